#!/usr/bin/env bash
# Every method on the same prompts with the same statistics, for each pair of objectives, and a report of their fronts:
#
#   bash scripts/compare.sh tiny [arguments of every stage, e.g. --workspace W --device cpu]
#
# The reference, the token table, MAVIS at several betas and at every iteration of value models that is there, beam
# search, best of N, and the trained baselines: single policies, MORLHF, Rewarded Soups, MOD, and autoregressive reward
# models. What must be trained for them is trained; value models and token tables are taken as they are (their own
# scripts make them). Stopped at any moment, the same command goes on. The environment narrows it:
#
#   DATASET      data set (anthropic)                    PAIRS        pairs of objectives, e.g. "help,harm help,humor" (all)
#   METHODS      of: reference table mavis beam best_of ppo morlhf soups mod arm (all)
#   WEIGHTS      of a pair's first objective (0 0.2 0.4 0.6 0.8 1)          SEEDS        of the sampling (0 1 2)
#   BETAS        of MAVIS and the table (1 2 4 8)        BEAM_BETAS   of beam search (4)        ARM_BETAS    (1)
#   NUM_SAMPLES  of best of N (2 4 8 16)                 NUM_PROMPTS, NUM_TRIALS                (the configuration's)
#   PPO_ARGS, ARM_ARGS   further arguments of the trainings, e.g. "--max_steps 10"
set -euo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: scripts/compare.sh CONFIG [arguments of every stage]" >&2
  exit 2
fi
METHODS=${METHODS:-reference table mavis beam best_of ppo morlhf soups mod arm}
for method in $METHODS; do
  case $method in
    reference | table | mavis | beam | best_of | ppo | morlhf | soups | mod | arm) ;;
    *) echo "error: METHODS has $method; valid: reference table mavis beam best_of ppo morlhf soups mod arm" >&2; exit 2 ;;
  esac
done

. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
WORLD=(--config "$1" "${@:2}")
DATASET=${DATASET:-anthropic}
WEIGHTS=${WEIGHTS:-0 0.2 0.4 0.6 0.8 1} SEEDS=${SEEDS:-0 1 2}
BETAS=${BETAS:-1 2 4 8} BEAM_BETAS=${BEAM_BETAS:-4} ARM_BETAS=${ARM_BETAS:-1} NUM_SAMPLES=${NUM_SAMPLES:-2 4 8 16}
WORKSPACE=$(workspace_of "${WORLD[@]}")
LOG=$WORKSPACE/compare.log
DATA=(--dataset "$DATASET")
EVAL=("${DATA[@]}" "${WORLD[@]}" ${NUM_PROMPTS:+--num_prompts "$NUM_PROMPTS"} ${NUM_TRIALS:+--num_trials "$NUM_TRIALS"})

has() { [[ " $METHODS " == *" $1 "* ]]; }

