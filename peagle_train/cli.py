"""The commands of `peagle-train`: each parses its arguments, calls one function and prints what that found.

Heavy imports happen inside the commands, so that every --help answers at once. Exit codes: see `run_tool`, and a command's
help for what else it returns.
"""

import argparse
import inspect
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from peagle_train.files import run_tool
from peagle_train.machine import GPUS, cores

Add = Callable[..., Any]
Read = Callable[[], argparse.Namespace]
"""An argparse parser's `add_argument`, and what parses: each command gets the two."""


class Parser(argparse.ArgumentParser):
    """A command's, with that command's docstring as its help. Mistakes are told like all others: in one line."""

    def __init__(self, name: str, given: list[str]) -> None:
        details, how = inspect.getdoc(COMMANDS[name]), argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"peagle-train {name}", description=details, formatter_class=how)
        self.given = given

    def read(self) -> argparse.Namespace:
        """The arguments; `recipe` is read, with its overrides."""
        o = self.parse_intermixed_args(self.given)
        if getattr(o, "recipe", None):
            from peagle_train.config import load_recipe

            o.recipe = load_recipe(o.recipe, o.overrides)
        return o

    def error(self, message: str) -> NoReturn:
        takes_settings = any(action.dest == "overrides" for action in self._actions)
        how = "settings are section.key=value, without dashes; " if takes_settings else ""
        raise ValueError(f"{message} ({how}{self.prog} --help says what is allowed)")


def number(low: float, high: float = math.inf, kind: type = int) -> Callable[[str], Any]:
    """An argument's type: a number within these limits."""

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # also where it is nan
            most = "or more" if high == math.inf else f"to {high:g}"
            raise argparse.ArgumentTypeError(f"got {text}; give {low:g} {most}")
        return value

    read.__name__ = kind.__name__  # for argparse's own message
    return read


def json_object(text: str) -> dict[str, Any]:
    if isinstance(value := json.loads(text), dict):
        return value
    raise argparse.ArgumentTypeError("give a JSON object")  # dict() would take lists of pairs, and empty ones


COUNT = number(1)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    here = Path(__file__).parent
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"  # in a wheel, in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(given: str) -> str:
    """The file that a command line means by its recipe: a path, or the name of one that comes with the package."""
    shipped = shipped_recipes()
    return str(shipped[given]) if given in shipped and not os.path.exists(given) else given


def _add_recipe(add: Add, nargs: str | None = None) -> None:
    add("recipe", nargs=nargs, type=recipe_path, help="a YAML file, or a name from peagle-train recipes")
    add("overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the recipe's")


def _train(add: Add, read: Read) -> None:
    """Train a P-EAGLE drafter from a recipe.

    accelerate launch --quiet -m peagle_train recipes/quickstart.yaml target.path=DIR output.dir=runs/first
    peagle-train train recipes/quickstart.yaml cod.num_segments=4 --print-config
    peagle-train train recipes/mine.yaml --resume
    """
    _add_recipe(add)
    add("--print-config", action="store_true", help="print the resolved recipe and stop")
    add("--resume", nargs="?", const="", metavar="DIR", help="from the newest checkpoint of output.dir, or from DIR")
    o = read()
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        # Else segments of several sizes leave holes. torch reads this when its CUDA allocator starts.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if o.print_config:
        from peagle_train.config import dump_recipe

        print(dump_recipe(o.recipe), end="")
    else:
        from peagle_train.training.build import train

        if summary := train(o.recipe, o.resume):
            print(summary)


def _is_for_train(word: str) -> bool:
    """Whether a word looks like a recipe or an override, which `train` takes."""
    return "=" in word or word.endswith((".yaml", ".yml")) or word in shipped_recipes()


def _close_resume(words: list[str]) -> list[str]:
    """`--resume` followed by a recipe or an override has no DIR: argparse would take either for one."""
    for i, (option, after) in enumerate(pairwise(words)):
        if option == "--resume" and _is_for_train(after) and not os.path.isdir(after):
            return [*words[:i], "--resume=", *words[i + 1 :]]
    return words


