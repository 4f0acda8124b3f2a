#!/usr/bin/env bash
# A whole later iteration: scripts/train_iter_n.sh DATASET ITER NUM "OBJECTIVES" [arguments of every stage]
#
# For each objective: trees under the MAVIS policy of its value model of iteration ITER - 1, labels, split, and training
# that goes on from that value model. BETA (default 4) is the policy's, ETA (default 0) the weight of the expected
# log-ratio in soft values, TREE_SHAPE further arguments of get_data_iter.py, e.g. "--num_layers 3". scripts/anthropic/train_iter_n.sh and scripts/summary/train_iter_n.sh call it.
set -euo pipefail

. "$(dirname "$0")/env.sh"
if [ $# -lt 4 ]; then
  echo 'usage: scripts/train_iter_n.sh DATASET ITER NUM "OBJECTIVES" [arguments of every stage]' >&2
  exit 2
fi
DATASET=$1 ITER=$2 NUM=$3 OBJECTIVES=$4 BETA=${BETA:-4} ETA=${ETA:-0}
shift 4
[ "$ITER" -ge 1 ] || { echo "error: ITER must be at least 1; iteration 0 is scripts/train_iter_0.sh's" >&2; exit 2; }
DATA=(--dataset "$DATASET" "$@")
WORKSPACE=$(workspace_of "$@")

for objective in $OBJECTIVES; do
  TREES=$WORKSPACE/tree_data/$DATASET/iter_$ITER/$objective
  TRAINING=$WORKSPACE/data_for_training/$DATASET/iter_$ITER/$objective
  stage "trees $objective" python get_data_iter.py 0 "$NUM" "$objective" --value_model_iter $((ITER - 1)) --beta "$BETA" ${TREE_SHAPE:-} "${DATA[@]}"
  stage "labels $objective" python label_tree.py "$TREES" "$objective" --soft "${DATA[@]}"
  stage "split $objective" python split_data.py "$TREES" ${NUM_VAL:+--num_val "$NUM_VAL"} --output_dir "$TRAINING" "${DATA[@]}"
  stage "value model $objective" python train_value_model.py --objective "$objective" --data_dir "$TRAINING" \
    --init_checkpoint "$WORKSPACE/value_models/iter_$((ITER - 1))/$objective" --no_warmup --KL_penalty "$ETA" "${DATA[@]}"
done
