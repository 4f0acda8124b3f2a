#!/usr/bin/env bash
# The tests: style, then everything that is neither slow nor in need of a GPU. Arguments go to pytest.
set -euo pipefail

. "$(dirname "$0")/env.sh"
ruff check .
python -m pytest -q -m "not slow and not gpu" "$@"
