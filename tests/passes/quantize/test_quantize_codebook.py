"""`quantize_codebook`: tables, codes, and what runtimes make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxslim_llm.custom_ops.quantize import BlockSpec, Layout, quantize_tile
from onnxslim_llm.errors import UsageError
from onnxslim_llm.ir.model import from_proto
from onnxslim_llm.ir.weights import constant, weight_of
from onnxslim_llm.ir.weights.weight import Weight
from onnxslim_llm.passes.quantize.codebook.assign import compensated, decoded, plain
from onnxslim_llm.passes.quantize.codebook.books import FIXED_BOOKS, fixed_book
from onnxslim_llm.passes.quantize.codebook.clusters import cluster, nearest, pairs_of
from onnxslim_llm.passes.quantize.codebook.codebook_job import CodebookJob
from onnxslim_llm.passes.quantize.codebook.form import BookForm
from onnxslim_llm.passes.quantize.quantize_codebook import QuantizeCodebook
from onnxslim_llm.rewrite.context import Context
from onnxslim_llm.rewrite.passes import Change
from onnxslim_llm.stats.calibration import TensorCalibration
from onnxslim_llm.stats.collect import collect
from onnxslim_llm.stats.curvature import inverse_factor, output_error
from onnxslim_llm.stats.statistics import Statistics

Array = NDArray[Any]

K, N, VOCABULARY = 64, 96, 80
#: float32 sums of K products in another order.
ROUNDING = 1e-4


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def proto(dtype: type = np.float32) -> onnx.ModelProto:
    """Return ids -> rows of E -> MatMul W -> Gemm (transB) V, and the classifier that is tied to E."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    arrays = {"E": normal(0, VOCABULARY, K), "W": normal(1, K, N), "V": normal(2, K, N), "c": normal(3, K)}
    weights = [numpy_helper.from_array(a.astype(dtype), name) for name, a in arrays.items()]
    nodes = [
        helper.make_node("Gather", ["E", "ids"], ["h"], "look_up"),
        helper.make_node("MatMul", ["h", "W"], ["a"], "first"),
        helper.make_node("Gemm", ["a", "V", "c"], ["b"], "second", transB=1),
        helper.make_node("Transpose", ["E"], ["Et"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["b", "Et"], ["logits"], "classify"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["T"])
    logits = helper.make_tensor_value_info("logits", kind, ["T", VOCABULARY])
    graph = helper.make_graph(nodes, "g", [ids], [logits], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rewritten(settings: QuantizeCodebook, model: onnx.ModelProto) -> tuple[onnx.ModelProto, Change]:
    loaded = from_proto(model)
    change = settings.apply(loaded, Context())
    return loaded.to_proto(), change


def weights_in(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def expected(result: onnx.ModelProto, source: onnx.ModelProto, ids: Array) -> Array:
    """Compute the model in float64 with the weights that the codes stand for."""
    stored, given = weights_in(result), weights_in(source)

    def weight(name: str) -> Array:
        if f"{name}_codes" not in stored:
            return given[name].astype(np.float64)
        vectors = stored[f"{name}_table"].astype(np.float64)[stored[f"{name}_codes"]]
        scale = stored[f"{name}_scale"].astype(np.float64)
        rows = vectors.reshape(len(vectors), scale.shape[1], -1) * scale
        whole = rows.reshape(len(vectors), -1)
        return whole.T if name == "W" else whole

    hidden = weight("E")[ids] @ weight("W") @ weight("V").T + given["c"]
    value: Array = hidden @ weight("E").T
    return value


@pytest.mark.parametrize("kind", [*FIXED_BOOKS, "kmeans", "vectors"])
@pytest.mark.parametrize("tables", [True, False])
def test_runtimes_compute_what_the_codes_stand_for(kind: Any, tables: bool) -> None:
    source = proto()
    result, change = rewritten(
        QuantizeCodebook(codebook=kind, block=32, tables=tables, max_overhead=9, length=4), source
    )
    onnx.checker.check_model(result, full_check=True)
    ids = np.array([0, 7, VOCABULARY - 1, 7])
    value = expected(result, source, ids)
    tolerance = ROUNDING * np.abs(value).max()
    session = onnxruntime.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"ids": ids})[0], value, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ReferenceEvaluator(result).run(None, {"ids": ids})[0], value, rtol=0, atol=tolerance)
    assert set(change.sites) == ({"E", "W", "V"} if tables else {"W", "V"})
    left = set(weights_in(result))
    assert ("E" in left) is not tables  # a tied table is stored once
    assert not {"W", "V"} & left


def test_half_precision_stays_half_precision() -> None:
    source = proto(np.float16)
    result, _ = rewritten(QuantizeCodebook(block=32, tables=True, max_overhead=9), source)
    onnx.checker.check_model(result, full_check=True)
    ids = np.arange(5)
    value = expected(result, source, ids)
    session = onnxruntime.InferenceSession(result.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"ids": ids})[0]
    assert got.dtype == np.float16
    assert np.linalg.norm(got - value) < 0.01 * np.linalg.norm(value)  # float16 has 11 bits


