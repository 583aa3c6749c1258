"""Bad input: a clear error that names what is wrong and where, never a traceback of something else."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from ir_samples import kitchen_sink, linear, same, text, write_external
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.errors import ModelError, ResourceError, SlimError, UsageError
from onnxslim_llm.ir.model import from_proto, open_model
from onnxslim_llm.ir.proto.external import resolve_model_path

VALUES = np.arange(1024, dtype=np.float32)
RAW = VALUES.tobytes()
TEXT = '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[N] y) {{ {} }}'


def fails(path: Path, what: str, where: str = "", kind: type[SlimError] = ModelError) -> None:
    with pytest.raises(kind) as caught:
        open_model(path)
    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.where
    assert caught.value.todo


def write(path: Path, model: onnx.ModelProto | bytes) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


# --- files ---


def test_no_file(tmp_path):
    fails(tmp_path / "nothing.onnx", "no such file", "nothing.onnx", UsageError)


def test_empty_file(tmp_path):
    fails(write(tmp_path / "m.onnx", b""), "the file is empty", "m.onnx")


def test_lfs_pointer(tmp_path):
    fails(
        write(tmp_path / "m.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS", "m.onnx"
    )


@pytest.mark.parametrize(
    "content", [b"hello, I am a text file\n" * 100, b"PK\x03\x04" + bytes(1000), b"\x7fELF" + bytes(100), b"{}"]
)
def test_other_files(content, tmp_path):
    fails(write(tmp_path / "m.onnx", content), "no", "m.onnx")


def test_a_message_without_a_graph(tmp_path):
    fails(write(tmp_path / "m.onnx", onnx.ModelProto(ir_version=9, producer_name="x")), "no graph", "m.onnx")


def test_no_read_permission(tmp_path):
    path = write(tmp_path / "m.onnx", linear(VALUES))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")
    fails(path, "cannot read", "m.onnx", ResourceError)


def test_truncated_at_any_byte(tmp_path):
    content = kitchen_sink().SerializeToString()
    path = tmp_path / "m.onnx"
    for length in sorted({*range(1, 300), *range(300, len(content), 7), len(content) - 1}):
        path.write_bytes(content[:length])
        try:
            model = open_model(path)
        except ModelError:
            continue
        else:
            # Only a cut between two fields of the outermost message leaves a model that can be read.
            assert content.startswith(onnx.load(path).SerializeToString())
            assert same(model.to_proto(), onnx.load(path)) or model.notes


def test_flipped_bytes_never_escape_as_other_errors(tmp_path):
    rng = random.Random(0)
    proto = kitchen_sink()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(2000, np.float32), "big"))
    content = proto.SerializeToString()
    path = tmp_path / "m.onnx"
    opened = 0
    for _ in range(500):
        broken = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            # The large tensor's zeros say nothing: hit the rest.
            broken[rng.randrange(len(content) - 8100 if rng.random() < 0.9 else len(content))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            model = open_model(path)
            model.to_proto()
            opened += 1
        except SlimError:
            continue
    assert 0 < opened < 500


def test_folders(tmp_path):
    model = linear(VALUES)
    fails(tmp_path, "no .onnx file", str(tmp_path), UsageError)
    only = write(tmp_path / "model.onnx", model)
    assert resolve_model_path(tmp_path) == only
    assert open_model(tmp_path).path == only
    encoder = write(tmp_path / "encoder_model.onnx", model)
    fails(tmp_path, "several models: encoder_model.onnx, model.onnx", str(tmp_path), UsageError)
    decoder = write(tmp_path / "decoder_model.onnx", model)
    assert resolve_model_path(tmp_path) == decoder
    write(tmp_path / "decoder_with_past_model.onnx", model)
    fails(tmp_path, "several models", str(tmp_path), UsageError)
    assert resolve_model_path(str(encoder)) == encoder
    nested = tmp_path / "repository"
    (nested / "onnx").mkdir(parents=True)
    inner = write(nested / "onnx" / "model.onnx", model)
    assert resolve_model_path(nested) == inner


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    fails(tmp_path / "pipe.onnx", "not a regular file", "pipe.onnx", UsageError)


# --- graphs ---


@pytest.mark.parametrize(
    ("body", "what", "where"),
    [
        ("a = Add (x, c)  b = Neg (a)  c = Abs (b)  y = Neg (c)", "a cycle of 3 nodes", "node (Add) that makes 'a'"),
        ("y = Add (x, y)", "a cycle of 1 nodes", "makes 'y'"),
        ("y = Add (x, ghost)", "tensor 'ghost' is never produced", "node (Add) that makes 'y'"),
        ("h = Neg (x)", "tensor 'y' is never produced", "a graph output"),
        ("y = Neg (x)  y = Abs (x)", "tensor 'y' is produced more than once", "node (Abs) that makes 'y'"),
        ("y, y = Split (x)", "tensor 'y' is produced more than once", "Split"),
        ("x = Neg (x)  y = Abs (x)", "tensor 'x' is produced more than once", "Neg"),
    ],
)
def test_broken_graphs(body, what, where, tmp_path):
    fails(write(tmp_path / "m.onnx", text(TEXT.format(body))), what, where)


def test_named_nodes_are_named(tmp_path):
    proto = text(TEXT.format("y = Add (x, ghost)"))
    proto.graph.node[0].name = "the/node"
    fails(write(tmp_path / "m.onnx", proto), "'ghost'", "node 'the/node' (Add)")


def test_cycle_through_a_subgraph(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20]> g (bool c, float x) => (float y) {
        h = Add (x, y)
        y = If (c) <then_branch = t () => (float a) { a = Neg (h) }, else_branch = e () => (float b) { b = Abs (x) }>
        }"""
    )
    fails(write(tmp_path / "m.onnx", proto), "a cycle of 2 nodes", "makes 'h'")


