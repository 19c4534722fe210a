"""The frozen target: features, labels, isolation of packed documents, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peagle_train.target_model.check import choose_way
from peagle_train.target_model.chunks import Way
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.target_model.loading import default_layer_ids
from peagle_train.training.evaluate import mass_outside
from tests.helpers import seeded
from tests.tiny import VOCAB, make_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(folder: Path) -> FrozenTarget:
    return FrozenTarget.load(str(folder), dtype="float64")


def ids_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, n), generator=torch.Generator().manual_seed(seed))


def test_features_are_the_streams_entering_the_three_layers_and_the_last_hidden_state_is_after_the_norm(
    target: FrozenTarget,
) -> None:
    ids, positions = ids_of(13), torch.arange(13)[None]
    features, last = target.features(ids, positions)
    states = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert target.layer_ids == [2, 3, 4]
    expected = torch.cat([states[i] for i in target.layer_ids], dim=-1)
    assert torch.equal(features, expected)
    assert torch.equal(last, states[-1])  # transformers' last entry is after the final norm


def test_default_layers_are_vllms_where_those_are_three() -> None:
    assert default_layer_ids(7) == [2, 3, 4]
    assert default_layer_ids(30) == [2, 15, 27]
    assert default_layer_ids(6) == [2, 3, 4]


def test_no_full_vocabulary_logits_are_built_and_no_hook_stays(target: FrozenTarget) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the head ran")

    handle = target.head.register_forward_pre_hook(fail)
    target.features(ids_of(5), torch.arange(5)[None])
    target.check()
    handle.remove()
    assert all(not layer._forward_pre_hooks for layer in target.layers)
    assert target.model.get_output_embeddings() is target.head  # type: ignore[operator]


def test_head_rows_times_last_hidden_are_the_models_own_logits(target: FrozenTarget) -> None:
    ids = ids_of(9)
    _, last = target.features(ids, torch.arange(9)[None])
    rows = torch.tensor([3, 17, 58])
    assert torch.allclose(last @ target.head_rows(rows).T, target.model(input_ids=ids).logits[..., rows], atol=1e-12)


def test_mass_outside_the_draft_vocabulary_matches_a_full_softmax(target: FrozenTarget) -> None:
    _, last = target.features(ids_of(11), torch.arange(11)[None])
    drafted = torch.tensor([0, 5, 6, 44])
    naive = 1 - (last[0] @ target.head.weight.T).softmax(-1)[:, drafted].sum(-1)  # type: ignore[operator, union-attr]
    for chunk in (1, 7, 1000):
        assert torch.allclose(mass_outside(target, last[0], drafted, chunk=chunk), naive.float(), atol=1e-6)


def test_a_target_that_lets_packed_documents_see_each_other_gets_one_at_a_time(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaky, good = (FrozenTarget.load(str(folder), dtype="float64", attn_implementation="eager") for _ in range(2))
    original = leaky.base.forward
    leaky.base.forward = lambda **kwargs: original(  # type: ignore[method-assign]
        **{**kwargs, "position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]}
    )
    lengths = (7, 1, 1, 12, 1)
    ids, positions = ids_of(sum(lengths)), torch.cat([torch.arange(n) for n in lengths])[None]
    expected = good.features(ids, positions)[0]
    assert (leaky.features(ids, positions)[0] - expected)[:, 9:21].abs().max() > 0.1
    leaky.check()
    assert "one document at a time" in caplog.text
    read = [*range(7), *range(9, 21)]  # nobody reads documents of one token
    found = leaky.features(ids, positions)[0]
    assert torch.allclose(found[:, read], expected[:, read], atol=1e-5)  # eager softmaxes in float32


def test_logits_changed_after_the_head_are_caught(folder: Path) -> None:
    changed = FrozenTarget.load(str(folder), dtype="float32")
    original = changed.model.forward

    def scaled(**kwargs: Any) -> Any:
        output = original(**kwargs)
        output.logits = output.logits * 0.5
        return output

    changed.model.forward = scaled  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="changes its logits after the head"):
        changed.check()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.2.mlp.down_proj.weight", "features that are not finite"),
        ("model.norm.weight", "last hidden states that are not finite"),
        ("lm_head.weight", "changes its logits after the head"),
    ],
)
def test_a_target_whose_numbers_are_not_finite_is_refused(folder: Path, name: str, what: str) -> None:
    broken = FrozenTarget.load(str(folder), dtype="float32")
    broken.model.get_parameter(name).data[:1] = float("inf" if "norm" in name else "nan")
    with pytest.raises(ValueError, match=what):
        broken.check()


def test_an_attention_that_does_not_run_here_is_named_with_its_setting(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(**_: Any) -> Any:
        raise NotImplementedError("no kernel\nfor float64")

    target = FrozenTarget.load(str(folder), dtype="float64")
    monkeypatch.setattr(target.config, "_attn_implementation", "flex_attention")
    monkeypatch.setattr(target.base, "forward", no_kernel)
    with pytest.raises(ValueError, match=r"cpu in float64 .*flex_attention.* set target\.attn_implementation to null"):
        target.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"layer_types": ["linear_attention"] * 6}, "state runs across packed documents"),
        ({"num_hidden_layers": 4}, "too few for the default feature layers"),
    ],
)
def test_targets_with_wrong_labels_or_features_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    base = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6}
    config = LlamaConfig(**{**base, "num_attention_heads": 2})
    config.num_hidden_layers = changes.pop("num_hidden_layers", 6)
    model = LlamaForCausalLM(config)
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        FrozenTarget(model)


@pytest.mark.parametrize("ids", [[1, 2], [3, 2, 1], [1, 1, 2], [0, 1, 6], [-1, 0, 1]])
def test_layer_ids_must_be_three_ascending_ids_of_the_target(folder: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="layer_ids"):
        FrozenTarget.load(str(folder), layer_ids=ids)


def test_folders_that_hold_no_target_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        FrozenTarget.load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        FrozenTarget.load(str(tmp_path))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        FrozenTarget.load(str(tmp_path))
    weights = (folder / "model.safetensors").read_bytes()
    for corrupt in (b"", b"garbage" * 100, weights[: len(weights) // 2]):
        (tmp_path / "model.safetensors").write_bytes(corrupt)
        with pytest.raises(ValueError, match="cannot be loaded") as error:
            FrozenTarget.load(str(tmp_path))
        assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    other = make_target(tmp_path / "other", num_hidden_layers=7)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "config.json").write_bytes((other / "config.json").read_bytes())
    (mixed / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="do not fit its config"):
        FrozenTarget.load(str(mixed))


class Int8Linear(nn.Linear):
    """As a quantiser makes it: int8 with a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.scale).to(x.dtype).T