def _plan(add: Add, read: Read) -> int:
    """Print the memory that a run would need and, for a machine of GPUs, how fast it would be. Nothing is loaded.

    peagle-train plan recipes/qwen3_8b_32k.yaml --on cuda:79x8
    peagle-train plan recipes/qwen3_coder_30b_8k.yaml target.server=http://localhost:8000 --gpu h200 --gpus 8

    --gpu adds tokens a second of the target and of training, counted in FLOPs, how many GPUs a server of the target should
    get, what features take, and whether the drafter fits under DDP and under FSDP2.

    Exit code 2: no number of segments fits (0 with --gpu, where the target may have GPUs of its own).
    """
    _add_recipe(add)
    add("--on", metavar="KIND:GIB[xN]", help="N processes on other devices, as in cuda:79x8 or cpu:16")
    add("--gpu", choices=GPUS, help="plan for a machine of these")
    add("--gpus", type=COUNT, default=1, metavar="N", help="how many (default 1)")
    add("--tokens", type=COUNT, default=10**8, metavar="N", help="tokens in an epoch (default: 100 million)")
    o = read()
    from peagle_train.memory import plan_table

    if (o.on and o.gpu) or (o.gpus != 1 and not o.gpu):
        raise ValueError("give --gpu for a machine of --gpus GPUs, or --on for other devices")
    if o.gpu:
        o.on = f"cuda:{GPUS[o.gpu][0]}x{o.gpus}"
    table, fits = plan_table(o.recipe, o.on)
    print(table)
    if o.gpu:
        from peagle_train.throughput import plan_throughput

        print("\n" + plan_throughput(o.recipe, o.gpu, o.gpus, o.tokens))
    return 0 if fits or o.gpu else 2


def _prepare(add: Add, read: Read) -> None:
    """Tokenize, mask and pack a recipe's data once, for any number of runs and ranks.

    Then give `data.prepared: DIR` in the recipe. The folder is whole or not there: after a kill, start it again.
    """
    _add_recipe(add)
    add("--out", metavar="DIR", help="the folder to make (default: the recipe's data.prepared)")
    add("--workers", type=COUNT, metavar="N", help="processes that tokenize (default: all cores)")
    o = read()
    from peagle_train.config import as_override
    from peagle_train.data.training_data import prepare_recipe
    from peagle_train.serving.start import with_start

    out = o.out or o.recipe.data.prepared
    if out is None:
        raise ValueError("no folder given: --out DIR, or data.prepared in the recipe")
    recipe = with_start(o.recipe, for_data=True)
    made = prepare_recipe(recipe, Path(out).expanduser(), num_workers=o.workers or cores())
    print("\n".join(made.lines))
    print(f"prepared: {out}: give {as_override('data.prepared', out)} to train on it")


def _check_data(add: Add, read: Read) -> None:
    """Count the examples of a recipe that cannot be used, by reason, with the first line of each.

    Reads everything, whatever data.max_bad_rows says. Exit code 2: a run would stop at it.
    """
    _add_recipe(add)
    add("--workers", type=COUNT, metavar="N", help="processes that tokenize (default: all cores)")
    o = read()
    from peagle_train.data.training_data import check_data
    from peagle_train.serving.start import with_start

    check_data(with_start(o.recipe, for_data=True), o.workers or cores())


def _cache(add: Add, read: Read) -> None:
    """Run the target once over a recipe's sequences and keep what training needs of it: features and last hidden states.

    peagle-train cache recipes/smollm2_cpu.yaml --out features
    peagle-train train recipes/smollm2_cpu.yaml target.cache=features

    Killed, it resumes when it is started again, and writes the same bytes on any number of processes:
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m peagle_train cache RECIPE --out features
    """
    _add_recipe(add, "?")
    add("--out", metavar="DIR", help="where to write; default: the recipe's target.cache")
    add("--speculators", metavar="DIR", help="take hs_*.safetensors that speculators left here; the target is not run")
    add("--verify", type=Path, metavar="DIR", help="compare a cache's files with their checksums, and stop")
    o = read()
    from peagle_train.serving.start import with_start
    from peagle_train.target_model.cache import verify_cache, write_cache

    if o.verify:
        print(verify_cache(o.verify))
        return
    if not o.recipe:
        raise ValueError("no recipe given: `peagle-train cache RECIPE --out DIR`")
    print(write_cache(with_start(o.recipe), o.out or o.recipe.target.cache, o.speculators), end="")


def _serve_target(add: Add, read: Read) -> None:
    """Print the command that starts a vLLM server for target.server, or run it.

    peagle-train serve-target RECIPE --python vllm/bin/python --vllm='--tensor-parallel-size 4'
    peagle-train serve-target RECIPE --run --port 8001
    peagle-train train RECIPE target.server=http://localhost:8001
    """
    _add_recipe(add)
    add("--run", action="store_true", help="start the server, and say when it answers")
    add("--port", type=number(1, 65535), default=8000, help="default: %(default)s")
    add("--folder", default="/dev/shm/peagle-train", help="shared by server and training (default: %(default)s)")
    add("--python", default=sys.executable, help="that of vLLM's environment; default: this one's")
    add("--vllm", default="", metavar="ARGUMENTS", help="of vLLM's own, as in --vllm='--tensor-parallel-size 4'")
    o = read()
    from peagle_train.target_model.server import run_server, serve_command

    command = serve_command(o.recipe, o.port, o.folder, o.python, shlex.split(o.vllm))
    print(shlex.join(command), flush=True)
    if o.run:
        run_server(command, o.port, o.folder)


