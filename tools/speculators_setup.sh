#!/usr/bin/env bash
# The package speculators with this project beside it, for `pytest -m speculators`, in an environment of its own: the folder given, or .venv-speculators.
# Exit code 3 where there is none for this machine.
set -euo pipefail
NAME=speculators_setup
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step install
install_beside speculators==0.9.0 "$(absolute "${1:-$ROOT/.venv-speculators}")"
