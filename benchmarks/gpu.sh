#!/usr/bin/env bash
# Speed on this machine's NVIDIA GPU, without any checkpoint, in minutes: is a recorded decoding step the plain one, how
# fast is either, and what does value training take? The last measurement has torch.compile fuse norms and MLPs.
#
#   bash benchmarks/gpu.sh                    into benchmarks/results, then docs/speed.md by benchmarks/speed_page.py
#   RESULTS=/some/folder bash benchmarks/gpu.sh --batch_size 1 --max_new_tokens 64
#
# It uses the python in PATH with torch, transformers, peft and pytest; needs 60 GB of GPU memory at the paper's shapes.
set -euo pipefail

cd "$(dirname "$0")/.."
RESULTS=${RESULTS:-benchmarks/results}
python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch sees no NVIDIA GPU here")'
python3 -m pytest -q tests/test_graphs.py
decode=(python3 benchmarks/decode.py --random_weights --device cuda)
"${decode[@]}" --batch_size 1 8 32 --output "$RESULTS/decode_paper_gpu.json" "$@"
python3 benchmarks/value_training.py --model tinyllama --device cuda --batch_size 32 --output "$RESULTS/value_training_gpu.json"
"${decode[@]}" --batch_size 1 32 --compile --rounds 2 --output "$RESULTS/decode_paper_gpu_compiled.json" "$@"
