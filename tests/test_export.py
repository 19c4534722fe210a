"""`peagle-train export` and `check`: what a checkpoint becomes, what its card says, nothing overwritten or half there."""

import os
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from safetensors.torch import load_file

from peagle_train.serving.drafter_io import load_drafter, read_config
from peagle_train.serving.export import check_folder, export_drafter
from tests.helpers import command, make_draft
from tests.runs import EVALUATED, run, same_tensors
from tests.tiny import VOCAB, make_target


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A finished run with a checkpoint."""
    train = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "dtype": "float32"}
    draft, folder = {"layer_type": "qwen3", "fc_norm": True}, tmp_path_factory.mktemp("run")
    run(tiny(folder, data=EVALUATED, draft=draft, train=train), "target.layer_ids=[0, 1, 2, 3, 5]")
    return folder / "run"


def same_weights(one: Path, other: Path) -> bool:
    return same_tensors(load_drafter(one).state_dict(), load_drafter(other).state_dict())


@pytest.mark.parametrize(("which", "format"), [("", "eagle3"), ("final", "speculators"), ("checkpoint-2", "eagle3")])
def test_an_export_holds_the_checkpoints_weights_and_its_card(tmp_path, trained, tiny_target, format, which):
    out = tmp_path / "out"
    notes, umask = export_drafter(trained / which, out, format), os.umask(0)
    os.umask(umask)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert same_weights(trained / (which or "final"), out) and [*tmp_path.iterdir()] == [out]
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
    card = (out / "README.md").read_text()
    for part in (
        "license: unknown\ntags:",
        f"| target | {tiny_target} |",
        "| data | rows.jsonl |",
        "| cod.num_depths | 4 |",
        "| cod.down_sample_ratio | 0.7 |",
        '"num_speculative_tokens": 4, "parallel_drafting": true' if format == "eagle3" else "vllm serve THIS_FOLDER",
    ):
        assert part in card, part
    assert {finding.level for finding in check_folder(out)} == {"ok"} and len(notes) == 1


def test_an_export_of_an_export_is_the_same_drafter_in_either_direction(tmp_path, trained, tiny_target):
    for first, second in (("eagle3", "speculators"), ("speculators", "eagle3")):
        export_drafter(trained, tmp_path / first, first)
        again = tmp_path / f"{first}-{second}"
        export_drafter(tmp_path / first, again, second, speculative_tokens=4, target_name="org/target")
        assert same_weights(tmp_path / first, again)
    assert read_config(tmp_path / "eagle3") == read_config(tmp_path / "speculators-eagle3")
    assert read_config(tmp_path / "speculators")["speculators_config"] == {
        "algorithm": "peagle",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": str(tiny_target), "architectures": ["LlamaForCausalLM"]},
    }


def test_options_name_the_target_the_dtype_k_and_the_licence(tmp_path, trained, tiny_target, monkeypatch):
    out, named = tmp_path / "out", {"target_name": "org/my-llm", "licence": "apache-2.0", "dtype": "bfloat16"}
    export_drafter(trained, out, "speculators", speculative_tokens=3, **named)
    config = read_config(out)["speculators_config"]
    assert config["verifier"]["name_or_path"] == "org/my-llm" and read_config(out)["dtype"] == "bfloat16"
    assert config["proposal_methods"][0]["speculative_tokens"] == 3
    wide = load_file(trained / "final" / "model.safetensors")
    for name, t in load_file(out / "model.safetensors").items():
        assert torch.equal(t, wide[name].bfloat16() if wide[name].is_floating_point() else wide[name])
    card = (out / "README.md").read_text()
    for part in ("license: apache-2.0", "base_model: org/my-llm", "| K to serve with | 3 |"):
        assert part in card
    recipe = trained / "final" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "  gone: 1\n")  # a key of an earlier version
    monkeypatch.chdir(tiny_target.parent)
    export_drafter(trained, tmp_path / "other", "speculators", target=Path(tiny_target.name))  # is named whole
    assert read_config(tmp_path / "other")["speculators_config"]["verifier"]["name_or_path"] == str(tiny_target)


def test_a_mistake_is_one_line_and_nothing_is_written_or_overwritten_but_an_empty_folder(tmp_path, trained):
    other, bare, out = make_target(tmp_path / "other", vocab_size=VOCAB + 3), tmp_path / "bare", tmp_path / "out"
    draft = make_draft(torch.float32)
    draft.norm.weight.data[3] = 1e5  # float16 ends at 65,504
    draft.save_pretrained(bare)
    for source, format, options, message in (
        (trained, "eagle3", {"speculative_tokens": 5}, "is 5; give at most the training's 4"),
        (trained, "eagle3", {"target": Path("/nowhere")}, "/nowhere/config.json cannot be read"),
        (trained, "eagle3", {"target": other}, f"target's vocab_size: {VOCAB + 3}, the drafter was made for {VOCAB}"),
        (bare, "speculators", {"target_name": "x"}, "give --num-speculative-tokens"),
        (bare, "speculators", {"speculative_tokens": 2}, "give --target DIR or --target-name"),
        (bare, "eagle3", {"dtype": "float16"}, r"norm\.weight .*not finite"),
        (bare / "..", "eagle3", {}, "config.json cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            export_drafter(source, out, format, **options)
        assert {path.name for path in tmp_path.iterdir()} == {"other", "bare"}
    (empty := tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for place in (other, bare / "config.json"):
        with pytest.raises(ValueError, match="is there already"):
            export_drafter(bare, place, "eagle3")
    assert sorted(tmp_path.rglob("*")) == before
    notes = export_drafter(bare, empty, "eagle3", dtype="bfloat16")
    assert any("no target is known" in note for note in notes)


def test_an_export_is_uploaded_privately_unless_public_is_given(tmp_path, trained, monkeypatch, capsys):
    for out, is_private, more, code, uploads, said in (
        ("one", True, [], 0, 1, "uploaded to https://hub/me/drafter"),
        ("two", False, [], 2, 0, "--public"),  # it exists, and its owner made it public
        ("three", False, ["--public"], 0, 1, "uploaded to"),
        ("lost", False, ["--public"], 2, 1, "not uploaded"),
    ):
        hub = Mock(endpoint="https://hub", **{"create_repo.return_value.repo_id": "me/drafter"})
        hub.model_info.return_value.private = is_private
        hub.upload_folder.side_effect = OSError("nobody answers") if out == "lost" else None
        monkeypatch.setattr("peagle_train.serving.export.HfApi", Mock(return_value=hub))
        assert command("export", trained, "--out", tmp_path / out, "--push-to-hub", "drafter", *more) == code
        assert hub.create_repo.call_args == call("drafter", private=not more, exist_ok=True)
        calls = [(c.kwargs["repo_id"], c.kwargs["folder_path"]) for c in hub.upload_folder.call_args_list]
        assert calls == [("me/drafter", tmp_path / out)] * uploads
        assert said in "".join(capsys.readouterr()) and (tmp_path / out).is_dir()
