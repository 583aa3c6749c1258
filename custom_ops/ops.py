"""The operators of the domain ``onnxslim_llm.ops``: their schemas, and the library that ONNX Runtime loads them from.

===============  ==================================================================================================
MatMulPacked     Y = activate(A * B + (A * U) * V + bias) + residual; B is one packed weight, see :mod:`packed` and
                 :mod:`sparse`.
GatherPacked     Y = rows of the table [N, K] that is stored as the packed weight B [K, N].
EmptyNode        nothing: what a node costs beside its work.
===============  ==================================================================================================

``docs/custom-ops.md`` lists attributes and inputs. :func:`register_schemas` makes them known to the onnx package
(checker, shape inference); :func:`register` makes them known to a session.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx.defs import OpSchema

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "ACCURACIES",
    "ACTIVATIONS",
    "DOMAIN",
    "EXPANDS",
    "LIBRARY_NAME",
    "VERSION",
    "cmake_folder",
    "library_path",
    "register",
    "register_schemas",
    "schemas",
]

DOMAIN = "onnxslim_llm.ops"
VERSION = 1

ACCURACIES = ("exact", "bf16", "int8")
"""The least precision of a product, see ``matmul_reference.Accuracy``; "int8" is the default."""
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "silu_gate", "gelu_gate", "gelu_tanh_gate")
"""What follows a product, see ``matmul_reference.Activation``; "none" is the default."""

EXPANDS = ("auto", "load", "run")
"""What is done with a sparse weight. "load": it is expanded when the session opens, dense in memory and as fast as a
dense one. "run": it is expanded in every product, which takes the least memory. "auto" (the default): as "load", but
products of few rows read the sparse weight where that is faster on this machine."""

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY_NAME = f"libonnxslim_llm_ops{_SUFFIX}"
"""File name of the library, here and in artifacts that carry it."""


def library_path() -> Path | None:
    """The library's file; None where it was not built (no C++ compiler, or another platform)."""
    file = resources.files("onnxslim_llm.custom_ops") / LIBRARY_NAME
    return Path(str(file)) if file.is_file() else None


