"""The drafter: names and files as on disk, refusals, and the forward against loops."""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from peagle_train.core.draft import DraftOutput, PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.serving.formats import parse_config
from tests import oracles
from tests.helpers import DRAFT_VOCAB, MASK_TOKEN, TARGET_HIDDEN, VOCAB, calls_of, make_config, make_draft, seeded
from tests.test_attention import Pass, make_pass


def expected_names(config: PEagleDraftConfig) -> set[str]:
    """As EAGLE-3 names them; the oracle of the forward, which reads them by these names, knows their shapes."""
    names = "embed_tokens fc norm lm_head layers.0.hidden_norm".split()
    names += ["input_norm"] if config.norm_before_fc else []
    names += [f"fc_norm.{i}" for i in range(config.num_aux_hidden_states) if config.fc_norm]
    of_layer = "input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj".split()
    of_layer += [f"self_attn.{letter}_proj" for letter in "qkvo"]
    of_layer += ["self_attn.q_norm", "self_attn.k_norm"] if config.layer_type == "qwen3" else []
    names += [f"layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in of_layer]
    return {"mask_hidden", "d2t", "t2d", *(f"{name}.weight" for name in names)}


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.bfloat16, {"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [2, 9, 17, 18]}),
        (torch.float32, {"num_hidden_layers": 1, "eagle_aux_hidden_state_layer_ids": [7], "norm_before_fc": True}),
        (torch.float32, {"eagle_aux_hidden_state_layer_ids": [0, 1, 6, 11], "layer_type": "qwen3", "fc_norm": True}),
        (torch.float32, {"num_hidden_layers": 4, "head_dim": 6, "hidden_size": 20, "num_key_value_heads": 1}),
    ],
)
def test_a_saved_drafters_tensors_have_exactly_the_loaders_names_and_load_back(tmp_path, dtype, changes):
    draft = make_draft(dtype, **changes)
    draft.set_draft_vocab(torch.arange(DRAFT_VOCAB) + (torch.arange(DRAFT_VOCAB) > 11) * 9)
    draft.save_pretrained(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    assert found.keys() == expected_names(draft.config)
    assert (found["mask_hidden"].shape, found["t2d"].shape) == ((1, 1, draft.config.feature_size), (VOCAB,))
    assert {name for name, p in draft.named_parameters() if p.requires_grad} == found.keys() - {"d2t", "t2d"}
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


@pytest.mark.parametrize(
    ("layer_type", "reader", "architecture"),
    [("llama", LlamaConfig, "LlamaForCausalLMEagle3"), ("qwen3", Qwen3Config, "Eagle3Qwen3ForCausalLM")],
)
def test_config_json_holds_what_vllms_loader_and_other_readers_read(tmp_path, layer_type, reader, architecture):
    given = {
        "eagle_aux_hidden_state_layer_ids": [2, 9, 17],
        "norm_before_residual": True,
        "max_position_embeddings": 8192,
    }
    make_draft(torch.float32, layer_type=layer_type, **given).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"model_type": layer_type, "architectures": [architecture], "rope_theta": 5000.0, "rope_scaling": None}
    expected |= dict.fromkeys(("mask_token_id", "pard_token", "ptd_token_id"), MASK_TOKEN)
    expected |= {"draft_vocab_size": DRAFT_VOCAB, "vocab_size": VOCAB, "target_hidden_size": TARGET_HIDDEN, **given}
    expected |= {"hidden_size": 16, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    expected |= {"num_hidden_layers": 2, "intermediate_size": 24}
    rope = {"rope_theta": 5000.0, "rope_type": "default"}
    assert {name: config.get(name, "missing") for name in expected} == expected and config["rope_parameters"] == rope
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is reader and not getattr(read, "use_sliding_window", False)
    assert (read.ptd_token_id, read.draft_vocab_size, read.head_dim) == (MASK_TOKEN, DRAFT_VOCAB, 8)
    assert read.architectures == [architecture] and read.rope_parameters == rope


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    ],
)
def test_rope_is_written_in_both_spellings_and_read_from_either(tmp_path, rope):
    make_draft(torch.float32, rope_theta=700.0, rope_scaling=dict(rope)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 700.0 and config["rope_scaling"] == rope
    assert config["rope_parameters"] == {**rope, "rope_theta": 700.0}
    rotary = PEagleDraft.from_pretrained(tmp_path).rotary_emb
    first, x, position = rotary.inv_freq, torch.zeros(1), torch.arange(100)[None]
    part = rotary(x, position[:, 3:5])  # does not depend on the call's length
    assert all(torch.equal(whole[:, 3:5], own) for whole, own in zip(rotary(x, position), part))
    assert not torch.equal(first, PEagleDraft(make_config(rope_theta=700.0)).rotary_emb.inv_freq)
    for gone in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        partial = {name: value for name, value in config.items() if name not in gone}
        assert torch.equal(PEagleDraft(PEagleDraftConfig(**partial)).rotary_emb.inv_freq, first)


def test_any_name_of_the_mask_token_is_enough_and_defaults_are_the_targets():
    shape = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    names = "mask_token_id dspark_noise_token_id pard_token ptd_token_id".split()  # vLLM's, and in a section of its own
    for key, value in [("dflash_config", {"mask_token_id": 3}), *((name, 3) for name in names)]:
        config = parse_config({**shape, key: value})
        assert (config.mask_token_id, config.ptd_token_id, config.pard_token) == (3, 3, 3), key
    assert PEagleDraftConfig(pard_token=4).ptd_token_id == PEagleDraftConfig(mask_token_id=4).pard_token == 4
    assert (config.draft_vocab_size, config.target_hidden_size, config.norm_before_residual) == (20, 8, False)


def test_the_draft_vocabulary_is_kept_as_offsets_and_flags():
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
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'.* call"),
        ({"ptd_token_id": None}, "mask_token_id is missing; set draft.mask_token_id"),
        ({"ptd_token_id": VOCAB}, f"mask_token_id is {VOCAB}; it must lie in 0..{VOCAB - 1}"),
        ({"ptd_token_id": -1}, "mask_token_id is -1"),
        ({"draft_vocab_size": VOCAB + 1}, f"draft_vocab_size is {VOCAB + 1}; the target's vocabulary has {VOCAB}"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"fc_norm": True, "norm_before_fc": True}, "norm_before_fc and fc_norm are both true"),
        ({"layer_type": "qwen3", "attention_bias": True}, "attention_bias and mlp_bias must be false"),
        ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even one"),
        ({"hidden_size": 18}, r"hidden size \(18\) is not a multiple of the number of attention heads \(4\)"),
    ],
)
def test_a_drafter_that_could_not_be_trained_or_served_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PEagleDraft(make_config(**changes))


