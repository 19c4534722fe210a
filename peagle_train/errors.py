"""Why a run stops that nobody made a mistake in, and streams that can tell it; light: the command line imports it first."""

import io
import sys
from collections.abc import Callable


def print_anything() -> None:
    """Let stdout and stderr take any text: what they cannot show (half a surrogate pair, a letter that the terminal lacks)
    they write as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class RunStopped(RuntimeError):
    """The run had to stop: one line for a person, exit code 1. What was saved before is whole."""


class NonFinite(RunStopped):
    """The weights are not finite, or the loss or gradient of too many steps in a row; none of these steps was applied."""


class NonFiniteWeights(ValueError):
    """A drafter's weights are not finite: refused where they are read, the end of a run that would save them."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's files are not what its manifest says: a user's decision, exit code 2."""


def one_line(what: object, most: int | None = None) -> str:
    """A text or an error's own words, on one line, of `most` letters at most."""
    return " ".join(str(what).split())[:most]


def told(error: ValueError | OSError) -> str:
    """A tool's last words about a user's mistake, in one line. An OSError that names no file is none, and raised again."""
    if isinstance(error, ValueError):
        return one_line(error)
    if error.filename is None:
        raise error
    name = ascii(error.filename)
    return f"{error.strerror}: {name if len(name) <= 200 else name[:197] + '...'}"


def run_tool(name: str, work: Callable[[], int | None], when_stopped: str = "") -> int:
    """A tool's exit code: what `work` gives (None: 0), 2 behind one line on stderr about a user's mistake, 130 behind one
    line if it was interrupted.
    """
    print_anything()
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        print(f"{name}: error: {told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped{when_stopped}", file=sys.stderr)
        return 130
