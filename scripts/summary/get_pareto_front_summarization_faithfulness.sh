#!/usr/bin/env bash
# The front of summarization and faithfulness:
#   bash scripts/summary/get_pareto_front_summarization_faithfulness.sh ITERS BETA [arguments of every stage]
set -euo pipefail

bash "$(dirname "$0")/../get_pareto_front.sh" summary summarization,faithful "$@"
