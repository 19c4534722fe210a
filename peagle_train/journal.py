"""Results that survive a crash: an append-only journal while a run lasts, one file in order at its end.

The journal is `OUT.journal`: a first line with the settings, then a line a result, in the order in which they came;
each line is on the disk before the next begins. `finish` turns it into OUT and `OUT.report.json`.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        self.entries: dict[int, Entry] = {}
        """By the row's number."""
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

    def add(self, index: int, entry: Entry) -> None:
        """Keep a result; it is on the disk when this returns."""
        assert index not in self.entries, f"row {index} has a result already"
        self._append({"index": index, **entry})
        self.entries[index] = entry

    def finish(self, lines: list[str], report: Mapping[str, Any]) -> None:
        """Write OUT and its report, and remove the journal. A crash in between leaves a journal to finish again."""
        text = "".join(line + "\n" for line in lines).encode()
        _replace(self.out, text)
        full = {"settings": self.settings, **report, "sha256": hashlib.sha256(text).hexdigest()}
        _replace(_report_path(self.out), (json.dumps(full, indent=2) + "\n").encode())
        self.discard()

    def discard(self) -> None:
        """Remove the journal."""
        self.path.unlink()
        _sync_folder(self.path.parent)
        self._file.close()

    def close(self) -> None:
        """Let go of the journal; its results stay."""
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]  # what follows the last line's end was being written when the run died
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._append({"settings": self.settings})
            _sync_folder(self.path.parent)
            return
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    begun = dict(entry["settings"])
                else:
                    self.entries[int(entry.pop("index"))] = entry
            except (TypeError, KeyError, AttributeError, ValueError):
                raise ValueError(f"{self.path}, line {number} is damaged: remove that file to start anew") from None
            if number == 1:
                self._compare(begun)

    def _compare(self, begun: dict[str, Any]) -> None:
        for key in {**begun, **self.settings}:
            if begun.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.path} was begun with {key} {_show(begun.get(key))}, now it is {_show(self.settings.get(key))}:"
                    " run the same command again, give another --out, or remove that file"
                )

    def _append(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier run of the same settings that OUT is still the result of, else None."""
    if not out.is_file() or out.with_name(out.name + ".journal").exists():
        return None
    try:
        report: dict[str, Any] = json.loads(_report_path(out).read_bytes())
        same = report["settings"] == json.loads(json.dumps(settings))
        return report if same and report["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _report_path(out: Path) -> Path:
    return out.with_name(out.name + ".report.json")


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
