"""`peagle-train export` and `check`: what a checkpoint becomes, what its card says, nothing overwritten or half there."""

import json
import os
import shutil
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from safetensors.torch import load_file

from peagle_train.__main__ import main as train_main
from peagle_train.serving.drafter_io import load_drafter
from peagle_train.serving.export import export_drafter
from tests.helpers import command, make_draft
from tests.tiny import VOCAB, make_target, write_recipe, write_rows


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_target(tmp_path_factory.mktemp("models") / "target")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Path:
    """A finished run with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", [9, 31, 4, 17, 32, 2, 26, 11, 40, 13], prompt=0.3)
    train = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "dtype": "float32"}
    sections = {"target": {"layer_ids": [0, 1, 2, 3, 5]}, "data": {"eval_fraction": 0.3}, "train": train}
    recipe = write_recipe(
        folder, target, rows, folder / "out", draft={"layer_type": "qwen3", "fc_norm": True}, **sections
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_main([str(recipe)]) == 0
    return folder / "out"


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_drafter(one).state_dict(), load_drafter(other).state_dict()
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.mark.parametrize(("which", "format"), [("", "eagle3"), ("final", "speculators"), ("checkpoint-2", "eagle3")])
def test_an_export_holds_the_checkpoints_weights_its_card_and_the_targets_tokenizer(
    tmp_path: Path, run: Path, target: Path, format: str, which: str
) -> None:
    done = export_drafter(run / which, tmp_path / "out", format)
    files = list((tmp_path / "out").iterdir())
    assert {path.name for path in files} == {
        "config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert same_weights(run / (which or "final"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    card = (tmp_path / "out" / "README.md").read_text()
    step = 2 if which == "checkpoint-2" else 4
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [r for r in records if r["kind"] == "eval" and r["step"] == step][-1]
    for part in (
        "license: unknown\ntags:",
        f"| target | {target} |",
        "| data | rows.jsonl |",
        f"| layers, draft vocabulary | 2, 40 of {VOCAB} tokens |",
        "| K in training | 4 |",
        "| r, its floor | 0.7, 0.2 |",
        f"| steps | {step} |",
        f"expected accepted length {measured['expected_accepted_length']:.3f}",
        f"loss {measured['loss']:.3f}",
        '"num_speculative_tokens": 4, "parallel_drafting": true' if format == "eagle3" else "vllm serve THIS_FOLDER",
    ):
        assert part in card, part
    assert {finding.level for finding in done.findings} == {"ok"}
    assert any("exported from" in note for note in done.notes) == (not which)


def test_an_export_of_an_export_is_the_same_drafter_in_either_direction(
    tmp_path: Path, run: Path, target: Path
) -> None:
    for first, second in (("eagle3", "speculators"), ("speculators", "eagle3")):
        export_drafter(run, tmp_path / first, first)
        again = tmp_path / f"{first}-{second}"
        export_drafter(tmp_path / first, again, second, speculative_tokens=4, target_name="org/target")
        assert same_weights(tmp_path / first, again)
    one, other = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("eagle3", "speculators-eagle3"))
    assert one == other
    assert json.loads((tmp_path / "speculators" / "config.json").read_text())["speculators_config"] == {
        "algorithm": "peagle",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": str(target), "architectures": ["LlamaForCausalLM"]},
    }


def test_another_drafters_recipe_is_not_taken_and_a_target_beside_is_named_whole(
    tmp_path: Path, run: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(target.parent)
    shutil.copytree(run / "final", tmp_path / "mine")
    (tmp_path / "mine" / "recipe.yaml").rename(tmp_path / "recipe.yaml")  # of whatever else lies there
    export_drafter(tmp_path / "mine", tmp_path / "out", "speculators", 3, target=Path("target"))
    assert "rows.jsonl" not in (tmp_path / "out" / "README.md").read_text()
    verifier = json.loads((tmp_path / "out" / "config.json").read_text())["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == str(target)


def test_options_name_the_target_the_dtype_k_the_licence_and_what_was_measured(tmp_path: Path, run: Path) -> None:
    by_k = [{"k": 1, "accepted_length": 1.5}, {"k": 3, "accepted_length": 2.25}, {"k": 4, "accepted_length": None}]
    (tmp_path / "report").write_text(json.dumps({"figures": [{"mt-bench": {"by_k": by_k}}]}))
    out = tmp_path / "out"
    export_drafter(
        run, out, "speculators", target_name="org/my-llm", speculative_tokens=3, dtype="bfloat16",
        licence="apache-2.0", measured=tmp_path / "report",
    )  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/my-llm" and config["dtype"] == "bfloat16"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    wide = load_file(run / "final" / "model.safetensors")
    for name, t in load_file(out / "model.safetensors").items():
        assert torch.equal(t, wide[name].bfloat16() if wide[name].is_floating_point() else wide[name])
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: org/my-llm" in card
    assert "mt-bench: accepted length 1.50 at K = 1, 2.25 at K = 3\n" in card


def test_what_does_not_fit_into_the_asked_dtype_is_refused(tmp_path: Path) -> None:
    draft = make_draft(torch.float32)
    with torch.no_grad():
        draft.norm.weight[3] = 1e5  # float16 ends at 65,504
    draft.save_pretrained(tmp_path / "drafter")
    export_drafter(tmp_path / "drafter", tmp_path / "wide", "eagle3", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"norm\.weight .*not finite"):
        export_drafter(tmp_path / "drafter", tmp_path / "out", "eagle3", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_users_mistake_is_one_line_and_nothing_is_written(tmp_path: Path, run: Path, target: Path) -> None:
    other, bare, out = make_target(tmp_path / "other", vocab_size=VOCAB + 3), tmp_path / "bare", tmp_path / "out"
    make_draft(torch.float32).save_pretrained(bare)
    for source, format, options, message in (
        (run, "eagle3", {"speculative_tokens": 5}, "is 5; give 1 to 4"),
        (run, "eagle3", {"target": Path("/nowhere")}, "/nowhere is not a folder"),
        (run, "eagle3", {"measured": Path("/nowhere.json")}, "no accepted lengths"),
        (run, "eagle3", {"target": other}, f"target's vocab_size: {VOCAB + 3}, the drafter was made for {VOCAB}"),
        (bare, "speculators", {"target_name": "x"}, "give --num-speculative-tokens"),
        (bare, "speculators", {"speculative_tokens": 2}, "give --target DIR or --target-name"),
        (bare / "..", "eagle3", {}, "is no drafter's folder"),
    ):
        with pytest.raises(ValueError, match=message):
            export_drafter(source, out, format, **options)
        assert {path.name for path in tmp_path.iterdir()} == {"other", "bare"}
    done = export_drafter(bare, out, "eagle3")
    assert any("no target is known" in note for note in done.notes)
    assert "Nothing yet." in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["folder", "file", "broken link", "link to empty", "empty"])
def test_nothing_that_is_there_is_overwritten_but_an_empty_folder(tmp_path: Path, run: Path, kind: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    if kind == "file":
        out.write_text("x")
    elif "link" in kind:
        if kind == "link to empty":
            elsewhere.mkdir()
        out.symlink_to(elsewhere)
    else:
        out.mkdir()
    if kind == "folder":
        (out / "mine").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    if kind == "empty":
        export_drafter(run, out, "eagle3")
        assert same_weights(run / "final", out)
        return
    with pytest.raises(ValueError, match="is there already"):
        export_drafter(run, out, "eagle3")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_exports_checks_and_says_why_not(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert command("export", run, "--out", out, "--dtype", "bfloat16") == 0
    printed = capsys.readouterr()
    assert "exported to" in printed.out and "note: exported from" in printed.err
    assert command("check", out) == 0 and "loadable: 0 errors, 0 warnings" in capsys.readouterr().out
    assert command("export", run, "--out", out) == 2 and "is there already" in capsys.readouterr().err
    assert command("export", out) == 2 and "--out" in capsys.readouterr().err
    assert command("check", tmp_path / "gone") == 2 and "is not a folder" in capsys.readouterr().err
    (tmp_path / "out" / "model.safetensors").write_bytes(b"1234567890")
    assert command("check", out) == 2 and "NOT loadable" in capsys.readouterr().out


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to an upload, in memory."""

    exists: ClassVar[bool] = False
    private: ClassVar[bool] = True
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        self.answer({"id": "me/drafter", "private": Hub.private, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)  # older clients say private, newer ones visibility
            if not Hub.exists:
                Hub.private = asked.get("private", asked.get("visibility") == "private")
            self.answer({"url": f"{host}/me/drafter"}, 409 if Hub.exists else 200)
            Hub.exists = True
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            contents = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files = {value["path"]: b64decode(value["content"]) for value in contents}
            commit = {"commitUrl": f"{host}/me/drafter/commit/1", "commitOid": "1", "pullRequestUrl": None}
            self.answer(commit)
        else:
            self.answer({"errors": [], "warnings": []})  # of the card

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def test_an_export_is_uploaded_privately_unless_public_is_given(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("NO_PROXY", "*")

    def push(out: str, *more: str) -> tuple[int, str, str]:
        words = ["export", str(run), "--out", str(tmp_path / out), "--push-to-hub", "me/drafter", *more]
        return train_main(words), *capsys.readouterr()

    code, printed, error = push("one")
    assert code == 0 and f"uploaded to {endpoint}/me/drafter" in printed, error
    assert Hub.private and Hub.files == {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    Hub.private, Hub.files = False, {}  # its owner made it public
    code, _, error = push("two")
    assert code == 2 and "--public" in error.splitlines()[-1]
    assert not Hub.files
    assert push("three", "--public")[0] == 0 and len(Hub.files) == 5
    server.shutdown()
    server.server_close()
    code, _, error = push("four")  # nobody answers
    assert code == 2 and "not uploaded" in error and (tmp_path / "four").is_dir()
