#!/usr/bin/env bash
# Iteration 0 of the anthropic data set: trees under the reference, labels, one value model per objective.
#
#   bash scripts/anthropic/train_iter_0.sh [NUM_PROMPTS] [arguments of every stage, e.g. --config tiny]
#
# Published: 5000 prompts. With the paper's models: days on one A100; split the collection by prompt ranges (--device).
# The SFT reference must be there (Finetuning/SFT). Stopped at any moment, the same command goes on.
set -euo pipefail

. "$(dirname "$0")/../env.sh"
NUM=5000
if [ $# -gt 0 ] && [[ $1 =~ ^[0-9]+$ ]]; then NUM=$1; shift; fi
bash scripts/train_iter_0.sh anthropic "$NUM" "help harm humor" "$@"
