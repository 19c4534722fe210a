"""Write the answers of a prompt set anew with the target itself, for training or for evaluation.

    python tools/regenerate.py PROMPTS --out FILE.jsonl --base-url http://127.0.0.1:8000/v1 --model NAME
    python tools/regenerate.py PROMPTS --out FILE.jsonl --target DIR

PROMPTS is `mt-bench`, `humaneval` or a .jsonl, .jsonl.gz or .json file of `messages`, `conversations`, `turns` or `prompt`.
Each question is asked with the target's own answers before it. A run that was killed resumes when it is started again.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="regenerate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", metavar="PROMPTS")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="rows of messages, as they come")
    who = parser.add_argument_group("who answers: a server (vLLM, SGLang) or a local model")
    who.add_argument("--base-url", metavar="URL", help="of a server with /chat/completions; needs the package openai")
    who.add_argument("--model", metavar="NAME", help="what that server calls the target")
    who.add_argument("--target", metavar="DIR", help="a Hugging Face folder, run here by transformers")
    how = parser.add_argument_group("how")
    how.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token (default 0.8)")
    how.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1")
    how.add_argument(
        "--max-tokens", type=int, default=2048, metavar="N", help="of an answer, if the context has room (default 2048)"
    )
    how.add_argument("--seed", type=int, default=0, metavar="S", help="each answer's own follows from it (default 0)")
    how.add_argument("--limit", type=int, metavar="N", help="the first N prompts alone")
    turns = how.add_mutually_exclusive_group()
    turns.add_argument("--all-turns", action="store_true", help="answer every question (the default)")
    turns.add_argument("--last-turn", action="store_true", help="keep recorded answers, and answer the last question")
    how.add_argument(
        "--keep-truncated", action="store_true", help="keep answers that --max-tokens cut, as the last ones"
    )
    how.add_argument(
        "--chat-template-kwargs", default="{}", metavar="JSON", help="as in '{\"enable_thinking\": false}'"
    )
    server = parser.add_argument_group("with a server")
    server.add_argument("--concurrency", type=int, default=16, metavar="C", help="conversations at a time (default 16)")
    server.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="VAR", help="variable that holds the API key"
    )
    server.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="of an answer (default 3600)")
    server.add_argument("--retries", type=int, default=10, help="of a request, up to 8 s apart (default 10)")
    local = parser.add_argument_group("with --target")
    local.add_argument("--batch-size", type=int, default=8, metavar="B", help="conversations at a time (default 8)")
    local.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16", "float64"])
    local.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the target")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.files import RunStopped
    from peagle_train.regenerate import Local, Server, Settings, load_prompts, regenerate

    if (options.base_url is None) == (options.target is None) or (options.base_url and not options.model):
        raise ValueError("give --base-url and --model for a server, or --target for a local model")
    settings = Settings(
        options.temperature,
        options.top_p,
        options.max_tokens,
        options.seed,
        options.last_turn,
        options.keep_truncated,
        read_mapping(options.chat_template_kwargs),
    )
    skipped: Counter[str] = Counter()
    prompts = load_prompts(options.prompts, options.limit, skipped)
    try:
        backend: Local | Server
        if options.target is not None:
            path, code = os.path.expanduser(options.target), options.trust_remote_code
            backend = Local(path, settings, dtype=options.dtype, batch_size=options.batch_size, trust_remote_code=code)
        else:
            backend = Server(
                options.base_url,
                options.model,
                settings,
                key=os.environ.get(options.api_key_env, "").strip(),
                concurrency=options.concurrency,
                timeout=options.timeout,
                retries=options.retries,
            )
        regenerate(prompts, options.out, backend, settings, skipped)
    except RunStopped as error:
        print(f"regenerate: error: {error}; what is answered is kept: the same command resumes", file=sys.stderr)
        return 1
    return 0


def read_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--chat-template-kwargs is {text!a}; give a JSON object")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 for a user's mistake, 1 for a server that stopped answering; one line on stderr says why."""
    options = parse(arguments)
    from peagle_train.files import run_tool

    return run_tool("regenerate", lambda: run(options), "; the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
