#!/usr/bin/env bash
# From nothing to a trained drafter and its accepted length: environment, install, target, training on this machine's CPU or GPU.
# Arguments are overrides of recipes/quickstart.yaml, such as train.max_steps=50. Paths in them are the repository's.
# PEAGLE_OUTPUT: where results go (runs/quickstart). PEAGLE_CACHE: where the target goes (~/.cache/peagle_train).
set -euo pipefail
NAME=quickstart
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin "$@"

if is_finished "$OUTPUT"; then
    echo "$NAME: already trained; to train again, set PEAGLE_OUTPUT to a new folder or remove $OUTPUT"
    if [ $# -gt 0 ]; then echo "$NAME: not used, as nothing was trained: $*"; fi
    exit 0
fi

STEP=recipe # a mistake in the arguments is told now, not after the download
python -m peagle_train recipes/quickstart.yaml "$@" --print-config >/dev/null

step target
python tools/fetch_smollm2.py
TARGET=$(python tools/fetch_smollm2.py --print-path)

step train
resume_or_clear "$OUTPUT"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(cores)}
export OMP_NUM_THREADS HF_HUB_OFFLINE=1
launch --num_cpu_threads_per_process "$OMP_NUM_THREADS" -m peagle_train recipes/quickstart.yaml \
    target.path="$TARGET" output.dir="$OUTPUT" train.mixed_precision="$(precision)" ${resume[@]+"${resume[@]}"} "$@"

step evaluate # the estimate above is of known text; this decodes
python -m peagle_train evaluate "$OUTPUT" --prompts stdlib --limit 10 --max-tokens 64 --k 5 ||
    echo "$NAME: trained, but its accepted length was not measured (see above)"
