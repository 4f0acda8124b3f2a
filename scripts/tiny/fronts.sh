#!/usr/bin/env bash
# The front of every pair of objectives in the tiny world, dialogue and summaries, each data set with its page:
#
#   bash scripts/tiny/fronts.sh          about 5 minutes on 2 CPU cores after scripts/quickstart.sh, whose work it goes on from
#
# Stopped at any moment, the same command goes on. WORKSPACE names another folder.
set -euo pipefail

cd "$(dirname "$0")/../.."
export WORKSPACE=${WORKSPACE:-workspaces/tiny} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
bash scripts/quickstart.sh
. scripts/env.sh
export LOG=$WORKSPACE/run.log
WORLD=(--config tiny --workspace "$WORKSPACE")
SFT=$WORKSPACE/sft_lora

stage "fine-tuning, summary" python Finetuning/SFT/sft.py --save_directory "$SFT" --wandb_name summary --exp_type summary "${WORLD[@]}"
stage "merge, summary" python Finetuning/SFT/merge_sft_lora.py --lora_name "$SFT/summary" --exp_type summary "${WORLD[@]}"
for dataset in anthropic summary; do
  bash scripts/train_iter_0.sh "$dataset" 300 all "${WORLD[@]}"
  stage "token tables" python fit_token_table.py "$WORKSPACE/data_for_training/$dataset/iter_0" all --dataset "$dataset" "${WORLD[@]}"
  bash scripts/get_pareto_front.sh "$dataset" all 0 4 "${WORLD[@]}"
done
echo
echo "pages: $WORKSPACE/report/anthropic_all/report.html, $WORKSPACE/report/summary_all/report.html"
