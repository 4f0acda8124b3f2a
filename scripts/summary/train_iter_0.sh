#!/usr/bin/env bash
# Iteration 0 of the summary data set: trees under the reference, labels, one value model per objective.
#
#   bash scripts/summary/train_iter_0.sh [NUM_PROMPTS] [arguments of every stage, e.g. --config tiny]
#
# Published: 3000 prompts. With the paper's models: days on one A100; split the collection by prompt ranges (--device).
# The SFT reference must be there (Finetuning/SFT). Stopped at any moment, the same command goes on.
set -euo pipefail

. "$(dirname "$0")/../env.sh"
NUM=3000
if [ $# -gt 0 ] && [[ $1 =~ ^[0-9]+$ ]]; then NUM=$1; shift; fi
bash scripts/train_iter_0.sh summary "$NUM" "summarization faithful" "$@"
