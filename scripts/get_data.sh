#!/usr/bin/env bash
# A later iteration's trees, labelled: scripts/get_data.sh ITER NUM OUT TOPK OBJECTIVE [BETA] [VALUE_MODEL_DIR]
#
#   bash scripts/get_data.sh 1 1000 tree_data/anthropic/iter_1/help 15 help 4
#
# grows NUM trees under the MAVIS policy of OBJECTIVE's value model of iteration ITER - 1 and labels them. DATASET
# (default anthropic) and CONFIG come from the environment. Stops at the first error; the same command goes on.
set -euo pipefail

# The folders are the user's, from where the user is.
if [ $# -ge 5 ]; then set -- "$1" "$2" "$(realpath -m "$3")" "$4" "$5" "${6:-4}" ${7:+"$(realpath -m "$7")"}; fi
. "$(dirname "$0")/env.sh"
[ $# -ge 5 ] || { echo "usage: scripts/get_data.sh ITER NUM OUT TOPK OBJECTIVE [BETA] [VALUE_MODEL_DIR]" >&2; exit 2; }
ITER=$1 NUM=$2 OUT=$3 TOPK=$4 OBJECTIVE=$5 BETA=${6:-4} VALUE_MODEL_DIR=${7:-}
[ "$ITER" -ge 1 ] || { echo "error: ITER must be at least 1; iteration 0 is get_data_base.py's" >&2; exit 2; }
COMMON=(--dataset "${DATASET:-anthropic}")
[ -z "${CONFIG:-}" ] || COMMON+=(--config "$CONFIG")
[ -z "${WORKSPACE:-}" ] || COMMON+=(--workspace "$WORKSPACE")
VALUES=(--value_model_iter $((ITER - 1)))
[ -z "$VALUE_MODEL_DIR" ] || VALUES+=(--value_model_dir "$VALUE_MODEL_DIR")

stage "trees $OBJECTIVE" python get_data_iter.py 0 "$NUM" "$OBJECTIVE" --beta "$BETA" --topk "$TOPK" --output_dir "$OUT" "${VALUES[@]}" "${COMMON[@]}"
stage "labels $OBJECTIVE" python label_tree.py "$OUT" "$OBJECTIVE" "${COMMON[@]}"
