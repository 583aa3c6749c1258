#!/usr/bin/env bash
# Compile the sample model, measure the artifact on held-out text, and let both models write.
#     bash models/demo.sh [COMMAND]      COMMAND: the installed onnxslim-llm (default: the one on PATH)
set -euo pipefail
command=${1:-onnxslim-llm}
models=$(cd "$(dirname "$0")" && pwd)
sample=$models/stdlib-llama
out=build/stdlib-llama.int4

"$command" compile "$sample" -o "$out" --calib "$sample/calib.txt" --force
"$command" eval "$out" --text "$sample/heldout.txt" --vs "$sample" --max-tokens 8192
prompt='def read_lines(path):
    """'
for model in "$sample" "$out"; do
  printf '\n--- %s writes:\n' "$(basename "$model")"
  "$command" generate "$model" --prompt "$prompt" -n 96
done
