"""Open and run a model in ONNX Runtime, with every failure turned into an error that names the node.

onnxruntime is imported on first use: a compile without verification never loads it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx

from onnxslim_llm.custom_ops import ops
from onnxslim_llm.errors import ModelError, ResourceError, UsageError
from onnxslim_llm.runtime.containers import CONTAINERS, flat_values
from onnxslim_llm.runtime.ort_errors import UNREGISTERED, ort_errors

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["Session", "TensorInfo", "inputs_of", "open_session", "open_with_options", "outputs_of"]

Dim = int | str | None
Array = np.ndarray[Any, np.dtype[Any]]

# ORT's own log repeats what its exceptions say; only fatal messages are let through to stderr.
_LOG_FATAL = 4

_ORT_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.str_,
}

# Threads that wait without burning a core. Two sessions at once, or any other work on the machine, make spinning
# threads wait for each other: a verification beside two busy processes took 38 s with and 1.7 s without.
_SHARED_MACHINE = {"session.intra_op.allow_spinning": "0"}


@dataclass(frozen=True)
class TensorInfo:
    """Name, element type and dimensions of a graph input or output.

    Attributes:
        dtype: numpy type, or None for a type without one (sequences, maps, sub-byte integers).
        shape: one entry a dimension: its size, its symbolic name or None if unknown; None if the rank is unknown.
        kind: the type as ONNX Runtime writes it, for messages.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[Dim, ...] | None
    kind: str = ""

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None if unknown."""
        return None if self.shape is None else len(self.shape)


class Session:
    """An open ONNX Runtime session that speaks numpy and `SlimError`.

    Args:
        inference: the onnxruntime InferenceSession, for example one that a target has opened.
        where: file or label of the model, for messages.
        around: entered during each run, for providers that print.
    """

    def __init__(
        self,
        inference: ort.InferenceSession,
        where: str = "",
        *,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.inference = inference
        self._around = around
        self.where = where
        self.inputs = tuple(_from_node_arg(arg) for arg in inference.get_inputs())
        self.outputs = tuple(_from_node_arg(arg) for arg in inference.get_outputs())
        self._containers = frozenset(info.name for info in self.outputs if info.kind.startswith(CONTAINERS))
        self._dtypes = {info.name: info.dtype for info in (*self.inputs, *self.outputs)}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once; returns arrays by output name (all outputs by default).

        Of an output that is a sequence or a map, such as the probabilities that scikit-learn's converters give, the
        values come as one vector.

        Raises:
            ModelError: ONNX Runtime refused the inputs or a node failed; the node is named.
            ResourceError: memory ran out.
        """
        names = [info.name for info in self.outputs] if outputs is None else list(outputs)
        strings = any(array.dtype.kind in "OUS" for array in feeds.values())  # OrtValues hold none from numpy
        if strings or not self._containers.isdisjoint(names):
            with ort_errors(self.where, "run"):
                values = self.inference.run(names, dict(feeds))
            return {name: flat_values(value) for name, value in zip(names, values, strict=True)}
        tensors = self.run_values({name: self.value(array) for name, array in feeds.items()}, outputs)
        return {name: self.array(tensor) for name, tensor in tensors.items()}

    def run_values(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """As `run`, on OrtValues: no copies, and types that numpy lacks (a bfloat16 cache) pass through."""
        names = [info.name for info in self.outputs] if outputs is None else list(outputs)
        missing = [info.name for info in self.inputs if info.name not in feeds]
        if missing:
            raise ModelError(f"inputs are missing: {', '.join(missing)}", where=self.where)
        with ort_errors(self.where, "run"), self._around():
            return dict(zip(names, self.inference.run_with_ort_values(names, dict(feeds)), strict=True))

    def run_in_place(
        self, feeds: Mapping[str, Any], outputs: Sequence[str], buffers: Mapping[str, tuple[str, Any]]
    ) -> dict[str, Any]:
        """As `run_values`, with outputs that are written where inputs are read.

        Args:
            feeds: OrtValues of the other inputs.
            outputs: names of the outputs to return.
            buffers: (output, OrtValue) by the name of the input; both are bound to the same memory.
        """
        with ort_errors(self.where, "run"):
            binding = self.inference.io_binding()
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            for name, (output, value) in buffers.items():
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(output, value)
            self.inference.run_with_iobinding(binding)
            return dict(zip(outputs, binding.get_outputs(), strict=False))

    def metadata(self) -> dict[str, str]:
        """The model's metadata_props."""
        return dict(self.inference.get_modelmeta().custom_metadata_map)

    def value(self, array: Array) -> Any:
        """Wrap a numpy array as an OrtValue, which keeps the array alive."""
        import onnxruntime as ort

        array = np.ascontiguousarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            raw = array.view(np.uint16)
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, onnx.TensorProto.BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(array)

    def array(self, value: Any) -> Array:
        """Copy an OrtValue into a numpy array (ml_dtypes for bfloat16).

        Raises:
            ModelError: the value is no dense tensor.
        """
        if not value.is_tensor():
            raise ModelError(f"an output is a {value.data_type()}, not a tensor", where=self.where)
        if value.data_type() == "tensor(bfloat16)":
            shape = value.shape()
            buffer = (ctypes.c_char * (2 * math.prod(shape))).from_address(value.data_ptr())
            return np.frombuffer(buffer, dtype=ml_dtypes.bfloat16).reshape(shape).copy()
        array: Array = value.numpy()
        return array

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """An OrtValue of `shape`, not initialised; for caches of length 0."""
        import onnxruntime as ort

        element = onnx.TensorProto.BFLOAT16 if dtype == ml_dtypes.bfloat16 else dtype.type
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element)


