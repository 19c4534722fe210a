"""Packed documents in the target: each gets what it gets alone, however many rows a batch has and whatever attends."""

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from peagle_train.target.frozen import FrozenTarget
from tests.tiny import VOCAB, make_target

ROWS = [[7, 1, 11, 2], [13, 3, 5]]
"""Lengths of the documents of a batch's rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def packed(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids, int64 [B, L]."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return torch.randint(0, VOCAB, positions.shape, generator=torch.Generator().manual_seed(1)), positions


def alone(model: Any, layer_ids: list[int], rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The same documents one by one through the whole model, by attention that has one row without a mask to do."""
    out = []
    for ids, lengths in zip(packed(rows)[0], rows, strict=True):
        states = [model(input_ids=part[None], output_hidden_states=True).hidden_states for part in ids.split(lengths)]
        out.append([torch.cat([s[i][0] for s in states]) for i in (*layer_ids, -1)])
    features, last = torch.stack([torch.cat(row[:3], dim=-1) for row in out]), torch.stack([row[3] for row in out])
    return features, last


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """What a causal kernel gives for one document, [n, heads, D], written out."""
    n, groups = query.shape[0], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[2] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


CALLS: list[int] = []
"""Documents of each call of the next function."""


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False
) -> Tensor:  # fmt: skip
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    CALLS.append(cu_seqlens_q.numel() - 1)
    return torch.cat([attend(q[a:b], k[a:b], v[a:b], softmax_scale) for a, b in pairwise(cu_seqlens_q.tolist())])


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: bool = False) -> Tensor:
    assert causal and q.shape[1] == k.shape[1]
    return torch.stack([attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts stand-ins for the functions of flash-attn where transformers looks for them, as it has no kernel for a CPU; all
    else is transformers' own code.
    """
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=None,
    )
    vars(padding).update(pad_input=None, unpad_input=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr("transformers.modeling_flash_attention_utils.is_flash_attn_2_available", lambda: True)
    CALLS.clear()
    return CALLS


def flash_target(folder: Path) -> FrozenTarget:
    model: Any = FrozenTarget.load(str(folder), dtype="float64").model
    model.config._attn_implementation = "flash_attention_2"  # transformers' own check asks for a GPU
    return FrozenTarget(model)


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:], [[1], [1]], [[4, 4], [8], [1, 7]]])
def test_flash_attention_keeps_the_documents_of_several_rows_apart(
    rows: list[list[int]], folder: Path, calls: list[int]
) -> None:
    target = flash_target(folder)
    features, last = target.features(*packed(rows))
    assert calls == [sum(map(len, rows))] * 6  # one call a layer, for all documents of the batch
    expected, expected_last = alone(FrozenTarget.load(str(folder), dtype="float64").model, target.layer_ids, rows)
    assert torch.allclose(features, expected, atol=1e-12) and torch.allclose(last, expected_last, atol=1e-12)


def test_flash_attention_passes_the_check_without_giving_documents_one_by_one(folder: Path, calls: list[int]) -> None:
    target = flash_target(folder)
    target.check()
    assert not target.apart and max(calls) > 2


def test_the_check_sees_documents_that_leak_only_where_a_batch_has_several_rows(folder: Path) -> None:
    target = FrozenTarget.load(str(folder), dtype="float64", attn_implementation="eager")
    forward = target.base.forward

    def leaking(position_ids: Tensor, **given: Any) -> Any:
        if len(position_ids) > 1:
            position_ids = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return forward(position_ids=position_ids, **given)

    target.base.forward = leaking  # type: ignore[method-assign]
    target.check()
    features, _ = target.features(*packed(ROWS))
    expected, _ = alone(FrozenTarget.load(str(folder), dtype="float64").model, target.layer_ids, ROWS)
    read = torch.tensor([[n > 1 for n in row for _ in range(n)] for row in ROWS])  # nobody reads one of a single token
    assert torch.allclose(features[read], expected[read], atol=1e-5)  # eager softmaxes in float32
