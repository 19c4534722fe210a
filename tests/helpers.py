"""Small drafters, rows and targets; how far two results are apart; commands in this process; what tensors hold at most."""

import hashlib
import json
import os
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peagle_train.core.collator import CODCollator
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.passes import StepStats, TargetOutputs

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
"""For subprocesses, whether or not the package is installed."""

GOLDEN_DRAWS = json.loads((ROOT / "tests" / "golden" / "cod.json").read_text())["cases"]
RANDOM_DRAWS = json.loads((ROOT / "tests" / "golden" / "cod_random.json").read_text())["cases"]
"""The reference's draws from random arguments, with the state that they leave the generator in."""

VOCAB, MASK_TOKEN, DRAFT_VOCAB, TARGET_HIDDEN = 48, 47, 30, 12
L, K = 37, 5
"""Columns and depths of most rows."""


def make_config(**changes: Any) -> PEagleDraftConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "target_hidden_size": TARGET_HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "draft_vocab_size": DRAFT_VOCAB,
        "ptd_token_id": MASK_TOKEN,
        "rope_theta": 5000.0,
    }
    return PEagleDraftConfig(**{**settings, **changes})


def make_draft(dtype: torch.dtype = torch.float64, **changes: Any) -> PEagleDraft:
    """A drafter whose every weight, the norms' too, is random and matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = PEagleDraft(make_config(**changes))
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter += torch.randn_like(parameter) * 0.2
    return draft.to(dtype)


def make_rows(
    L: int, documents: int = 1, batch_size: int = 1, prompt: float = 0.0, padding: int = 2, seed: int = 1
) -> list[dict[str, Any]]:
    """Rows of random ids, each shorter than the one before; a share of each document's front is not supervised."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for b in range(batch_size):
        n = max(1, L - padding - 3 * b)
        starts = [0, *sorted((torch.randperm(max(0, n - 2), generator=g)[: documents - 1] + 1).tolist()), n]
        row: dict[str, Any] = {"input_ids": torch.randint(0, MASK_TOKEN, (n,), generator=g).tolist()}
        row["document_ids"] = [i for i, (a, z) in enumerate(pairwise(starts)) for _ in range(a, z)]
        row["loss_mask"] = []
        for a, z in pairwise(starts):
            unsupervised = max(1, int((z - a) * prompt))
            row["loss_mask"] += ([0] * unsupervised + [1] * (z - a))[: z - a]
        rows.append(row)
    return rows


def make_batch(rows: Sequence[Mapping[str, Any]], L: int, S: int = 1, K: int = K, **options: Any) -> dict[str, Tensor]:
    options = {"down_sample_ratio": 0.8, "down_sample_ratio_min": 0.2, **options}
    return CODCollator(L, num_depths=K, num_segments=S, **options)(rows)


def make_target(
    batch: dict[str, Tensor], dtype: torch.dtype = torch.float64, seed: int = 2, layers: int = 3
) -> TargetOutputs:
    """Random features, last hidden states and head, the same for every cut of the same rows."""
    B, L = batch["input_ids"].shape
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    features, last_hidden = normal(B, L, layers * TARGET_HIDDEN), normal(B, L, TARGET_HIDDEN)
    return TargetOutputs(features, last_hidden, normal(DRAFT_VOCAB, TARGET_HIDDEN))


def elements_of(batch: dict[str, Tensor], b: int) -> list[tuple[int, int]]:
    """Row b's (anchor, depth), padding left out."""
    pairs = zip(batch["anchor"][b].tolist(), batch["depth"][b].tolist(), strict=True)
    return [(anchor, depth) for anchor, depth in pairs if depth >= 0]


@dataclass
class Outcome:
    """What one step gave."""

    loss: Tensor
    hits: list[int]
    totals: list[int]
    gradients: dict[str, Tensor]
    """Zeros where a parameter got none."""
    untouched: list[str]
    """Parameters whose gradient is None."""


def outcome_of(
    step: Callable[..., StepStats], draft: PEagleDraft, batch: dict[str, Tensor], target: TargetOutputs, **options: Any
) -> Outcome:
    draft.zero_grad(set_to_none=True)
    stats = step(draft, batch, target, **options)
    named = dict(draft.named_parameters())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
    untouched = [n for n, p in named.items() if p.grad is None]
    draft.zero_grad(set_to_none=True)
    return Outcome(stats.loss, stats.hits.tolist(), stats.totals.tolist(), gradients, untouched)


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Worst max|difference| / max|expected| of any tensor.

    A tensor that is zero but for rounding (one visible key has no gradient) is measured against a 10,000th of the largest.
    """
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for t in expected.values())
    worst = 0.0
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-4 * largest)
        difference = float((found[name] - tensor).abs().max())
        assert difference == difference, f"{name} is not a number"
        worst = max(worst, difference / scale if scale else difference)
    return worst


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Euclidean, over all tensors together."""
    return sum(float((found[n].double() - t.double()).square().sum()) for n, t in expected.items()) ** 0.5


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-10) -> None:
    """Loss and gradients to a relative tolerance, hits and counts exactly."""
    assert (found.hits, found.totals) == (expected.hits, expected.totals)
    assert relative_error({"loss": found.loss}, {"loss": expected.loss}) <= tolerance
    assert relative_error(found.gradients, expected.gradients) <= tolerance


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    """A list that grows by the number of rows (dim 1 of the first argument) whenever the module is called."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1]))
    try:
        yield calls
    finally:
        handle.remove()


def golden_arguments(case: dict[str, Any]) -> tuple[int, Tensor, int, float, float, bool]:
    mask = torch.zeros(1, case["seq_length"], dtype=torch.int64)
    for start, stop in case["loss_mask_runs"]:
        mask[0, start:stop] = 1
    ratio, floor = case["down_sample_ratio"], case["down_sample_ratio_min"]
    return case["seq_length"], mask, case["num_depths"], ratio, floor, case.get("filter_position_zero", True)


def sha256(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().astype("<i8").tobytes()).hexdigest()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_package(folder: Path, package: str, file: str, content: bytes) -> None:
    """An installed distribution that would fail if it were imported."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{file.split('/')[0]}/__init__.py,,\n{file},,\n")
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_bytes(content)
    (folder / file.split("/")[0] / "__init__.py").write_text("raise RuntimeError('imported')")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def command(name: str, *arguments: object) -> int:
    """A command of `peagle-train` in this process; its exit code."""
    from peagle_train.cli import main

    return main([name, *map(str, arguments)])


class LiveBytes(TorchDispatchMode):
    """`peak`: the most that all tensors made within the block held together at any moment, each storage once; `largest`:
    the most of one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.held = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in known | self._known:
                self._known.add(storage._cdata)
                self.held += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return out

    def _let_go(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.held -= size