def cmake_folder() -> Path:
    """The value for CMake's onnxslim_llm_ops_DIR, so that find_package(onnxslim_llm_ops) works.

    Raises:
        RuntimeError: this installation has no compiled operators.
    """
    folder = resources.files("onnxslim_llm.custom_ops") / "cmake"
    if not folder.is_dir():
        raise RuntimeError("the operators of onnxslim-llm were not built here: install the wheel, with a C++ compiler")
    return Path(str(folder))


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Makes the operators known to the sessions that these options open; ONNX Runtime 1.17 or newer.

    Raises:
        RuntimeError: the library was not built here, or ONNX Runtime refuses it.
    """
    path = library_path()
    if path is None:
        raise RuntimeError(
            f"{LIBRARY_NAME} was not built here (no C++ compiler?): reinstall onnxslim-llm with one, "
            "or compile the model for the target ort-cpu"
        )
    session_options.register_custom_ops_library(str(path))


def _attribute(name: str, default: str, description: str) -> OpSchema.Attribute:
    return OpSchema.Attribute(name, onnx.helper.make_attribute(name, default), description)


def _packed_attributes() -> list[OpSchema.Attribute]:
    described = {
        "K": "Rows of the weight.",
        "N": "Columns of the weight.",
        "bits": "Width of a code: 2, 3, 4 or 8.",
        "block_size": "Rows that share a scale: 16, 32, 64, 128 or 256.",
    }
    return [OpSchema.Attribute(name, OpSchema.AttrType.INT, text) for name, text in described.items()]


def _formal(name: str, kind: str, text: str, optional: bool = False) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption.Optional if optional else OpSchema.FormalParameterOption.Single
    return OpSchema.FormalParameter(name, kind, text, param_option=option)


def schemas() -> tuple[OpSchema, ...]:
    """The schemas of all operators, each with its type and shape inference."""
    floats = ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Computed in.")
    matmul = OpSchema(
        "MatMulPacked",
        DOMAIN,
        VERSION,
        doc="Y = activate(A * B + (A * U) * V + bias) + residual.",
        inputs=[
            _formal("A", "T", "[..., K]"),
            _formal("B", "tensor(uint8)", "The packed or sparse weight [K, N]; an initializer."),
            _formal("bias", "T", "[N]", optional=True),
            _formal("residual", "T", "The shape of Y.", optional=True),
            _formal("U", "tensor(float)", "[K, rank]", optional=True),
            _formal("V", "tensor(float)", "[rank, N]", optional=True),
        ],
        outputs=[_formal("Y", "T", "[..., N], or [..., N / 2] with a gate.")],
        type_constraints=[floats],
        attributes=[
            *_packed_attributes(),
            _attribute("accuracy", "int8", f"The least precision: {', '.join(ACCURACIES)}."),
            _attribute("activation", "none", f"What follows: {', '.join(ACTIVATIONS)}."),
            _attribute("expand", "auto", f"When a sparse B is expanded: {', '.join(EXPANDS)}."),
        ],
    )
    matmul.set_type_and_shape_inference_function(_infer_matmul)
    gather = OpSchema(
        "GatherPacked",
        DOMAIN,
        VERSION,
        doc="Y = columns of B, that is rows of the table [N, K], at the indices; negative ones count from the end.",
        inputs=[
            _formal("B", "tensor(uint8)", "The packed weight [K, N]; an initializer."),
            _formal("indices", "tensor(int64)", "[...]"),
        ],
        outputs=[_formal("Y", "tensor(float)", "[..., K]")],
        attributes=_packed_attributes(),
    )
    gather.set_type_and_shape_inference_function(_infer_gather)
    empty = OpSchema(
        "EmptyNode",
        DOMAIN,
        VERSION,
        doc="Makes an output like X and writes nothing to it: for measuring.",
        inputs=[_formal("X", "tensor(float)", "")],
        outputs=[_formal("Y", "tensor(float)", "")],
        attributes=[OpSchema.Attribute("parallel", OpSchema.AttrType.INT, "1: wake up the session's threads.")],
    )
    return (matmul, gather, empty)


def register_schemas() -> None:
    """Makes the operators known to onnx.checker and onnx.shape_inference of this process; once is enough."""
    for schema in schemas():
        if not onnx.defs.has(schema.name, domain=DOMAIN):
            onnx.defs.register_schema(schema)


def _infer_matmul(context: onnx.shape_inference.InferenceContext) -> None:
    gated = _text(context, "activation").endswith("_gate")
    columns = _integer(context, "N")
    _infer_last_dimension(context, 0, columns // 2 if gated else columns, replace=True)


def _infer_gather(context: onnx.shape_inference.InferenceContext) -> None:
    _infer_last_dimension(context, 1, _integer(context, "K"), replace=False)


def _infer_last_dimension(
    context: onnx.shape_inference.InferenceContext, source: int, size: int, *, replace: bool
) -> None:
    found: onnx.TypeProto | None = context.get_input_type(source)
    if found is None:  # what makes the input is not known to onnx
        return
    made = onnx.TypeProto()
    made.tensor_type.elem_type = found.tensor_type.elem_type if replace else onnx.TensorProto.FLOAT
    if found.tensor_type.HasField("shape") and size > 0:
        dims = list(found.tensor_type.shape.dim)
        made.tensor_type.shape.dim.extend(dims[:-1] if replace else dims)
        made.tensor_type.shape.dim.add().dim_value = size
    context.set_output_type(0, made)


def _integer(context: onnx.shape_inference.InferenceContext, name: str) -> int:
    found = context.get_attribute(name)
    return int(found.i) if found is not None else 0


def _text(context: onnx.shape_inference.InferenceContext, name: str) -> str:
    found = context.get_attribute(name)
    return found.s.decode() if found is not None else ""
