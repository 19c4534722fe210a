#!/usr/bin/env python
"""Measure how many drafted tokens a target really accepts: speculative decoding, batch 1, on prompts."""

import argparse
import sys
from pathlib import Path

EPILOG = """prompts:
  humaneval, mt-bench   by name (from optional packages: it says which)
  stdlib                held-out standard-library modules of the checkpoint's recipe, cut at seeded places
  FILE                  .jsonl of {"text": ...}, taken as it is, or of chats (messages, conversations, turns, prompt)

what is reported, for every K from 1 to the drafter's own, out of one decoding:
  accepted length   tokens that one verifying pass gives, the target's own included, repetition left out
  teacher-forced    what training's estimate (all positions, slots taken as independent) gives on the same texts
  in training       that estimate on the training run's own held-out rows
  tokens/pass       output tokens over all passes of the target, the prompt's and repetition included
Repetition: stretches of at least max(24, 2 p) tokens that each equal the one p before, p up to 64.
--engine vllm (greedy): the same prompts in vLLM with the same K, beside our decoder's figures, and where the two part: by
how many ulp of the dtype our best logit led the second (near-tie: 2 of a 16-bit dtype).
Exit code: 0; 1 if a greedy text is not the target's own and no tie of logits explains it, or vLLM parts from our decoder in
float32 without a near-tie; 2 for a user's mistake.

examples:
  python tools/evaluate.py runs/mine/final --prompts humaneval mt-bench --limit 20 --json acceptance.json
  python tools/evaluate.py runs/mine/final --prompts stdlib --compare runs/other/final
  python tools/evaluate.py runs/mine/final --prompts stdlib --compare runs/mine/checkpoint-*   # over training time
  .venv-vllm/bin/python tools/evaluate.py runs/mine/final --prompts stdlib --engine vllm   # behind tools/vllm_setup.sh
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a drafter's folder, such as runs/mine/final")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="WHAT", help="see below")
    parser.add_argument("--target", metavar="DIR", help="the target's folder; default: the checkpoint's recipe's")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the target")
    parser.add_argument("--compare", nargs="+", default=[], metavar="OTHER", help="other drafters, on the same texts")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of each output (default 128)")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts of each data set")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy")
    parser.add_argument(
        "--likeliest-drafts", action="store_true", help="with T > 0: take the likeliest drafts, drawing none"
    )
    parser.add_argument("--k", type=int, metavar="K", help="slots of the decoding itself (default 5)")
    parser.add_argument(
        "--max-k", type=int, metavar="K", help="largest K reported (default: the recipe's num_depths, or an export's K)"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument("--plain", action="store_true", help="give prompts to the target without its chat template")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="for stdlib (default 256)")
    parser.add_argument("--cuts", type=int, metavar="N", help="prompts of each module of stdlib (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of cuts, sampling and intervals")
    parser.add_argument("--engine", choices=["vllm"], help="measure in vLLM too, beside our own decoder (see below)")
    parser.add_argument(
        "--base-url", metavar="URL", help="with --engine: a server that runs, such as http://localhost:8000"
    )
    parser.add_argument(
        "--speed", action="store_true", help="with --engine: tokens per second with and without drafter"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything, every prompt included")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not
    from peagle_train.files import run_tool

    return run_tool("evaluate.py", lambda: measure(options))


def measure(options: argparse.Namespace) -> int:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.decoding.evaluate import run

    text, is_right = run(options, Path(options.checkpoint))
    print(text)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
