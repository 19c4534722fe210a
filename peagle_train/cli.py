"""The commands of `peagle-train`: each parses its arguments, calls one function and prints what that found.

Heavy imports happen inside the commands, so that every --help answers at once. Exit code: 0; 2 for a user's mistake, told
in one line on stderr; what else a command returns is in its help, what `train` does is in ending.py.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from peagle_train.ending import run_training
from peagle_train.files import run_tool

Options = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """Mistakes are told like all others: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help says what is allowed)")


def _add_recipe(parser: Parser, nargs: str | None = None) -> None:
    parser.add_argument("recipe", nargs=nargs, help="a YAML file with sections target, data, draft, cod, train, output")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the recipe's"
    )


def _train(parser: Parser) -> Callable[[Options], None]:
    """Train a P-EAGLE drafter from a recipe.

    accelerate launch -m peagle_train recipes/quickstart.yaml target.path=DIR output.dir=runs/first
    peagle-train train recipes/quickstart.yaml cod.num_segments=4 --print-config
    peagle-train train recipes/mine.yaml --dry-run --on cuda:79x8
    peagle-train train recipes/mine.yaml --resume
    peagle-train train --summary runs/first
    """
    _add_recipe(parser, "?")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that a run would need, and stop")
    parser.add_argument("--on", metavar="KIND:GIB[xN]", help="with --dry-run: see `peagle-train plan --help`")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="resume the run in output.dir, from its newest checkpoint or from the folder DIR of one",
    )
    parser.add_argument(
        "--force", action="store_true", help="start a run even if its planned memory is over twice what there is"
    )
    parser.add_argument("--summary", metavar="DIR", help="print where a finished run's drafter is and how good it is")

    def run(options: Options) -> None:
        from peagle_train.config import check_path, dump_recipe, load_recipe

        if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
            # Else segments of several sizes leave holes. torch reads this when its CUDA allocator starts.
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        for name in ("summary", "resume"):
            try:
                check_path(getattr(options, name) or ".")
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from None
        if options.summary:
            from peagle_train.training.checkpoint import read_summary

            print(read_summary(Path(options.summary)))
            return
        if not options.recipe:
            raise ValueError("no recipe given: `peagle-train train RECIPE`, for example recipes/quickstart.yaml")
        recipe = load_recipe(options.recipe, options.overrides)
        if options.on and not options.dry_run:
            raise ValueError("--on goes with --dry-run: it says for which device to plan")
        if options.print_config:
            print(dump_recipe(recipe), end="")
        elif options.dry_run:
            from peagle_train.memory import dry_run

            table = dry_run(recipe, options.on)
            if os.environ.get("RANK", "0") == "0":
                print(table)
        else:
            from transformers.utils.logging import disable_progress_bar

            from peagle_train.training.build import train

            if not sys.stderr.isatty():
                disable_progress_bar()
            if summary := train(recipe, options.resume, options.force):
                print(summary)

    return run


def _close_resume(arguments: list[str]) -> list[str]:
    """`--resume` followed by a recipe, an override or an option has no DIR: argparse would take either for one."""
    closed = list(arguments)
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else "-"
        is_other = following.startswith("-") or "=" in following or following.endswith((".yaml", ".yml"))
        if argument == "--resume" and is_other and not os.path.isdir(following):
            closed[i] = "--resume="
    return closed


def _plan(parser: Parser) -> Callable[[Options], None]:
    """Print the memory that a run would need. Nothing is loaded.

    peagle-train plan recipes/qwen3_8b_32k.yaml --on cuda:79x8
    """
    _add_recipe(parser)
    parser.add_argument("--on", metavar="KIND:GIB[xN]", help="N processes on other devices, as in cuda:79x8 or cpu:16")

    def run(options: Options) -> None:
        from peagle_train.config import load_recipe
        from peagle_train.memory import dry_run

        print(dry_run(load_recipe(options.recipe, options.overrides), options.on))

    return run