def _regenerate(add: Add, read: Read) -> None:
    """Answer a prompt set with the target itself, for training or for evaluation.

    peagle-train regenerate PROMPTS --out FILE.jsonl --base-url http://127.0.0.1:8000/v1 --model NAME
    peagle-train regenerate PROMPTS --out FILE.jsonl --target DIR

    PROMPTS is `mt-bench`, `humaneval` or a .jsonl, .jsonl.gz or .json file of `messages`, `conversations`, `turns` or
    `prompt`. Each question is asked with the target's own answers before it. A run that was killed resumes when it is
    started again. Exit code 1: a server stopped answering.
    """
    add("prompts", metavar="PROMPTS")
    add("--out", required=True, type=Path, metavar="FILE.jsonl", help="rows of messages, as they come")
    add("--base-url", action="append", metavar="URL", help="http://HOST:PORT/v1; may be repeated; needs openai")
    add("--model", metavar="NAME", help="what those servers call the target")
    home = os.path.expanduser  # of --target=~/x the shell leaves it to us
    add("--target", type=home, metavar="DIR", help="instead of a server: a Hugging Face folder, run by transformers")
    add("--features", type=home, metavar="DIR", help="also keep hidden states here; needs servers of serve-target")
    add("--temperature", type=number(0, 100, float), default=0.8, help="0: the likeliest token (default 0.8)")
    add("--top-p", type=number(1e-9, 1, float), default=1.0, metavar="P", help="default 1")
    add("--max-tokens", type=COUNT, default=0, help="of an answer; default 2048, or half of the context if less")
    add("--seed", type=int, default=0, metavar="S", help="each answer's own follows from it (default 0)")
    add("--limit", type=COUNT, metavar="N", help="the first N prompts alone")
    add("--keep-truncated", action="store_true", help="keep answers that --max-tokens cut, as the last ones")
    add("--chat-template-kwargs", type=json_object, default={}, metavar="JSON", help='as {"enable_thinking": false}')
    many = number(1, 1000)  # openai's limit of connections
    add("--concurrency", type=many, default=128, metavar="C", help="conversations at each server (default 128)")
    add("--retries", type=number(0), default=10, help="of a request to a server, up to 8 s apart (default 10)")
    add("--batch-size", type=COUNT, default=8, metavar="B", help="with --target: conversations at a time (default 8)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16", "float64"])
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the target")
    o = read()
    from peagle_train.regenerate import Local, Servers, Settings, regenerate

    if (o.base_url is None) == (o.target is None) or bool(o.base_url) != bool(o.model) or (o.features and o.target):
        raise ValueError("give --base-url and --model (also --features) for a server, or --target alone for one here")
    how = o.temperature, o.top_p, o.max_tokens, o.seed, o.keep_truncated, o.chat_template_kwargs
    settings = Settings(*how, o.features)
    backend: Local | Servers
    if o.target is not None:
        backend = Local(o.target, settings, o.dtype, o.batch_size, o.trust_remote_code)
    else:
        backend = Servers(o.base_url, o.model, settings, o.concurrency, o.retries)
    regenerate(o.prompts, o.limit, o.out, backend)
    if o.features:
        print(f"their features: peagle-train cache RECIPE --speculators {shlex.quote(o.features)} --out CACHE")