def open_session(
    model: str | Path | onnx.ModelProto,
    *,
    threads: int = 0,
    optimise: bool = True,
    config: Mapping[str, str] | None = None,
    base_dir: str | Path | None = None,
) -> Session:
    """Open a model on the CPU provider; the project's own operators are registered if the model has any.

    Args:
        model: a file, or a proto below 2 GiB.
        threads: threads inside one operator; 0 leaves the choice to ONNX Runtime.
        optimise: all graph optimisations as in deployment, or none, so that nothing hides an error of the graph; then
            memory is also given back after every operator (a float16 model's float32 copies of its weights, for one).
        config: session config entries, for example {"session.qdq_matmulnbits_accuracy_level": "1"}. Unless they say
            otherwise, idle threads sleep.
        base_dir: folder of the external data of a proto.

    Raises:
        ModelError: the file is missing or ONNX Runtime refuses the model; the node or op is named.
        ResourceError: memory ran out, or onnxruntime is not installed.
        UsageError: a config value is refused.
    """
    where = "the model in memory" if isinstance(model, onnx.ModelProto) else str(model)
    if not isinstance(model, onnx.ModelProto) and not Path(model).is_file():
        raise ModelError("there is no such model file", where=where)
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ResourceError(f"onnxruntime cannot be imported: {error}", todo="pip install onnxruntime") from error
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    if not optimise:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        # The default order casts all weights first and holds them: measured 4.9 GB for 2.2 GB of float16, else 2.5 GB.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    entries = {**_SHARED_MACHINE, **(config or {})}
    if base_dir is not None:
        entries["session.model_external_initializers_file_folder_path"] = str(base_dir)
    for key, value in entries.items():
        try:
            options.add_session_config_entry(key, value)
        except Exception as error:
            raise UsageError(f"onnxruntime refuses the session option {key}={value}", todo=str(error)) from error
    with ort_errors(where, "open"):
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
        return Session(_open(source, options), where)


def open_with_options(
    path: Path, options: ort.SessionOptions, *, around: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Session:
    """Open a model file with options that already name its provider, for targets that are no CPUs.

    Args:
        path: The .onnx file.
        options: Of ONNX Runtime.
        around: Entered while the provider works.

    Raises:
        ModelError: ONNX Runtime refuses the model; the node or op is named.
        ResourceError: memory ran out.
    """
    import onnxruntime as ort

    if not path.is_file():
        raise ModelError("there is no such model file", where=str(path))
    options.log_severity_level = _LOG_FATAL
    with ort_errors(str(path), "open"), around():
        inference = ort.InferenceSession(str(path), options)
    return Session(inference, str(path), around=around)


def _open(source: bytes | str, options: ort.SessionOptions) -> ort.InferenceSession:
    """Open a model, and once more with our operators if it turns out to have some: that is known after milliseconds."""
    import onnxruntime as ort

    providers = ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(source, options, providers=providers)
    except Exception as error:
        if f"{ops.DOMAIN}:" not in str(error) or UNREGISTERED.search(str(error)) is None:
            raise
    try:
        ops.register(options)
    except RuntimeError as error:
        todo = "reinstall onnxslim-llm with a C++ compiler, or compile the model for the target ort-cpu"
        raise ResourceError(f"the model has operators of {ops.DOMAIN}: {error}", todo=todo) from error
    return ort.InferenceSession(source, options, providers=providers)


def inputs_of(model: Session | onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """The inputs that a caller must feed: initializers with a default value are left out."""
    if isinstance(model, Session):
        return model.inputs
    defaults = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return tuple(_from_value_info(v) for v in model.graph.input if v.name not in defaults)


def outputs_of(model: Session | onnx.ModelProto) -> tuple[TensorInfo, ...]:
    """The outputs of a model, in order."""
    return model.outputs if isinstance(model, Session) else tuple(_from_value_info(v) for v in model.graph.output)


def _from_node_arg(arg: Any) -> TensorInfo:
    shape = tuple(d if d is None or isinstance(d, int) else str(d) for d in arg.shape)
    dtype = _ORT_DTYPES.get(arg.type)
    return TensorInfo(arg.name, None if dtype is None else np.dtype(dtype), shape, arg.type)


def _from_value_info(value: onnx.ValueInfoProto) -> TensorInfo:
    if not value.type.HasField("tensor_type"):
        return TensorInfo(value.name, None, None, value.type.WhichOneof("value") or "unknown type")
    tensor = value.type.tensor_type
    kind = f"tensor({onnx.TensorProto.DataType.Name(tensor.elem_type).lower()})"
    shape: tuple[Dim, ...] | None = None
    if tensor.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
    dtype = _ORT_DTYPES.get(kind)
    return TensorInfo(value.name, None if dtype is None else np.dtype(dtype), shape, kind)
