"""The drafter: names and files as on disk, refusals, and the forward against loops."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from peagle_train.core.draft import DraftOutput, Labels, PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.visibility import Visibility
from tests import oracles
from tests.helpers import DRAFT_VOCAB, MASK_TOKEN, TARGET_HIDDEN, VOCAB, calls_of, make_config, make_draft


def expected_shapes(config: PEagleDraftConfig) -> dict[str, tuple[int, ...]]:
    """DESIGN 8, name by name."""
    H, V, Vd = config.hidden_size, config.vocab_size, config.draft_vocab_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    middle, T = config.intermediate_size, config.target_hidden_size
    features = T * len(config.eagle_aux_hidden_state_layer_ids or [2, 9, 17])
    shapes: dict[str, tuple[int, ...]] = {
        "mask_hidden": (1, 1, features),
        "embed_tokens.weight": (V, H),
        "fc.weight": (H, features),
        "norm.weight": (H,),
        "lm_head.weight": (Vd, H),
        "d2t": (Vd,),
        "t2d": (V,),
        "layers.0.hidden_norm.weight": (H,),
    }
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (features,)
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (T,) for i in range(features // T)}
    for i in range(config.num_hidden_layers):
        size = 2 * H if i == 0 else H
        shapes |= {
            f"layers.{i}.input_layernorm.weight": (H,),
            f"layers.{i}.post_attention_layernorm.weight": (H,),
            f"layers.{i}.self_attn.q_proj.weight": (queries, size),
            f"layers.{i}.self_attn.k_proj.weight": (keys, size),
            f"layers.{i}.self_attn.v_proj.weight": (keys, size),
            f"layers.{i}.self_attn.o_proj.weight": (H, queries),
            f"layers.{i}.mlp.gate_proj.weight": (middle, H),
            f"layers.{i}.mlp.up_proj.weight": (middle, H),
            f"layers.{i}.mlp.down_proj.weight": (H, middle),
        }
        if config.layer_type == "qwen3":
            shapes |= {f"layers.{i}.self_attn.{a}_norm.weight": (config.head_dim,) for a in "qk"}
    return shapes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "num_hidden_layers": 1,
            "num_key_value_heads": 4,
            "eagle_aux_hidden_state_layer_ids": [7],
            "norm_before_fc": True,
        },
        {"eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3, 4, 5, 6, 11], "layer_type": "qwen3", "fc_norm": True},
        {"num_hidden_layers": 4, "head_dim": 6, "hidden_size": 20, "num_key_value_heads": 1},
        {"hidden_size": TARGET_HIDDEN, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 4},
    ],
)
def test_the_files_tensors_have_exactly_the_loaders_names_and_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    draft = make_draft(torch.float32, **changes)
    draft.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    assert {name: tuple(t.shape) for name, t in found.items()} == expected_shapes(draft.config)
    special = {"d2t": torch.int64, "t2d": torch.bool}
    assert {name: t.dtype for name, t in found.items()} == {n: special.get(n, torch.float32) for n in found}
    trained = {name for name, p in draft.named_parameters() if p.requires_grad}
    assert trained == found.keys() - {"d2t", "t2d"}


@pytest.mark.parametrize(("dtype", "layer_type"), [(torch.float32, "qwen3"), (torch.bfloat16, "llama")])
def test_a_saved_drafter_loads_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, layer_type: str) -> None:
    changes: dict[str, Any] = {"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [2, 9, 17, 18]}
    draft = make_draft(dtype, layer_type=layer_type, **changes)
    draft.set_draft_vocab(torch.arange(DRAFT_VOCAB) + (torch.arange(DRAFT_VOCAB) > 11) * 9)
    draft.save_pretrained(tmp_path / "one")
    loaded = PEagleDraft.from_pretrained(tmp_path / "one", dtype=dtype)
    assert loaded.state_dict().keys() == draft.state_dict().keys()
    for name, tensor in draft.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype and torch.equal(loaded.state_dict()[name], tensor), name
    # In no file, and made on the meta device when loading.
    assert torch.equal(loaded.rotary_emb.inv_freq.float(), PEagleDraft(draft.config).rotary_emb.inv_freq)
    assert loaded.mask_token_id == MASK_TOKEN and torch.equal(loaded.draft_token_ids, draft.draft_token_ids)
    loaded.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "config.json").read_text() for name in ("one", "two"))
    assert one == two


def saved_config(folder: Path, **changes: Any) -> dict[str, Any]:
    make_draft(torch.float32, **changes).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_config_json_holds_what_vllms_loader_reads(tmp_path: Path) -> None:
    config = saved_config(
        tmp_path, max_position_embeddings=8192, eagle_aux_hidden_state_layer_ids=[2, 9, 17], norm_before_residual=True
    )
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLMEagle3"],
        "mask_token_id": MASK_TOKEN,
        "pard_token": MASK_TOKEN,
        "ptd_token_id": MASK_TOKEN,
        "draft_vocab_size": DRAFT_VOCAB,
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "target_hidden_size": TARGET_HIDDEN,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 8192,
        "eagle_aux_hidden_state_layer_ids": [2, 9, 17],
        "norm_before_residual": True,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    }
    assert {name: config.get(name, "missing") for name in expected} == expected


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope_is_written_in_both_spellings_and_read_from_either(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = saved_config(tmp_path, rope_theta=700.0, rope_scaling=rope)
    assert config["rope_theta"] == 700.0 and config["rope_scaling"] == rope
    assert config["rope_parameters"] == {**rope, "rope_theta": 700.0}
    first = PEagleDraft.from_pretrained(tmp_path).rotary_emb.inv_freq
    plain = PEagleDraft(make_config(rope_theta=700.0)).rotary_emb.inv_freq
    assert not torch.equal(first, plain)
    for gone in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        partial = {name: value for name, value in config.items() if name not in gone}
        assert torch.equal(PEagleDraft(PEagleDraftConfig(**partial)).rotary_emb.inv_freq, first)
    old_key = {**rope, "type": rope["rope_type"]}
    del old_key["rope_type"]
    old = PEagleDraft(make_config(rope_theta=700.0, rope_scaling=old_key))
    assert torch.equal(old.rotary_emb.inv_freq, first)


@pytest.mark.parametrize("layer_type", ["llama", "qwen3"])
def test_other_readers_see_a_llama_or_qwen3_with_the_same_numbers(tmp_path: Path, layer_type: str) -> None:
    saved_config(tmp_path, layer_type=layer_type)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is {"llama": LlamaConfig, "qwen3": Qwen3Config}[layer_type]
    expected = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}[layer_type]
    assert config.architectures == [expected] and not getattr(config, "use_sliding_window", False)
    assert (config.ptd_token_id, config.pard_token, config.draft_vocab_size) == (MASK_TOKEN, MASK_TOKEN, DRAFT_VOCAB)
    assert (config.head_dim, config.num_hidden_layers, config.vocab_size) == (8, 2, VOCAB)
    assert config.rope_parameters == {"rope_theta": 5000.0, "rope_type": "default"}


NAMES = ("dflash_config", "mask_token_id", "dspark_noise_token_id", "pard_token", "ptd_token_id")


def test_any_name_of_the_mask_token_is_enough_the_first_counts_and_defaults_are_the_targets() -> None:
    for first in range(len(NAMES)):
        given: dict[str, Any] = {name: 3 + i for i, name in enumerate(NAMES) if i >= first}
        if first == 0:
            given["dflash_config"] = {"mask_token_id": 3}
        config = PEagleDraftConfig(vocab_size=20, hidden_size=8, num_attention_heads=2, **given)
        assert (config.mask_token_id, config.ptd_token_id, config.pard_token) == (3 + first,) * 3
        written = json.loads(config.to_json_string())
        assert {name: written.get(name) for name in NAMES} == {
            name: 3 + first if name in ("mask_token_id", "pard_token", "ptd_token_id") else None for name in NAMES
        }
    assert (config.draft_vocab_size, config.target_hidden_size, config.norm_before_residual) == (20, 8, False)


def test_the_draft_vocabulary_is_kept_as_offsets_and_flags() -> None:
    draft = make_draft(draft_vocab_size=4, vocab_size=10, ptd_token_id=9)
    assert draft.draft_token_ids.tolist() == [0, 1, 2, 3] and draft.t2d.nonzero().flatten().tolist() == [0, 1, 2, 3]
    draft.set_draft_vocab(torch.tensor([1, 2, 5, 8]))
    assert draft.d2t.tolist() == [1, 1, 3, 5] and draft.draft_token_ids.tolist() == [1, 2, 5, 8]
    assert draft.t2d.tolist() == [i in (1, 2, 5, 8) for i in range(10)]
    for wrong in ([1, 2, 5], [1, 5, 2, 8], [1, 2, 2, 8]):
        with pytest.raises(AssertionError):
            draft.set_draft_vocab(torch.tensor(wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type is 'dynamic'.* differ from the whole row",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope type is 'longrope'",
        ),
        ({"ptd_token_id": None}, "mask_token_id is missing; set draft.mask_token_id"),
        ({"ptd_token_id": VOCAB}, f"mask_token_id is {VOCAB}; it must lie in 0..{VOCAB - 1}"),
        ({"ptd_token_id": -1}, "mask_token_id is -1"),
        ({"draft_vocab_size": VOCAB + 1}, f"draft_vocab_size is {VOCAB + 1}; it must lie in 1..{VOCAB}"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"fc_norm": True, "norm_before_fc": True}, "norm_before_fc and fc_norm are both true"),
        ({"layer_type": "qwen3", "attention_bias": True}, "attention_bias and mlp_bias must be false"),
        ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even one"),
        # transformers' LlamaConfig, through which config.json is read, takes no such shape: better now than when saving.
        ({"hidden_size": 18}, r"hidden_size \(?(is )?18.*num_attention_heads"),
    ],
)
def test_a_drafter_that_could_not_be_trained_or_served_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PEagleDraft(make_config(**changes))


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "llama3"])
def test_the_other_rope_types_do_not_depend_on_the_calls_length(rope_type: str) -> None:
    scaling: dict[str, Any] = {"rope_type": rope_type}
    if rope_type != "default":
        scaling |= {"factor": 4.0, "original_max_position_embeddings": 8}
    if rope_type == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    draft = PEagleDraft(make_config(rope_scaling=scaling, max_position_embeddings=32))
    x, position = torch.zeros(1), torch.arange(100)[None]
    whole = draft.rotary_emb(x, position)
    part = draft.rotary_emb(x, position[:, 3:5])
    assert all(torch.equal(a[:, 3:5], b) for a, b in zip(whole, part))


# The forward


def random_pass(skip: int = 0) -> tuple[Visibility, torch.Tensor, list[list[oracles.Element]]]:
    """Visibility and positions of two rows' elements, of documents of 5 and of 4 + b tokens, and the elements."""
    B, K, rows = 2, 4, []
    for b in range(B):
        documents = [0] * 5 + [1] * (4 + b)
        drawn = oracles.draw_packed([1] * len(documents), documents, K, 0.9, 0.2, torch.Generator().manual_seed(b))
        rows.append(sorted(drawn, key=lambda e: (e[1] > 0, e[0], e[1])))
    N = max(map(len, rows)) + 2
    anchor, depth = torch.zeros(B, N, dtype=torch.int64), torch.full((B, N), -1)
    for b, elements in enumerate(rows):
        anchor[b, : len(elements)], depth[b, : len(elements)] = torch.tensor(elements).T
    start = torch.where(anchor >= 5, 5, 0)
    count = (depth == 0).sum(1)
    tables = Visibility(
        start=start,
        anchor=anchor,
        depth=depth,
        context_end=torch.zeros(B, dtype=torch.int64),
        num_context=0,
        num_depth0=int(count.max()),
        first_rollout=int(count.min()),
        num_depths=K,
        cut=skip,
    )
    return tables, anchor - start + depth.clamp(min=0), rows


