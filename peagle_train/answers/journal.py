"""Results that survive a crash: an append-only journal while a run lasts, one file in order at its end.

The journal is `OUT.journal`: a first line with the settings, then a line a result, in the order in which they came;
each line is on the disk before the next begins. `finish` turns it into OUT and `OUT.report.json`.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peagle_train.durable import partial_path, put, sync

Entry = dict[str, Any]


class Journal:
    """The results of a run so far, those of an earlier, killed run of the same settings included.

    Args:
        out: where the finished file goes; its folder is made.
        settings: everything that results depend on. Plain JSON values.

    Raises:
        ValueError: the journal is of other settings or damaged, another process writes it, or OUT is there already.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.path = out, out.with_name(out.name + ".journal")
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._begins: dict[int, int] = {}  # of each result's line, so that the results need not be in memory
        if out.exists() and not self.path.exists():
            raise ValueError(f"{out} is there already: give another --out, or remove it")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops the lock of a dead process
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process is writing {self.path}: wait for it, or give another --out") from None
        except ValueError:
            self._file.close()
            raise

    def __contains__(self, index: int) -> bool:
        return index in self._begins

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[Entry]:
        """The results in the order of their numbers."""
        for index in sorted(self._begins):
            self._file.seek(self._begins[index])
            yield json.loads(self._file.readline())

    def add(self, index: int, entry: Entry) -> None:
        """Keep a result; it is on the disk when this returns."""
        assert index not in self._begins, f"row {index} has a result already"
        self._begins[index] = self._append({"index": index, **entry})

    def finish(self, lines: Iterable[str], report: Mapping[str, Any]) -> None:
        """Write OUT and its report, and remove the journal. A crash in between leaves a journal to finish again."""
        digest = hashlib.sha256()

        def encoded() -> Iterator[bytes]:
            for line in lines:
                data = line.encode() + b"\n"
                digest.update(data)
                yield data

        _replace(self.out, encoded())
        full = {"settings": self.settings, **report, "sha256": digest.hexdigest()}
        _replace(_report_path(self.out), [json.dumps(full, indent=2).encode() + b"\n"])
        self.discard()

    def discard(self) -> None:
        """Remove the journal."""
        self.path.unlink()
        sync(self.path.parent)
        self._file.close()

    def close(self) -> None:
        """Let go of the journal; its results stay."""
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        number, begin = 0, 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):  # it was being written when the run died
                self._file.truncate(begin)
                number -= 1
                break
            try:
                entry = json.loads(line)
                if number == 1:
                    begun = dict(entry["settings"])
                else:
                    self._begins[int(entry["index"])] = begin
            except (TypeError, KeyError, ValueError):
                raise ValueError(f"{self.path}, line {number} is damaged: remove that file to start anew") from None
            if number == 1:
                self._compare(begun)
            begin += len(line)
        if number == 0:
            self._append({"settings": self.settings})
            sync(self.path.parent)

    def _compare(self, begun: dict[str, Any]) -> None:
        for key in {**begun, **self.settings}:
            if begun.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.path} was begun with {key} {_show(begun.get(key))}, now it is {_show(self.settings.get(key))}:"
                    " run the same command again, give another --out, or remove that file"
                )

    def _append(self, value: Any) -> int:
        """Where the line begins."""
        begin = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return begin


def finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier run of the same settings that OUT is still the result of, else None."""
    if not out.is_file() or out.with_name(out.name + ".journal").exists():
        return None
    try:
        report: dict[str, Any] = json.loads(_report_path(out).read_bytes())
        same = report["settings"] == json.loads(json.dumps(settings))
        return report if same and report["sha256"] == _sha256(out) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _report_path(out: Path) -> Path:
    return out.with_name(out.name + ".report.json")


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.writelines(parts)
    put(partial, path)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
