#!/usr/bin/env bash
# A later iteration of the summary data set: bash scripts/summary/train_iter_n.sh ITER NUM_PROMPTS [arguments of every stage]
set -euo pipefail

. "$(dirname "$0")/../env.sh"
[ $# -ge 2 ] || { echo "usage: scripts/summary/train_iter_n.sh ITER NUM_PROMPTS [arguments of every stage]" >&2; exit 2; }
ITER=$1 NUM=$2
shift 2
bash scripts/train_iter_n.sh summary "$ITER" "$NUM" "summarization faithful" "$@"
