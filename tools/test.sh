#!/usr/bin/env bash
# Set up and run all tests, the slow ones too: a file at a time on each core. With arguments, which go to pytest, in one
# process. --install-only: set up, run nothing.
set -euo pipefail
NAME="test"
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step environment
enter_environment
step install
install -e "${ROOT}[test]"
if [ "${1:-}" = --install-only ]; then exit 0; fi

step pytest
cd "$ROOT" # paths among the arguments are the repository's
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# = 0 ]; then set -- -n "$(cores)" --dist loadfile --no-loadscope-reorder; fi
python -m pytest "$@"
