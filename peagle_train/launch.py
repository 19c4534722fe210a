"""Training's command line, `accelerate launch -m peagle_train RECIPE [section.key=value ...]`, and how a run ends."""

import argparse
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from peagle_train.files import RunStopped, one_line, print_anything

EPILOG = """examples:
  accelerate launch -m peagle_train recipes/quickstart.yaml target.path=DIR output.dir=runs/first
  python -m peagle_train recipes/quickstart.yaml cod.num_segments=4 --print-config
  python -m peagle_train recipes/mine.yaml --dry-run --on cuda:79x8
  python -m peagle_train recipes/mine.yaml --resume
  python -m peagle_train --summary runs/first
"""


class Parser(argparse.ArgumentParser):
    """Mistakes are told like all others: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help says what is allowed)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="peagle-train train",
        description="Train a P-EAGLE drafter from a recipe.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file with sections target, data, draft, cod, train, output")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that a run would need, and stop")
    parser.add_argument(
        "--on",
        metavar="KIND:GIB[xN]",
        help="with --dry-run: for N processes (1) on devices of another kind than here, as in cuda:79x8 or cpu:16",
    )
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
    return parser.parse_intermixed_args(_close_resume(sys.argv[1:] if arguments is None else arguments))


def _close_resume(arguments: list[str]) -> list[str]:
    """`--resume` followed by a recipe, an override or an option has no DIR: argparse would take either for one."""
    closed = list(arguments)
    for i, argument in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else "-"
        is_other = following.startswith("-") or "=" in following or following.endswith((".yaml", ".yml"))
        if argument == "--resume" and is_other and not os.path.isdir(following):
            closed[i] = "--resume="
    return closed


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 for a user's mistake, 1 for a run that had to stop; one line on stderr says why."""
    print_anything()
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        # Else segments of several sizes leave holes. torch reads this when its CUDA allocator starts.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    with interruptible():
        return _main(arguments)


@contextmanager
def interruptible() -> Iterator[None]:
    """Outside of the training loop SIGTERM ends the process by a KeyboardInterrupt, as SIGINT does by itself, and SIGUSR1,
    which would kill it, does nothing.
    """
    main_process = os.getpid()

    def on_term(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        if os.getpid() != main_process:  # forked off; its parent ends it by this very signal
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt("SIGTERM")

    def on_unraisable(what: "sys.UnraisableHookArgs") -> None:
        hook(what)
        if isinstance(what.exc_value, KeyboardInterrupt):  # lost in a `__del__` or a weak reference's callback
            os._exit(_interrupted(what.exc_value))

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # of a notebook or a server, which has its own handlers
        yield
        return
    hook, sys.unraisablehook = sys.unraisablehook, on_unraisable
    before: list[Any] = [signal.signal(signal.SIGTERM, on_term), signal.signal(signal.SIGUSR1, signal.SIG_IGN)]
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])


def _main(arguments: list[str] | None) -> int:
    try:
        return _run(parse(arguments))
    except ValueError as error:
        return _fail(error, 2)
    except RunStopped as error:
        return _fail(error, 1)
    except KeyboardInterrupt as error:
        return _interrupted(error)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise  # anything unexpected keeps its traceback
        _stop(error, traceback.format_exc(), 1)


def _run(options: argparse.Namespace) -> int:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.config import check_path

    for name in ("summary", "resume"):
        if getattr(options, name):
            try:
                check_path(getattr(options, name))
            except ValueError as error:
                raise ValueError(f"--{name}: {error}") from None
    if options.summary:
        from peagle_train.training.checkpoint import read_summary

        print(read_summary(Path(options.summary)))
        return 0
    if not options.recipe:
        raise ValueError("no recipe given: `python -m peagle_train RECIPE`, for example recipes/quickstart.yaml")
    from peagle_train.config import dump_recipe, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print_config:
        print(dump_recipe(recipe), end="")
        return 0
    if options.on and not options.dry_run:
        raise ValueError("--on goes with --dry-run: it says for which device to plan")
    if options.dry_run:
        from peagle_train.memory import dry_run

        table = dry_run(recipe, options.on)
        if os.environ.get("RANK", "0") == "0":
            print(table)
        return 0
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    from transformers.utils.logging import disable_progress_bar

    from peagle_train.training.build import train

    if not sys.stderr.isatty():
        disable_progress_bar()

    summary = train(recipe, options.resume, options.force)
    if summary:
        print(summary)
    return 0


def _interrupted(error: KeyboardInterrupt) -> int:
    name, code = ("SIGTERM", 143) if str(error) == "SIGTERM" else ("interrupted", 130)
    return _fail(Exception(f"{name} outside of the training loop: nothing more was saved"), code)


def _fail(error: BaseException, code: int) -> int:
    line = f"peagle_train: error: {' '.join(str(error).split())}\n"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _stop(error, line, code)
    sys.stderr.write(line)
    sys.stderr.flush()
    return code


def _stop(error: BaseException, text: str, code: int) -> NoReturn:
    """Print why this rank fails and end the process at once: nothing at exit may wait for the other ranks."""
    rank = os.environ.get("RANK", "0")
    if code != 1 and rank != "0":
        # All ranks make a user's mistake or get a signal, as a rule: rank 0 reports it, and torchrun ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if code == 1 and re.search(r"[Cc]onnection (closed|reset)|remote process exited", str(error)):
        text = f"peagle_train: error: {one_line(error, 300)}: if another rank has failed, its message is above"
    sys.stdout.flush()
    sys.stderr.write(f"{text.rstrip()} (rank {rank})\n")
    sys.stderr.flush()
    os._exit(code)
