"""What is trained is what vLLM runs: our logits against a reading of our files by vLLM's rules, slot by slot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.visibility import Visibility
from peagle_train.serving.check_drafter import check_folder, is_loadable
from peagle_train.serving.drafter_files import load_drafter
from peagle_train.serving.export import export_drafter
from peagle_train.serving.import_drafter import import_drafter
from tests import vllm_reader
from tests.helpers import DRAFT_VOCAB, MASK_TOKEN, TARGET_HIDDEN, VOCAB, make_draft

N, K = 11, 4
"""Tokens of the text; slots."""


def draft_ids() -> Tensor:
    return torch.arange(DRAFT_VOCAB) + (torch.arange(DRAFT_VOCAB) > 11) * 9 + (torch.arange(DRAFT_VOCAB) > 20) * 5


def text() -> tuple[Tensor, Tensor]:
    """Tokens x_0..x_N and features of all but the last."""
    g = torch.Generator().manual_seed(4)
    return torch.randint(0, MASK_TOKEN, (N + 1,), generator=g), torch.randn(N, 3 * TARGET_HIDDEN, generator=g)


@torch.no_grad()
def our_logits(draft: PEagleDraft) -> Tensor:
    """[N, K, Vd]: what training computes of every anchor's whole rollout, in one pass."""
    tokens, features = text()
    anchor = torch.cat([torch.arange(N), torch.arange(N).repeat_interleave(K - 1)])[None]
    depth = torch.cat([torch.zeros(N, dtype=torch.int64), torch.arange(1, K).repeat(N)])[None]
    visibility = Visibility(
        start=torch.zeros_like(anchor),
        anchor=anchor,
        depth=depth,
        context_end=torch.zeros(1, dtype=torch.int64),
        num_context=0,
        num_depth0=N,
        first_rollout=N,
        num_depths=K,
    )
    token = torch.where(depth == 0, tokens[(anchor + 1).clamp(max=N)], draft.mask_token_id)
    logits = draft.lm_head(draft(token, anchor + depth, features[None], visibility).hidden)[0]
    return torch.cat([logits[:N, None], logits[N:].unflatten(0, (N, K - 1))], dim=1)


def their_logits(loaded: vllm_reader.Loaded) -> Tensor:
    """[N, K, V]: vLLM's proposal behind every prefix of the text."""
    tokens, features = text()
    return torch.stack(
        [vllm_reader.propose(loaded, tokens[:n], int(tokens[n]), features[:n], K) for n in range(1, N + 1)]
    )


def assert_same_logits(theirs: Tensor, ours: Tensor, ids: Tensor) -> None:
    """At every slot of every anchor, to 1e-5 of the largest; nothing outside of the draft vocabulary."""
    drafted = torch.zeros(theirs.shape[-1], dtype=torch.bool)
    drafted[ids] = True
    assert bool((theirs[..., ~drafted] == float("-inf")).all())
    errors = (theirs[..., ids] - ours).abs().amax(-1) / ours.abs().max()
    assert float(ours.abs().max()) > 0.1 and float(errors.max()) <= 1e-5, errors


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_hidden_layers": 1, "norm_before_residual": True},
    {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 6},
    {"num_key_value_heads": 1, "attention_bias": True},
    {"rms_norm_eps": 0.1, "rope_theta": 3.0},
    *({"rope_scaling": rope} for rope in ROPES),
]


@pytest.mark.parametrize("format", ["eagle3", "speculators"])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_vllm_computes_what_was_trained_at_every_slot(tmp_path: Path, changes: dict[str, Any], format: str) -> None:
    draft = make_draft(torch.float32, **changes)
    draft.set_draft_vocab(draft_ids())
    draft.save_pretrained(tmp_path / "trained")
    export_drafter(tmp_path / "trained", tmp_path / "out", format, target_name="org/target", speculative_tokens=K)
    loaded = vllm_reader.load(tmp_path / "out")
    assert loaded.mask_token == MASK_TOKEN and loaded.num_speculative_tokens == (None if format == "eagle3" else K)
    assert_same_logits(their_logits(loaded), our_logits(draft), draft_ids())


