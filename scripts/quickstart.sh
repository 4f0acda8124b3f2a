#!/usr/bin/env bash
# From nothing to a Pareto front that was steered at decoding time: every stage in the tiny world, offline, on a CPU.
#
#   bash scripts/quickstart.sh          about 3 minutes on 2 CPU cores, after the installation
#
# The world is a generated language (utils/tiny_world.py), so its figures say nothing about real text: they show that
# the chain works. Stopped at any moment, the same command goes on. WORKSPACE names another folder.
set -euo pipefail

. "$(dirname "$0")/env.sh"
WORKSPACE=${WORKSPACE:-workspaces/tiny}
LOG=$WORKSPACE/run.log
WORLD=(--config tiny --workspace "$WORKSPACE")
DATA=(--dataset anthropic)
TREES=$WORKSPACE/tree_data/anthropic/iter_0
TRAINING=$WORKSPACE/data_for_training/anthropic/iter_0
BETA=4
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models this small lose more by waiting for a second thread than they gain
export HF_HUB_OFFLINE=1

stage "world" python scripts/tiny/make_world.py --workspace "$WORKSPACE"
aside "reward model" python Finetuning/RM/train_reward_model.py --objective humor "${WORLD[@]}"
stage "prompts" python dataset_preprocess.py anthropic --split=train "${WORLD[@]}"
stage "prompts" python dataset_preprocess.py anthropic --split=test "${WORLD[@]}"
stage "fine-tuning" python Finetuning/SFT/sft.py --save_directory "$WORKSPACE/sft_lora" --wandb_name anthropic --exp_type assistant "${WORLD[@]}"
stage "merge" python Finetuning/SFT/merge_sft_lora.py --lora_name "$WORKSPACE/sft_lora/anthropic" --exp_type assistant "${WORLD[@]}"
stage "trees" python get_data_base.py 0 300 "${DATA[@]}" "${WORLD[@]}"
joined
stage "labels" python label_tree.py "$TREES" all "${DATA[@]}" "${WORLD[@]}"
stage "split" python split_data.py "$TREES" --output_dir "$TRAINING" "${DATA[@]}" "${WORLD[@]}"
aside "value model of harm" python train_value_model.py --objective harm --data_dir "$TRAINING" "${DATA[@]}" "${WORLD[@]}"
stage "value model of help" python train_value_model.py --objective help --data_dir "$TRAINING" "${DATA[@]}" "${WORLD[@]}"
joined
stage "token tables" python fit_token_table.py "$TRAINING" help,harm "${DATA[@]}" "${WORLD[@]}"

stage "reference" python baseline_eval.py "${DATA[@]}" "${WORLD[@]}"
stage "mavis" python mavis.py --front help,harm --points 6 --beta "$BETA" --track_KL "${DATA[@]}" "${WORLD[@]}"
stage "token table" python baseline_eval.py --token_table --obj_weights 1,0 --obj_weights 0.6,0.4 --obj_weights 0,1 --beta "$BETA" \
  "${DATA[@]}" "${WORLD[@]}"
stage "best of 4" python baseline_eval.py --num_samples 4 --obj_weights 0.6,0.4 "${DATA[@]}" "${WORLD[@]}"
stage "report" python pareto_report.py "$WORKSPACE/mavis_logs" "$WORKSPACE/baseline_logs" "$WORKSPACE/baseline_bon_logs" \
  --objectives help,harm --output_dir "$WORKSPACE/report"
echo
echo "the front of help and harm: $WORKSPACE/report/anthropic_help_harm_front.png (its numbers: $WORKSPACE/report/report.md)"
