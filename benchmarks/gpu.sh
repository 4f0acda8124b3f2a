#!/usr/bin/env bash
# Speed on this machine's NVIDIA GPU, without any checkpoint: is a recorded decoding step the plain one, how fast is
# either, and what does value training take? The last part has torch.compile fuse norms and MLPs.
#
#   bash benchmarks/gpu.sh                    into benchmarks/results, then docs/speed.md by benchmarks/speed_page.py
#   PARTS="tests decoding" RESULTS=/some/folder bash benchmarks/gpu.sh
#
# PARTS are of: tests decoding training compiled (all), some minutes each. It uses the python3 in PATH with torch,
# transformers, peft and pytest, and needs 60 GB of GPU memory at the paper's shapes.
set -euo pipefail

cd "$(dirname "$0")/.."
RESULTS=${RESULTS:-benchmarks/results} PARTS=${PARTS:-tests decoding training compiled}
python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch sees no NVIDIA GPU here")'
decode=(python3 benchmarks/decode.py --random_weights --device cuda)
for part in $PARTS; do
  case $part in
    tests) python3 -m pytest -q -m gpu tests/test_graphs.py ;;
    decoding) "${decode[@]}" --batch_size 1 32 8 --rounds 3 --output "$RESULTS/decode_paper_gpu.json" ;;
    training) python3 benchmarks/value_training.py --model tinyllama --device cuda --batch_size 32 --output "$RESULTS/value_training_gpu.json" ;;
    compiled) "${decode[@]}" --batch_size 1 32 --compile --rounds 2 --output "$RESULTS/decode_paper_gpu_compiled.json" ;;
    *) echo "error: PARTS has $part; valid: tests decoding training compiled" >&2; exit 2 ;;
  esac
done