def _prepare(parser: Parser) -> Callable[[Options], None]:
    """Tokenize, mask and pack a recipe's data once, for any number of runs and ranks.

    peagle-train prepare RECIPE [section.key=value ...] --out DIR

    Then give `data.prepared: DIR` in the recipe. The folder is whole or not there: after a kill, start it again.
    """
    _add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to make (default: the recipe's data.prepared)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (default: all cores)")

    def run(options: Options) -> None:
        from peagle_train.config import as_override, load_recipe
        from peagle_train.data.prepare import prepare_recipe
        from peagle_train.machine import cores

        recipe = load_recipe(options.recipe, options.overrides)
        out = options.out or recipe.data.prepared
        if out is None:
            raise ValueError("no folder given: --out DIR, or data.prepared in the recipe")
        workers = options.workers if options.workers is not None else cores()
        if workers < 1:
            raise ValueError(f"--workers is {workers}; give at least 1")
        made = prepare_recipe(recipe, Path(out).expanduser(), num_workers=workers)
        print("\n".join(made.describe()))
        print(f"prepared: {out}: give {as_override('data.prepared', out)} to train on it")

    return run


def _cache(parser: Parser) -> Callable[[Options], None]:
    """Run the target once over a recipe's rows and keep what training needs of it: features and last hidden states.

    peagle-train cache recipes/quickstart.yaml --out features
    peagle-train train recipes/quickstart.yaml target.cache=features

    Killed, it resumes when it is started again, and writes the same bytes on any number of processes:
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m peagle_train cache RECIPE --out features
    """
    _add_recipe(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write; default: the recipe's target.cache")
    parser.add_argument("--shard-mib", type=int, default=512, metavar="N", help="size of a file (default 512)")
    parser.add_argument(
        "--speculators",
        metavar="DIR",
        help="take what speculators left in this folder (hs_*.safetensors) instead of running the target",
    )

    def run(options: Options) -> None:
        from peagle_train.config import load_recipe
        from peagle_train.target_model.cache_writer import write_cache

        recipe = load_recipe(options.recipe, options.overrides)
        print(write_cache(recipe, options.out or recipe.target.cache, options.shard_mib, options.speculators), end="")

    return run


def _regenerate(parser: Parser) -> Callable[[Options], int]:
    """Write the answers of a prompt set anew with the target itself, for training or for evaluation.

    peagle-train regenerate PROMPTS --out FILE.jsonl --base-url http://127.0.0.1:8000/v1 --model NAME
    peagle-train regenerate PROMPTS --out FILE.jsonl --target DIR

    PROMPTS is `mt-bench`, `humaneval` or a .jsonl, .jsonl.gz or .json file of `messages`, `conversations`, `turns` or
    `prompt`. Each question is asked with the target's own answers before it. A run that was killed resumes when it is
    started again. Exit code 1: a server stopped answering.
    """
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

    def run(options: Options) -> int:
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
            _read_mapping(options.chat_template_kwargs),
        )
        skipped: Counter[str] = Counter()
        prompts = load_prompts(options.prompts, options.limit, skipped)
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
        return 0

    return run


def _read_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--chat-template-kwargs is {text!a}; give a JSON object")
    return value


def _export(parser: Parser) -> Callable[[Options], None]:
    """Export a trained drafter for an engine. It is checked before it is put in its place.

    peagle-train export runs/mine --out drafter
    peagle-train export runs/mine/best --format speculators --target-name org/my-llm --dtype bfloat16 --out drafter

    eagle3: for vLLM's --speculative-config '{"method": "eagle3", "parallel_drafting": true, ...}' (the default);
    speculators: for `vllm serve DIR`, which finds the target by itself, and for the speculators package.
    """
    parser.add_argument("folder", metavar="FOLDER", help="a drafter's folder (final, best, checkpoint-N), or a run's")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder, or an empty one")
    parser.add_argument("--format", choices=["eagle3", "speculators"], default="eagle3")
    parser.add_argument("--check", action="store_true", help="print the table of the check")
    parser.add_argument("--target", metavar="DIR", help="the target's folder; default: the recipe's")
    parser.add_argument("--target-name", metavar="NAME", help="how the files name the target, such as org/my-llm")
    parser.add_argument(
        "--num-speculative-tokens", type=int, metavar="K", help="to serve with; default: the training's"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    parser.add_argument("--licence", "--license", metavar="ID", help="the model card's licence field, e.g. apache-2.0")
    parser.add_argument("--measured", metavar="FILE", help="what `evaluate --json` wrote, for the model card")

    def run(options: Options) -> None:
        import torch

        from peagle_train.serving.check import table
        from peagle_train.serving.export import export_drafter

        done = export_drafter(
            Path(options.folder),
            Path(options.out),
            options.format,
            target=Path(options.target) if options.target else None,
            target_name=options.target_name,
            speculative_tokens=options.num_speculative_tokens,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            licence=options.licence,
            measured=Path(options.measured) if options.measured else None,
        )
        if options.check:
            print(table(done.findings))
        else:
            done.notes += [f"{f.what}: {f.detail}" for f in done.findings if f.level == "warn"]
        _print_notes(done.notes)
        print(f"exported to {done.folder}; how to serve it is in its README.md")

    return run


def _check(parser: Parser) -> Callable[[Options], int]:
    """Check any drafter's folder, in either format, and print a table.

    peagle-train check drafter

    Exit code 1: a drafter of another kind than this project's (layers that are not Llama's, windows, ...), which is not
    judged; 2: an engine would not load it.
    """
    parser.add_argument("folder", metavar="FOLDER", help="a drafter's folder (final, best, checkpoint-N), or a run's")
    parser.add_argument("--target", metavar="DIR", help="the target's folder, to check that the two fit")

    def run(options: Options) -> int:
        from peagle_train.serving.check import check_folder, table, worst
        from peagle_train.serving.drafter_io import read_config
        from peagle_train.serving.export import find_drafter

        folder = find_drafter(Path(options.folder))
        findings = check_folder(folder, read_config(Path(options.target)) if options.target else None)
        print(table(findings))
        return {"BAD": 2, "????": 1}.get(worst(findings), 0)

    return run


def _import(parser: Parser) -> Callable[[Options], None]:
    """Bring another's EAGLE-3 or P-EAGLE drafter into this project's names, to start a run from it or to check it.

    peagle-train import hub/some-peagle-drafter --out start
    peagle-train import hub/some-eagle3-drafter --target models/my-llm --mask-token-id 128011 --out start

    Reads vLLM's EAGLE-3 names (also midlayer.* and model.*) and the speculators format, one file or shards; never pickle.
    What an EAGLE-3 drafter lacks is filled in, and said: embeddings and head from the target, mask_hidden at random. A
    recipe can name such a folder directly: draft.init_from=FOLDER.
    """
    parser.add_argument("folder", metavar="FOLDER", help="the drafter's folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder, or an empty one")
    parser.add_argument("--target", metavar="DIR", help="the target's folder, for embeddings and head")
    parser.add_argument("--mask-token-id", type=int, metavar="N", help="where the drafter has none")
    parser.add_argument("--seed", type=int, default=0, help="of mask_hidden where the drafter has none")

    def run(options: Options) -> None:
        from peagle_train.serving.start import import_drafter

        done = import_drafter(
            Path(options.folder),
            Path(options.out),
            target=Path(options.target) if options.target else None,
            mask_token_id=options.mask_token_id,
            seed=options.seed,
        )
        _print_notes(done.notes)
        print(f"imported to {done.folder}")

    return run


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _evaluate(parser: Parser) -> Callable[[Options], int]:
    """Measure how many drafted tokens a target really accepts: speculative decoding, batch 1, on prompts.

    peagle-train evaluate runs/mine/final --prompts humaneval mt-bench --limit 20 --json acceptance.json
    peagle-train evaluate runs/mine/final --prompts stdlib --compare runs/mine/checkpoint-*   # over training time
    .venv-vllm/bin/peagle-train evaluate runs/mine/final --prompts stdlib --engine vllm       # after tools/vllm_setup.sh

    prompts:
      humaneval, mt-bench   by name (from optional packages: it says which)
      stdlib                held-out standard-library modules of the checkpoint's recipe, cut at seeded places
      FILE                  .jsonl of {"text": ...}, taken as it is, or of chats (messages, conversations, turns, prompt)

    what is reported, for every K from 1 to the drafter's own, out of one decoding:
      accepted length   tokens that one verifying pass gives, the target's own included, repetition left out
      teacher-forced    what training's estimate (all positions, slots taken as independent) gives on the same texts
      in training       that estimate on the training run's own held-out rows
      tokens/pass       output tokens over all passes of the target, the prompt's and repetition included
    Repetition: stretches of at least max(24, 2 p) tokens that each equal the one p before, p up to 64.
    --engine vllm (greedy): the same prompts in vLLM with the same K, beside our decoder's figures, and where the two part:
    by how many ulp of the dtype our best logit led the second (near-tie: 2 of a 16-bit dtype).

    Exit code 1: a greedy text is not the target's own and no tie of logits explains it, or vLLM parts from our decoder in
    float32 without a near-tie.
    """
    parser.add_argument("checkpoint", help="a drafter's folder, such as runs/mine/final")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="WHAT", help="see above")
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
    parser.add_argument("--engine", choices=["vllm"], help="measure in vLLM too, beside our own decoder (see above)")
    parser.add_argument(
        "--base-url", metavar="URL", help="with --engine: a server that runs, such as http://localhost:8000"
    )
    parser.add_argument(
        "--speed", action="store_true", help="with --engine: tokens per second with and without drafter"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything, every prompt included")

    def run(options: Options) -> int:
        from peagle_train.decoding.evaluate import run as measure

        text, is_right = measure(options, Path(options.checkpoint))
        print(text)
        return 0 if is_right else 1

    return run


def _report(parser: Parser) -> Callable[[Options], None]:
    """One HTML page about runs, finished or running: results, curves, data, settings; several runs side by side.

    peagle-train report runs/first runs/second --out compared.html

    The page needs no other file. Needs matplotlib (the extra `report`).
    """
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of runs")
    parser.add_argument("--out", default="report.html", metavar="FILE.html", help="default report.html")

    def run(options: Options) -> None:
        from peagle_train.report import write_report

        write_report([Path(name).expanduser() for name in options.runs], Path(options.out))
        print(options.out)

    return run


def _show_row(parser: Parser) -> Callable[[Options], None]:
    """Print a sequence of a recipe's data as training sees it: tokens, which are learned, where documents end.

    peagle-train show-row RECIPE --row 3 [section.key=value ...]
    peagle-train show-row RECIPE --row 3 --elements [--anchors 17,18,40]

    Learned tokens are green on a terminal, in [brackets] elsewhere. --elements adds what each element (anchor, depth) of
    some anchors reads and predicts.
    """
    _add_recipe(parser)
    parser.add_argument("--row", type=int, required=True, metavar="N", help="which sequence, from 0")
    parser.add_argument("--held-out", action="store_true", help="of the held-out sequences")
    parser.add_argument("--elements", action="store_true", help="what elements read and predict, too")
    parser.add_argument("--anchors", type=_numbers, metavar="A,B,...", help="whose elements (default: the first few)")
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="whose draw of elements (default: 0)")
    parser.add_argument("--no-color", action="store_true", help="brackets on a terminal, too")

    def run(options: Options) -> None:
        from peagle_train.config import load_recipe
        from peagle_train.show import show_sequence

        text = show_sequence(
            load_recipe(options.recipe, options.overrides),
            options.row,
            epoch=options.epoch,
            is_held_out=options.held_out,
            with_elements=options.elements or options.anchors is not None,
            anchors=options.anchors or (),
            is_colored=sys.stdout.isatty() and not options.no_color and not os.environ.get("NO_COLOR"),
        )
        print(text)

    return run


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _show_batch(parser: Parser) -> Callable[[Options], None]:
    """Draw a sequence's flat batch: who sees whom, and what each segment runs and reads.

    peagle-train show-batch --example --out batch.png
    peagle-train show-batch recipes/mine.yaml --row 3 --out batch.png
    peagle-train show-batch recipes/mine.yaml data.max_length=48 cod.num_segments=3   # small enough for labels

    It is the batch that training would get in its first epoch, from the recipe's own collator; of the target only the
    tokenizer and config.json are read. Needs matplotlib (the extra `report`).
    """
    _add_recipe(parser, "?")
    parser.add_argument("--example", action="store_true", help="two short documents of words, K = 4, S = 3")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="which sequence, from 0 (default 0)")
    parser.add_argument("--out", default="batch.png", metavar="FILE.png", help="default batch.png")

    def run(options: Options) -> None:
        if bool(options.recipe) == options.example:
            raise ValueError("give a recipe or --example, and not both")
        from peagle_train.config import load_recipe
        from peagle_train.show import write_picture

        recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
        print(f"{options.out}: {write_picture(recipe, options.row, Path(options.out))}")

    return run


