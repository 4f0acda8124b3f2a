#!/usr/bin/env bash
# The fronts of all pairs, in one report: bash scripts/anthropic/get_pareto_fronts.sh ITERS BETA [arguments of every stage, e.g. --config tiny]
set -euo pipefail

bash "$(dirname "$0")/../get_pareto_front.sh" anthropic all "$@"