# The forward


def random_pass() -> tuple[Pass, Tensor]:
    """Two rows' elements, of documents of 5 and of 4 + b tokens, and their positions."""
    p = make_pass([([5, 4], 0), ([5, 5], 0)], ratio=0.9)
    v = p.visibility
    return p, v.anchor - v.start + v.depth.clamp(min=0)


def run_and_expect(draft: PEagleDraft, **options: Any) -> tuple[DraftOutput, list[Tensor]]:
    """The drafter's output on random inputs, and each row's hidden states by the oracle, on the same parameters."""
    p, position = random_pass()
    B, N, M, g = *position.shape, p.visibility.num_depth0, seeded(5)
    token = torch.randint(0, VOCAB, (B, N), generator=g)
    features = torch.randn(B, M, draft.config.feature_size, generator=g, dtype=torch.float64)
    output = draft(token, position, features, p.visibility, **options)
    expected = []
    for b, queries in enumerate(p.queries):
        who = [query for query in queries if query]
        read = [features[b, i] if d == 0 else None for i, (_, _, d) in enumerate(who)]
        given = token[b].tolist()[: len(who)], position[b].tolist()[: len(who)], read, oracles.who_sees_whom(who, who)
        expected.append(oracles.drafter(dict(draft.named_parameters()), draft.config, *given))
    return output, expected


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1, "norm_before_residual": True, "num_key_value_heads": 4, "num_aux_hidden_states": 5},
        {"num_key_value_heads": 1, "rms_norm_eps": 0.1, "rope_theta": 3.0},
        {"hidden_size": 21, "head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"layer_type": "qwen3", "num_key_value_heads": 4, "fc_norm": True},
        {"norm_before_fc": True, "num_aux_hidden_states": 2},
        {"layer_type": "qwen3", "num_hidden_layers": 1, "fc_norm": True, "num_aux_hidden_states": 1},
    ],
    ids=str,
)
def test_the_forward_is_the_slow_one_and_so_are_its_gradients(changes):
    draft = make_draft(**changes)
    output, expected = run_and_expect(draft)
    assert output.hidden.dtype == torch.float64
    for hidden, row in zip(output.hidden, expected):
        assert (hidden[: len(row)] - row).abs().max().item() <= 1e-10
    parameters = [p for n, p in draft.named_parameters() if n != "lm_head.weight"]
    weights = [torch.randn(row.shape, generator=seeded(6), dtype=torch.float64) for row in expected]
    ours = sum((h[: len(w)] * w).sum() for h, w in zip(output.hidden, weights))
    theirs = sum((row * w).sum() for row, w in zip(expected, weights))
    for one, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)):
        assert float((one - other).abs().max()) <= 1e-9 * max(1.0, float(other.abs().max()))