def _recipes(parser: Parser) -> Callable[[Options], None]:
    """List the recipes that come with the package, or print one.

    peagle-train recipes
    peagle-train recipes quickstart > mine.yaml
    """
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")

    def run(options: Options) -> None:
        here = Path(__file__).parent
        folder = (
            here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
        )  # in a wheel, in a checkout
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if options.name is None:
            for name, path in found.items():
                print(f"{name:20} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
            return
        name = options.name.removesuffix(".yaml")
        if name not in found:
            raise ValueError(f"no recipe is called {options.name}; there are {', '.join(found)}")
        print(found[name].read_text(encoding="utf-8"), end="")

    return run


COMMANDS: dict[str, Callable[[Parser], Callable[[Options], int | None]]] = {
    "train": _train,
    "plan": _plan,
    "prepare": _prepare,
    "cache": _cache,
    "regenerate": _regenerate,
    "export": _export,
    "check": _check,
    "import": _import,
    "evaluate": _evaluate,
    "report": _report,
    "show-row": _show_row,
    "show-batch": _show_batch,
    "recipes": _recipes,
}
RESUMES = {"cache": "; the same command resumes", "regenerate": "; the same command resumes"}


def main(arguments: list[str] | None = None) -> int:
    """`peagle-train COMMAND ...`; other arguments are those of `train`, as in `python -m peagle_train RECIPE`."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        out = sys.stdout if given else sys.stderr
        print("usage: peagle-train COMMAND ... (each has --help)\n", file=out)
        for name, add in COMMANDS.items():
            print(f"  {name:12} {(add.__doc__ or '').splitlines()[0]}", file=out)
        return 0 if given else 2
    name, *rest = given if given[0] in COMMANDS else ("train", *given)

    def work() -> int | None:
        summary, _, details = (COMMANDS[name].__doc__ or "").partition("\n\n")
        parser = Parser(
            prog=f"peagle-train {name}",
            description=summary,
            epilog="\n".join(line.removeprefix("    ") for line in details.rstrip().splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        run = COMMANDS[name](parser)
        options = parser.parse_intermixed_args(_close_resume(rest) if name == "train" else rest)
        import logging

        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        return run(options)

    return run_training(work) if name == "train" else run_tool(f"peagle-train {name}", work, RESUMES.get(name, ""))
