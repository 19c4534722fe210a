"""The speculators package itself reads our export and computes our logits; its own checkpoint comes back through import."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peagle_train.core.cod import generate_cod_sample_indices
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.visibility import Visibility, first_seen
from peagle_train.serving.drafter_io import load_drafter, read_config, read_drafter
from peagle_train.serving.export import check_folder, export_drafter, is_loadable
from tests.helpers import seeded
from tests.runs import same_tensors
from tests.test_draft import LLAMA3
from tests.test_generate import tiny_draft
from tests.test_import import start
from tests.tiny import MASK, VOCAB, make_target, write_rows

pytestmark = [pytest.mark.speculators, pytest.mark.slow]

N, K, HIDDEN = 23, 5, 16
LAYERS = "eagle_aux_hidden_state_layer_ids"
IDS = torch.arange(1, VOCAB, 2)  # another drafter's vocabulary, and the same as flags
T2D = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, IDS, True)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


def made(folder: Path, target: Path, **changes: Any) -> tuple[PEagleDraft, Path]:
    """A drafter for the tiny target, and its export in the speculators format."""
    draft = tiny_draft(torch.float32, **{LAYERS: [2, 3, 4], **changes})
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1, "norm_before_residual": True},
        {"num_hidden_layers": 3, "num_key_value_heads": 1, "rms_norm_eps": 0.1, "rope_theta": 50.0},
        {"ids": torch.arange(VOCAB)},
        {"layer_type": "qwen3", LAYERS: [0, 1, 2, 4, 5]},
        {LAYERS: [5], "norm_before_fc": True},
        {LAYERS: [1, 5], "fc_norm": True},
        {"sliding_window": K + 1},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 16}},
    ],
    ids=str,
)
@torch.no_grad()
def test_its_forward_gives_our_logits_for_every_element(tmp_path, target, changes):
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
        start=first_seen(torch.zeros_like(anchor), anchor, depth, draft.config.sliding_window),
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


@pytest.mark.parametrize("window", [None, 2048])
def test_its_own_checkpoint_comes_back_through_import_bit_for_bit(tmp_path, target, window):
    draft, folder = made(tmp_path, target, sliding_window=window)
    theirs = read_by_speculators(folder)
    with torch.no_grad():
        theirs.fc.weight.add_(1.0)  # as if it had been trained on there
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_config(tmp_path / "theirs")["speculators_version"] and is_loadable(check_folder(tmp_path / "theirs"))
    export_drafter(tmp_path / "theirs", tmp_path / "back", "eagle3")
    back = load_drafter(tmp_path / "back")
    for name, tensor in draft.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor + 1.0 if name == "fc.weight" else tensor), name
    one, other = (json.loads(c.to_json_string()) for c in (draft.config, back.config))
    assert {k: v for k, v in one.items() if k != "dtype"} == {k: v for k, v in other.items() if k != "dtype"}


def their_default(folder: Path, target: Path, full_attention: list[int]) -> Any:
    """A drafter as their trainer makes it: Qwen3 layers, five feature layers, windows but for `full_attention`."""
    pytest.importorskip("speculators")
    from speculators.models.peagle.core import PEagleDraftModel
    from speculators.train.cli import create_transformer_layer_config

    layers = create_transformer_layer_config(str(target), 2, "qwen3", None, 2048, full_attention)
    model = PEagleDraftModel.from_training_args(
        layers, T2D, IDS - torch.arange(len(IDS)), draft_vocab_size=len(IDS), mask_token_id=MASK, num_depths=K,
        verifier_name_or_path=str(target), target_layer_ids=[0, 1, 3, 4, 5], draft_attn_impl="eager",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("full_attention", [[], [0, 1]], ids=["window", "no window"])
def test_its_default_drafter_is_imported_starts_a_run_and_goes_back_the_same(tmp_path, target, full_attention):
    theirs = their_default(tmp_path / "theirs", target, full_attention)
    export_drafter(tmp_path / "theirs", tmp_path / "in", "eagle3")
    export_drafter(tmp_path / "in", tmp_path / "back", "speculators", target=target, speculative_tokens=K)
    back = read_by_speculators(tmp_path / "back")
    before, after = load_file(tmp_path / "theirs" / "model.safetensors"), back.state_dict()
    assert same_tensors({name: after[name] for name in before}, before)
    old, new = (read_config(tmp_path / name) for name in ("theirs", "back"))
    for key in ("draft_vocab_size", "mask_token_id", "norm_before_residual", LAYERS):
        assert old[key] == new[key], key
    for key in ("sliding_window", "use_sliding_window", "layer_types") if not full_attention else ():
        assert old["transformer_layer_config"][key] == new["transformer_layer_config"][key], key
    assert type(back.config.transformer_layer_config) is type(theirs.config.transformer_layer_config)
    assert is_loadable(check_folder(tmp_path / "back"))
    rows = write_rows(tmp_path / "rows.jsonl", [9, 31, 4], prompt=0.3)
    assert start(tmp_path, target, rows, tmp_path / "theirs", "target.layer_ids=[0, 1, 3, 4, 5]") == 0
    trained, given = (load_drafter(tmp_path / name).state_dict() for name in ("run/final", "in"))
    assert same_tensors(trained, given, 1e-6)


def test_an_eagle3_checkpoint_of_its_own_is_read_and_named_as_that(tmp_path, target):
    pytest.importorskip("speculators")
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3.config import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    layers = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 1}
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=LlamaConfig(**layers, num_attention_heads=4, num_key_value_heads=2),
        draft_vocab_size=len(IDS),
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,  # their default of these two
        eagle_aux_hidden_state_layer_ids=[2, 3, 4],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_pretrained(str(target)),
        ),
    )
    model = Eagle3DraftModel(config)
    model.load_vocab_mappings(T2D, IDS - torch.arange(len(IDS)))
    model.load_verifier_weights()
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="mask_hidden, a mask token"):
        export_drafter(tmp_path / "theirs", tmp_path / "back", "eagle3")
    files, stored = read_drafter(tmp_path / "theirs"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert files.config.norm_before_residual and torch.equal(files.draft_token_ids, IDS)
    assert same_tensors(files.tensors, stored)


def test_draws_with_few_anchors_are_those_of_their_sampler():
    """Indices, and where the generator ends. Position 0, which they take at depth 1 and we do not, has no loss."""
    data = pytest.importorskip("speculators.models.peagle.data")
    rng = random.Random(0)
    for seed in range(500):
        n, depths, anchors = rng.randint(2, 90), rng.randint(1, 8), rng.choice([None, 1, 3, 10, 30, 512])
        ratio, least = rng.choice([0.5, 0.7, 0.8, 1.0]), rng.choice([0.0, 0.2])
        supervised = rng.choice([0.3, 0.7, 1.0])
        mask = torch.tensor([[0, *(int(rng.random() < supervised) for _ in range(n - 1))]])
        found = []
        for sample in (data.generate_cod_sample_indices, generate_cod_sample_indices):
            torch.manual_seed(seed)
            settings = {"down_sample_ratio": ratio, "down_sample_ratio_min": least, "max_anchors": anchors}
            found.append([*sample(seq_length=n, loss_mask=mask, num_depths=depths, **settings), torch.get_rng_state()])
        case = n, depths, anchors, ratio, least, seed
        assert all(torch.equal(theirs, ours) for theirs, ours in zip(*found, strict=True)), case