def run_and_expect(
    draft: PEagleDraft, skip: int = 0, **options: Any
) -> tuple[DraftOutput, list[torch.Tensor], list[list[oracles.Element]]]:
    """The drafter's output on random inputs, and each row's hidden states by the oracle, on the same parameters."""
    tables, position, rows = random_pass(skip)
    B = len(rows)
    g = torch.Generator().manual_seed(5)
    N, M = tables.anchor.shape[1], tables.num_depth0
    token = torch.randint(0, VOCAB, (B, N), generator=g)
    features = torch.randn(B, M, draft.config.feature_size, generator=g, dtype=torch.float64)
    output = draft(token, position, features, tables, skip=skip, **options)
    weights = dict(draft.named_parameters())
    expected = []
    for b, elements in enumerate(rows):
        n = len(elements)
        who: list[oracles.Who | None] = [(int(a >= 5), a, d) for a, d in elements]
        read = [features[b, i] if d == 0 else None for i, (_, d) in enumerate(elements)]
        visible = oracles.who_sees_whom(who, who)
        tokens, positions = token[b, :n].tolist(), position[b, :n].tolist()
        expected.append(oracles.drafter(weights, draft.config, tokens, positions, read, visible))
    return output, expected, rows


SHAPES: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": True},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 1, "norm_before_residual": True, "num_key_value_heads": 4},
    {"num_hidden_layers": 4, "num_key_value_heads": 1},
    {"hidden_size": 21, "head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 3},
    {"rms_norm_eps": 0.1, "rope_theta": 3.0},
    {"num_aux_hidden_states": 1},
    {"num_aux_hidden_states": 5, "num_hidden_layers": 1},
    {"layer_type": "qwen3", "num_key_value_heads": 4, "fc_norm": True},
    {"norm_before_fc": True, "num_aux_hidden_states": 2},
    {"fc_norm": True, "num_aux_hidden_states": 1},
    {"layer_type": "qwen3", "num_hidden_layers": 1, "rms_norm_eps": 0.1},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_forward_is_the_slow_one_and_so_are_its_gradients(changes: dict[str, Any]) -> None:
    draft = make_draft(**changes)
    output, expected, rows = run_and_expect(draft)
    assert output.hidden.dtype == torch.float64
    for hidden, row, elements in zip(output.hidden, expected, rows):
        assert (hidden[: len(elements)] - row).abs().max().item() <= 1e-10
    parameters = [p for n, p in draft.named_parameters() if n != "lm_head.weight"]
    g = torch.Generator().manual_seed(6)
    weights = [torch.randn(row.shape, generator=g, dtype=torch.float64) for row in expected]
    ours = sum((h[: len(w)] * w).sum() for h, w in zip(output.hidden, weights))
    theirs = sum((row * w).sum() for row, w in zip(expected, weights))
    for one, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)):
        assert float((one - other).abs().max()) <= 1e-9 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("skip", [0, 4])
