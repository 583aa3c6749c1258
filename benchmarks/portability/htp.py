"""How exact models are on Qualcomm's HTP, in the vendor's simulator: the table of docs/npu.md.

    python benchmarks/portability/htp.py NAME=MODEL=SHAPE=CALIB [--recipe w8a16 --recipe w8a8]

Each compile takes a minute or more: the simulator does some 50 tokens of a model of 5 M parameters a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import onnxslim_llm as osl
from onnxslim_llm.errors import GateError
from onnxslim_llm.targets.qnn_htp import PLACEMENT_NAME


def main() -> None:
    """Compile every model with every recipe; print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL=SHAPE=CALIB")
    parser.add_argument("--recipe", action="append", default=[])
    arguments = parser.parse_args()
    print(
        "| model | recipe | nodes on the NPU | cosine | top-1 | mean KL | perplexity |\n|---|---|---|---|---|---|---|"
    )
    for text in arguments.models:
        name, model, rest = text.split("=", 2)
        shape, calib = rest.rsplit("=", 1)
        for recipe in arguments.recipe or ["w8a16", "w8a8"]:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "out")
                try:
                    result = osl.compile(model, out, target="qnn-htp", recipe=recipe, shape=shape, calib=calib)
                except GateError as error:
                    print(f"| {name} | {recipe} | not published: {error.what} | | | | |")
                    continue
                placement = json.loads((result.path / PLACEMENT_NAME).read_text())["nodes"]
            verify, quality = result.manifest.verify, result.manifest.quality
            assert verify is not None
            nodes = f"{len(placement['NPU'])} of {sum(map(len, placement.values()))}"
            figures = [f"{verify.cosine:.5f}", "", "", ""]
            if quality is not None:
                figures[1:] = [
                    f"{quality.top1_agreement:.1%}",
                    f"{quality.kld_mean:.2g}",
                    f"{quality.ppl_source:.4g} → {quality.ppl_artifact:.4g}",
                ]
            print("|", " | ".join([name, recipe, nodes, *figures]), "|", flush=True)


if __name__ == "__main__":
    main()
