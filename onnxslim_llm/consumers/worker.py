"""One consumer on one model, in a process of its own: `python -m onnxslim_llm.consumers.worker REQUEST`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_llm.bounded import answer
from onnxslim_llm.consumers.refusal import RefusalError


def main() -> None:
    """Run the adapter, write its results, and answer how it went."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    adapter = import_module(f"onnxslim_llm.consumers.adapters.{request['consumer']}")
    with np.load(request["feeds"]) as file:
        feeds = {name: file[name] for name in file.files}
    start = time.perf_counter()
    try:
        results = adapter.run(Path(request["model"]), feeds, Path(request["folder"]), request["outputs"])
    except RefusalError as refusal:
        answer({"error": str(refusal), "unsupported": refusal.operators})
        return
    except Exception as error:  # the consumer's own errors, of whatever kind, are the result
        traceback.print_exc()
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        answer({"error": f"{type(error).__name__}: {first[:300]}"})
        return
    np.savez(request["results"], **results)
    answer({"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    main()
