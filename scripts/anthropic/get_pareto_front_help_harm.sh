#!/usr/bin/env bash
# The front of help and harm: bash scripts/anthropic/get_pareto_front_help_harm.sh ITERS BETA [arguments of every stage, e.g. --config tiny]
set -euo pipefail

bash "$(dirname "$0")/../get_pareto_front.sh" anthropic help,harm "$@"
