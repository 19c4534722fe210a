"""Answers of a prompt set, written anew by the target itself, turn by turn: what a drafter should learn from."""

import hashlib
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from peagle_train.answers import Answer, fault
from peagle_train.chat_server import ChatServer, ServerError
from peagle_train.journal import Entry, Journal, finished
from peagle_train.prompts import Message, Prompt, fingerprint

if TYPE_CHECKING:
    from peagle_train.chat_local import LocalChat

Conversation = Generator["Ask", Answer, Entry]

HOPELESS = 20
"""Prompts turned down in a row from the start, without one answer, after which a run stops."""


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
            if recorded is None:
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


def regenerate(
    prompts: Sequence[Prompt],
    out: Path,
    backend: "ChatServer | LocalChat",
    settings: Settings,
    *,
    identity: Mapping[str, Any],
    skipped: Mapping[str, int] | None = None,
    concurrency: int = 16,
    say: Callable[[str], None] = print,
) -> None:
    """Answer all prompts and write OUT in their order; goes on where a killed run of the same settings was.

    Args:
        backend: a server, asked by `concurrency` threads at a time, or a local model, asked in its batches.
        identity: what else the answers depend on: `model`, `chat_template_kwargs`, and more for a local one. Part of the
            journal's settings.
        skipped: prompts left out when reading, by reason; only reported.

    Raises:
        ValueError: a user's mistake; ServerError: the server stopped answering. What was answered is kept.
    """
    settings.check()
    if concurrency < 1:
        raise ValueError(f"--concurrency is {concurrency}; give 1 or more")
    everything = {"prompts": fingerprint(prompts), "count": len(prompts), **identity, **vars(settings)}
    if finished(out, everything) is not None:
        say(f"{out} is already complete")
        return
    journal = Journal(out, everything)
    start, before = time.monotonic(), len(journal.entries)
    if before:
        say(f"going on behind {before} of {len(prompts)} prompts in {journal.path}")

    def make(row: int) -> Conversation:
        return converse(prompts[row], row, identity["model"], settings, identity["chat_template_kwargs"])

    results = (
        _by_threads(backend, len(prompts), journal, make, concurrency)
        if isinstance(backend, ChatServer)
        else _by_batches(backend, len(prompts), journal, make)
    )
    try:
        with tqdm(total=len(prompts), initial=before, unit="prompt", disable=None) as bar:
            for row, entry in results:
                if entry["fault"] == "refused" and not any(e["fault"] == "refused" for e in journal.entries.values()):
                    say(f"prompt {prompts[row].id} is refused: {entry['detail']}")
                journal.add(row, entry)
                bar.update()
                _stop_if_hopeless(journal, len(prompts))
        new = time.monotonic() - start
        lines, report = _outcome(journal.entries, skipped or {})
        if not lines:
            raise ValueError(f"no prompt got a usable answer ({report['text']}); remove {journal.path} to try again")
        journal.finish(lines, {key: value for key, value in report.items() if key != "text"})
    finally:
        results.close()
        if isinstance(backend, ChatServer):
            backend.stop()
        journal.close()
    say(f"{out}: {report['text']}, {len(prompts) - before} prompts in {new:.0f} s")


def _by_threads(
    server: ChatServer, total: int, journal: Journal, make: Callable[[int], Conversation], concurrency: int
) -> Generator[tuple[int, Entry], None, None]:
    """(row, entry) as they come. A thread takes one conversation at a time, from its first turn to its last."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Entry | BaseException]] = queue.SimpleQueue()
    rows = [row for row in range(total) if row not in journal.entries]
    for row in rows:
        todo.put(row)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                row = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((row, _drive(make(row), server)))
            except BaseException as error:  # the main thread raises it
                done.put((row, error))
                return

    try:
        for _ in range(min(concurrency, len(rows))):
            # Daemons: an interrupted run does not wait for answers that nobody will read.
            threading.Thread(target=work, daemon=True).start()
        for _ in rows:
            row, result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield row, result
    finally:
        over.set()


def _drive(conversation: Conversation, server: ChatServer) -> Entry:
    try:
        ask = next(conversation)
        while True:
            ask = conversation.send(server.answer(ask.messages, ask.seed))
    except StopIteration as end:
        entry: Entry = end.value
        return entry


def _by_batches(
    local: "LocalChat", total: int, journal: Journal, make: Callable[[int], Conversation]
) -> Generator[tuple[int, Entry], None, None]:
    """(row, entry) by batches of consecutive prompts, whatever an earlier run has done of them: the numerics of a batched
    pass depend on the batch, so a batch that was only half journaled is computed again as it was.
    """
    for first in range(0, total, local.batch_size):
        rows = range(first, min(total, first + local.batch_size))
        if all(row in journal.entries for row in rows):
            continue
        conversations = {row: make(row) for row in rows}
        answers: dict[int, Answer] = {}
        ended: dict[int, Entry] = {}
        while conversations:
            asks: dict[int, Ask] = {}
            for row, conversation in list(conversations.items()):
                try:
                    asks[row] = conversation.send(answers[row]) if answers else next(conversation)
                except StopIteration as end:
                    ended[row] = end.value
                    del conversations[row]
            if asks:
                batch = list(asks.values())
                given = local.answer([ask.messages for ask in batch], [ask.seed for ask in batch])
                answers = dict(zip(asks, given))
        for row in rows:
            if row not in journal.entries:
                yield row, ended[row]


def _stop_if_hopeless(journal: Journal, total: int) -> None:
    """A server that turns down whatever it is asked is set up wrongly: better to say so than to count it."""
    if len(journal.entries) == min(HOPELESS, total):
        entries = list(journal.entries.values())
        if all(entry["fault"] == "refused" for entry in entries):
            journal.discard()  # or the next run, with the mistake mended, would take these for answered
            raise ValueError(f"the first {len(entries)} prompts are all refused: {entries[0]['detail']}")


def _outcome(entries: Mapping[int, Entry], skipped: Mapping[str, int]) -> tuple[list[str], dict[str, Any]]:
    """The lines to write and the counts to report."""
    in_order = [entries[row] for row in sorted(entries)]
    lines = [_line(entry["row"]) for entry in in_order if entry["row"] is not None]
    cut = Counter(entry["fault"] for entry in in_order if entry["row"] is not None and entry["fault"])
    dropped = Counter(entry["fault"] for entry in in_order if entry["row"] is None)
    totals = {name: sum(entry[name] for entry in in_order) for name in ("answers", "tokens")}
    text = f"{len(lines)} of {len(in_order)} prompts written"
    for what, counts in (("cut short", cut), ("dropped", dropped), ("skipped", Counter(skipped))):
        if counts:
            text += f", {counts.total()} {what} ({', '.join(f'{n} {reason}' for reason, n in sorted(counts.items()))})"
    text += f"; {totals['answers']} answers, {totals['tokens']} tokens"
    report = {"rows": len(lines), "cut": dict(sorted(cut.items())), "dropped": dict(sorted(dropped.items()))}
    return lines, {**report, "skipped": dict(sorted(skipped.items())), **totals, "text": text}


def _line(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    # A lone surrogate, which JSON can hold and UTF-8 cannot, stays an escape.
    return line if line.isascii() or _is_text(line) else json.dumps(row)


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


__all__ = ["Ask", "ServerError", "Settings", "answer_seed", "converse", "regenerate"]
