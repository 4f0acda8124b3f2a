#!/usr/bin/env bash
# One iteration under the reference, for a data set: scripts/train_iter_0.sh DATASET NUM_PROMPTS "OBJECTIVES" [ARGUMENTS]
# scripts/anthropic/train_iter_0.sh and scripts/summary/train_iter_0.sh call it with the published numbers. NUM_VAL is the
# number of prompts for validation (default: the configuration's).
set -euo pipefail

. "$(dirname "$0")/env.sh"
if [ $# -lt 3 ]; then
  echo 'usage: scripts/train_iter_0.sh DATASET NUM_PROMPTS "OBJECTIVES" [arguments of every stage]' >&2
  exit 2
fi
DATASET=$1 NUM=$2 OBJECTIVES=$3
shift 3
DATA=(--dataset "$DATASET" "$@")
WORKSPACE=$(workspace_of "$@")
TREES=$WORKSPACE/tree_data/$DATASET/iter_0
TRAINING=$WORKSPACE/data_for_training/$DATASET/iter_0

stage "prompts" python dataset_preprocess.py "$DATASET" --split=train "$@"
stage "prompts" python dataset_preprocess.py "$DATASET" --split=test "$@"
stage "trees" python get_data_base.py 0 "$NUM" "${DATA[@]}"
stage "labels" python label_tree.py "$TREES" all "${DATA[@]}"
stage "check" python label_tree.py "$TREES" all --check_trees "${DATA[@]}"
stage "split" python split_data.py "$TREES" ${NUM_VAL:+--num_val "$NUM_VAL"} --output_dir "$TRAINING" "${DATA[@]}"
stage "value models" python train_value_model.py --objective "${OBJECTIVES// /,}" --data_dir "$TRAINING" "${DATA[@]}"
