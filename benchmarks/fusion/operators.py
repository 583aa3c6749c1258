"""Which operator should a norm or an activation become? The forms that ONNX Runtime has for each, in one run.

    python benchmarks/fusion/operators.py [--rounds 15] [--threads 2] [--sizes 1x768 256x768 1x2048 128x2048]

Each graph is a chain of 24 times the same operation, so that the session's own time does not count. All forms of an
operation run in turn, so that a machine that slows down does so for all; medians, and their ratio to the first form.
ONNX Runtime's own optimisations are on. The docstrings in passes/lower/ say what was chosen by this.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import numpy_helper, parser

CHAIN = 24
RUNS = 10

#: What -> form -> nodes of one link: from {x} (and the residual {r}) to {y} (and the new residual {s}).
FORMS: dict[str, dict[str, str]] = {
    "RMS norm": {
        "RMSNormalization": "{y} = RMSNormalization <epsilon = 0.00001> ({x}, w)",
        "SimplifiedLayerNormalization": "{y} = SimplifiedLayerNormalization <epsilon = 0.00001> ({x}, w)",
    },
    "residual sum and RMS norm": {
        "Add, RMSNormalization": "{s} = Add ({r}, {x}) {y} = RMSNormalization <epsilon = 0.00001> ({s}, w)",
        "SkipSimplifiedLayerNormalization": (
            "{y}, , , {s} = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.00001> ({r}, {x}, w)"
        ),
    },
    "residual sum and layer norm": {
        "Add, LayerNormalization": "{s} = Add ({r}, {x}) {y} = LayerNormalization <epsilon = 0.00001> ({s}, w, c)",
        "SkipLayerNormalization": (
            "{y}, , , {s} = com.microsoft.SkipLayerNormalization <epsilon = 0.00001> ({r}, {x}, w, c)"
        ),
    },
    "SiLU": {
        "Sigmoid, Mul": "{y}g = Sigmoid ({x}) {y} = Mul ({x}, {y}g)",
        "QuickGelu": "{y} = com.microsoft.QuickGelu <alpha = 1.0> ({x})",
        "Swish": "{y} = Swish ({x})",
    },
    "Gelu": {"Gelu": "{y} = Gelu ({x})", "com.microsoft.Gelu": "{y} = com.microsoft.Gelu ({x})"},
    "Gelu by tanh": {
        "Gelu": '{y} = Gelu <approximate = "tanh"> ({x})',
        "FastGelu": "{y} = com.microsoft.FastGelu ({x})",
    },
    "bias and Gelu": {
        "Add, Gelu": "{y}b = Add ({x}, c) {y} = Gelu ({y}b)",
        "BiasGelu": "{y} = com.microsoft.BiasGelu ({x}, c)",
    },
}


def session(form: str, width: int, threads: int) -> ort.InferenceSession:
    """Return a session of a chain of one form."""
    links, x, r = [], "x", "x"
    for i in range(CHAIN):
        links.append(form.format(x=x, r=r, y=f"y{i}", s=f"s{i}"))
        x, r = f"y{i}", f"s{i}" if "{s}" in form else "x"
    body = "\n".join(links)
    text = f"""<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]>
        agraph (float[b, s, {width}] x) => (float[b, s, {width}] z) {{ {body} z = Add ({x}, {r}) }}"""
    model = parser.parse_model(text)
    random = np.random.default_rng(0)
    for name in "wc":
        model.graph.initializer.append(numpy_helper.from_array(random.random(width, np.float32) + 0.5, name))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(forms: dict[str, str], tokens: int, width: int, rounds: int, threads: int) -> dict[str, float]:
    """Return the median seconds of one link by form."""
    sessions = {name: session(form, width, threads) for name, form in forms.items()}
    feeds: dict[str, Any] = {"x": np.random.default_rng(1).standard_normal((1, tokens, width), np.float32)}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, running in sessions.items():
            running.run(None, feeds)
            start = time.perf_counter()
            for _ in range(RUNS):
                running.run(None, feeds)
            times[name].append((time.perf_counter() - start) / RUNS / CHAIN)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure everything and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--sizes", nargs="+", default=["1x768", "256x768", "1x2048", "128x2048"])
    given = arguments.parse_args()
    print(f"onnxruntime {ort.__version__}, {given.threads} threads; microseconds, ratio to the first form")
    for what, forms in FORMS.items():
        for size in given.sizes:
            tokens, width = map(int, size.split("x"))
            found = measure(forms, tokens, width, given.rounds, given.threads)
            first = next(iter(found.values()))
            cells = ", ".join(f"{name} {value * 1e6:.1f} ({value / first:.2f})" for name, value in found.items())
            print(f"{what}, {tokens} tokens of {width}: {cells}")


if __name__ == "__main__":
    main()
