#!/usr/bin/env bash
# The core's tests with the oldest versions that pyproject.toml allows. PyPI's torch is built for CUDA, so that its Triton
# code is written, too, for a GPU that need not be there. Usage: test_oldest.sh [FOLDER]: of an environment with these
# versions; it is made where there is none (5 GB).
set -euo pipefail
NAME="test_oldest"
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

venv=$(absolute "${1:-${PEAGLE_CACHE:-$HOME/.cache/peagle_train}/venv-oldest}")
wanted=("torch==2.11.0" "transformers==5.17.*" "accelerate==1.15.*" pytest pytest-xdist hypothesis)

step install
enter_environment "$venv"
install "${wanted[@]}" -e "$ROOT"

step pytest
cd "$ROOT"
export OMP_NUM_THREADS=1
python -m pytest -n "$(cores)" --dist loadfile --no-loadscope-reorder \
    tests/test_{cod,collator,segments,attention,block_mask,loss,relay,compile,flex,fake_cuda,draft,resume}.py
