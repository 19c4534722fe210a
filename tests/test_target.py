"""The frozen target: features, labels, where its weights may lie, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peagle_train.distributed import check_device_map
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


def ids_of(n: int) -> Tensor:
    return torch.randint(0, VOCAB, (1, n), generator=seeded(0))


@pytest.mark.parametrize("layer_ids", [None, [0], [1, 2, 4, 5]])
def test_features_are_the_streams_entering_the_layers_and_the_last_hidden_state_is_after_the_norm(
    folder: Path, layer_ids: list[int] | None
) -> None:
    target = FrozenTarget.load(str(folder), dtype="float64", layer_ids=layer_ids)
    ids = ids_of(13)
    features, last = target.features(ids, torch.arange(13)[None])
    states = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(features, torch.cat([states[i] for i in layer_ids or [2, 3, 4]], dim=-1))
    assert torch.equal(last, states[-1])  # transformers' last entry is after the final norm
    assert target.final_norm() is target.model.model.norm


def test_default_layers_are_vllms_where_those_are_three() -> None:
    assert [default_layer_ids(n) for n in (6, 7, 30)] == [[2, 3, 4], [2, 3, 4], [2, 15, 27]]


def test_head_rows_times_last_hidden_are_the_models_own_logits_without_all_of_which_features_come(
    target: FrozenTarget,
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the head ran")

    ids = ids_of(9)
    handle = target.head.register_forward_pre_hook(fail)
    _, last = target.features(ids, torch.arange(9)[None])
    target.check()
    handle.remove()
    assert all(not layer._forward_pre_hooks for layer in target.layers)
    rows = torch.tensor([3, 17, 58])
    assert torch.allclose(last @ target.head_rows(rows).T, target.model(input_ids=ids).logits[..., rows], atol=1e-12)
    naive = 1 - (last[0] @ target.head.weight.T).softmax(-1)[:, rows].sum(-1)
    for chunk in (1, 7, 1000):
        assert torch.allclose(mass_outside(target, last[0], rows, chunk=chunk), naive.float(), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_target_whose_weights_lie_elsewhere_gives_the_same(tied: bool, tmp_path: Path) -> None:
    folder = make_target(tmp_path / "target", tie_word_embeddings=tied)

    def load(device_map: str | None = None) -> FrozenTarget:
        return FrozenTarget.load(str(folder), dtype="float64", device_map=device_map)

    target, mapped, away, on_disk = load(), load("auto"), load(), load("disk")  # on a CPU a map leaves everything there
    cpu_offload(away.model, execution_device=torch.device("cpu"))  # the hooks of a map, with every weight elsewhere
    assert all(parameter.is_meta for one in (away, on_disk) for parameter in one.model.parameters())
    some, batch = torch.tensor([3, 17, 58]), {"input_ids": ids_of(9), "position_ids": torch.arange(9)[None]}
    expected = target.outputs(batch, target.head_rows(some))
    for other in (mapped, away, on_disk):
        other.check()
        got = other.outputs(batch, other.head_rows(some))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(vars(got).values(), vars(expected).values()))
        assert torch.equal(other.embedding_rows(), target.embedding_rows())
        assert torch.equal(other.final_norm()(got.last_hidden), target.final_norm()(got.last_hidden))
        outside = mass_outside(other, got.last_hidden[0], some)
        assert torch.equal(outside, mass_outside(target, got.last_hidden[0], some))


def test_several_processes_do_not_each_spread_a_target_over_the_same_devices() -> None:
    check_device_map("auto", 1)
    check_device_map(None, 8)
    with pytest.raises(ValueError, match="device_map is auto and there are 8 processes"):
        check_device_map("auto", 8)


def test_logits_changed_after_the_head_are_caught(folder: Path) -> None:
    changed = FrozenTarget.load(str(folder), dtype="float32")
    original = changed.model.forward

    def scaled(**kwargs: Any) -> Any:
        output = original(**kwargs)
        output.logits = output.logits * 0.5
        return output

    changed.model.forward = scaled
    with pytest.raises(ValueError, match="changes its logits"):
        changed.check()
    assert changed.model.get_output_embeddings() is changed.head


@pytest.mark.parametrize(
    ("name", "what"), [("model.layers.2.mlp.down_proj.weight", "features"), ("model.norm.weight", "last hidden states")]
)
def test_a_target_whose_numbers_are_not_finite_is_refused(folder: Path, name: str, what: str) -> None:
    broken = FrozenTarget.load(str(folder), dtype="float32")
    broken.model.get_parameter(name).data[:1] = float("inf" if "norm" in name else "nan")
    with pytest.raises(ValueError, match=f"{what} that are not finite"):
        broken.check()


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
def test_targets_with_wrong_labels_or_features_are_refused(changes: dict[str, Any], message: str) -> None:
    layers = changes.pop("num_hidden_layers", 6)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, **shape))
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        FrozenTarget(model)


@pytest.mark.parametrize("ids", [[], [3, 2, 1], [1, 1, 2], [0, 1, 6], [-1, 0, 1]])
def test_layer_ids_must_be_ascending_ids_of_the_target(folder: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="layer_ids"):
        FrozenTarget.load(str(folder), layer_ids=ids)


def test_folders_that_hold_no_target_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    other = make_target(tmp_path / "other", num_hidden_layers=7)
    folder_, weights = tmp_path / "mine", (folder / "model.safetensors").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            FrozenTarget.load(str(folder_))
        assert "\n" not in str(error.value)

    refused("is not a folder")
    folder_.mkdir()
    refused(r"no config\.json")
    (folder_ / "config.json").write_bytes((other / "config.json").read_bytes())
    refused(r"no \.safetensors")
    for corrupt in (b"", b"garbage" * 100, weights[: len(weights) // 2]):
        (folder_ / "model.safetensors").write_bytes(corrupt)
        refused("cannot be loaded")
    (folder_ / "model.safetensors").write_bytes(weights)
    refused("do not fit its config")


class Int8Linear(nn.Linear):
    """As a quantiser makes it: int8 with a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("what", ["exact", "rounded", "leaks", "fails"])
def test_a_document_that_rounding_moves_is_kept_packed_and_one_that_its_neighbour_moves_is_not(
    what: str, dtype: torch.dtype
) -> None:
    """Of six documents in two sequences of 13 tokens, the second is far off what it gives alone, or the last one reads the
    first token of its sequence, or packed ones raise an error without a word. Models in 16 bits do the first by themselves,
    in 32 none does.
    """
    table = torch.randn(64, 8, generator=seeded(0)).to(dtype)

    def features(ids_BL: Tensor, position_BL: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        found = table[ids_BL] + position_BL[..., None]
        if not way.apart and what == "fails":
            raise NotImplementedError
        if not way.apart and what == "rounded":
            found[0, 6:11] *= 1.5
        if not way.apart and what == "leaks":
            found[1, 10:] += table[ids_BL[1, 0]]
        return found, found

    way = choose_way("Name", features, Way(apart=False), 64)
    assert way.apart == (what in ("leaks", "fails") or (what == "rounded" and dtype == torch.float32))
