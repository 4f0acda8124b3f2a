#!/usr/bin/env bash
# Later iterations of the small world, after scripts/smollm/run.sh: value models of two objectives, fitted again on trees
# of the policy that they steered.
#
#   DATA_DIR=/path/to/data bash scripts/smollm/iterate.sh        about 40 minutes on 2 CPU cores for iterations 1 and 2
#
# Ends in a table of what each iteration's value model explains on each policy's trees, and in the iterations' rewards at
# equal beta. Stopped at any moment, the same command goes on.
set -euo pipefail

. "$(dirname "$0")/../env.sh"
PROMPTS=${PROMPTS:-100} ITERATIONS=${ITERATIONS:-2} OBJECTIVES=${OBJECTIVES:-help relevance}
WORKSPACE=${WORKSPACE:-workspaces/smollm}
LOG=$WORKSPACE/iterations.log
WORLD=(--config smollm --workspace "$WORKSPACE")
DATA=(--dataset anthropic)
export TREE_SHAPE="--num_layers 3" NUM_VAL=${NUM_VAL:-30}
declare -A WEIGHTS=([help]=1 [harm]=0,1 [humor]=0,0,1 [relevance]=0,0,0,1)

for ((iteration = 1; iteration <= ITERATIONS; iteration++)); do
  stage "iteration $iteration" bash scripts/train_iter_n.sh anthropic "$iteration" "$PROMPTS" "$OBJECTIVES" "${WORLD[@]}"
  for objective in $OBJECTIVES; do
    stage "mavis $objective" python mavis.py --obj_weights "${WEIGHTS[$objective]}" --beta 4 --value_model_iter "$iteration" "${DATA[@]}" "${WORLD[@]}"
  done
done
stage "quality" python scripts/value_quality.py --objectives "${OBJECTIVES// /,}" --iterations "$ITERATIONS" "${DATA[@]}" "${WORLD[@]}"
