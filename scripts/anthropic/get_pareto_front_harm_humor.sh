#!/usr/bin/env bash
# The front of harm and humor: bash scripts/anthropic/get_pareto_front_harm_humor.sh ITERS BETA [arguments of every stage, e.g. --config tiny]
set -euo pipefail

bash "$(dirname "$0")/../get_pareto_front.sh" anthropic harm,humor "$@"
