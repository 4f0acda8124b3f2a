#!/usr/bin/env bash
# The front of two objectives: scripts/get_pareto_front.sh DATASET A,B ITERS BETA [arguments of every stage]
#
# MAVIS at the weights 0, 0.2, ..., 1 (the models are loaded once), the reference, and the report of the pair. ITERS is
# each objective's iteration as --value_model_iter takes it, e.g. 0 or 1,,0. scripts/anthropic/get_pareto_front_*.sh and
# scripts/summary/get_pareto_front_*.sh call it. Stopped at any moment, the same command goes on.
set -euo pipefail

. "$(dirname "$0")/env.sh"
if [ $# -lt 4 ]; then
  echo 'usage: scripts/get_pareto_front.sh DATASET A,B ITERS BETA [arguments of every stage]' >&2
  exit 2
fi
DATASET=$1 PAIR=$2 ITERS=$3 BETA=$4
shift 4
DATA=(--dataset "$DATASET" "$@")
WORKSPACE=$(workspace_of "$@")

stage "front of $PAIR" python mavis.py --front "$PAIR" --points 6 --value_model_iter "$ITERS" --beta "$BETA" "${DATA[@]}"
stage "reference" python baseline_eval.py "${DATA[@]}"
stage "report" python pareto_report.py "$WORKSPACE/mavis_logs/$DATASET" "$WORKSPACE/baseline_logs/$DATASET" \
  --objectives "$PAIR" --output_dir "$WORKSPACE/report/${DATASET}_${PAIR/,/_}"
