#!/usr/bin/env bash
# Sourced by the other scripts (or run once by hand): the repository's folder, its virtual environment, and `stage`.
# The environment is .venv, or the folder that MAVIS_VENV names; it is made anew when requirements.txt changes.
set -euo pipefail

# Relative paths among the arguments of the script that sources this, and in its environment, are meant from where its
# user is, as the stages take them: of --config and --workspace, and a configuration that is the first argument.
for NAME in CONFIG MAVIS_CONFIG DATA_DIR MAVIS_VENV; do
  if [ -e "${!NAME:-}" ]; then printf -v "$NAME" %s "$(realpath "${!NAME}")"; fi
done
if [ -n "${WORKSPACE:-}" ]; then WORKSPACE=$(realpath -m "$WORKSPACE"); fi
GIVEN=() BEFORE=
for ARGUMENT in "$@"; do
  case $BEFORE in
    --workspace) if [ -n "$ARGUMENT" ]; then ARGUMENT=$(realpath -m "$ARGUMENT"); fi ;;
    --config | "") if [ -f "$ARGUMENT" ]; then ARGUMENT=$(realpath "$ARGUMENT"); fi ;;
  esac
  case $ARGUMENT in
    --workspace=?*) ARGUMENT=--workspace=$(realpath -m "${ARGUMENT#*=}") ;;
    --config=*) if [ -f "${ARGUMENT#*=}" ]; then ARGUMENT=--config=$(realpath "${ARGUMENT#*=}"); fi ;;
  esac
  GIVEN+=("$ARGUMENT") BEFORE=$ARGUMENT
done
set -- "${GIVEN[@]}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${MAVIS_VENV:-.venv}
STAMP=$VENV/.requirements
WANTED=$(cksum < requirements.txt)
if [ "$(cat "$STAMP" 2>/dev/null || true)" != "$WANTED" ]; then
  command -v python3 > /dev/null || { echo "error: no python3; install Python 3.11 or newer" >&2; exit 1; }
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { echo "error: $(python3 --version) is too old; install Python 3.11 or newer" >&2; exit 1; }
  echo "making the virtual environment $VENV (about 3 minutes)"
  [ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$WANTED" > "$STAMP"
fi
export PATH="$(cd "$VENV/bin" && pwd):$PATH"
export TOKENIZERS_PARALLELISM=false

# stage NAME COMMAND...: run a stage, say how long it took, and note that in $LOG where one is set.
stage() {
  local name=$1 began=$SECONDS
  shift
  echo
  echo "== $name: $*"
  "$@"
  local seconds=$((SECONDS - began))
  printf -- '-- %s: %d min %02d s\n' "$name" $((seconds / 60)) $((seconds % 60))
  if [ -n "${LOG:-}" ]; then
    mkdir -p "$(dirname "$LOG")"
    printf '%s\t%s\t%d\n' "$(date -u +%FT%TZ)" "$name" "$seconds" >> "$LOG"
  fi
}

# aside NAME COMMAND...: a stage beside the next ones, for what these do not wait for; it ends with the script.
# joined: wait for it, print what it said, and fail where it failed.
aside() {
  ASIDE_SAID=$(mktemp)
  set -m  # a process group of its own, so that all of it can be ended
  stage "$@" > "$ASIDE_SAID" 2>&1 < /dev/null &
  ASIDE=$!
  set +m
  trap 'kill -- -"$ASIDE" 2> /dev/null || true; rm -f "$ASIDE_SAID"' EXIT
}

joined() {
  local status=0
  wait "$ASIDE" || status=$?
  cat "$ASIDE_SAID"
  rm -f "$ASIDE_SAID"
  trap - EXIT
  return $status
}

# workspace_of ARGUMENTS...: the workspace that a stage with these arguments works in.
workspace_of() { of_config workspace "$@"; }

# objectives_of DATASET ARGUMENTS...: its name for Finetuning/ scripts, and its objectives in their order.
objectives_of() { of_config "$@"; }

of_config() {  # workspace|DATASET ARGUMENTS...: what the configuration that these arguments name says of it
  python - "$@" <<'PYTHON'
import sys
from argparse import ArgumentParser

sys.path.insert(0, ".")
from utils import cli


def main():
    parser = ArgumentParser()
    cli.add_common(parser)
    config, what = cli.config_from(parser.parse_known_args(sys.argv[2:])[0]), sys.argv[1]
    if what == "workspace":
        print(config.workspace)
    else:
        spec = config.dataset(what)
        print(spec.exp_type, *spec.objectives)


sys.exit(cli.run(main))
PYTHON
}
