#!/usr/bin/env bash
# The front of two objectives: scripts/get_pareto_front.sh DATASET A,B ITERS BETA [arguments of every stage]
#
# MAVIS at the weights 0, 0.2, ..., 1 (the models are loaded once), the token table at the same points where there is one
# of each objective (fit_token_table.py), the reference, and the report of the pair. `all` in place of A,B is every pair of
# the data set's objectives, in one report. ITERS is each objective's iteration as --value_model_iter takes it, e.g. 0 or
# 1,,0. scripts/anthropic/get_pareto_front_*.sh and scripts/summary/get_pareto_front_*.sh call it. Stopped at any moment,
# the same command goes on.
set -euo pipefail

. "$(dirname "$0")/env.sh"
if [ $# -lt 4 ]; then
  echo 'usage: scripts/get_pareto_front.sh DATASET A,B|all ITERS BETA [arguments of every stage]' >&2
  exit 2
fi
DATASET=$1 PAIR=$2 ITERS=$3 BETA=$4
shift 4
DATA=(--dataset "$DATASET" "$@")
WORKSPACE=$(workspace_of "$@")

FRONT=(--front "$PAIR" --points 6)
OBJECTIVES=${PAIR/,/ } OF_PAIR=(--objectives "$PAIR")
if [ "$PAIR" = all ]; then
  read -r _ OBJECTIVES <<< "$(objectives_of "$DATASET" "$@")"
  OF_PAIR=()
fi
tables=1
for objective in $OBJECTIVES; do [ -e "$WORKSPACE/token_tables/$objective.safetensors" ] || tables=; done

stage "front of $PAIR" python mavis.py "${FRONT[@]}" --value_model_iter "$ITERS" --beta "$BETA" "${DATA[@]}"
if [ -n "$tables" ]; then stage "token table" python baseline_eval.py --token_table "${FRONT[@]}" --beta "$BETA" "${DATA[@]}"; fi
stage "reference" python baseline_eval.py "${DATA[@]}"
stage "report" python pareto_report.py "$WORKSPACE/mavis_logs/$DATASET" "$WORKSPACE/baseline_logs/$DATASET" \
  "${OF_PAIR[@]}" --output_dir "$WORKSPACE/report/${DATASET}_${PAIR/,/_}"
