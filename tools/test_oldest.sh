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
if [ "$(cat "$venv/.peagle-oldest" 2>/dev/null)" != "${wanted[*]} $ROOT" ]; then
    python=$(find_python)
    echo "$NAME: pip install ${wanted[*]} -e $ROOT into $venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${wanted[@]}" -e "$ROOT"
    echo "${wanted[*]} $ROOT" >"$venv/.peagle-oldest"
fi

step pytest
cd "$ROOT"
# subprocesses of the tests find their commands here, too
export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1
python -m pytest -n "$(cores)" --dist loadfile --no-loadscope-reorder \
    tests/test_{cod,collator,segments,attention,block_mask,loss,relay,compile,flex,fake_cuda,draft,resume}.py