def _export(add: Add, read: Read) -> None:
    """Export a trained drafter for an engine. It is checked before it is put in its place.

    peagle-train export runs/mine --out drafter
    peagle-train export runs/mine/best --format speculators --target-name org/my-llm --dtype bfloat16 --out drafter

    eagle3: for vLLM's --speculative-config '{"method": "eagle3", "parallel_drafting": true, ...}' (the default);
    speculators: for `vllm serve DIR`, which finds the target by itself, and for the speculators package.
    """
    add("folder", type=Path, metavar="FOLDER", help="a drafter's folder (final, best, checkpoint-N), or a run's")
    add("--out", type=Path, metavar="DIR", required=True, help="a new folder, or an empty one")
    add("--format", choices=["eagle3", "speculators"], default="eagle3")
    add("--target", type=Path, metavar="DIR", help="the target's folder; default: the recipe's")
    add("--target-name", metavar="NAME", help="how the files name the target, such as org/my-llm")
    add("--num-speculative-tokens", type=COUNT, metavar="K", help="to serve with; default: the training's")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    add("--licence", "--license", metavar="ID", help="the model card's licence field, e.g. apache-2.0")
    add("--push-to-hub", metavar="USER/MODEL", help="upload it to Hugging Face, too, private (after `hf auth login`)")
    add("--public", action="store_true", help="with --push-to-hub: for everybody to see")
    o = read()
    if o.public and not o.push_to_hub:
        raise ValueError("--public goes with --push-to-hub USER/MODEL")
    from peagle_train.serving.export import export_drafter, push_to_hub

    about = {"target": o.target, "target_name": o.target_name, "licence": o.licence}
    for note in export_drafter(o.folder, o.out, o.format, o.num_speculative_tokens, o.dtype, **about):
        print(f"note: {note}", file=sys.stderr)
    print(f"exported to {o.out}; how to serve it is in its README.md")
    if o.push_to_hub:
        print(f"uploaded to {push_to_hub(o.out, o.push_to_hub, o.public)}")


def _check(add: Add, read: Read) -> int:
    """Check any drafter's folder, in either format, and print a table.

    Exit code 2: an engine would not load it, or it is of another kind than this project's (which the table then says).
    """
    add("folder", type=Path, metavar="FOLDER", help="a drafter's folder (final, best, checkpoint-N), or a run's")
    add("--target", type=Path, metavar="DIR", help="the target's folder, to check that the two fit")
    o = read()
    from peagle_train.serving.drafter_io import read_config
    from peagle_train.serving.export import check_folder, find_drafter, is_loadable, table

    folder = find_drafter(o.folder)
    findings = check_folder(folder, read_config(o.target) if o.target else None)
    print(table(findings))
    return 0 if is_loadable(findings) else 2


def _import(add: Add, read: Read) -> None:
    """Bring another's P-EAGLE drafter into this project's names, to check, evaluate or serve it.

    peagle-train import hub/some-peagle-drafter --out drafter

    Reads vLLM's EAGLE-3 names (also midlayer.* and model.*) and the speculators format; never pickle. To train on from such
    a folder, or from an EAGLE-3 drafter's, name it in a recipe: draft.init_from=FOLDER.
    """
    add("folder", type=Path, metavar="FOLDER", help="the drafter's folder")
    add("--out", type=Path, metavar="DIR", required=True, help="a new folder, or an empty one")
    o = read()
    from peagle_train.serving.export import export_drafter

    for note in export_drafter(o.folder, o.out, "eagle3"):
        print(f"note: {note}", file=sys.stderr)
    print(f"imported to {o.out}")


def _evaluate(add: Add, read: Read) -> int:
    """Measure how many drafted tokens a target really accepts: speculative decoding, batch 1, on prompts.

    peagle-train evaluate runs/mine/final --prompts humaneval mt-bench --limit 20 --json acceptance.json
    peagle-train evaluate runs/mine/final --prompts stdlib --compare runs/mine/checkpoint-*   # over training time
    .venv-vllm/bin/peagle-train evaluate runs/mine/final --prompts stdlib --engine vllm       # after tools/vllm_setup.sh

    Prompts: humaneval and mt-bench (from optional packages: it says which); stdlib (held-out standard-library modules of
    the checkpoint's recipe, cut at seeded places); FILE.jsonl of {"text": ...}, taken as it is, or of chats. The output
    explains itself; docs/serving.md has more. Exit code 1: a greedy text is not the target's own and no tie of logits
    explains it, or vLLM's differs in float32.
    """
    add("checkpoint", type=Path, help="a drafter's folder, such as runs/mine/final")
    add("--prompts", nargs="+", required=True, metavar="WHAT", help="see above")
    add("--target", metavar="DIR", help="the target's folder; default: the checkpoint's recipe's")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the target")
    add("--compare", nargs="+", type=Path, default=[], metavar="OTHER", help="other drafters, on the same texts")
    add("--max-tokens", type=COUNT, default=128, metavar="N", help="of each output (default 128)")
    add("--limit", type=COUNT, metavar="N", help="prompts of each data set; of stdlib, several of a module if need be")
    add("--temperature", type=number(0, 100, float), default=0.0, metavar="T", help="default 0: greedy")
    add("--k", type=COUNT, metavar="K", help="largest K (default: the recipe's num_depths, or an export's K)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32", "float64"])
    add("--device", help="default: cuda if there is one, else cpu")
    add("--prompt-tokens", type=COUNT, metavar="N", help="for stdlib (default 256)")
    add("--seed", type=int, default=0, help="of cuts, sampling and intervals")
    add("--engine", choices=["vllm"], help="measure in vLLM too, beside our own decoder (see above)")
    add("--json", type=Path, metavar="FILE", help="write everything, every prompt included")
    o = read()
    from peagle_train.decoding import evaluate

    text, is_right = evaluate.run(o)
    print(text)
    return 0 if is_right else 1