def test_the_normal_table_is_nearer_to_normal_weights_than_even_steps() -> None:
    weight = normal(4, 4096, 8)
    form = BookForm("nf4", 2, 1, 64)
    job = CodebookJob(stored(weight), 0, form, "W")
    job.compute()
    assert job.figures is not None
    even = quantize_tile(weight, BlockSpec(4, 64, True, "float16"), "search", None, Layout.NBITS)
    assert job.figures["sq_error"] < 0.95 * even.sq_error


def stored(weight: Array) -> Weight:
    return weight_of(constant("W", weight))


def test_fixed_tables() -> None:
    for kind in FIXED_BOOKS:
        book = fixed_book(kind)
        assert len(book) == 16
        assert (np.diff(book) > 0).all()
        assert book[-1] == 1
        assert 0 in book
    # The values that QLoRA's appendix gives for its first and last codes.
    np.testing.assert_allclose(fixed_book("nf4")[[1, 8, 14]], [-0.6962, 0.0796, 0.7230], atol=1e-4)


def test_nearest_against_all_distances() -> None:
    vectors, book = normal(5, 100, 3), normal(6, 40, 3)
    importance = np.abs(normal(7, 100, 3))
    distances = (importance[:, None] * np.square(vectors[:, None] - book)).sum(axis=2)
    np.testing.assert_array_equal(nearest(vectors, book, importance), distances.argmin(axis=1))
    pairs = pairs_of(np.sort(normal(8, 16)))
    vectors = normal(9, 100, 2)
    plain_way = np.square(vectors[:, None] - pairs).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest(vectors, pairs), plain_way)


def test_clusters_find_what_is_there() -> None:
    centres = normal(10, 8, 2) * 10
    vectors = np.repeat(centres, 50, axis=0) + 0.01 * normal(11, 400, 2)
    book = cluster(vectors, np.ones_like(vectors), 8, seed=0)
    assert np.abs(book[nearest(centres, book)] - centres).max() < 0.05
    # Only what is important is fitted.
    values = np.array([[0.0], [1.0]] * 20, np.float32)
    weights = np.array([[1.0], [0.0]] * 20, np.float32)
    np.testing.assert_allclose(cluster(values, weights, 1, seed=0), [[0.0]])


def test_more_stages_come_nearer() -> None:
    source = stored(normal(12, 64, 256))
    errors = []
    for stages in (1, 2, 3):
        job = CodebookJob(source, 0, BookForm("vectors", 8, stages, 64), "W")
        job.compute()
        assert job.figures is not None
        errors.append(job.figures["relative_error"])
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.3 * errors[2]


