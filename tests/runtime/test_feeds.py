from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import parser
from reference_decoder import DecoderSpec, build

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.feeds import index_bounds, random_feeds, sizes_of
from onnxslim_llm.runtime.session import TensorInfo


def info(name: str, dtype: object, *shape: int | str | None) -> TensorInfo:
    return TensorInfo(name, None if dtype is None else np.dtype(dtype), shape, str(dtype))  # type: ignore[call-overload]


def feeds(*infos: TensorInfo, **options: object) -> dict[str, np.ndarray]:
    sizes = sizes_of(infos, batch=3, length=5)
    return random_feeds(infos, sizes, np.random.default_rng(0), **options)  # type: ignore[arg-type]


def test_named_dimensions_agree_and_sums_follow_their_parts() -> None:
    made = feeds(
        info("a", np.float32, "batch_size", "seq"),
        info("b", np.float32, "N", "past", 4),
        info("c", np.float32, "batch_size", "past + seq", "seq+1"),
    )
    assert made["a"].shape == (3, 5)
    assert made["b"].shape == (3, 5, 4)
    assert made["c"].shape == (3, 10, 6)


def test_unnamed_dimensions() -> None:
    made = feeds(info("a", np.float32, None, None, 2), info("s", np.float32), batch=2, length=7)
    assert made["a"].shape == (2, 7, 2)
    assert made["s"].shape == ()


def test_values_by_meaning() -> None:
    made = feeds(
        info("attention_mask", np.int64, "batch", "seq"),
        info("bool_mask", np.bool_, "batch", "seq"),
        info("token_type_ids", np.int64, "batch", "seq"),
        info("position_ids", np.int32, "batch", "seq"),
        info("indices", np.int64, "batch", "seq"),
        info("pixels", np.uint8, "batch", 64),
        info("quantized", np.int8, "batch", 64),
        info("flags", np.bool_, "batch", 64),
        info("half", np.float16, "batch", 4),
        info("brain", ml_dtypes.bfloat16, "batch", 4),
    )
    assert made["attention_mask"].all()
    assert made["bool_mask"].dtype == bool
    assert made["bool_mask"].all()
    assert not made["token_type_ids"].any()
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert set(made["indices"].ravel()) <= {0, 1}
    assert made["pixels"].max() > 127
    assert made["quantized"].min() < 0 < made["quantized"].max()
    assert 0 < made["flags"].sum() < made["flags"].size
    assert made["half"].dtype == np.float16
    assert made["brain"].dtype == ml_dtypes.bfloat16


def test_bounds_are_respected() -> None:
    made = feeds(info("i", np.int64, "batch", 1000), info("positions", np.int64, 1, 9), bounds={"i": 7, "positions": 4})
    assert set(made["i"].ravel()) == set(range(7))
    assert made["positions"].max() == 3


def test_same_seed_same_values() -> None:
    inputs = info("a", np.float32, "batch", 4)
    assert np.array_equal(feeds(inputs)["a"], feeds(inputs)["a"])


@pytest.mark.parametrize("dtype", [None, np.str_])
def test_impossible_types_name_the_input(dtype: object) -> None:
    with pytest.raises(ModelError) as caught:
        feeds(info("words", dtype, 2))
    assert caught.value.where == "words"
    assert "--calib" in caught.value.todo


def test_bounds_of_a_decoder_are_its_vocabulary() -> None:
    assert index_bounds(build(DecoderSpec(vocab=99))) == {"input_ids": 99}


def test_bounds_through_casts_and_quantized_tables() -> None:
    proto = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (int32[N] ids, int64[N] other, float[4] given) => '
        "(float[N, 3] y, float[N] z, float[N] u) {"
        "  wide = Cast<to=7>(ids) deep = Unsqueeze(wide, zero) flat = Squeeze(deep, zero)"
        "  real = DequantizeLinear(table, scale) y = Gather<axis=0>(real, flat)"
        "  row = Gather<axis=1>(small, other) z = Squeeze(row, zero) u = Gather<axis=0>(given, other) }"
    )
    arrays = {
        "zero": np.array([0]),
        "table": np.zeros((12, 3), np.uint8),
        "scale": np.array(1, np.float32),
        "small": np.zeros((1, 5), np.float32),
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    assert index_bounds(proto) == {"ids": 12, "other": 5}


def test_bounds_of_packed_tables() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "onnxslim_llm.ops" : 1]>
        g (int64[n] ids) => (float[n, 70] y) {
            y = onnxslim_llm.ops.GatherPacked <K = 70, N = 33, bits = 4, block_size = 32> (B, ids)
        }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(5000, np.uint8), "B"))
    assert index_bounds(proto) == {"ids": 33}
