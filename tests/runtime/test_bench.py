from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser
from reference_decoder import DecoderSpec, write

from onnxslim_llm.errors import ModelError, UsageError
from onnxslim_llm.runtime.bench import bench
from onnxslim_llm.runtime.bench_worker import peak_rss


def test_two_decoders_interleaved(tmp_path: Path) -> None:
    a = write(DecoderSpec(), tmp_path / "a.onnx")
    b = write(DecoderSpec(cache=False), tmp_path / "b.onnx")
    told: list[tuple[int, int]] = []
    report = bench(
        [a, b], prompt_tokens=16, new_tokens=4, repeats=2, threads=1, progress=lambda d, t: told.append((d, t))
    )
    assert [r.model for r in report.results] == [str(a), str(b)]
    for result in report.results:
        path = Path(result.model)
        assert result.file_bytes == path.stat().st_size + path.with_name(path.name + ".data").stat().st_size
        assert {name: len(values) for name, values in result.samples.items()} == {"load": 2, "prefill": 2, "decode": 2}
        assert min(v for values in result.samples.values() for v in values) > 0
        assert result.prefill_tokens_per_second == pytest.approx(16 / np.median(result.samples["prefill"]))
        assert result.decode_tokens_per_second == pytest.approx(4 / np.median(result.samples["decode"]))
        assert result.run_seconds is None
        assert result.peak_rss_bytes > 20 << 20  # a Python with onnxruntime is above this
    assert told[-1] == (10, 10)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert json.loads(json.dumps(report.to_json()))["threads"] == 1


def test_peak_memory_is_the_models_own(tmp_path: Path) -> None:
    """A parent of any size must not show in the figure: ru_maxrss would start with the parent's."""
    path = write(DecoderSpec(), tmp_path / "a.onnx")
    ballast = np.ones(600 << 17)  # 600 MiB
    result = bench([path], prompt_tokens=4, new_tokens=1, repeats=1, threads=1).results[0]
    assert peak_rss() > ballast.nbytes > result.peak_rss_bytes


def test_another_model_is_timed_by_runs(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }'
    )
    onnx.save(proto, tmp_path / "m.onnx")
    result = bench([tmp_path / "m.onnx"], prompt_tokens=4, new_tokens=1, repeats=2, threads=1).results[0]
    assert result.prefill_tokens_per_second is None
    assert result.decode_tokens_per_second is None
    assert result.run_seconds
    assert len(result.samples["run"]) == 2


def test_errors_of_the_measuring_process_arrive(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot open") as caught:
        bench([tmp_path / "broken.onnx"], repeats=1)
    assert "broken.onnx" in caught.value.where


def test_a_prompt_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    path = write(DecoderSpec(cache=False), tmp_path / "a.onnx")
    proto = onnx.load(path, load_external_data=False)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="at most 8 tokens"):
        bench([path], prompt_tokens=9, new_tokens=1, repeats=1, threads=1)


@pytest.mark.parametrize("options", [{"repeats": 0}, {"prompt_tokens": 0}, {"new_tokens": 0}])
def test_senseless_numbers_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        bench(["any.onnx"], **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        bench([])
