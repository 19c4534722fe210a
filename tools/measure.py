"""Measuring helpers of the benches: memory held for backward, peak memory, child processes, results."""

import argparse
import ctypes
import datetime
import functools
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint

from peagle_train import files

MIB = 2**20

# ---- arguments


def integers(text: str) -> list[int]:
    """`8,16` as a list, for argparse's `type`."""
    return [at_least_one(part.strip()) for part in text.split(",")]


def at_least_one(text: str) -> int:
    """A single number, for argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def read_options(about: str | None, one: Callable[..., Any], **defaults: Any) -> argparse.Namespace:
    """A bench's command line: an option for each default, of the default's type, and --json. In a child (`run_child`),
    call `one` with its settings instead, write down what it returns, and end.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        kind = {list: integers, int: at_least_one}.get(type(default), type(default))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        write_json(options.child[1], one(**json.loads(options.child[0])))
        sys.exit()
    return options


# ---- memory of this process


def status_bytes(field: str) -> int:
    """A size out of this process's /proc/self/status: VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def release_memory() -> None:
    """Collect garbage and have the C library return what is free, so that a baseline holds nothing of the past."""
    gc.collect()
    with suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


class PeakRSS:
    """Peak resident memory of a `with` block over what was resident at its start (Linux).

    The kernel's own high-water mark, reset at the start, so that no spike falls between two samples.
    """

    peak_bytes: int

    def __enter__(self) -> "PeakRSS":
        release_memory()
        Path("/proc/self/clear_refs").write_text("5")
        self._baseline = status_bytes("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak_bytes = max(0, status_bytes("VmHWM") - self._baseline)


# ---- memory held for backward


class SavedBytes:
    """Bytes that autograd holds for backward, of a `with` block: `peak_bytes`, the most at any one moment.

    Every storage counts once, whole, however many tensors and nodes of the graph share it, from the moment it is first
    saved until the last node that saved it lets go. What `torch.utils.checkpoint` computes again (without reentrance)
    counts too, until it is freed. Bool tensors (masks) do not count, nor what `excluded` returns whenever something is
    saved: tensors that are there anyway, or accounted for apart.
    """

    peak_bytes: int

    def __init__(self, excluded: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self.peak_bytes = 0
        self._excluded = excluded
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()
        self._recomputed: dict[int, tuple[Any, int]] = {}  # storage: (weak reference, bytes)

    def __enter__(self) -> "SavedBytes":
        tracker = self

        # Within a checkpointed region torch's own hooks stand in front of ours: in the forward they keep nothing, in
        # the backward what they keep lives until it has been used, which a weak reference to its storage tells.
        original: Any = checkpoint._recomputation_hook

        class Watched(original):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                pack = self.pack_hook  # type: ignore[has-type]

                def watched_pack(tensor: Tensor) -> Any:
                    tracker._watch(tensor)
                    return pack(tensor)

                self.pack_hook = watched_pack

        self._stack = ExitStack()
        self._stack.enter_context(mock.patch.object(checkpoint, "_recomputation_hook", Watched))
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._hold, lambda held: held.tensor))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _counts(self, tensor: Tensor) -> bool:
        return tensor.dtype != torch.bool and _storage_id(tensor) not in map(_storage_id, self._excluded())

    def _hold(self, tensor: Tensor) -> "_Held":
        held = _Held(tensor)
        if self._counts(tensor):
            self._held.add(held)
            self._note()
        return held

    def _watch(self, tensor: Tensor) -> None:
        if self._counts(tensor):
            storage = tensor.untyped_storage()
            self._recomputed[_storage_id(tensor)] = StorageWeakRef(storage), storage.nbytes()
            self._note()

    def _note(self) -> None:
        # The sum grows nowhere but here, so its maximum is seen without looking at any other moment.
        self._recomputed = {k: (ref, size) for k, (ref, size) in self._recomputed.items() if not ref.expired()}
        now = {k: size for k, (_, size) in self._recomputed.items()}
        now |= {_storage_id(held.tensor): held.tensor.untyped_storage().nbytes() for held in self._held}
        self.peak_bytes = max(self.peak_bytes, sum(now.values()))


class _Held:
    """What the graph keeps in a tensor's place; dies with the node's hold on it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---- processes


def run_process(
    command: Sequence[str],
    *,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
    log: list[str] | None = None,
) -> str | None:
    """Run a command to its end; after `timeout` seconds, kill it and all that it has started. Returns why it did not do its
    work; None if it did. `log` gets the lines that it printed.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as child:
        try:
            output, died = child.communicate(timeout=timeout)[0], None
        except BaseException as error:  # also where we are being stopped ourselves
            os.killpg(child.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            output, died = child.communicate()[0], f"took more than {timeout:g} s"
    code, lines = child.returncode, [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    if log is not None:
        log += lines
    if died is None and code < 0:
        died = f"ended by {signal.Signals(-code).name}" + " (out of memory?)" * (code == -signal.SIGKILL)
    elif died is None and code:
        died = ": ".join([f"exit {code}", *(line[:300] for line in lines[-1:])])
    return died


def run_child(script: str, settings: dict[str, Any], timeout: float | None = None) -> tuple[dict[str, Any], str | None]:
    """Run `script --child SETTINGS OUT`: what it wrote to OUT, and why it did not do its work, if so. Compilers' caches are
    its own: an earlier process's would hide what compiling takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, script, "--child", json.dumps(settings), str(out)]
        died = run_process(command, timeout=timeout, environment=environment)
        return json.loads(out.read_text()) if out.exists() else {}, died


Runs = tuple[list[dict[str, Any]], str | None]
"""What the runs of a case found, and why one of them died."""


def run_in_turns(
    script: str, cases: dict[str, dict[str, Any]], repeats: int, timeout: float | None = None
) -> dict[str, Runs]:
    """Run every case, settings by name, `repeats` times, each time in a process of its own and all of them in turns, so
    that a slow minute of the machine does not fall on one alone. A case that has died is not run again.
    """
    found: dict[str, Runs] = {name: ([], None) for name in cases}
    for turn in range(repeats):
        for name, (runs, earlier) in found.items():
            if earlier is None:
                result, died = run_child(script, cases[name], timeout)
                found[name] = (runs if died else [*runs, result]), died
                print(f"[{turn + 1}/{repeats}] {name}: {died or 'done'}", file=sys.stderr, flush=True)
    return found


# ---- output


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write whole or not at all; each object of a list also says where, with which versions and when it was measured."""
    if isinstance(content, list):
        content = [{**row, **where_and_when()} for row in content]
    files.write_json(Path(path), content)


@functools.cache
def where_and_when() -> dict[str, str]:
    return {
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers")),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    name = platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return name


def format_number(value: float | None, unit: float = 1, digits: int = 2) -> str:
    """`value` in units, "-" for None."""
    return "-" if value is None else f"{value / unit:,.{digits}f}"
