"""What an error in the output of one product does to the model's answer, measured by making such errors.

A change E of a weight adds tr(E^T H E) to the squared output of its product. How much the answer suffers from that
differs a thousandfold between the products of one model, so that bits can only be shared out well by those who know it.
Each weight in turn gets an error of the kind and size that 4 bits make, and the model runs on a few calibration tokens:
the KL divergence to the model as it is, divided by the squared error, is the weight's gain. Divergences of small errors
are quadratic in them and add up over weights, which makes the gain good for errors of other sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxslim_llm.errors import ModelError
from onnxslim_llm.runtime.session import Session, open_session
from onnxslim_llm.runtime.signature import find_decoder
from onnxslim_llm.stats.calibration import Calibration, Feeds, TokenCalibration
from onnxslim_llm.stats.curvature import inverse_factor
from onnxslim_llm.stats.statistics import Gain, Statistics
from onnxslim_llm.stats.taps import find_taps

__all__ = ["GAIN_TOKENS", "measure_gains"]

Array = NDArray[Any]
Progress = Callable[[int, int], None]

#: Tokens of each run: with two samples, the 37 runs of the sample model take some 15 seconds of one thread.
GAIN_TOKENS = 1024
#: Multiplications of all runs together, some minutes' worth: larger models get fewer tokens, and none below `_FEWEST`.
_WORK = 1e13
_FEWEST_TOKENS = 32
#: Root mean square of the error by that of the output: about what 4 bits in blocks of 32 make.
_AMPLITUDE = 0.05
#: Inputs with more channels get errors that are independent of each other: a factor of H takes K^3.
_LARGEST_FACTOR = 4096
_SMALLEST_TABLE = 4096  # elements
_FILE = "gains.json"
_VERSION = 3


def measure_gains(
    model: Path,
    data: Calibration,
    statistics: Statistics,
    *,
    only_tied: bool = False,
    threads: int = 0,
    tokens: int = GAIN_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Gain]:
    """Return the gain of every product's weight and of every embedding table, by the initializer's name.

    A weight that is both, read by a product and by look-ups, has two gains: errors are made in one of both at a time.

    Nothing is measured of a model that is too large for so many runs: the result is empty then. Otherwise gains are
    kept in the folder of the statistics and taken from there the next time.

    Args:
        model: The .onnx file, external data beside it.
        data: The calibration inputs, the first ones of which are used.
        statistics: Of the same model and data.
        only_tied: Measure embedding tables that are a product's weight as well, and no other weight.
        threads: For ONNX Runtime; 0 leaves the choice to it.
        tokens: Rows of the answer that a run is judged by; fewer for large models.
        progress: Called with (done, of how many) weights.

    Raises:
        ModelError: The model does not run, or an error in a weight makes its answer NaN or infinite.
    """
    key = f"gains v{_VERSION} {statistics.key} {tokens} {only_tied}"
    known = _stored(statistics.folder / _FILE, key)
    if known is not None:
        return known
    proto = onnx.load(model, load_external_data=False)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    products = [name for tap in find_taps(proto.graph) for name in tap.weights if name in weights]
    tables = list(_tables(proto.graph, weights))
    size = sum(int(np.prod(weights[name].dims)) for name in products)
    if only_tied:
        tied = list(_tied(products, tables, weights, model.parent))
        products, tables = ([*dict.fromkeys(names)] for names in (zip(*tied, strict=True) if tied else ((), ())))
    limit = min(tokens, int(_WORK / max(1, size * (len(products) + len(tables)))))
    if limit < _FEWEST_TOKENS or not products:
        return {}
    inputs = {name: name for name in tables if name not in products}
    inputs |= {name: _let_look_up(proto, weights[name]) for name in tables if name in products}
    _let_replace(proto, [*products, *inputs.values()])
    if isinstance(data, TokenCalibration):
        data = replace(data, window=min(data.window, limit))
    judge = _Judge(open_session(proto, threads=threads, base_dir=model.parent), data, limit)
    gains: dict[str, Gain] = {}
    runs = [*((name, False) for name in products), *((name, True) for name in tables)]
    for done, (name, of_table) in enumerate(runs):
        weight = numpy_helper.to_array(weights[name], base_dir=str(model.parent))
        random = np.random.default_rng(done)
        change, squared = _table_error(weight, random) if of_table else _product_error(weight, name, statistics, random)
        if squared > 0:
            changed = (weight.astype(np.float32) + change).astype(weight.dtype)
            gain = Gain(judge.harm({inputs[name] if of_table else name: changed}, name), squared, of_table)
            gains[name] = replace(gains[name], looked_up=gain) if name in gains else gain
        if progress is not None:
            progress(done + 1, len(runs))
    content = {"key": key, "gains": {name: asdict(gain) for name, gain in gains.items()}}
    (statistics.folder / _FILE).write_text(json.dumps(content))
    return gains


def _stored(file: Path, key: str) -> dict[str, Gain] | None:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if content.get("key") != key:
        return None
    return {name: _read(entry) for name, entry in content["gains"].items()}


def _read(entry: dict[str, Any]) -> Gain:
    looked_up = entry.pop("looked_up")
    return Gain(**entry, looked_up=None if looked_up is None else _read(looked_up))


def _tables(graph: onnx.GraphProto, weights: dict[str, onnx.TensorProto]) -> Iterator[str]:
    found = [node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in weights]
    for name in dict.fromkeys(found):
        if int(np.prod(weights[name].dims)) >= _SMALLEST_TABLE:
            yield name


def _tied(
    products: list[str], tables: list[str], weights: dict[str, onnx.TensorProto], folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield each product's weight that is a table, too, as one initializer or as two, with the name of the table."""
    for table in tables:
        rows, columns = weights[table].dims
        for product in products:
            if product == table:
                yield product, table
            elif sorted(weights[product].dims) == sorted((rows, columns)):
                one, other = (numpy_helper.to_array(weights[name], base_dir=str(folder)) for name in (table, product))
                if any(np.array_equal(one, turned) for turned in (other, other.T)):
                    yield product, table