def test_missing_name_inside_a_subgraph(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20]> g (bool c, float x) => (float y) {
        y = If (c) <then_branch = t () => (float a) { h = Neg (x)  a = Neg (h) },
                    else_branch = e () => (float b) { b = Abs (h) }>
        }"""
    )
    fails(write(tmp_path / "m.onnx", proto), "tensor 'h' is never produced", "makes 'b'")


def test_functions_see_nothing_of_the_graph(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20, "d" : 1]> g (float x) => (float y) { y = d.F (x) }
        <domain: "d", opset_import: ["" : 20]> F (a) => (b) { b = Add (a, x) }"""
    )
    fails(write(tmp_path / "m.onnx", proto), "tensor 'x' is never produced", "makes 'b'")
    proto.functions[0].node[0].input[1] = "a"
    proto.functions[0].output[0] = "nothing"
    fails(write(tmp_path / "m.onnx", proto), "tensor 'nothing' is never produced", "function 'd::F'")


@pytest.mark.parametrize("field", ["initializer", "input"])
def test_a_name_given_twice(field, tmp_path):
    proto = text(TEXT.format("y = Add (x, w)"))
    for _ in range(2):
        if field == "initializer":
            proto.graph.initializer.append(numpy_helper.from_array(VALUES[:1], "w"))
        else:
            proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [1]))
    fails(write(tmp_path / "m.onnx", proto), "tensor 'w' is produced more than once", field)


def test_attribute_given_twice(tmp_path):
    proto = text(TEXT.format("y = Softmax <axis = 0, axis = 1> (x)"))
    fails(write(tmp_path / "m.onnx", proto), "attribute 'axis' is given twice", "Softmax")


def test_names_that_are_no_text(tmp_path):
    content = linear(VALUES).SerializeToString().replace(b"Identity", b"Ident\xff\xfey")
    fails(write(tmp_path / "m.onnx", content), "not UTF-8: field 'op_type' of NodeProto", "m.onnx")


# --- opsets and operators ---


def test_opsets_that_do_not_exist(tmp_path):
    for version, what in ((999, "opset 999 of ai.onnx is unknown"), (0, "opset 0 of ai.onnx does not exist")):
        proto = text(TEXT.format("y = Neg (x)"))
        proto.opset_import[0].version = version
        fails(write(tmp_path / "m.onnx", proto), what, "m.onnx")


