"""Python code in a target's folder runs only if whoever starts the command says so: a real payload, in every command."""

import json
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from peagle_train.__main__ import main
from tests.documents import make_byte_target, write_stdlib_recipe

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


def add_code(config: Path, classes: dict[str, Any]) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": classes}))


def test_a_drafters_recipe_cannot_have_code_of_its_target_run(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    target, marker = make_byte_target(tmp_path / "target"), tmp_path / "marker"
    (target / "payload.py").write_text(PAYLOAD.format(marker=str(marker)))
    add_code(target / "config.json", {"AutoConfig": "payload.Config", "AutoModelForCausalLM": "payload.Model"})
    recipe = str(write_stdlib_recipe(tmp_path / "mine.yaml", target, str(tmp_path / "run")))
    drafter, prompts = str(tmp_path / "run" / "final"), tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "def f(x):"}')
    assert main([recipe, "target.trust_remote_code=true"]) == 0
    assert marker.exists() and "trust_remote_code: true" in (tmp_path / "run" / "final" / "recipe.yaml").read_text()
    marker.unlink()
    add_code(target / "tokenizer_config.json", {"AutoTokenizer": [None, "payload.Fast"]})

    evaluate, warm = ["evaluate", drafter, "--prompts", str(prompts), "--max-tokens", "3"], f"draft.init_from={drafter}"
    for words in (
        evaluate,
        ["evaluate", drafter, "--prompts", "stdlib", "--limit", "1"],
        ["export", drafter, "--out", str(tmp_path / "exported")],
        ["check", drafter, "--target", str(target)],
        ["import", drafter, "--out", str(tmp_path / "in")],
        ["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")],
        [recipe, "--resume", str(tmp_path / "run" / "checkpoint-1")],
        ["plan", recipe, warm],
        [recipe, warm, f"output.dir={tmp_path / 'other'}"],
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        capfd.readouterr()
        code, said = main(words), "".join(capfd.readouterr())
        assert code == 0 and not marker.exists(), (words, said[-600:])
        if words[0] in ("evaluate", "export"):
            assert str(target) in said, words
        if words is evaluate:
            assert "--trust-remote-code" in caplog.text
    assert main([*evaluate, "--trust-remote-code"]) == 0
    assert marker.exists()