def _let_look_up(proto: onnx.ModelProto, table: onnx.TensorProto) -> str:
    """Let look-ups read a copy of a table, so that it can be changed without them; return the copy's name."""
    taken = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    name = f"{table.name}/looked_up"
    while name in taken:
        name += "_"
    copy = proto.graph.initializer.add()
    copy.CopyFrom(table)
    copy.name = name
    for node in proto.graph.node:
        if node.op_type == "Gather" and node.input[0] == table.name:
            node.input[0] = name
    return name


def _let_replace(proto: onnx.ModelProto, names: list[str]) -> None:
    """Make graph inputs of weights: their content is the default then, and a run may bring another one."""
    proto.ir_version = max(proto.ir_version, 4)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    inputs = {info.name for info in proto.graph.input}
    for name in names:
        if name not in inputs:
            tensor = weights[name]
            proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))


def _product_error(
    weight: Array, name: str, statistics: Statistics, random: np.random.Generator
) -> tuple[Array, float]:
    """Return an error as compensated codes make it, which no direction of the input feels more than another."""
    stored = statistics.of_weight(name)
    if stored is None:
        return np.zeros_like(weight), 0.0
    moments = stored.load().fit
    assert moments.gram is not None
    wide = weight.astype(np.float32)
    turned = wide.shape[0] != stored.size
    matrix = wide.T if turned else wide
    gram = (moments.gram / max(moments.count, 1)).astype(np.float32)
    signal = float(np.einsum("kn,kn->", gram @ matrix, matrix, dtype=np.float64))
    if not signal > 0:
        return np.zeros_like(wide), 0.0
    noise = random.standard_normal(matrix.shape, dtype=np.float32)
    factor = inverse_factor(gram) if stored.size <= _LARGEST_FACTOR else None
    if factor is not None:
        noise = factor.T @ noise
    raw = float(np.einsum("kn,kn->", gram @ noise, noise, dtype=np.float64))
    squared = _AMPLITUDE**2 * signal
    change = noise * np.float32(np.sqrt(squared / raw))
    return (change.T if turned else change), squared


def _table_error(weight: Array, random: np.random.Generator) -> tuple[Array, float]:
    wide = weight.astype(np.float32)
    size = np.sqrt(np.square(wide).mean(axis=1, keepdims=True))
    change = _AMPLITUDE * size * random.standard_normal(wide.shape, dtype=np.float32)
    return change, float(np.square(change, dtype=np.float64).sum())


class _Judge:
    """Runs the model on a few samples and compares its answers."""

    def __init__(self, session: Session, data: Calibration, rows: int) -> None:
        signature, _ = find_decoder(session)
        self._session = session
        self._decoder = signature is not None
        self._output = signature.logits if signature is not None else session.outputs[0].name
        self._feeds: list[Feeds] = []
        self._expected: list[Array] = []
        seen = 0
        for feeds in data.feeds():
            self._feeds.append(feeds)
            self._expected.append(self._answer(feeds))
            seen += len(self._expected[-1])
            if seen >= rows:
                break

    def harm(self, changed: Feeds, where: str) -> float:
        """Return the mean over rows of the KL divergence; for a model that is no decoder, of the squared difference.

        Raises:
            ModelError: The answer is not finite.
        """
        total, rows = 0.0, 0
        for feeds, expected in zip(self._feeds, self._expected, strict=True):
            answer = self._answer({**feeds, **changed})
            if not np.isfinite(answer).all():
                what = "an error as small as that of 4 bits makes the model's answer NaN or infinite"
                raise ModelError(what, where=f"tensor '{where}'", todo="leave target_bits away")
            total += float((_divergence if self._decoder else _distance)(expected, answer).sum())
            rows += len(expected)
        return total / max(rows, 1)

    def _answer(self, feeds: Feeds) -> Array:
        found = self._session.run(feeds, [self._output])[self._output]
        return found.reshape(-1, found.shape[-1]).astype(np.float64)


def _divergence(expected: Array, answer: Array) -> Array:
    """KL(expected || answer) of each row of logits."""
    logs = []
    for logits in (expected, answer):
        shifted = logits - logits.max(axis=1, keepdims=True)
        logs.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
    result: Array = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
    return result


def _distance(expected: Array, answer: Array) -> Array:
    """Squared difference of each row, by the mean square of all."""
    result: Array = np.square(expected - answer).mean(axis=1) / max(float(np.square(expected).mean()), 1e-30)
    return result