def test_opset_of_a_function(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20, "d" : 1]> g (float x) => (float y) { y = d.F (x) }
        <domain: "d", opset_import: ["" : 999]> F (a) => (b) { b = Neg (a) }"""
    )
    fails(write(tmp_path / "m.onnx", proto), "opset 999", "function 'd::F'")


def test_no_opset(tmp_path):
    proto = text(TEXT.format("y = Neg (x)"))
    del proto.opset_import[:]
    fails(write(tmp_path / "m.onnx", proto), "does not say its opset", "m.onnx")


def test_unknown_operators_are_kept_and_listed(tmp_path):
    proto = text(
        """<ir_version: 10, opset_import: ["" : 20, "d" : 1, "com.microsoft" : 1]> g (float x) => (float y)
        { a = Nonsense (x)  b = d.F (a)  c = d.G (b)  e = com.microsoft.Gelu (c)  y = Neg (e) }
        <domain: "d", opset_import: ["" : 20]> F (a) => (b) { b = Unheard (a) }"""
    )
    model = open_model(write(tmp_path / "m.onnx", proto))
    assert model.unknown_ops() == ["Nonsense", "Unheard", "com.microsoft::Gelu", "d::G"]
    assert same(model.to_proto(), proto)


# --- tensors ---


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.dims.append(2), "4096 bytes, 8192 wanted"),
        (lambda t: t.dims.__setitem__(0, -1), "negative dimension, none wanted"),
        (lambda t: setattr(t, "raw_data", RAW[:100]), "100 bytes, 4096 wanted"),
        (lambda t: (t.ClearField("raw_data"), t.float_data.extend([1, 2])), "2 values in float_data, 1024 wanted"),
        (lambda t: t.ClearField("raw_data"), "0 values in float_data"),
    ],
)
def test_inline_tensors_that_do_not_fit(change, what, tmp_path):
    proto = linear(VALUES, "the weight")
    change(proto.graph.initializer[0])
    fails(write(tmp_path / "m.onnx", proto), what, "tensor 'the weight'")


@pytest.mark.parametrize("onnx_type", [TensorProto.INT4, TensorProto.UINT2, TensorProto.COMPLEX64, TensorProto.STRING])
def test_typed_tensors_that_do_not_fit(onnx_type, tmp_path):
    tensor = TensorProto(name="w", data_type=onnx_type, dims=[9])
    tensor.string_data.extend([b"a"] * 3)
    tensor.int32_data.extend([1] * 2)
    tensor.float_data.extend([1] * 9)
    fails(write(tmp_path / "m.onnx", linear(tensor)), "does not fit its shape", "tensor 'w'")


def test_unknown_element_types_are_kept(tmp_path):
    tensor = TensorProto(name="w", data_type=123, dims=[2], raw_data=b"12345")
    proto = linear(tensor)
    model = open_model(write(tmp_path / "m.onnx", proto))
    assert same(model.to_proto(), proto)
    with pytest.raises(ModelError, match=r"(?s)unreadable tensor.*'w'"):
        _ = model.graph.nodes[0].inputs[0].values


def test_zero_size_tensors(tmp_path):
    proto = linear(np.zeros((0, 4), np.float32))
    model = open_model(write(tmp_path / "m.onnx", proto))
    assert model.graph.nodes[0].inputs[0].values.shape == (0, 4)
    path = write_external(proto, tmp_path, b"", {"location": "w.bin", "length": "0"})
    assert open_model(path).graph.nodes[0].inputs[0].values.shape == (0, 4)


# --- external data ---


@pytest.mark.parametrize(
    ("entries", "data", "what"),
    [
        ({"location": "gone.bin"}, RAW, "cannot be opened: No such file"),
        ({}, RAW, "without a location"),
        ({"location": "w.bin"}, RAW[:-1], "too short: bytes 0 to 4096 wanted, the file has 4095"),
        ({"location": "w.bin", "offset": "4"}, RAW, "too short: bytes 4 to 4100"),
        ({"location": "w.bin", "offset": "99999999999999999999"}, RAW, "too short"),
        ({"location": "w.bin", "offset": "-4"}, RAW, "offset '-4' is no non-negative number"),
        ({"location": "w.bin", "offset": "four"}, RAW, "offset 'four'"),
        ({"location": "w.bin", "length": "1e3"}, RAW, "length '1e3'"),
        ({"location": "w.bin", "length": "4095"}, RAW, "length 4095 does not fit FLOAT [1024], which takes 4096 bytes"),
        ({"location": "w.bin", "length": "8192"}, RAW * 2, "length 8192 does not fit"),
        ({"location": "."}, RAW, "not a regular file"),
        ({"location": "w.bin/x"}, RAW, "cannot be opened"),
    ],
)
def test_broken_external_data(entries, data, what, tmp_path):
    path = write_external(linear(VALUES, "the weight"), tmp_path, data, entries)
    fails(path, what, "tensor 'the weight'")
    with pytest.raises(ModelError) as caught:
        open_model(path)
    assert entries.get("location", "") in caught.value.where


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../outside.bin",
        "sub/../../outside.bin",
        "link.bin",
        "folder/outside.bin",
        "C:\\x",
        "\\\\host\\x",
    ],
)
def test_locations_outside_of_the_folder_are_refused(location, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    (tmp_path / "outside.bin").write_bytes(RAW)
    (folder / "link.bin").symlink_to("../outside.bin")
    (folder / "folder").symlink_to("..")
    path = write_external(linear(VALUES, "the weight"), folder, RAW, {"location": location})
    fails(path, "outside of the model's folder is refused", "tensor 'the weight'")


def test_locations_inside_of_the_folder_are_fine(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "link.bin").symlink_to("w.bin")
    (tmp_path / "way").symlink_to(folder)
    for location in ("w.bin", "./w.bin", "sub/../w.bin", "link.bin", "sub/deep/../../w.bin"):
        write_external(linear(VALUES), folder, RAW, {"location": location})
        for path in (folder / "model.onnx", tmp_path / "way" / "model.onnx"):
            monkeypatch.chdir("/")
            assert np.array_equal(open_model(path).graph.nodes[0].inputs[0].values, VALUES)
    # The folder of the model counts, never the working directory.
    monkeypatch.chdir(folder)
    model = open_model("model.onnx")
    monkeypatch.chdir("/")
    assert np.array_equal(model.graph.nodes[0].inputs[0].values, VALUES)


def test_the_cache_of_the_hugging_face_hub(tmp_path):
    # snapshots/<revision>/name -> ../../blobs/<hash>, for the model and for its data.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_external(linear(VALUES), blobs, RAW, {"location": "w.bin"}).rename(blobs / "1234")
    (blobs / "w.bin").rename(blobs / "5678")
    (snapshot / "model.onnx").symlink_to("../../blobs/1234")
    (snapshot / "w.bin").symlink_to("../../blobs/5678")
    assert np.array_equal(open_model(snapshot).graph.nodes[0].inputs[0].values, VALUES)
    (tmp_path / "secret").write_bytes(RAW)
    (snapshot / "w.bin").unlink()
    (snapshot / "w.bin").symlink_to("../../secret")
    fails(snapshot / "model.onnx", "outside of the model's folder", "tensor 'w'")
    write_external(linear(VALUES), blobs, RAW, {"location": "../../blobs/5678"}).rename(blobs / "1234")
    fails(snapshot / "model.onnx", "outside of the model's folder", "tensor 'w'")


def test_strings_cannot_be_external(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.STRING, dims=[2])
    path = write_external(linear(tensor), tmp_path, b"abcd", {"location": "w.bin"})
    fails(path, "string tensors cannot be stored externally", "tensor 'w'")


def test_external_data_of_a_proto_without_folder():
    proto = linear(VALUES, "the weight")
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    proto.graph.initializer[0].external_data.add(key="location", value="w.bin")
    with pytest.raises(ModelError, match=r"(?s)not known in which folder.*'the weight'"):
        from_proto(proto)


def test_sparse_indices_outside_of_the_tensor(tmp_path):
    proto = linear(np.zeros((2, 2), np.float32), "s")
    del proto.graph.initializer[:]
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.array([4], np.int64))
    proto.graph.sparse_initializer.add().CopyFrom(helper.make_sparse_tensor(values, indices, [2, 2]))
    model = open_model(write(tmp_path / "m.onnx", proto))
    with pytest.raises(ModelError, match=r"(?s)bad indices.*tensor 's'"):
        _ = model.graph.nodes[0].inputs[0].values
