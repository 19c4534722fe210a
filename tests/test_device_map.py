"""A target that accelerate has spread over devices, or moved away, gives what it gives in one place."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

from peagle_train.distributed import check_device_map
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.evaluate import mass_outside
from tests.tiny import VOCAB, make_target


@pytest.mark.parametrize("tied", [False, True])
def test_a_target_whose_weights_a_device_map_has_moved_away_gives_the_same(tied: bool, tmp_path: Path) -> None:
    folder = make_target(tmp_path / "target", tie_word_embeddings=tied)

    def load(device_map: str | None = None) -> FrozenTarget:
        return FrozenTarget.load(str(folder), dtype="float64", device_map=device_map)

    target, mapped, away = load(), load("auto"), load()  # on a CPU a map leaves everything there
    cpu_offload(away.model, execution_device=torch.device("cpu"))  # the hooks of a map, with every weight elsewhere
    assert all(parameter.is_meta for parameter in away.model.parameters())
    ids = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    some, batch = torch.tensor([3, 17, 58]), {"input_ids": ids, "position_ids": torch.arange(9)[None]}
    expected = target.outputs(batch, target.head_rows(some))
    for other in (mapped, away):
        other.check()
        got = other.outputs(batch, other.head_rows(some))
        assert torch.equal(got.features, expected.features) and torch.equal(got.last_hidden, expected.last_hidden)
        assert torch.equal(got.head, expected.head)
        assert torch.equal(other.embedding_rows(), target.embedding_rows())
        outside = mass_outside(other, got.last_hidden[0], some)
        assert torch.equal(outside, mass_outside(target, got.last_hidden[0], some))


def test_several_processes_do_not_each_spread_a_target_over_the_same_devices() -> None:
    check_device_map("auto", 1)
    check_device_map(None, 8)
    with pytest.raises(ValueError, match=r"device_map is auto and there are 8 processes: .* use target\.shard"):
        check_device_map("auto", 8)
