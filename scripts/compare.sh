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

for pair in $PAIRS; do
  a=${pair%%,*} b=${pair#*,}
  if [ "$pair" != "$a,$b" ] || [ "$a" = "$b" ] || [[ " $OBJECTIVES " != *" $a "* || " $OBJECTIVES " != *" $b "* ]]; then
    echo "error: PAIRS has $pair; a pair is two of $DATASET's objectives, e.g. ${OBJECTIVES%% *},${OBJECTIVES##* }; valid: $OBJECTIVES" >&2
    exit 2
  fi
done

vector() {  # A WEIGHT_OF_A B WEIGHT_OF_B: --obj_weights in the data set's order; a weight of 0 is left out
  local cells=() objective weight
  for objective in $OBJECTIVES; do
    case $objective in "$1") weight=$2 ;; "$3") weight=$4 ;; *) weight= ;; esac
    cells+=("$(awk -v w="$weight" 'BEGIN { if (w + 0 != 0) printf "%g", w }')")
  done
  (IFS=,; echo "${cells[*]}")
}

rest() { awk -v w="$1" 'BEGIN { printf "%g", 1 - w }'; }
inner() { awk -v w="$1" 'BEGIN { exit !(w > 0 && w < 1) }'; }
both() { [ -e "$1" ] && [ -e "$2" ]; }

points_of() {  # WEIGHTS PAIR...: the pairs' points at these weights, each once (pairs share their ends), one per line
  local weights=$1 pair w
  for pair in "${@:2}"; do
    for w in $weights; do vector "${pair%,*}" "$w" "${pair#*,}" "$(rest "$w")"; done
  done | awk '!seen[$0]++ { print "--obj_weights=" $0 }'
}

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
# One command per method and seed: the weights of all pairs (and betas) are points from one load of the models.
# shellcheck disable=SC2086
{
  mapfile -t POINTS < <(points_of "$WEIGHTS" $PAIRS)
  mapfile -t ENDS < <(points_of "0 1" $PAIRS)
}
TABLE_PAIRS=
for pair in $PAIRS; do
  if both "$WORKSPACE/token_tables/${pair%,*}.safetensors" "$WORKSPACE/token_tables/${pair#*,}.safetensors"; then
    TABLE_PAIRS+=" $pair"
  elif has table; then
    echo "note: no token tables of $pair in $WORKSPACE/token_tables (fit_token_table.py makes them): left out"
  fi
done
declare -A STEERED  # {iteration: pairs that have its value models}
for pair in $PAIRS; do
  found=
  for folder in "$WORKSPACE"/value_models/iter_*; do
    both "$folder/${pair%,*}/metrics.json" "$folder/${pair#*,}/metrics.json" || continue
    found=1
    STEERED[${folder##*iter_}]+=" $pair"
  done
  if [ -z "$found" ] && { has mavis || has beam; }; then
    echo "note: no value models of $pair in $WORKSPACE/value_models (scripts/train_iter_0.sh makes them): left out"
  fi
done

# shellcheck disable=SC2086
for seed in $SEEDS; do
  RUN=("${EVAL[@]}" --seed "$seed")
  if has reference; then stage "reference, seed $seed" python baseline_eval.py "${RUN[@]}"; fi
  if has table && [ -n "$TABLE_PAIRS" ]; then
    mapfile -t points < <(points_of "$WEIGHTS" $TABLE_PAIRS)
    stage "token table, seed $seed" python baseline_eval.py --token_table --beta $BETAS "${points[@]}" "${RUN[@]}"
  fi
  for n in $(printf '%s\n' "${!STEERED[@]}" | sort -n); do
    mapfile -t points < <(points_of "$WEIGHTS" ${STEERED[$n]})
    steered=(--value_model_iter "$n" "${points[@]}" "${RUN[@]}")
    if has mavis; then stage "mavis, iteration $n, seed $seed" python mavis.py --beta $BETAS "${steered[@]}"; fi
    if has beam; then
      stage "beam search, iteration $n, seed $seed" python mavis_bs.py --Q 4 --N 4 --beta $BEAM_BETAS "${steered[@]}"
    fi
  done
  for n in $NUM_SAMPLES; do
    if has best_of; then
      stage "best of $n, seed $seed" python baseline_eval.py --num_samples "$n" "${POINTS[@]}" "${RUN[@]}"
    fi
  done
  if has morlhf; then
    stage "MORLHF, seed $seed" python baseline_eval_KL.py --morlhf "${POINTS[@]}" "${RUN[@]}"
  elif has ppo; then  # MORLHF's ends are the single policies
    stage "policies, seed $seed" python baseline_eval_KL.py --morlhf "${ENDS[@]}" "${RUN[@]}"
  fi
  if has soups; then stage "soups, seed $seed" python baseline_eval_KL.py --ppo "${POINTS[@]}" "${RUN[@]}"; fi
  if has mod; then stage "MOD, seed $seed" python mod_eval.py "${POINTS[@]}" "${RUN[@]}"; fi
  for beta in $ARM_BETAS; do
    if has arm; then
      stage "GenARM, beta $beta, seed $seed" python baseline_eval_KL.py --arm --arm_beta "$beta" "${POINTS[@]}" "${RUN[@]}"
    fi
  done
done

# --------------------------------------------------------------------------------------------------------- the report
LOGS=()
for kind in mavis_logs mavis_bs_logs baseline_logs baseline_bon_logs; do
  if [ -d "$WORKSPACE/$kind/$DATASET" ]; then LOGS+=("$WORKSPACE/$kind/$DATASET"); fi
done
stage "report" python pareto_report.py "${LOGS[@]}" --output_dir "$WORKSPACE/report_compare"
