"""Hidden states that speculators wrote: the same drafter as from our own target, and one line for what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from peagle_train.__main__ import main
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import command
from tests.tiny import make_target, write_recipe, write_rows

LENGTHS = [9, 31, 4, 17, 32, 1, 2]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in write_rows(folder / "rows.jsonl", LENGTHS, 0.4).read_text().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    """Files as speculators leaves them."""
    model, folder = FrozenTarget.load(str(target), dtype="float64"), tmp_path_factory.mktemp("written")
    before: list[torch.Tensor] = []
    model.model.model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    for i, row in enumerate(samples(tmp_path_factory.mktemp("rows"))):
        ids = torch.tensor(row["input_ids"])
        features, _ = model.features(ids[None], torch.arange(ids.numel())[None])
        hidden = torch.cat([features[0].view(ids.numel(), 3, 16), before[-1][0][:, None]], dim=1)
        save_file({"token_ids": ids, "hidden_states": hidden}, folder / f"hs_{i}.safetensors")
    return folder


def copied(written: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """`changes` replace tensors of hs_1; None removes one."""
    shutil.copytree(written, folder)
    tensors = {**load_file(folder / "hs_1.safetensors"), **changes}
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, folder / "hs_1.safetensors")
    return folder


def write_data_set(folder: Path, rows: list[dict[str, Any]], form: str | None = None) -> None:
    import datasets

    table = datasets.Dataset.from_list([{**row, "seq_len": len(row["input_ids"])} for row in rows])
    table.with_format(form).save_to_disk(str(folder))


def drafter(recipe: Path, run: Path, *overrides: str) -> dict[str, torch.Tensor]:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(recipe), f"output.dir={run}", *overrides]) == 0
    return load_file(run / "final" / "model.safetensors")


@pytest.mark.parametrize("mask", ["in the data set as tensors", "in the files"])
def test_a_drafter_from_speculators_files_is_the_one_from_the_target(
    mask: str, tmp_path: Path, target: Path, written: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = samples(tmp_path)
    data = tmp_path / "data"
    files = copied(written, data / "hidden_states")
    if mask.startswith("in the data set"):
        write_data_set(data, rows, "torch")
    else:
        for i, row in enumerate(rows):
            path = files / f"hs_{i}.safetensors"
            save_file({**load_file(path), "loss_mask": torch.tensor(row["loss_mask"])}, path)
    recipe = write_recipe(
        tmp_path, target, tmp_path / "rows.jsonl", tmp_path / "run", train={"max_steps": 2}, data={"max_bad_rows": 1}
    )
    assert command("cache", recipe, "--speculators", data, "--out", tmp_path / "cache") == 0
    documents = [json.loads(line) for line in (tmp_path / "cache" / "documents.jsonl").read_text().splitlines()]
    assert documents == [row for row in rows if 1 in row["loss_mask"][1:]] != rows
    assert "1 samples with no token to learn from are not in" in caplog.text
    online = drafter(recipe, tmp_path / "online")
    source = f"data.sources=[{tmp_path / 'cache' / 'documents.jsonl'}]"
    cached = drafter(recipe, tmp_path / "cached", f"target.cache={tmp_path / 'cache'}", source)
    assert all(torch.allclose(online[name], cached[name], rtol=0, atol=1e-9) for name in online)


def test_the_targets_weights_stay_on_the_disk_and_its_norm_is_looked_for_once(
    tmp_path: Path, target: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples(tmp_path)
    models: list[FrozenTarget] = []
    final_norm = FrozenTarget.final_norm

    def watched(self: FrozenTarget) -> Any:
        models.append(self)
        return final_norm(self)

    monkeypatch.setattr(FrozenTarget, "final_norm", watched)
    recipe = write_recipe(tmp_path, target, tmp_path / "rows.jsonl", tmp_path / "run")
    assert command("cache", recipe, "--speculators", written, "--out", tmp_path / "cache") == 0
    [model] = models
    assert all(parameter.is_meta for parameter in model.model.parameters())


WRONG: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no ids": ({"token_ids": None}, [], "it must have token_ids"),
    "no states": ({"hidden_states": None}, [], "hidden_states"),
    "two layers": ({"hidden_states": torch.zeros(31, 3, 16)}, [], "(31, 3, 16)"),
    "cut": ({"hidden_states": torch.zeros(30, 4, 16)}, [], "(30, 4, 16)"),
    "ids outside": ({"token_ids": torch.full((31,), 61)}, [], "ids in 0..60"),
    "not finite": ({"hidden_states": torch.full((31, 4, 16), float("nan"))}, [], "not all finite"),
    "FP8": ({"hidden_states_scales": torch.ones(31, 4)}, [], "FP8 (hidden_states_scales)"),
    "mask": ({"loss_mask": torch.ones(30, dtype=torch.int64)}, [], "loss_mask"),
    "other layers": ({}, ["target.layer_ids=[0, 1, 2]"], "give target.layer_ids"),
    "longer than a row": ({}, ["data.max_length=16"], "has 31 tokens, data.max_length is 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit_are_one_clear_line(
    case: str, tmp_path: Path, target: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, overrides, message = WRONG[case]
    files = copied(written, tmp_path / "files", **changes)
    samples(tmp_path)
    recipe = write_recipe(tmp_path, target, tmp_path / "rows.jsonl", tmp_path / "run")
    assert command("cache", recipe, *overrides, "--speculators", files, "--out", tmp_path / "cache") == 2
    assert message in capsys.readouterr().err


def test_a_data_set_of_other_tokens_and_files_that_are_no_cache_are_refused(
    tmp_path: Path, target: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = samples(tmp_path)
    files = copied(written, tmp_path / "data" / "hidden_states")
    write_data_set(tmp_path / "data", rows[1:] + rows[:1])
    recipe = write_recipe(tmp_path, target, tmp_path / "rows.jsonl", tmp_path / "run")
    assert command("cache", recipe, "--speculators", files, "--out", tmp_path / "cache") == 2
    assert "row 0 of the data set next to it has other tokens" in capsys.readouterr().err
    assert main([str(recipe), f"target.cache={written}"]) == 2
    assert "--speculators" in capsys.readouterr().err