def test_a_run_without_a_pruned_vocabulary_is_read_the_same(tmp_path: Path) -> None:
    draft = make_draft(torch.float32, draft_vocab_size=VOCAB)
    draft.save_pretrained(tmp_path / "trained")
    for format in ("eagle3", "speculators"):
        export_drafter(tmp_path / "trained", tmp_path / format, format, target_name="org/target", speculative_tokens=K)
    for folder in (tmp_path / "trained", tmp_path / "eagle3", tmp_path / "speculators"):
        assert not {"d2t", "t2d"} & load_file(folder / "model.safetensors").keys()
        assert_same_logits(their_logits(vllm_reader.load(folder)), our_logits(draft), torch.arange(VOCAB))
        assert torch.equal(load_drafter(folder).draft_token_ids, torch.arange(VOCAB))


@pytest.mark.parametrize("format", ["eagle3", "speculators"])
def test_a_mapping_beside_the_full_vocabulary_is_refused_by_vllm_and_the_check_but_read(
    tmp_path: Path, format: str
) -> None:
    draft = make_draft(torch.float32, draft_vocab_size=VOCAB)
    draft.save_pretrained(tmp_path / "trained")
    old = tmp_path / "old"
    export_drafter(tmp_path / "trained", old, format, target_name="org/target", speculative_tokens=K)
    edited(old, t2d=torch.ones(VOCAB, dtype=torch.bool))
    vllm_reader.load(old)
    assert is_loadable(check_folder(old))
    order = torch.arange(VOCAB).roll(1)  # draft token i is the target's order[i]
    head = load_file(old / "model.safetensors")["lm_head.weight"]
    for d2t, rows in ((torch.zeros(VOCAB, dtype=torch.int64), head), (order - torch.arange(VOCAB), head[order])):
        edited(old, d2t=d2t, lm_head__weight=rows.contiguous())
        with pytest.raises(KeyError, match="draft_id_to_target_id"):
            vllm_reader.load(old)
        assert [finding.what for finding in check_folder(old) if finding.level == "BAD"] == ["d2t"]
        for name, tensor in load_drafter(old).state_dict().items():
            assert torch.equal(tensor, draft.state_dict()[name]), name
    import_drafter(old, tmp_path / "new")
    assert_same_logits(their_logits(vllm_reader.load(tmp_path / "new")), our_logits(draft), torch.arange(VOCAB))


def edited(folder: Path, **changes: Tensor | None) -> Path:
    """The folder's tensors with some replaced or (None) left out."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors = {n: t for n, t in tensors.items() if n != name} | ({} if tensor is None else {name: tensor})
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_midlayer_names_and_parts_shared_with_the_target_are_read_as_the_whole_drafter(tmp_path: Path) -> None:
    draft = make_draft(torch.float32, draft_vocab_size=VOCAB)
    draft.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    target = {name: tensors.pop(name) for name in ("embed_tokens.weight", "lm_head.weight")}
    tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_logits(their_logits(vllm_reader.load(tmp_path, target)), our_logits(draft), torch.arange(VOCAB))


@pytest.mark.parametrize("what", ["mask_hidden", "d2t", "embed_tokens.weight", "fc.weight", "position", "token"])
def test_the_comparison_notices_every_part_that_could_be_wrong(tmp_path: Path, what: str) -> None:
    draft = make_draft(torch.float32)
    draft.set_draft_vocab(draft_ids())
    draft.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if what == "d2t":
        edited(tmp_path, d2t=torch.arange(DRAFT_VOCAB) * 0)
    elif what == "position":
        config = json.loads((tmp_path / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 4900.0
        (tmp_path / "config.json").write_text(json.dumps(config))
    elif what == "token":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "mask_token_id": 3}))
    else:
        edited(tmp_path, **{what.replace(".", "__"): tensors[what] + 1e-3})
    with pytest.raises(AssertionError):
        assert_same_logits(their_logits(vllm_reader.load(tmp_path)), our_logits(draft), draft_ids())


def test_what_vllm_would_not_load_fails_in_the_reader_too(tmp_path: Path) -> None:
    make_draft(torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match=r"model\."):
        vllm_reader.load(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != "mask_hidden"}, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError, match="mask_hidden"):
        vllm_reader.load(tmp_path)
