"""The reference dump: tools/check_reference.py passes on it and notices what is wrong, and so do the oracles."""

import json
import runpy
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
from tests.helpers import ROOT, relative_error

DUMP = ROOT / "tests" / "golden" / "draft_2layer.safetensors"


def load(path: Path = DUMP) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


Check = Callable[[Path], tuple[int, str, str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """The tool on a file, in this process: exit status, stdout, stderr."""

    def run(path: Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check_reference.py", str(path)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "check_reference.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()  # type: ignore[return-value]

    return run


def test_the_reference_dump_passes_with_its_loss_and_every_gradient(check):
    status, stdout, stderr = check(DUMP)
    assert (status, stderr) == (0, "")
    *lines, verdict = stdout.splitlines()
    expected = {"loss"} | {name.removeprefix("grad.") for name in load()[0] if name.startswith("grad.")}
    assert len(expected) == 25 and {line.split()[-1] for line in lines} == expected
    assert all(line.startswith("ok ") for line in lines) and verdict.startswith("passed: worst relative error")


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("grad.layers.1.self_attn.k_proj.weight", 1 + 3e-5),
        ("grad.fc.weight", float("nan")),
        ("loss", 1.001),
    ],
)
def test_a_dump_with_one_number_changed_fails_and_the_tensor_is_named(tmp_path, name, factor, check):
    tensors, metadata = load()
    flat = tensors[name].view(-1)
    flat[flat.abs().argmax()] *= factor  # errors are relative to the largest entry
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    status, stdout, _ = check(tmp_path / "changed.safetensors")
    bad = [line.split()[-1] for line in stdout.splitlines() if line.startswith("BAD")]
    assert status == 1 and bad == [name.removeprefix("grad.")] and "FAILED" in stdout.splitlines()[-1]


def test_what_is_no_dump_is_told_from_a_dump_that_differs(tmp_path, check):
    path = tmp_path / "file.safetensors"
    tensors, metadata = load()
    too_many = {**tensors, "weight.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}
    for content, described in ((tensors, None), (too_many, metadata)):
        save_file(content, path, described)
        status, stdout, stderr = check(path)
        assert (status, stdout) == (2, "")
        assert stderr.startswith("check_reference: ") and len(stderr.splitlines()) == 1


def test_the_oracles_agree_with_the_reference_too():
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