def test_a_quantised_body_is_used_and_a_quantised_head_or_table_refused(folder: Path) -> None:
    model: Any = FrozenTarget.load(str(folder), dtype="float64").model
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    FrozenTarget(model).check()
    table, model.lm_head = model.get_input_embeddings(), Int8Linear(model.lm_head)
    with pytest.raises(ValueError, match="quantised head"):
        FrozenTarget(model)
    model.lm_head = nn.Linear(16, VOCAB, bias=False, dtype=torch.float64)
    table.weight = nn.Parameter((table.weight * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised embeddings"):
        FrozenTarget(model)


def test_the_final_norm_is_found(target: FrozenTarget) -> None:
    assert target.final_norm() is target.model.model.norm  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("what", ["exact", "rounded", "leaks"])
def test_a_document_that_rounding_moves_is_kept_packed_and_one_that_its_neighbour_moves_is_not(
    what: str, dtype: torch.dtype
) -> None:
    """Of six documents in two sequences of 13 tokens, the second is far off what it gives alone, or the last one reads the
    first token of its sequence. Models in 16 bits do the first by themselves, in 32 none does.
    """
    table = torch.randn(64, 8, generator=seeded(0)).to(dtype)

    def features(ids_BL: torch.Tensor, position_BL: torch.Tensor, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
        found = table[ids_BL] + position_BL[..., None]
        is_packed = bool((position_BL[:, 1:] == 0).any())
        if is_packed and what == "rounded" and not way.apart:
            found[0, 6:11] *= 1.5
        if is_packed and what == "leaks" and not way.apart:
            found[1, 10:] += table[ids_BL[1, 0]]
        return found, found

    way = choose_way(object(), features, Way(flattens=True, chunk_tokens=None, apart=False), 64)
    is_wrong = what == "leaks" or (what == "rounded" and dtype == torch.float32)
    assert (way.flattens, way.apart) == ((False, True) if is_wrong else (True, False))


def test_a_kernel_that_fails_without_a_word_is_not_taken_for_one_that_works() -> None:
    def features(ids_BL: torch.Tensor, position_BL: torch.Tensor, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
        if way.flattens:
            raise NotImplementedError
        found = (ids_BL + position_BL)[..., None].float()
        return found, found

    assert not choose_way(object(), features, Way(flattens=True, chunk_tokens=None, apart=False), 64).flattens
