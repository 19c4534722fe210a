# Sourced by the scripts beside it, which set -euo pipefail and NAME (how they call themselves) first.
# shellcheck shell=bash

unset CDPATH # with it, cd prints
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

# Cores that this process may use: its affinity and, in a container, its share of time.
cores() {
    local count quota period
    count=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
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

# Use the active environment, or make .venv. What we make holds a file from its first moment on and another one from
# its last: half-made ones are redone, and one that somebody else made is used, never removed.
enter_environment() {
    local python making="$ROOT/.venv/.peagle-making" made="$ROOT/.venv/.peagle-made"
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        VIRTUAL_ENV=$ROOT/.venv
        # the scripts inside a venv know its path, so one that was moved along with the repository is of no use
        if [ -e "$making" ]; then
            if [ "$(cat "$made" 2>/dev/null)" != "$ROOT" ] || ! python_works "$VIRTUAL_ENV/bin/python"; then
                echo "$NAME: removing an unfinished .venv"
                rm -rf "$VIRTUAL_ENV"
            fi
        fi
        if [ ! -e "$VIRTUAL_ENV" ]; then
            python=$(find_python)
            echo "$NAME: making .venv with $("$python" --version)"
            mkdir "$VIRTUAL_ENV"
            : >"$making"
            "$python" -m venv "$VIRTUAL_ENV"
            echo "$ROOT" >"$made"
        fi
    fi
    "$VIRTUAL_ENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die 2 "$VIRTUAL_ENV has no working Python >= 3.11: activate another environment, or remove it"
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
    unset PYTHONHOME
}

# Where the environment's peagle-train is installed from, if it is an editable install.
installed_from() {
    (cd / && python -c '
import json, urllib.parse, urllib.request
from importlib.metadata import distribution
url = json.loads(distribution("peagle-train").read_text("direct_url.json"))["url"]
print(urllib.request.url2pathname(urllib.parse.urlparse(url).path))') 2>/dev/null || true
}

# Install the package with an extra, unless exactly that was done before: a second run needs no network.
install_extra() {
    local stamp="$VIRTUAL_ENV/.peagle-installed-$1" wanted
    wanted=$(python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())' \
        <"$ROOT/pyproject.toml")
    wanted="$wanted $1 $ROOT"
    # another clone may have been installed into the same environment since
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ "$(installed_from)" = "$ROOT" ]; then
        echo "$NAME: already installed in $VIRTUAL_ENV"
        return
    fi
    rm -f "$stamp"
    echo "$NAME: pip install -e $ROOT[$1] into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check -e "${ROOT}[$1]"
    echo "$wanted" >"$stamp"
}

# install_beside PACKAGE FOLDER: it and the project's tests into an environment of their own, without the packages that it
# brings for another build of torch (transformers fails on importing them). Exit code 3 where it cannot be had.
install_beside() {
    local stamp="$2/.peagle-beside"
    [ -e "$stamp" ] || "$(find_python)" -m venv "$2" # one that is half made gets whole, too
    export VIRTUAL_ENV=$2 PATH="$2/bin:$PATH"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$1" ]; then
        echo "$NAME: pip install $1 into $2, some minutes and GB"
        python -m pip install --quiet --disable-pip-version-check "$1" -e "${ROOT}[test]" ||
            die 3 "no $1 for $(uname -sm) and $(python --version) here (see above): it wants a CPU build of torch, which PyTorch's own index has, too"
        python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
        echo "$1" >"$stamp"
    fi
    install_extra test
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
    accelerate launch "${options[@]}" "$@"
}