def _report(add: Add, read: Read) -> None:
    """One HTML page about runs, finished or running: results, curves, data, settings; several runs side by side.

    peagle-train report runs/first runs/second --out compared.html

    Needs matplotlib (the extra `report`).
    """
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="default report.html")
    o = read()
    from peagle_train.show import write_report

    write_report(o.runs, o.out)
    print(o.out)


def _show_row(add: Add, read: Read) -> None:
    """Print a sequence of a recipe's data as training sees it: tokens, which are learned, where documents end.

    peagle-train show-row RECIPE --row 3 --elements

    Learned tokens are in [brackets]. --elements adds what each element (anchor, depth) reads and predicts, as drawn in the
    first epoch.
    """
    _add_recipe(add)
    add("--row", type=int, default=0, metavar="N", help="which sequence, from 0 (default 0)")
    add("--elements", action="store_true", help="what elements read and predict, too")
    o = read()
    from peagle_train.serving.start import with_start
    from peagle_train.show import show_sequence

    print(show_sequence(with_start(o.recipe), o.row, o.elements))


def _show_batch(add: Add, read: Read) -> None:
    """Draw a sequence's flat batch: what each segment runs and what it reads of others.

    peagle-train show-batch recipes/mine.yaml --row 3 --out batch.png
    peagle-train show-batch recipes/mine.yaml data.max_length=48 cod.num_segments=3   # small enough for labels

    It is the batch that training would get in its first epoch. Needs matplotlib (the extra `report`).
    """
    _add_recipe(add)
    add("--row", type=int, default=0, metavar="N", help="which sequence, from 0 (default 0)")
    add("--out", type=Path, default=Path("batch.png"), metavar="FILE.png", help="default batch.png")
    o = read()
    from peagle_train.serving.start import with_start
    from peagle_train.show import write_picture

    print(f"{o.out}: {write_picture(with_start(o.recipe), o.row, o.out)}")


def _recipes(add: Add, read: Read) -> None:
    """List the recipes that come with the package, or print one.

    peagle-train recipes
    peagle-train recipes quickstart > mine.yaml
    """
    add("name", nargs="?", metavar="NAME", help="print this one")
    o = read()
    found = shipped_recipes()
    if o.name is None:
        for name, path in found.items():
            print(f"{name:20} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return
    name = o.name.removesuffix(".yaml")
    if name not in found:
        raise ValueError(f"no recipe is called {o.name}; there are {', '.join(found)}")
    print(found[name].read_text(encoding="utf-8"), end="")


_FIRST = _train, _plan, _check_data, _prepare, _cache, _serve_target, _regenerate, _export, _check, _import, _evaluate
COMMANDS: dict[str, Callable[[Add, Read], int | None]] = {
    run.__name__[1:].replace("_", "-"): run for run in (*_FIRST, _report, _show_row, _show_batch, _recipes)
}


def main(arguments: list[str] | None = None) -> int:
    """`peagle-train COMMAND ...`; other arguments are those of `train`, as in `python -m peagle_train RECIPE`."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        out = sys.stdout if given else sys.stderr
        print("usage: peagle-train COMMAND ... (each has --help)\n", file=out)
        for name, add in COMMANDS.items():
            print(f"  {name:12} {(add.__doc__ or '').splitlines()[0]}", file=out)
        print("\nfirst: save README.md's recipe for your own model as mine.yaml, then", file=out)
        print("       peagle-train plan mine.yaml; peagle-train train mine.yaml", file=out)
        return 0 if given else 2
    if given == ["--version"]:
        print(f"peagle-train {version('peagle-train')}")
        return 0
    first = given[0]
    name, *rest = given if first in COMMANDS else ("train", *given)

    def work() -> int | None:
        if not (first in COMMANDS or first.startswith("-") or _is_for_train(first) or os.path.exists(first)):
            names = ", ".join([*COMMANDS, *shipped_recipes()])
            raise ValueError(f"no command or recipe is called {first!a}; there are {names}")
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        parser = Parser(name, _close_resume(rest) if name == "train" else rest)
        return COMMANDS[name](parser.add_argument, parser.read)

    when_stopped = "; the same command resumes" if name in ("cache", "regenerate") else ""
    return run_tool(f"peagle-train {name}", work, when_stopped)
