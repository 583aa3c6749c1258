"""One run of Qualcomm's compiler, in a process of its own: `python -m onnxslim_llm.targets.qnn_worker REQUEST`."""

from __future__ import annotations

import json
import sys
from typing import Any

from onnxslim_llm.bounded import answer
from onnxslim_llm.targets.qnn_provider import qnn_options

_LOG_LEVELS = {"errors": 2, "everything": 0}


def main() -> None:
    """Compile `models` into `contexts`, several into one binary, and answer which node runs where."""
    import onnxruntime as ort

    request: dict[str, Any] = json.loads(sys.argv[1])
    placement: dict[str, list[str]] = {}
    count = len(request["models"])
    sessions = []  # what they share lives as long as they do
    for number, (model, context) in enumerate(zip(request["models"], request["contexts"], strict=True), 1):
        entries = {
            "session.disable_cpu_ep_fallback": "1",
            "session.record_ep_graph_assignment_info": "1",
            "ep.context_enable": "1",
            "ep.context_file_path": context,
            "ep.context_embed_mode": "0",
        }
        if count > 1:
            entries["ep.share_ep_contexts"] = "1"
            entries |= {"ep.stop_share_ep_contexts": "1"} if number == count else {}
        options = qnn_options(request["provider_options"], entries)
        options.log_severity_level = _LOG_LEVELS[request["log"]]
        options.intra_op_num_threads = request["threads"]
        session = ort.InferenceSession(model, options)
        sessions.append(session)
        for part in session.get_provider_graph_assignment_info():
            names = [f"{node.op_type} '{node.name}'" for node in part.get_nodes()]
            placement.setdefault(part.ep_name, []).extend(names)
    answer({"placement": placement})


if __name__ == "__main__":
    main()
