"""An answer of the target, and what makes one unfit to train on."""

import re
from dataclasses import dataclass

LOOP_CHARACTERS, LOOP_REPEATS, LOOP_PERIOD = 200, 4, 1000
LINE_CHARACTERS, LINE_REPEATS, LINE_SHARE = 20, 8, 0.5


@dataclass(frozen=True)
class Answer:
    """One answer, as a server or a model gives it."""

    content: str
    """The text, without what ends a turn."""
    finish_reason: str = "stop"
    """The server's: `stop`, `length`, ...; `refused` where it would not answer."""
    reasoning: str | None = None
    """What it thought first, where the server tells that apart."""
    tokens: int = 0
    """Tokens generated, 0 where the server does not say."""
    detail: str = ""
    """The server's words, where it refused."""


def fault(answer: Answer, keep_truncated: bool = False) -> str | None:
    """Why an answer is unfit, in a word or two; None for a good one.

    `refused`, `truncated` (finish_reason length), another finish_reason than stop, `empty`, or `loop` (see `is_loop`; in
    the content or in the reasoning).
    """
    if answer.finish_reason == "refused":
        return "refused"
    if is_loop(answer.content) or is_loop(answer.reasoning or ""):
        return "loop"
    if answer.finish_reason == "length" and not keep_truncated:
        return "truncated"
    if answer.finish_reason not in ("stop", "length"):
        return f"finish_reason {answer.finish_reason}"
    return None if answer.content.strip() else "empty"


def is_loop(text: str) -> bool:
    """Whether a text got stuck. White space at its end does not count; it loops where one of these holds:

    - its end repeats: for some period p of 1 to 1000 characters, each of its last max(4 * p, 200) characters equals the one
      p before it (within that end; so a unit stands there at least 4 times, and for 200 characters);
    - one line fills it: with digits and outer white space removed, a line of 20 characters or more occurs 8 times or more,
      and these lines have at least half of the text's characters.
    """
    text = text.rstrip()
    for period in range(1, min(LOOP_PERIOD, len(text) // LOOP_REPEATS) + 1):
        length = max(LOOP_REPEATS * period, LOOP_CHARACTERS)
        if length > len(text):
            continue
        tail = text[-length:]
        if tail[period:] == tail[:-period]:
            return True
    times: dict[str, int] = {}
    characters: dict[str, int] = {}
    for line in text.split("\n"):
        plain = re.sub(r"\d+", "", line).strip()
        if len(plain) >= LINE_CHARACTERS:
            times[plain] = times.get(plain, 0) + 1
            characters[plain] = characters.get(plain, 0) + len(line)
    return any(times[line] >= LINE_REPEATS and characters[line] >= LINE_SHARE * len(text) for line in times)
