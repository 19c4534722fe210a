"""The reference dump: tools/check_reference.py passes on it and notices what is wrong, and so do the oracles."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests import oracles
from tests.helpers import ENVIRONMENT, ROOT, relative_error

DUMP = ROOT / "tests" / "golden" / "draft_2layer.safetensors"


def load(path: Path = DUMP) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


TOOL = ROOT / "tools" / "check_reference.py"


@pytest.fixture
def check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], tuple[int, str, str]]:
    """The tool's main on a file, in this process: exit status, stdout, stderr."""
    spec = importlib.util.spec_from_file_location("check_reference", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(path: Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(path)])
        return tool.main(), *capsys.readouterr()

    return run


Check = Callable[[Path], tuple[int, str, str]]


@pytest.mark.slow
def test_the_tools_exit_status_is_its_verdict(tmp_path: Path) -> None:
    tensors, metadata = load()
    largest_entry_times(tensors["grad.fc.weight"], 1.001)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    command = [sys.executable, str(TOOL), str(tmp_path / "changed.safetensors")]
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == 1


def test_the_reference_dump_passes_with_its_loss_and_every_gradient(check: Check) -> None:
    status, stdout, stderr = check(DUMP)
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    tensors, _ = load()
    expected = {"loss"} | {name.removeprefix("grad.") for name in tensors if name.startswith("grad.")}
    assert len(expected) == 25 and {line.split()[-1] for line in lines[:-1]} == expected
    assert all(line.startswith("ok ") for line in lines[:-1]) and lines[-1].startswith("passed: worst relative error")


def largest_entry_times(tensor: Tensor, factor: float) -> None:
    """Errors are relative to the largest entry."""
    flat = tensor.view(-1)
    flat[flat.abs().argmax()] *= factor


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("grad.layers.1.self_attn.k_proj.weight", 1 + 3e-5),
        ("grad.mask_hidden", -1.0),
        ("grad.fc.weight", float("nan")),
        ("loss", 1.001),
    ],
)
def test_a_dump_with_one_number_changed_fails_and_the_tensor_is_named(
    tmp_path: Path, name: str, factor: float, check: Check
) -> None:
    tensors, metadata = load()
    largest_entry_times(tensors[name], factor)
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    status, stdout, _ = check(tmp_path / "changed.safetensors")
    assert status == 1
    bad = [line.split()[-1] for line in stdout.splitlines() if line.startswith("BAD")]
    assert bad == [name.removeprefix("grad.")] and "FAILED" in stdout.splitlines()[-1]


def no_dump(folder: Path, kind: str) -> Path:
    path = folder / "file.safetensors"
    tensors, metadata = load()
    if kind == "text":
        path.write_text("no tensors here")
    elif kind == "without config":
        save_file(tensors, path)
    elif kind == "without a weight":
        del tensors["weight.norm.weight"]
        save_file(tensors, path, metadata)
    elif kind == "with a weight too many":
        save_file({**tensors, "weight.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}, path, metadata)
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "without config", "without a weight", "with a weight too many"])
def test_what_is_no_dump_is_told_from_a_dump_that_differs(tmp_path: Path, kind: str, check: Check) -> None:
    status, stdout, stderr = check(no_dump(tmp_path, kind))
    assert (status, stdout) == (2, "")
    assert stderr.startswith("check_reference: ") and len(stderr.splitlines()) == 1


def test_the_oracles_agree_with_the_reference_too() -> None:
    """What the other tests compare with is itself compared with somebody else's implementation."""
    tensors, metadata = load()
    settings = json.loads(metadata["config"])
    config = SimpleNamespace(
        **settings,
        rope_parameters={"rope_theta": settings["rope_theta"]},
        norm_before_residual=False,
        layer_type="llama",
        norm_before_fc=False,
        fc_norm=False,
        sliding_window=None,
        ptd_token_id=settings["mask_token_id"],
    )
    weights = {n.removeprefix("weight."): t.requires_grad_() for n, t in tensors.items() if n.startswith("weight.")}
    # The dump is shifted: its row p reads token p + 1 of a document whose first token it does not hold.
    n = settings["seq_length"]
    row = {
        "input_ids": [0, *tensors["input_ids"].tolist()],
        "loss_mask": [0, *tensors["loss_mask"].tolist()],
        "document_ids": [0] * (n + 1),
    }
    logits = tensors["target_logits"][:, tensors["draft_token_ids"]]
    loss, _, totals = oracles.step(
        weights,
        config,
        row,
        list(zip(tensors["anchor"].tolist(), tensors["depth"].tolist())),
        tensors["aux_hidden_states"],
        torch.cat([logits[:1], logits]),
        torch.eye(settings["draft_vocab_size"], dtype=torch.float64),
    )
    assert sum(totals) == settings["supervised"]
    loss = loss / sum(totals)
    assert relative_error({"loss": loss.detach()}, {"loss": tensors["loss"][0]}) <= 1e-5
    found = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
    assert relative_error(found, {name: tensors[f"grad.{name}"] for name in found}) <= 1e-5
