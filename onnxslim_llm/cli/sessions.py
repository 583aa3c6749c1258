"""Opening a model the way it is meant to run: an artifact by its own target, any other model by plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxslim_llm.runtime.decoder import DecoderRunner
    from onnxslim_llm.runtime.session import Session
    from onnxslim_llm.runtime.static_pair import StaticPair

__all__ = ["open_as_meant", "open_decoder"]


def open_as_meant(path: Path, *, threads: int = 0) -> Session:
    """Open the .onnx file `path`.

    Raises:
        ModelError: It cannot be opened, or the manifest beside it is none.
        ResourceError: Its runtime is not installed.
    """
    from onnxslim_llm.artifact.manifest import MANIFEST_NAME, read_manifest
    from onnxslim_llm.runtime.session import open_session

    manifest = path.parent / MANIFEST_NAME
    if manifest.is_file():
        from onnxslim_llm.targets import get_target

        return get_target(read_manifest(manifest).target).open(path, threads=threads)
    return open_session(path, threads=threads)


def open_decoder(path: Path, *, threads: int = 0) -> DecoderRunner | StaticPair:
    """Open a decoder, ready to be fed: with both of its graphs, if it has a pair of them.

    Raises:
        ModelError: The model is no decoder; and as `open_as_meant`.
    """
    from onnxslim_llm.artifact.manifest import MANIFEST_NAME, read_manifest
    from onnxslim_llm.runtime.decoder import DecoderRunner

    manifest = path.parent / MANIFEST_NAME
    graphs = read_manifest(manifest).graphs if manifest.is_file() else []
    if len(graphs) > 1 and path.name in {graph.path for graph in graphs}:
        from onnxslim_llm.runtime.static_pair import StaticPair

        prefill, decode = (open_as_meant(path.parent / graph.path, threads=threads) for graph in graphs)
        return StaticPair(prefill, decode)
    return DecoderRunner(open_as_meant(path, threads=threads))
