# Sourced by the scripts beside it, which set -euo pipefail and NAME (how they call themselves) first.
# shellcheck shell=bash

unset CDPATH PYTHONHOME # with CDPATH, cd prints
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STEP=arguments

# An EXIT trap, not "step || fail": in a condition bash would ignore set -e for everything that a step calls.
finish() {
    local code=$?
    [ "$code" -eq 0 ] || echo "$NAME: step '$STEP' failed (exit $code)" >&2
}
trap finish EXIT

step() {
    STEP=$1
    echo "$NAME: $STEP"
}

die() { # die CODE MESSAGE
    echo "$NAME: error: $2" >&2
    exit "$1"
}

# Cores that this process may use: its affinity and, in a container, its share of time; nproc alone would heed OMP_NUM_THREADS.
cores() {
    local count quota period
    count=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        quota=$(((quota + period - 1) / period))
        [ "$quota" -ge "$count" ] || count=$quota
    fi
    echo "$count"
}

# Running it is the test: a shim (pyenv's) can be on the PATH without a Python behind it.
python_works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local python
    for python in python3.11 python3.12 python3; do
        if python_works "$python"; then
            echo "$python"
            return
        fi
    done
    die 2 "no Python >= 3.11 with venv runs here: install python3.11 (and python3.11-venv)"
}

# Use the environment in FOLDER, else the active one, else .venv. Of these, FOLDER and .venv are made where they are not there.
enter_environment() { # enter_environment [FOLDER]
    local own=${1:-} python
    if [ -z "$own" ] && [ -z "${VIRTUAL_ENV:-}" ]; then own=$ROOT/.venv; fi
    # one that is half made, or was made without pip, gets whole
    if [ -n "$own" ] && ! "$own/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "$NAME: making $own with $("$python" --version)"
        "$python" -m venv "$own"
    fi
    export VIRTUAL_ENV=${own:-$VIRTUAL_ENV}
    "$VIRTUAL_ENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die 2 "$VIRTUAL_ENV has no working Python >= 3.11: activate another environment, or remove it"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
}

# What is written down of an installation. Another clone may have been installed into the same environment since.
installed() {
    echo "$* $(cksum <"$ROOT/pyproject.toml") $(cd / && python -c 'import peagle_train; print(peagle_train.__file__)' 2>/dev/null)"
}

# Let pip install its arguments, unless exactly that was done before: a second run needs no network.
install() { # install ARGUMENT...
    local stamp="$VIRTUAL_ENV/.peagle-installed"
    if grep -qxF -- "$(installed "$@")" "$stamp" 2>/dev/null; then
        echo "$NAME: already installed in $VIRTUAL_ENV"
        return
    fi
    echo "$NAME: pip install $* into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check "$@" || return
    installed "$@" >>"$stamp"
}

# install_beside PACKAGE FOLDER: it and the project's tests into an environment of their own, without the packages that it
# brings for another build of torch (transformers fails on importing them). Exit code 3 where it cannot be had.
install_beside() {
    enter_environment "$2"
    install "$1" -e "${ROOT}[test]" ||
        die 3 "no $1 for $(uname -sm) and $(python --version) here (see above): it wants a CPU build of torch, which PyTorch's own index has, too"
    python -m pip uninstall -qq -y torchvision torchaudio torchcodec
}

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

# What the drafter computes in where the target's dtype is auto: bfloat16 on a GPU, and where the processor multiplies in it.
precision() {
    python -c '
import torch
from peagle_train.target_model.loading import resolve_dtype
print("no" if resolve_dtype("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu")) is torch.float32 else "bf16")'
}

# Arguments have to be overrides of the recipe.
check_overrides() { # check_overrides ARGUMENT...
    local argument
    for argument in "$@"; do
        case ${argument//[[:space:]]/} in
            -h | --help) sed -n '2,/^set/s/^# //p' "$0" && exit ;;
            output.dir=*) die 2 "$argument: set PEAGLE_OUTPUT instead" ;;
            [!-]*=*) ;;
            *) die 2 "$argument is not an override (section.key=value), such as train.max_steps=50" ;;
        esac
    done
}

# The first steps of a script that trains: its arguments are overrides, and $OUTPUT is where results go, its own alone.
begin() { # begin ARGUMENT...
    check_overrides "$@"
    OUTPUT=$(absolute "${PEAGLE_OUTPUT:-$ROOT/runs/$NAME}")
    if [ -e "$OUTPUT" ] && [ ! -d "$OUTPUT" ]; then die 2 "$OUTPUT is a file: set PEAGLE_OUTPUT to a folder"; fi
    if [ -n "${PEAGLE_CACHE:-}" ]; then
        PEAGLE_CACHE=$(absolute "$PEAGLE_CACHE")
        export PEAGLE_CACHE
    fi
    cd "$ROOT"
    step environment
    enter_environment
    step install
    install -e "${ROOT}[quickstart]"
    STEP=output
    lock_output
}

# A run that is going looks like one that was killed; only this lock on $OUTPUT, which the trainer inherits, tells them apart.
lock_output() {
    mkdir -p "$(dirname "$OUTPUT")"
    exec 9>"$(dirname "$OUTPUT")/.$(basename "$OUTPUT").lock"
    if command -v flock >/dev/null && ! flock -n 9; then die 2 "another $NAME is at work on $OUTPUT"; fi
}

is_finished() { grep -q '"state": "finished"' "$1/run.json" 2>/dev/null; }

# What is in a run's folder, under lock_output: sets `resume` to --resume where there is something to resume from or nothing
# left to do, and removes a run that was stopped before its first checkpoint.
resume_or_clear() { # resume_or_clear FOLDER ARGUMENT...
    resume=()
    if [ ! -d "$1" ] || [ -z "$(ls -A "$1")" ]; then return; fi
    [ -e "$1/run.json" ] || # the trainer's mark: nothing but its own files is ever removed
        die 2 "$1 is not empty and not from a training run: set PEAGLE_OUTPUT to another folder"
    if is_finished "$1"; then
        echo "$NAME: $1 holds a finished run"
        if [ $# -gt 1 ]; then echo "$NAME: not used, as nothing is trained: ${*:2}"; fi
        resume=(--resume)
    elif (cd "$1" && compgen -G "checkpoint*") >/dev/null; then # the folder's own name may look like a pattern
        echo "$NAME: $1 holds a run that was stopped: resuming from its last checkpoint"
        resume=(--resume)
    elif [ -e "$1/final" ]; then
        die 1 "$1/final is there but its run did not end well: remove $1, or set PEAGLE_OUTPUT to a new folder"
    else
        echo "$NAME: $1 holds a run that was stopped before its first checkpoint: removing it, starting again"
        rm -rf "$1"
    fi
}

# accelerate launch on one process, GPU or not. Everything is said: what is not, it takes from the user's own configuration
# file (and one thread).
launch() {
    local options=(--quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
    if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then options+=(--cpu); fi
    python -m accelerate.commands.launch "${options[@]}" "$@"
}
