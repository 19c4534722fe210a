"""The speculators package itself reads our export and computes our logits; its own checkpoint comes back through import."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peagle_train.core.cod import generate_cod_sample_indices
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.visibility import Visibility
from peagle_train.serving.check import check_folder, is_loadable
from peagle_train.serving.drafter_io import load_drafter, read_drafter
from peagle_train.serving.export import export_drafter, import_drafter
from tests.helpers import make_draft, seeded
from tests.tiny import MASK, VOCAB, make_target

pytestmark = [pytest.mark.speculators, pytest.mark.slow]

N, K, HIDDEN, DRAFTED = 23, 5, 16, 40


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def made(folder: Path, target: Path, **changes: Any) -> tuple[PEagleDraft, Path]:
    """A drafter for the tiny target, and its export in the speculators format."""
    shape = {"vocab_size": VOCAB, "ptd_token_id": MASK, "draft_vocab_size": DRAFTED, "target_hidden_size": HIDDEN}
    draft = make_draft(torch.float32, **{**shape, "eagle_aux_hidden_state_layer_ids": [2, 3, 4], **changes})
    if draft.config.draft_vocab_size == DRAFTED:
        draft.set_draft_vocab(torch.arange(DRAFTED) + (torch.arange(DRAFTED) > 7) * 11)
    draft.save_pretrained(folder / "trained")
    export_drafter(folder / "trained", folder / "out", "speculators", target=target, speculative_tokens=K)
    return draft, folder / "out"


def read_by_speculators(folder: Path) -> Any:
    """Their model, by their own generic loader; plain attention, since flex has no eager backward on CPU."""
    pytest.importorskip("speculators")
    from speculators import SpeculatorModelConfig
    from speculators.model import SpeculatorModel

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config)
    assert type(model).__name__ == "PEagleDraftModel"
    return model.eval()


def test_its_sampler_draws_what_ours_draws_with_max_anchors_too() -> None:
    """Position 0 is not supervised: theirs lets it in at depth 1, where its anchor is -1."""
    pytest.importorskip("speculators")
    from speculators.models.peagle.data import generate_cod_sample_indices as theirs

    g = seeded(0)
    for case in range(500):
        n, K = (int(torch.randint(1, most, (), generator=g)) for most in (200, 9))
        mask = (torch.rand(n, generator=g) < 0.7).long()
        mask[0] = 0
        ratio, floor = (0.8, 0.0) if case % 2 else (0.7, 0.2)
        most = int(torch.randint(1, 100, (), generator=g)) if case % 5 else None
        torch.manual_seed(case)
        expected = theirs(n, mask[None], K, ratio, floor, True, most)
        ours = generate_cod_sample_indices(n, mask, K, ratio, floor, generator=seeded(case), max_anchors=most)
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True)), case


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1, "norm_before_residual": True},
        {"num_hidden_layers": 3, "num_key_value_heads": 1, "rms_norm_eps": 0.1, "rope_theta": 50.0},
        {"draft_vocab_size": VOCAB},
        {"layer_type": "qwen3", "eagle_aux_hidden_state_layer_ids": [0, 1, 2, 4, 5]},
        {"eagle_aux_hidden_state_layer_ids": [5], "norm_before_fc": True},
        {"eagle_aux_hidden_state_layer_ids": [1, 5], "fc_norm": True},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ],
    ids=str,
)
@torch.no_grad()
def test_its_forward_gives_our_logits_for_every_element(tmp_path: Path, target: Path, changes: dict[str, Any]) -> None:
    if "rope_scaling" in changes:
        changes["rope_scaling"]["original_max_position_embeddings"] = 16
    draft, folder = made(tmp_path, target, **changes)
    theirs = read_by_speculators(folder)
    g = seeded(3)
    input_ids = torch.randint(0, MASK, (1, N), generator=g)  # shifted already: row p holds x_{p+1}
    features = torch.randn(1, N, draft.config.feature_size, generator=g)
    loss_mask = torch.ones(1, N, dtype=torch.int64)
    loss_mask[0, 0] = 0
    logits: list[torch.Tensor] = []
    theirs.lm_head.register_forward_hook(lambda module, given, output: logits.append(output[0]))
    torch.manual_seed(5)
    from speculators.losses import resolve_loss_config

    theirs(
        hidden_states=features,
        input_ids=input_ids,
        document_ids=torch.zeros(1, N, dtype=torch.int64),
        loss_mask=loss_mask,
        verifier_last_hidden_states=torch.randn(1, N, HIDDEN, generator=g),
        loss_config=resolve_loss_config("kl_div", "eager"),
        num_depths=K,
        down_sample_ratio=0.8,
    )
    torch.manual_seed(5)
    anchor, depth = generate_cod_sample_indices(N, loss_mask, K, 0.8, 0.2)
    order = ((depth > 0) * N + anchor).mul(K).add(depth).argsort()  # ours: depth 0, then rollout by rollout
    anchor, depth, expected = anchor[order][None], depth[order][None], logits[0][order]
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
    token = torch.where(depth == 0, input_ids[0][anchor], MASK)
    ours = draft.lm_head(draft(token, anchor + depth, features, visibility).hidden)[0]
    assert expected.shape == ours.shape == (anchor.numel(), draft.config.draft_vocab_size)
    assert int(depth.max()) == K - 1 and anchor.numel() > 2 * N
    assert float((ours - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_its_own_checkpoint_comes_back_through_import_bit_for_bit(tmp_path: Path, target: Path) -> None:
    draft, folder = made(tmp_path, target)
    theirs = read_by_speculators(folder)
    with torch.no_grad():
        theirs.fc.weight.add_(1.0)  # as if it had been trained on there
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["speculators_version"] and is_loadable(check_folder(tmp_path / "theirs"))
    import_drafter(tmp_path / "theirs", tmp_path / "back")
    back = load_drafter(tmp_path / "back")
    for name, tensor in draft.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor + 1.0 if name == "fc.weight" else tensor), name
    one, other = (json.loads(c.to_json_string()) for c in (draft.config, back.config))
    assert {k: v for k, v in one.items() if k != "dtype"} == {k: v for k, v in other.items() if k != "dtype"}


def test_an_eagle3_checkpoint_of_its_own_is_read_and_named_as_that(tmp_path: Path, target: Path) -> None:
    pytest.importorskip("speculators")
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3.config import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    ids = torch.arange(1, VOCAB, 2)
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
    layers = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1}
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=LlamaConfig(**layers, num_attention_heads=4, num_key_value_heads=2),
        draft_vocab_size=ids.numel(),
        norm_before_residual=True,
        eagle_aux_hidden_state_layer_ids=[2, 3, 4],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_pretrained(str(target)),
        ),
    )
    model = Eagle3DraftModel(config)
    model.load_vocab_mappings(t2d, ids - torch.arange(ids.numel()))
    model.load_verifier_weights()
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="mask_hidden, a mask token"):
        import_drafter(tmp_path / "theirs", tmp_path / "back")
    files, stored = read_drafter(tmp_path / "theirs"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert files.config.norm_before_residual and torch.equal(files.draft_token_ids, ids)
    assert files.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(files.tensors[name], tensor), name
