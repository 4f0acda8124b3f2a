#!/usr/bin/env bash
# Later iterations of a pair of objectives, side by side: scripts/iterate.sh CONFIG [arguments of every stage]
#
#   OBJECTIVES="help harm" bash scripts/iterate.sh tiny                 after scripts/quickstart.sh; about 6 minutes
#   OBJECTIVES="help relevance" TREE_SHAPE="--num_layers 3" bash scripts/iterate.sh smollm     after scripts/smollm/run.sh
#
# Each iteration's value models go on from the one before, on trees of the policy that they steered. Ends in a table of
# what every iteration's value model explains on every policy's held-out trees (value_quality.json), and in a report of
# the iterations' fronts at one beta. The environment: OBJECTIVES, DATASET (anthropic), ITERATIONS (2), PROMPTS (100),
# NUM_VAL (30), BETA (4), ETA (0), POINTS of a front (3), TREE_SHAPE (arguments of get_data_iter.py). Stopped at any
# moment, the same command goes on.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: scripts/iterate.sh CONFIG [arguments of every stage]" >&2
  exit 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
WORLD=(--config "$1" "${@:2}")
DATASET=${DATASET:-anthropic} OBJECTIVES=${OBJECTIVES:-help harm} ITERATIONS=${ITERATIONS:-2} PROMPTS=${PROMPTS:-100}
POINTS=${POINTS:-3}
export NUM_VAL=${NUM_VAL:-30} BETA=${BETA:-4} ETA=${ETA:-0} TREE_SHAPE=${TREE_SHAPE:-}
WORKSPACE=$(workspace_of "${WORLD[@]}")
export LOG=$WORKSPACE/iterations.log
DATA=(--dataset "$DATASET")

for ((iteration = 0; iteration <= ITERATIONS; iteration++)); do
  if [ "$iteration" -gt 0 ]; then
    bash scripts/train_iter_n.sh "$DATASET" "$iteration" "$PROMPTS" "$OBJECTIVES" "${WORLD[@]}"
  fi
  stage "front, iteration $iteration" python mavis.py --front "${OBJECTIVES// /,}" --points "$POINTS" --beta "$BETA" \
    --value_model_iter "$iteration" "${DATA[@]}" "${WORLD[@]}"
done
stage "quality" python scripts/value_quality.py --objectives "${OBJECTIVES// /,}" --iterations "$ITERATIONS" "${DATA[@]}" "${WORLD[@]}"
stage "report" python pareto_report.py "$WORKSPACE/mavis_logs/$DATASET" "$WORKSPACE/baseline_logs/$DATASET" \
  --objectives "${OBJECTIVES// /,}" --output_dir "$WORKSPACE/report_iterations"
