"""Python code in a target's folder runs only if whoever starts the command says so: a real payload, in every command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from peagle_train.__main__ import main as train
from tests.byte_tokenizer import make_byte_target, write_stdlib_recipe
from tests.helpers import command

PAYLOAD = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class Config(LlamaConfig):
    def __post_init__(self, **kwargs):
        Path({marker!r}).touch()
        super().__post_init__(**kwargs)

class Model(LlamaForCausalLM):
    config_class = Config

class Fast(PreTrainedTokenizerFast):
    def __init__(self, *arguments, **options):
        Path({marker!r}).touch()
        super().__init__(*arguments, **options)
"""


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A target with code of its own, and the file that the code makes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    target, marker = make_byte_target(tmp_path / "target"), tmp_path / "marker"
    (target / "payload.py").write_text(PAYLOAD.format(marker=str(marker)))
    add_code(target / "config.json", {"AutoConfig": "payload.Config", "AutoModelForCausalLM": "payload.Model"})
    return target, marker


def add_code(config: Path, classes: dict[str, Any]) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": classes}))


def test_a_drafters_recipe_cannot_have_code_of_its_target_run(
    tmp_path: Path, payload: tuple[Path, Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    target, marker = payload
    recipe = str(write_stdlib_recipe(tmp_path / "mine.yaml", target, str(tmp_path / "run")))
    drafter, prompts = str(tmp_path / "run" / "final"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "def f(x):"}')
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train([recipe, "target.trust_remote_code=true"]) == 0
    assert marker.exists() and "trust_remote_code: true" in (tmp_path / "run" / "final" / "recipe.yaml").read_text()
    marker.unlink()
    add_code(target / "tokenizer_config.json", {"AutoTokenizer": [None, "payload.Fast"]})

    evaluate = [drafter, "--prompts", str(prompts), "--max-tokens", "3"]
    out = str(tmp_path / "other")
    commands: dict[str, Callable[[], int]] = {
        "evaluate": lambda: command("evaluate", *evaluate),
        "evaluate stdlib": lambda: command("evaluate", drafter, "--prompts", "stdlib", "--limit", "1"),
        "export": lambda: command("export", drafter, "--out", tmp_path / "exported"),
        "check": lambda: command("check", drafter, "--target", target),
        "import": lambda: command("import", drafter, "--out", tmp_path / "in"),
        "report": lambda: command("report", tmp_path / "run", "--out", tmp_path / "report.html"),
        "summary": lambda: train(["--summary", str(tmp_path / "run")]),
        "resume": lambda: train([recipe, "--resume", str(tmp_path / "run" / "checkpoint-1")]),
        "plan": lambda: train([recipe, "--dry-run", f"draft.init_from={drafter}"]),
        "warm start": lambda: train([recipe, f"draft.init_from={drafter}", f"output.dir={out}"]),
    }
    for name, run in commands.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        capfd.readouterr()
        code, said = run(), "".join(capfd.readouterr())
        assert code == 0 and not marker.exists(), (name, said[-600:])
        if name in ("evaluate", "export"):
            assert str(target) in said, name
        if name == "evaluate":
            assert "--trust-remote-code" in caplog.text
    assert command("evaluate", *evaluate, "--trust-remote-code") == 0
    assert marker.exists()
