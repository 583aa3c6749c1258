"""A manifest as a compile of a small decoder leaves it."""

from __future__ import annotations

import pytest

from onnxslim_llm.artifact.manifest import (
    Artifact,
    Cost,
    Environment,
    FileEntry,
    Gate,
    LayerError,
    Manifest,
    PassEntry,
    Quality,
    SkippedSite,
    Source,
    Tool,
    Verify,
)

PASSES = ["fold_constants", "remove_dead_code", "deduplicate_weights", "quantize_weights", "lower_to_ort_cpu"]


@pytest.fixture
def manifest() -> Manifest:
    kinds = [("q", "attention"), ("k", "attention"), ("v", "attention"), ("o", "attention"), ("gate", "ffn")]
    kinds += [("up", "ffn"), ("down", "ffn")]
    layers = [LayerError(name="model.embed_tokens.weight", role="embedding", bits=4, relative_error=0.081)]
    layers += [
        LayerError(name=f"model.layers.{n}.{kind}_proj.weight", role=role, bits=4, relative_error=0.07 + 0.003 * n)
        for n in range(6)
        for kind, role in kinds
    ]
    roles = {"embedding": 4_194_304, "attention": 6_291_456, "ffn": 12_582_912, "norm": 13_312, "other": 2_048}
    return Manifest(
        tool=Tool(version="0.1.0"),
        created="2026-11-20T18:00:00Z",
        source=Source(
            path="models/sample/model.onnx",
            sha256="a" * 64,
            bytes=23_200_000,
            opset={"": 17},
            ops={"MatMul": 61, "Gather": 12, "Reshape": 48, "Shape": 30, "Softmax": 6},
            bytes_by_role=roles,
            weight_bytes=sum(roles.values()),
        ),
        artifact=Artifact(
            files=[
                FileEntry(path="model.onnx", bytes=90_000, sha256="b" * 64),
                FileEntry(path="model.onnx.data", bytes=3_400_000, sha256="c" * 64),
            ],
            carried=[FileEntry(path="tokenizer.json", bytes=120_000, sha256="d" * 64)],
            bytes=3_490_000,
            opset={"": 21, "com.microsoft": 1},
            ops={"MatMul": 12, "MatMulNBits": 43, "GatherBlockQuantized": 1, "Reshape": 24, "Softmax": 6},
            bytes_by_role={role: size // 7 for role, size in roles.items()},
        ),
        target="ort-cpu",
        recipe={"name": "int4", "gates": "int4", "passes": [{"name": name} for name in PASSES]},
        environment=Environment(
            python="3.11.2", onnxruntime="1.31.1", cpu_features=["avx2"], cpu="Some CPU", threads=2
        ),
        passes=[
            PassEntry(
                name=name,
                seconds=0.01 * 3**i,
                changed=i * 14,
                skipped_count=60 if i == 3 else 0,
                skipped=[SkippedSite(where=f"/norm/{n}", reason="one-dimensional") for n in range(50 if i == 3 else 0)],
                nodes=(300 - 40 * i, 260 - 40 * i),
                bytes=(23_000_000, 23_000_000 if i < 3 else 3_400_000),
            )
            for i, name in enumerate(PASSES)
        ],
        layers=layers,
        verify=Verify(
            inputs=["prefill", "left padding", "decode with cache"],
            max_abs=1.25,
            max_rel=0.3,
            sqnr_db=21.4,
            cosine=0.9962,
            kl_mean=0.0213,
            top1_agreement=0.931,
            gates=[
                Gate(name="kl_mean", limit=0.05, value=0.0213, ok=True),
                Gate(name="cosine", limit=0.98, value=0.9962, ok=True, comparison=">="),
            ],
        ),
        quality=Quality(tokens=51_200, ppl_source=4.211, ppl_artifact=4.262, kld_mean=0.019, kld_p99=0.21),
        cost=Cost(seconds=1.83, peak_rss_bytes=312_000_000, bytes_read=23_200_000, bytes_written=3_610_000),
        notes=["the embedding and the output layer share their weight"],
    )
