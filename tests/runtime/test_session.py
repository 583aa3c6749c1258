from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import parser

from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.runtime.session import inputs_of, open_session, outputs_of

HEAD = '<ir_version: 9, opset_import: ["": 18, "com.unknown": 1]> '


def model(text: str) -> onnx.ModelProto:
    return parser.parse_model(HEAD + text)


def test_runs_by_name_and_selects_outputs() -> None:
    session = open_session(model("g (float[N] x) => (float[N] y, float[N] z) { y = Neg(x) z = Abs(y) }"))
    out = session.run({"x": np.array([1.0, -2.0], np.float32)}, ["z"])
    assert list(out) == ["z"]
    assert out["z"].tolist() == [1.0, 2.0]


def test_bfloat16_goes_in_and_comes_out() -> None:
    session = open_session(model("g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }"))
    x = np.array([1.5, -2.25, 0.0], ml_dtypes.bfloat16)
    y = session.run({"x": x})["y"]
    assert session.run({"x": x[:0]})["y"].shape == (0,)
    assert y.dtype == ml_dtypes.bfloat16
    assert y.tolist() == x.tolist()
    assert session.inputs[0].dtype == np.dtype(ml_dtypes.bfloat16)


def test_strings_run() -> None:
    session = open_session(model("g (string[N] x) => (string[N] y) { y = Identity(x) }"))
    assert session.run({"x": np.array(["a", "bc"], object)})["y"].tolist() == ["a", "bc"]


def test_signature_from_proto_equals_the_session() -> None:
    proto = model("g (float16[B, 3] x, bool m, int64[A] i) => (float16[B, 3] y) { y = Where(m, x, x) }")
    session = open_session(proto)
    assert [(i.name, i.dtype, i.shape) for i in inputs_of(proto)] == [
        (i.name, i.dtype, i.shape) for i in inputs_of(session)
    ]
    assert outputs_of(proto)[0].shape == ("B", 3)


def test_inputs_with_a_default_are_left_out() -> None:
    proto = model("g (float[N] x, float[1] w) => (float[N] y) { y = Add(x, w) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "w"))
    assert [i.name for i in inputs_of(proto)] == ["x"]
    assert [i.name for i in open_session(proto).inputs] == ["x"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("g (float[N] x) => (float[N] y) { [bad] y = com.unknown.Twirl(x) }", "Twirl"),
        ("g (float[N] x) => (float[N] y) { [bad] y = Twirl(x) }", "Twirl 'bad'"),
        ("g (bool[N] x) => (bool[N] y) { [bad] y = Sin(x) }", "Sin 'bad'"),
    ],
)
def test_a_model_that_cannot_open_names_the_operator(text: str, named: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_session(model(text))
    assert named in caught.value.where
    assert "onnxruntime_src" not in str(caught.value)


def test_a_failing_node_is_named() -> None:
    session = open_session(model("g (float[A] x, int64[B] s) => (float[C, D] y) { [reshape_it] y = Reshape(x, s) }"))
    with pytest.raises(ModelError, match="cannot be reshaped") as caught:
        session.run({"x": np.ones(6, np.float32), "s": np.array([5, 5])})
    assert caught.value.where.startswith("Reshape 'reshape_it'")


def test_wrong_feeds_are_model_errors() -> None:
    session = open_session(model("g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }"))
    with pytest.raises(ModelError, match="inputs are missing: x"):
        session.run({})
    with pytest.raises(ModelError, match="invalid dimensions"):
        session.run({"x": np.ones((2, 4), np.float32)})
    with pytest.raises(ModelError, match="data type"):
        session.run({"x": np.ones((2, 3), np.float64)})


def test_memory_that_runs_out_is_a_resource_error() -> None:
    session = open_session(model("g (int64[1] n) => (float[N] y) { [huge] y = ConstantOfShape(n) }"))
    with pytest.raises(ResourceError) as caught:
        session.run({"n": np.array([1 << 45])})
    assert "huge" in caught.value.where


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file"):
        open_session(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no protobuf" * 9)
    with pytest.raises(ModelError, match="cannot open") as caught:
        open_session(broken)
    assert str(broken) in caught.value.where


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    proto = model("g (float[N] x) => (float[N] y) { y = Add(x, w) }")
    tensor = proto.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="gone.bin")
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError) as caught:
        open_session(tmp_path / "m.onnx")
    assert "gone.bin" in str(caught.value)


def test_external_data_of_a_proto_is_found_in_base_dir(tmp_path: Path) -> None:
    proto = model("g (float[N] x) => (float[N] y) { y = Add(x, w) }")
    (tmp_path / "w.bin").write_bytes(np.array([2.0], "<f4").tobytes())
    tensor = proto.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    session = open_session(proto, base_dir=tmp_path, optimise=False)
    assert session.run({"x": np.ones(2, np.float32)})["y"].tolist() == [3.0, 3.0]


def test_a_refused_config_entry_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="refuses the session option"):
        open_session(model("g (float[N] x) => (float[N] y) { y = Neg(x) }"), config={"": "1"})


def test_optimise_decides_the_optimisation_level() -> None:
    proto = model("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    options = [open_session(proto, optimise=on, threads=1).inference.get_session_options() for on in (False, True)]
    assert [o.graph_optimization_level.name for o in options] == ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"]
    assert [o.enable_cpu_mem_arena for o in options] == [False, True]
    assert [o.intra_op_num_threads for o in options] == [1, 1]
