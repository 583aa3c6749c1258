"""Which one computes: the registered operator, or a model-local function with its name?"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from op_models import TYPES, attributes, model, needs_library, packed_weight

from onnxslim_llm.custom_ops import matmul_reference, ops
from onnxslim_llm.custom_ops.packed import PackedScheme

pytestmark = needs_library

SCHEME = PackedScheme(rows=96, columns=40, bits=4, block=32)
#: Says 42 where the operator would multiply.
BODY = f"""<domain: "{ops.DOMAIN}", opset_import: ["" : 17]>
    MatMulPacked <K, N, bits, block_size, accuracy> (A, B) => (Y) {{
        columns = Constant <value_ints = [40]> ()
        shape = Shape <end = -1> (A)
        wanted = Concat <axis = 0> (shape, columns)
        Y = ConstantOfShape <value = float[1] {{42.0}}> (wanted)
    }}"""


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_a_registered_operator_wins_over_a_function(registered: bool, optimise: bool) -> None:
    a, weight = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32), packed_weight(SCHEME)
    proto = model("MatMulPacked", {"a": a}, {"B": weight}, TYPES[a.dtype], **attributes(SCHEME, accuracy="int8"))
    proto.functions.append(onnx.parser.parse_function(BODY))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    if registered:
        ops.register(options)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    actual = session.run(None, {"a": a})[0]
    expected = (
        matmul_reference.matmul(a, weight, matmul_reference.Accuracy.INT8) if registered else np.full((3, 40), 42)
    )
    np.testing.assert_array_equal(actual, expected)
