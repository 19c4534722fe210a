"""One conversation with the target, turn by turn: what is asked, and what of the answers is kept."""

import hashlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from peagle_train.answers.answers import Answer, fault
from peagle_train.answers.journal import Entry
from peagle_train.answers.prompts import Message, Prompt

Conversation = Generator["Ask", Answer, Entry]


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted."""

    messages: list[Message]
    """The conversation so far, roles and contents alone."""
    seed: int
    """Of this answer's sampling, in 0..2**31 - 1."""


@dataclass(frozen=True)
class Settings:
    """What the answers depend on, besides prompts and model."""

    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 2048
    seed: int = 0
    last_turn: bool = False
    """Answer only the last question; earlier answers stay as recorded, with weight 0."""
    keep_truncated: bool = False
    """Keep an answer that max_tokens cut, as its conversation's last."""

    def check(self) -> None:
        """ValueError on a value that is not allowed."""
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"--temperature is {self.temperature}; give 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; give more than 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is {self.max_tokens}; give 1 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; give 0 to 2**63 - 1")


def answer_seed(seed: int, row: int, turn: int) -> int:
    """The seed of one answer: a function of the run's seed, the prompt's number and the turn."""
    key = hashlib.sha256(f"answer,{seed},{row},{turn}".encode()).digest()
    return int.from_bytes(key[:8], "little") % 2**31


def converse(
    prompt: Prompt, row: int, model: str, settings: Settings, template_kwargs: Mapping[str, Any] | None = None
) -> Conversation:
    """Yields what to ask, is sent the answers, returns the row's entry.

    An entry has `row` (what is written, or None), `fault` (why the conversation ends early, or None), `answers` and
    `tokens`. A conversation is cut before its first unfit answer; if nothing of the target's is left, it has no row.
    """
    messages: list[Message] = []
    finish_reasons: list[str] = []
    count = tokens = 0
    why = detail = None
    for turn, (asked, recorded) in enumerate(zip(prompt.turns, prompt.answers)):
        if settings.last_turn and turn < len(prompt.turns) - 1:
            if recorded is None or not _says_something(recorded):  # training takes no empty turn, whatever its weight
                why = "no recorded answers"
                break
            messages += [*asked, {**recorded, "weight": 0}]  # read, but not learned from: it is not the target's
            continue
        context = [{"role": m["role"], "content": m["content"]} for m in [*messages, *asked]]
        answer = yield Ask(context, answer_seed(settings.seed, row, turn))
        count, tokens = count + 1, tokens + answer.tokens
        why, detail = fault(answer, settings.keep_truncated), answer.detail
        if why is not None:
            break
        message: Message = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        messages += [*asked, message]
        finish_reasons.append(answer.finish_reason)
        if answer.finish_reason == "length":  # kept: but no answer to a later question would follow from it
            why = "truncated" if turn < len(prompt.turns) - 1 else None
            break
    generated = {
        "model": model,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "finish_reasons": finish_reasons,
    }
    # Training renders a row with its own variables of the template, so that it reads what the target has read.
    kwargs = {"chat_template_kwargs": dict(template_kwargs)} if template_kwargs else {}
    written = {"id": prompt.id, "messages": messages, **kwargs, "generated": generated}
    entry: Entry = {"row": written if finish_reasons else None, "fault": why, "answers": count, "tokens": tokens}
    return {**entry, "detail": detail} if detail else entry


def _says_something(recorded: Message) -> bool:
    return any(recorded.get(name, "").strip() for name in ("content", "reasoning_content"))
