#!/usr/bin/env bash
# A later iteration of the anthropic data set: bash scripts/anthropic/train_iter_n.sh ITER NUM_PROMPTS [arguments of every stage]
set -euo pipefail

. "$(dirname "$0")/../env.sh"
[ $# -ge 2 ] || { echo "usage: scripts/anthropic/train_iter_n.sh ITER NUM_PROMPTS [arguments of every stage]" >&2; exit 2; }
ITER=$1 NUM=$2
shift 2
bash scripts/train_iter_n.sh anthropic "$ITER" "$NUM" "help harm humor" "$@"