def test_keys_values_only_computes_no_query_of_the_last_layer_and_the_same_keys():
    draft = make_draft(num_hidden_layers=3)
    whole, _ = run_and_expect(draft)
    with calls_of(draft.layers[1].self_attn.q_proj) as middle, calls_of(draft.layers[2].self_attn.q_proj) as last:
        output, _ = run_and_expect(draft, keys_values_only=True)
    assert (len(middle), last) == (1, [])
    assert output.hidden is None and output.loss is None and output.hits is None
    for ours, theirs in zip(output.keys_values, whole.keys_values, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("norm", [{}, {"norm_before_fc": True}, {"fc_norm": True}], ids=str)
def test_features_of_slots_that_hold_no_depth_0_element_are_not_read(norm):
    draft, (p, position) = make_draft(**norm), random_pass()
    tables = p.visibility
    features = torch.randn(2, tables.num_depth0, 3 * TARGET_HIDDEN, dtype=torch.float64)
    empty = tables.depth[:, : tables.num_depth0] != 0
    assert empty.any()
    found = []
    for filling in (0.0, float("nan")):
        features[empty] = filling
        hidden = draft(torch.zeros_like(position), position, features, tables).hidden
        found.append([hidden, *torch.autograd.grad(hidden.square().sum(), [draft.fc.weight, draft.mask_hidden])])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_transformers_own_switch_turns_checkpointing_on_which_changes_nothing_and_never_runs_in_an_evaluation():
    draft = make_draft(num_hidden_layers=3)
    kind = "activation" if hasattr(draft, "activation_checkpointing_enable") else "gradient"  # its name before 5.24
    parameters = [p for n, p in draft.named_parameters() if n != "lm_head.weight"]

    def run() -> tuple[int, list[Tensor]]:
        """Runs of a layer, forward and backward, and what came of them."""
        with calls_of(draft.layers[1].self_attn.q_proj) as calls:
            hidden = run_and_expect(draft)[0].hidden
            gradients = torch.autograd.grad(hidden.square().sum(), parameters)
        return len(calls), [hidden, *gradients]

    once, expected = run()
    getattr(draft, f"{kind}_checkpointing_enable")()
    twice, found = run()
    assert (once, twice) == (1, 2) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert draft.eval() and run()[0] == 1


def test_a_new_drafters_weights_are_all_set_and_its_mask_vector_is_not_zero():
    torch.manual_seed(0)
    for name, p in PEagleDraft(make_config(initializer_range=0.05)).named_parameters():
        assert (p == 1).all() if "norm" in name else 0.03 < p.std().item() < 0.07, name


def test_rms_norm_is_exact_in_float64_and_answers_in_its_inputs_dtype():
    norm = make_draft().norm
    x = torch.randn(3, 16, dtype=torch.float64) * 1e-3
    expected = oracles.rms_norm(x, norm.weight, norm.eps)
    assert (norm(x) - expected).abs().max() <= 1e-14 * expected.abs().max()
    low = copy.deepcopy(norm).float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [low(x.to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    assert [out.dtype for out in outputs] == [torch.bfloat16, torch.float32]
    for out, error in zip(outputs, (0.02, 1e-5)):
        assert torch.allclose(out.double(), expected, rtol=error, atol=error)