def test_labels_give_the_loss_of_the_chosen_rows(skip: int) -> None:
    draft = make_draft()
    g = torch.Generator().manual_seed(7)
    chosen = [(0, 6), (0, 8), (1, 5), (1, 9)]
    target_hidden = torch.randn(4, TARGET_HIDDEN, generator=g, dtype=torch.float64)
    target_head = torch.randn(DRAFT_VOCAB, TARGET_HIDDEN, generator=g, dtype=torch.float64)
    N = random_pass()[0].anchor.shape[1]
    rows = torch.tensor([b * (N - skip) + i - skip for b, i in chosen])
    labels = Labels(rows, target_hidden, target_head, "soft_ce", chunk_rows=3)
    output, expected, _ = run_and_expect(draft, skip, labels=labels)
    pairs = [
        oracles.row_loss(draft.lm_head.weight @ expected[b][i], target_head @ t, "soft_ce")
        for (b, i), t in zip(chosen, target_hidden)
    ]
    assert abs(output.loss.item() - sum(loss.item() for loss, _ in pairs)) <= 1e-10
    assert output.hits.tolist() == [hit for _, hit in pairs]
    assert output.hidden.shape[1] == N - skip


def test_keys_values_only_computes_no_query_of_the_last_layer_and_the_same_keys() -> None:
    draft = make_draft(num_hidden_layers=3)
    whole, _, _ = run_and_expect(draft)
    with calls_of(draft.layers[1].self_attn.q_proj) as middle, calls_of(draft.layers[2].self_attn.q_proj) as last:
        output, _, _ = run_and_expect(draft, keys_values_only=True)
    assert (len(middle), last) == (1, [])
    assert output.hidden is None and output.loss is None and output.hits is None
    for ours, theirs in zip(output.keys_values, whole.keys_values, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("norm", ["none", "norm_before_fc", "fc_norm"])
def test_features_of_slots_that_hold_no_depth_0_element_are_not_read(norm: str) -> None:
    draft = make_draft(**({} if norm == "none" else {norm: True}))
    tables, position, _ = random_pass()
    token = torch.zeros_like(position)
    features = torch.randn(2, tables.num_depth0, 3 * TARGET_HIDDEN, dtype=torch.float64)
    empty = tables.depth[:, : tables.num_depth0] != 0
    assert empty.any()
    found = []
    for filling in (0.0, float("nan")):
        features[empty] = filling
        hidden = draft(token, position, features, tables).hidden
        found.append([hidden, *torch.autograd.grad(hidden.square().sum(), [draft.fc.weight, draft.mask_hidden])])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_activation_checkpointing_changes_nothing() -> None:
    draft = make_draft(num_hidden_layers=3)
    plain, _, _ = run_and_expect(draft)
    parameters = [p for n, p in draft.named_parameters() if n != "lm_head.weight"]
    expected = torch.autograd.grad(plain.hidden.square().sum(), parameters)
    draft.gradient_checkpointing = True
    with calls_of(draft.layers[1].self_attn.q_proj) as calls:
        output, _, _ = run_and_expect(draft)
        found = torch.autograd.grad(output.hidden.square().sum(), parameters)
    assert len(calls) == 2  # the second time in the backward
    assert torch.equal(output.hidden, plain.hidden) and all(torch.equal(a, b) for a, b in zip(found, expected))


def test_transformers_own_switch_turns_checkpointing_on_and_off_and_evaluation_never_recomputes() -> None:
    draft = make_draft(num_hidden_layers=3)
    kind = "activation" if hasattr(draft, "activation_checkpointing_enable") else "gradient"  # its name before 5.24

    def runs_of_a_layer() -> int:
        with calls_of(draft.layers[1].self_attn.q_proj) as calls:
            run_and_expect(draft)[0].hidden.square().sum().backward()
        return len(calls)

    getattr(draft, f"{kind}_checkpointing_enable")()
    assert runs_of_a_layer() == 2 and draft.is_gradient_checkpointing
    assert draft.eval() and runs_of_a_layer() == 1
    assert draft.train() and runs_of_a_layer() == 2
    getattr(draft, f"{kind}_checkpointing_disable")()
    assert runs_of_a_layer() == 1 and not draft.is_gradient_checkpointing


def test_a_new_drafters_weights_are_all_set_and_its_mask_vector_is_not_zero() -> None:
    torch.manual_seed(0)
    draft = PEagleDraft(make_config(initializer_range=0.05))
    for name, p in draft.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        else:
            assert 0.03 < p.std().item() < 0.07, name


def test_rms_norm_is_exact_in_float64_with_its_gradients_and_answers_in_its_inputs_dtype() -> None:
    draft = make_draft()
    norm = draft.norm
    norm.weight.data.uniform_(0.5, 1.5)
    x, upstream = (torch.randn(3, 16, dtype=torch.float64) * scale for scale in (1e-3, 1))
    results = []
    for function in (norm, lambda x: oracles.rms_norm(x, norm.weight, draft.config.rms_norm_eps)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out, (leaf, norm.weight), upstream)))
    for found, expected in zip(*results):
        assert (found - expected).abs().max() <= 1e-14 * expected.abs().max()
    low = copy.deepcopy(norm).float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [low(x.to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    assert [out.dtype for out in outputs] == [torch.bfloat16, torch.float32]
    for out, error in zip(outputs, (0.02, 1e-5)):
        assert torch.allclose(out.double(), results[1][0], rtol=error, atol=error)
