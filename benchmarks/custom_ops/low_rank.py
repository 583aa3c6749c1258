"""A low-rank correction A * U * V of a product: inside of MatMulPacked, or as two products of ONNX Runtime's beside it.

    python benchmarks/custom_ops/low_rank.py

Prints the microseconds that the correction adds to a product without one, on one thread: the 20th percentile of
interleaved runs, with 4-bit weights in blocks of 32. "residual" is the form that lowering makes: the correction by two
float products, added by the operator as its residual.
"""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxslim_llm.custom_ops import kernels, ops
from onnxslim_llm.custom_ops.packed import PackedScheme

SHAPES = ((2048, 2048), (2048, 8192))
RANKS = (16, 64)
ROWS = {1: 151, 16: 41, 128: 15}  # and how often
FORMS = {
    "plain": ["MatMulPacked(a, B) -> y"],
    "inside": ["MatMulPacked(a, B, , , U, V) -> y"],
    "apart": ["MatMulPacked(a, B) -> p", "MatMul(a, U) -> t", "MatMul(t, V) -> c", "Add(p, c) -> y"],
    "residual": ["MatMul(a, U) -> t", "MatMul(t, V) -> c", "MatMulPacked(a, B, , c) -> y"],
}


def session(form: str, scheme: PackedScheme, weights: dict[str, NDArray[np.generic]]) -> onnxruntime.InferenceSession:
    """One of the forms, on one thread."""
    nodes = []
    for text in FORMS[form]:
        op, _, rest = text.partition("(")
        operands, _, result = rest.partition(") -> ")
        own = op == "MatMulPacked"
        attributes = {"K": scheme.rows, "N": scheme.columns, "bits": scheme.bits, "block_size": scheme.block}
        inputs = [name.strip() for name in operands.split(",")]
        nodes.append(
            helper.make_node(op, inputs, [result], domain=ops.DOMAIN if own else "", **(attributes if own else {}))
        )
    read = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items() if name in read]
    ends = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["m", scheme.rows]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", scheme.columns]),
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors), opset_imports=imports, ir_version=8
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    ops.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measure and print."""
    ops.register_schemas()
    rng = np.random.default_rng(0)
    for k, n in SHAPES:
        scheme = PackedScheme(k, n)
        codes = rng.integers(0, 256, (n, k // scheme.block, scheme.block // 2), np.uint8)
        packed = kernels.pack(scheme, codes, np.full((n, k // scheme.block), 2**-7, np.float16), None)
        for rank in RANKS:
            u, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((k, rank), (rank, n)))
            sessions = {form: session(form, scheme, {"B": packed, "U": u, "V": v}) for form in FORMS}
            for rows, rounds in ROWS.items():
                feeds = {"a": rng.standard_normal((rows, k)).astype(np.float32)}
                samples: dict[str, list[float]] = {form: [] for form in FORMS}
                for _ in range(rounds):
                    for form, opened in sessions.items():
                        start = time.perf_counter()
                        opened.run(None, feeds)
                        samples[form].append(time.perf_counter() - start)
                best = {form: 1e6 * float(np.percentile(found, 20)) for form, found in samples.items()}
                added = "  ".join(f"{form} {best[form] - best['plain']:+8.0f}" for form in FORMS if form != "plain")
                print(f"{k} x {n}  rank {rank:2}  rows {rows:3}  plain {best['plain']:8.0f} us  {added}")


if __name__ == "__main__":
    main()
