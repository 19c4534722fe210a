"""Answers of a prompt set, written anew by the target itself: what a drafter should learn from."""

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from peagle_train.answers.answers import Answer
from peagle_train.answers.chat_server import ChatServer
from peagle_train.answers.conversation import Ask, Conversation, Settings, converse
from peagle_train.answers.journal import Entry, Journal, finished
from peagle_train.answers.prompts import Prompt, fingerprint

if TYPE_CHECKING:
    from peagle_train.answers.chat_local import LocalChat

HOPELESS = 20
"""Prompts turned down in a row from the start, without one answer, after which a run stops."""


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
    start, before, tally = time.monotonic(), len(journal), Tally(skipped or {})
    for entry in journal:
        tally.add(entry)
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
                if entry["fault"] == "refused" and not tally.count("refused"):
                    say(f"prompt {prompts[row].id} is refused: {entry['detail']}")
                journal.add(row, entry)
                tally.add(entry)
                bar.update()
                if bar.disable and len(journal) * 10 // len(prompts) > (len(journal) - 1) * 10 // len(prompts):
                    say(f"{len(journal)} of {len(prompts)} prompts, {tally.tokens} tokens")
                if tally.dropped["refused"] == len(journal) == min(HOPELESS, len(prompts)):
                    journal.discard()  # or the next run, with the mistake mended, would take these for answered
                    raise ValueError(f"the first {tally.total} prompts are all refused: {entry['detail']}")
        seconds = time.monotonic() - start
        if not tally.rows:
            raise ValueError(f"no prompt got a usable answer ({tally.describe()}); remove {journal.path} to try again")
        journal.finish((_line(entry["row"]) for entry in journal if entry["row"] is not None), tally.report())
    finally:
        results.close()
        if isinstance(backend, ChatServer):
            backend.stop()
        journal.close()
    say(f"{out}: {tally.describe()}; {len(prompts) - before} prompts in {seconds:.0f} s")


class Tally:
    """What became of the prompts. `skipped` were not asked, by reason."""

    def __init__(self, skipped: Mapping[str, int]) -> None:
        self.total = self.rows = self.answers = self.tokens = 0
        self.cut: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.skipped = Counter(skipped)

    def add(self, entry: Entry) -> None:
        self.total += 1
        self.rows += entry["row"] is not None
        self.answers += entry["answers"]
        self.tokens += entry["tokens"]
        if entry["fault"] is not None:
            (self.dropped if entry["row"] is None else self.cut)[entry["fault"]] += 1

    def count(self, fault: str) -> int:
        return self.dropped[fault] + self.cut[fault]

    def report(self) -> dict[str, Any]:
        """For the report's file: no clock, no order of arrival, so that it is the same after a crash."""
        counts = {name: dict(sorted(getattr(self, name).items())) for name in ("cut", "dropped", "skipped")}
        return {"prompts": self.total, "rows": self.rows, **counts, "answers": self.answers, "tokens": self.tokens}

    def describe(self) -> str:
        """One line."""
        text = f"{self.rows} of {self.total} prompts written"
        for what, counts in (("cut short", self.cut), ("dropped", self.dropped), ("skipped", self.skipped)):
            if counts:
                reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
                text += f", {counts.total()} {what} ({reasons})"
        return text + f"; {self.answers} answers, {self.tokens} tokens"


def _by_threads(
    server: ChatServer, total: int, journal: Journal, make: Callable[[int], Conversation], concurrency: int
) -> Generator[tuple[int, Entry], None, None]:
    """(row, entry) as they come. A thread takes one conversation at a time, from its first turn to its last."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Entry | BaseException]] = queue.SimpleQueue()
    rows = [row for row in range(total) if row not in journal]
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
        if all(row in journal for row in rows):
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
            if row not in journal:
                yield row, ended[row]


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