def test_vectors_make_up_for_each_other_as_rows_do() -> None:
    """With vectors of one number and a table of even steps, this is GPTQ."""
    weight, inputs = normal(13, 24, 10), normal(14, 200, 24) @ normal(15, 24, 24)
    gram = inputs.T.astype(np.float64) @ inputs
    factor = inverse_factor(gram)
    assert factor is not None
    book = np.arange(-8, 8, dtype=np.float32).reshape(1, 16, 1) / 4
    scales = np.ones((1, 10), np.float32)
    codes = compensated(weight, scales, book, factor)
    work = weight.astype(np.float64)
    want = np.empty((24, 10), np.int64)
    for k in range(24):
        want[k] = np.clip(np.rint(work[k] * 4) + 8, 0, 15)
        error = (work[k] - book[0, want[k], 0]) / factor[k, k]
        work[k + 1 :] -= np.outer(factor[k, k + 1 :], error)
    assert (codes[0] != want).mean() < 0.02  # ties in float32
    alone = plain(weight, scales, book, None)
    far, near = (output_error(weight - decoded(c, scales, book), gram).sum() for c in (alone, codes))
    assert near < 0.7 * far


@pytest.fixture
def statistics(tmp_path: Path) -> Statistics:
    onnx.save(proto(), tmp_path / "model.onnx")
    rng = np.random.default_rng(16)
    data = TensorCalibration(tuple({"ids": rng.integers(0, 12, 64)} for _ in range(24)))
    return collect(tmp_path / "model.onnx", "m", data, tmp_path / "statistics")[0]


def test_data_make_columns_better_where_they_were_not_seen(statistics: Statistics) -> None:
    source = weight_of(from_proto(proto()).graph.tensors()["W"])
    form = BookForm("vectors", 4, 1, 32)
    with_data = CodebookJob(source, 0, form, "W", statistics.of_weight("W"))
    without = CodebookJob(source, 0, form, "W")
    with_data.compute()
    assert with_data.figures is not None
    moments = statistics.of_weight("W")
    assert moments is not None
    held = moments.load().held.gram
    codes, scales, table = (
        np.frombuffer(raw, spec_dtype).reshape(spec.shape)
        for raw, spec, spec_dtype in zip(
            without.compute(), without.outputs, (np.uint8, np.float16, np.float16), strict=True
        )
    )
    value = decoded(codes.T[None], scales[..., 0].T.astype(np.float32), table[None].astype(np.float32))
    assert held is not None
    error = output_error(source.view() - value, held).sum()
    assert with_data.figures["output_error"] < 0.7 * error


def test_same_bytes_from_any_order_of_tiles(statistics: Statistics) -> None:
    source = weight_of(from_proto(proto()).graph.tensors()["W"])
    jobs = [CodebookJob(source, 0, BookForm("kmeans", 2, 1, 32), "W", statistics.of_weight("W")) for _ in range(2)]
    first, second = ([bytes(raw) for raw in job.compute()] for job in jobs)
    assert first == second


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"codebook": "nf5"}, "nf4"),
        ({"method": "gptq"}, "calibrated"),
        ({"codebook": "vectors", "length": 0}, "1 to 16"),
        ({"stages": 5}, "1 to 4"),
        ({"codebook": "vectors", "length": 4, "block": 30}, "multiple of 4"),
        ({"block": 33}, "multiple of 2"),
        ({"max_overhead": -1}, "0 or more"),
        ({"exclude": ("(",)}, "("),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeCodebook(**options)
    assert word in f"{caught.value} {caught.value.todo}"


def test_data_are_asked_for() -> None:
    with pytest.raises(UsageError, match="calibration data"):
        QuantizeCodebook(method="calibrated").requires(from_proto(proto()), Context())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (QuantizeCodebook(block=48), "no multiple of the block"),
        (QuantizeCodebook(min_elements=10_000), "fewer than min_elements"),
        (QuantizeCodebook(exclude=("first",), block=32), "excluded by 'first'"),
        (QuantizeCodebook(codebook="vectors", length=16, block=32), "tables would add"),
        (QuantizeCodebook(block=32), "embedding table"),
    ],
)
def test_what_is_left_alone_says_why(settings: QuantizeCodebook, reason: str) -> None:
    _, change = rewritten(settings, proto())
    assert any(reason in skip.reason for skip in change.skipped)
