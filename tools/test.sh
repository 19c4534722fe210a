#!/usr/bin/env bash
# Set up and run all tests, the slow ones too. Arguments go to pytest. --install-only: set up, run nothing.
set -euo pipefail
NAME="test"
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step environment
enter_environment
step install
install_extra test
if [ "${1:-}" = --install-only ]; then exit 0; fi

step pytest
cd "$ROOT" # paths among the arguments are the repository's
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(cores)}
python -m pytest "$@"