# The name that Finetuning/ scripts have for the data set, and its objectives in their order.
read -r EXP_TYPE OBJECTIVES <<< "$(objectives_of "$DATASET" "${WORLD[@]}")"
[ -n "$OBJECTIVES" ] || exit 2
if [ -z "${PAIRS:-}" ]; then
  read -r -a names <<< "$OBJECTIVES"
  for ((i = 0; i < ${#names[@]}; i++)); do
    for ((j = i + 1; j < ${#names[@]}; j++)); do PAIRS="${PAIRS:-} ${names[i]},${names[j]}"; done
  done
fi

vector() {  # A WEIGHT_OF_A B WEIGHT_OF_B: --obj_weights in the data set's order
  local cells=() objective
  for objective in $OBJECTIVES; do
    case $objective in "$1") cells+=("$2") ;; "$3") cells+=("$4") ;; *) cells+=("") ;; esac
  done
  (IFS=,; echo "${cells[*]}")
}

rest() { awk -v w="$1" 'BEGIN { printf "%g", 1 - w }'; }
inner() { awk -v w="$1" 'BEGIN { exit !(w > 0 && w < 1) }'; }
both() { [ -e "$1" ] && [ -e "$2" ]; }

# ------------------------------------------------------------------------------------------------ what must be trained
for pair in $PAIRS; do
  a=${pair%,*} b=${pair#*,}
  for objective in "$a" "$b"; do
    if has ppo || has morlhf || has soups || has mod; then
      # shellcheck disable=SC2086
      stage "policy of $objective" python Finetuning/PPO/ppo.py --exp_type "$EXP_TYPE" --reward_models "$objective" "${WORLD[@]}" ${PPO_ARGS:-}
    fi
    if has arm; then
      # shellcheck disable=SC2086
      stage "reward model of $objective" python Finetuning/ARM/train_arm.py --objective "$objective" "${DATA[@]}" "${WORLD[@]}" ${ARM_ARGS:-}
    fi
  done
  for w in $WEIGHTS; do
    inner "$w" || continue
    if has morlhf; then
      # shellcheck disable=SC2086
      stage "MORLHF $pair $w" python Finetuning/PPO/ppo.py --exp_type "$EXP_TYPE" --reward_models "$a" "$b" --alpha "$w" "${WORLD[@]}" ${PPO_ARGS:-}
    fi
    if has soups; then
      stage "soup $pair $w" python Finetuning/reward_soup_merge.py --objectives "$a" "$b" --weights "$w" "$(rest "$w")" "${DATA[@]}" "${WORLD[@]}"
    fi
  done
done

# -------------------------------------------------------------------------------------------------------- evaluations
# One command per method, pair and seed: its weights (and betas) are points from one load of the models.
for seed in $SEEDS; do
  SEED=(--seed "$seed")
  if has reference; then stage "reference, seed $seed" python baseline_eval.py "${EVAL[@]}" "${SEED[@]}"; fi
  for pair in $PAIRS; do
    a=${pair%,*} b=${pair#*,}
    at="$pair, seed $seed"
    POINTS=() ENDS=()
    for w in $WEIGHTS; do
      v=$(vector "$a" "$w" "$b" "$(rest "$w")")
      POINTS+=(--obj_weights "$v")
      inner "$w" || ENDS+=(--obj_weights "$v")
    done
    if has table; then
      if both "$WORKSPACE/token_tables/$a.safetensors" "$WORKSPACE/token_tables/$b.safetensors"; then
        # shellcheck disable=SC2086
        stage "token table $at" python baseline_eval.py --token_table --beta $BETAS "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"
      else
        echo "note: no token tables of $pair in $WORKSPACE/token_tables (fit_token_table.py makes them): left out"
      fi
    fi
    found=
    for folder in "$WORKSPACE"/value_models/iter_*; do
      both "$folder/$a/metrics.json" "$folder/$b/metrics.json" || continue
      found=1 n=${folder##*iter_}
      if has mavis; then
        # shellcheck disable=SC2086
        stage "mavis $at, iteration $n" python mavis.py --value_model_iter "$n" --beta $BETAS "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"
      fi
      if has beam; then
        # shellcheck disable=SC2086
        stage "beam search $at, iteration $n" python mavis_bs.py --Q 4 --N 4 --value_model_iter "$n" --beta $BEAM_BETAS "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"
      fi
    done
    if [ -z "$found" ] && { has mavis || has beam; }; then
      echo "note: no value models of $pair in $WORKSPACE/value_models (scripts/train_iter_0.sh makes them): left out"
    fi
    for n in $NUM_SAMPLES; do
      if has best_of; then stage "best of $n $at" python baseline_eval.py --num_samples "$n" "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"; fi
    done
    if has morlhf; then
      stage "MORLHF $at" python baseline_eval_KL.py --morlhf "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"
    elif has ppo && [ ${#ENDS[@]} -gt 0 ]; then  # MORLHF's ends are the single policies
      stage "policies $at" python baseline_eval_KL.py --morlhf "${ENDS[@]}" "${EVAL[@]}" "${SEED[@]}"
    fi
    if has soups; then stage "soups $at" python baseline_eval_KL.py --ppo "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"; fi
    if has mod; then stage "MOD $at" python mod_eval.py "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"; fi
    for beta in $ARM_BETAS; do
      if has arm; then stage "GenARM $at, beta $beta" python baseline_eval_KL.py --arm --arm_beta "$beta" "${POINTS[@]}" "${EVAL[@]}" "${SEED[@]}"; fi
    done
  done
done

# --------------------------------------------------------------------------------------------------------- the report
LOGS=()
for kind in mavis_logs mavis_bs_logs baseline_logs baseline_bon_logs; do
  if [ -d "$WORKSPACE/$kind/$DATASET" ]; then LOGS+=("$WORKSPACE/$kind/$DATASET"); fi
done
stage "report" python pareto_report.py "${LOGS[@]}" --output_dir "$WORKSPACE/report_compare"
