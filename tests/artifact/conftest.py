"""Small artifacts to publish: real manifests, real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onnxslim_llm.artifact.environment import read_environment
from onnxslim_llm.artifact.hashing import hash_files
from onnxslim_llm.artifact.manifest import (
    MANIFEST_NAME,
    Artifact,
    Cost,
    Gate,
    Manifest,
    PassEntry,
    SkippedSite,
    Source,
    Tool,
    Verify,
    created_now,
)

Fill = Callable[[Path, int], Manifest]


def fill_artifact(folder: Path, version: int) -> Manifest:
    """Write two files that both tell `version`, and their manifest, into `folder`."""
    (folder / "model.onnx").write_bytes(b"graph %d" % version)
    (folder / "model.onnx.data").write_bytes(b"%d" % version * 5000)
    files = hash_files(folder, ["model.onnx", "model.onnx.data"])
    manifest = Manifest(
        tool=Tool(version="0.1.0"),
        created=created_now(),
        source=Source(path="model.onnx", sha256="0" * 64, bytes=40_000, opset={"": 21}, ops={"MatMul": 2}),
        artifact=Artifact(files=files, bytes=sum(f.bytes for f in files), opset={"": 21}, ops={"MatMulNBits": 2}),
        target="ort-cpu",
        recipe={"name": "int4", "version": version},
        environment=read_environment(threads=2),
        passes=[
            PassEntry(
                name="quantize_weights",
                seconds=0.5,
                changed=2,
                skipped_count=1,
                skipped=[SkippedSite(where="/norm", reason="one-dimensional")],
                nodes=(4, 4),
                bytes=(40_000, 5_000),
            )
        ],
        verify=Verify(
            inputs=["decode"],
            sqnr_db=float("inf"),
            gates=[Gate(name="cosine", limit=0.99, value=0.5, ok=False, comparison=">=")],
        ),
        cost=Cost(seconds=1.0, peak_rss_bytes=10_000, bytes_read=40_000, bytes_written=5_000),
    )
    manifest.write(folder / MANIFEST_NAME)
    return manifest


@pytest.fixture
def fill() -> Fill:
    return fill_artifact
