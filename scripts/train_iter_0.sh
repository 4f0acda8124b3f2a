#!/usr/bin/env bash
# One iteration under the reference, for a data set: scripts/train_iter_0.sh DATASET NUM_PROMPTS "OBJECTIVES" [ARGUMENTS]
# scripts/anthropic/train_iter_0.sh and scripts/summary/train_iter_0.sh call it with the published numbers.
set -euo pipefail

. "$(dirname "$0")/env.sh"
[ $# -ge 3 ] || { echo 'usage: scripts/train_iter_0.sh DATASET NUM_PROMPTS "OBJECTIVES" [arguments of every stage]' >&2; exit 2; }
DATASET=$1 NUM=$2 OBJECTIVES=$3
shift 3
DATA=(--dataset "$DATASET" "$@")
WORKSPACE=$(python -c 'import sys; sys.path.insert(0, "."); from argparse import ArgumentParser; from utils import cli
p = ArgumentParser(); cli.add_common(p); print(cli.config_from(p.parse_known_args(sys.argv[1:])[0]).workspace)' "$@")
TREES=$WORKSPACE/tree_data/$DATASET/iter_0
TRAINING=$WORKSPACE/data_for_training/$DATASET/iter_0

stage "prompts" python dataset_preprocess.py "$DATASET" --split=train "$@"
stage "prompts" python dataset_preprocess.py "$DATASET" --split=test "$@"
stage "trees" python get_data_base.py 0 "$NUM" "${DATA[@]}"
stage "labels" python label_tree.py "$TREES" all "${DATA[@]}"
stage "check" python label_tree.py "$TREES" all --check_trees "${DATA[@]}"
stage "split" python split_data.py "$TREES" --output_dir "$TRAINING" "${DATA[@]}"
for objective in $OBJECTIVES; do
  stage "value model $objective" python train_value_model.py --objective "$objective" --data_dir "$TRAINING" "${DATA[@]}"
done
