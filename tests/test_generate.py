"""Drafting as served against drafting as trained, slot by slot; speculative output against the target's own."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from peagle_train.core.passes import Passes, TargetOutputs, plan_of, visibility_of
from peagle_train.decoding.generate import CachedTarget, Drafter, decode, greedy_tokens, sampler
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import make_batch, make_draft, seeded
from tests.tiny import MASK, VOCAB


def trained_logits(draft: Any, row: dict[str, Any], target: TargetOutputs, K: int) -> dict[tuple[int, int], Tensor]:
    """Logits of every element of the flat training pass, by (anchor, depth)."""
    L = len(row["input_ids"])
    batch = make_batch([row], L, 1, K, down_sample_ratio=1.0)
    passes = Passes(draft, batch, target, plan_of(batch, draft), "kl", 384, 1.0)
    segment = passes.plan.segments[0]
    own = passes.own(segment)
    visibility = visibility_of(own, K, M=segment.num_depth0, first_rollout=segment.first_rollout)
    with torch.no_grad():
        hidden = passes.run(own, segment.anchors, visibility).hidden
        logits = draft.lm_head(hidden[0])
    who = zip(own.anchor[0].tolist(), own.depth[0].tolist(), logits)
    return {(anchor, depth): rows for anchor, depth, rows in who if depth >= 0}


def tiny_draft(dtype: torch.dtype = torch.float64, seed: int = 7, ids: Tensor | None = None, **changes: Any) -> Any:
    """Of random ids of the target unless `ids` are given."""
    ids = torch.randperm(VOCAB, generator=seeded(seed))[:41].sort().values if ids is None else ids
    shape = {"vocab_size": VOCAB, "target_hidden_size": 16, "ptd_token_id": MASK, "draft_vocab_size": len(ids)}
    draft = make_draft(dtype, **{**shape, **changes})
    draft.set_draft_vocab(ids)
    return draft


class Patched:
    """A drafter whose slots say what a function of the index of the next token says."""

    def __init__(self, text: Callable[[int], int], K: int) -> None:
        self.text, self.K, self.known, self.token_ids = text, K, 0, torch.arange(VOCAB)

    def propose(self, tokens: Sequence[int], features_nF: Tensor) -> Tensor:
        self.known += len(tokens)
        logits = torch.zeros(self.K, VOCAB)
        for k in range(self.K):
            logits[k, self.text(self.known + 1 + k)] = 9.0
        return logits


PROMPT = [3, 14, 15, 9, 26, 5, 35]


def by_hand(target: FrozenTarget, prompt: Sequence[int], n: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
    """The target's own text without a cache: everything again for every token."""
    ids, generator = [*prompt], seeded(seed)
    for _ in range(n):
        with torch.no_grad():
            logits_V = target.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        chosen = logits_V.argmax()
        if temperature:
            chosen = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)
        ids.append(int(chosen))
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("n, K", [(1, 4), (23, 4), (7, 1)])
def test_the_text_is_the_targets_own_whatever_the_drafter_and_all_or_none_of_a_perfect_or_hopeless_one_is_accepted(
    llama, n, K, temperature
):
    """Drawn or not: token for token what the target says alone, its draws coming from the same seed."""
    own = by_hand(llama, PROMPT, n + K + 1, temperature)  # a last pass may draw further than n
    if temperature == 0:
        assert greedy_tokens(llama, PROMPT, n, frozenset()) == own[:n]
    text = [*PROMPT, *own, *[0] * 9]
    for drafter, passes in (
        (Drafter(tiny_draft(), K), None),
        (Patched(lambda i: text[i] if i % 3 else 1, K), None),
        (Patched(lambda i: text[i], K), [(i, K) for i in range(0, n - 1, K + 1)]),
        (Patched(lambda i: (text[i] + 1) % VOCAB, K), [(i, 0) for i in range(n - 1)]),
    ):
        out = decode(CachedTarget(llama), drafter, PROMPT, n, sampler(temperature, seeded(0)))
        assert out.tokens == own[:n] and (passes is None or out.passes == passes)
        assert out.features.shape == (len(PROMPT) + n - 1, 48)
    assert not llama.layers[2]._forward_pre_hooks


def test_a_sliding_window_target_can_take_tokens_back():
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    shape |= {"num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, initializer_range=0.5)).double()
    ids = torch.randint(0, VOCAB, (1, 30), generator=seeded(2))
    expected = model(ids, use_cache=False).logits[0]
    tokens = ids[0].tolist()
    target = CachedTarget(FrozenTarget(model))
    target.extend(tokens[:20], 1)
    target.extend([1, 2, 3, 4, 5], 1)
    target.crop(20)
    _, logits = target.extend(tokens[20:], 10)
    assert torch.allclose(logits, expected[20:], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "wrong, accepted",
    [((), {5}), (range(99), {0}), ((8, 15, 19, 20, 21, 28, 30), {0, 1, 3, 5})],
    ids=["all", "none", "some"],
)
@pytest.mark.parametrize(
    "changes, dtype, tolerance",
    [
        ({}, torch.float32, 1e-5),
        ({"norm_before_residual": True, "num_hidden_layers": 1}, torch.float64, 1e-10),
        ({"sliding_window": 5}, torch.float64, 1e-10),
        ({"sliding_window": 8, "num_hidden_layers": 3}, torch.float64, 1e-10),
    ],
    ids=str,
)
def test_every_slot_after_any_acceptance_is_the_training_row(llama, changes, dtype, tolerance, wrong, accepted):
    """The whole way: cached features, cached context, rejections, against one flat pass of both models; it goes on where
    the drafter's own max_position_embeddings end. Which drafts are accepted is not left to the drafter.
    """
    K, n, draft = 5, 30, tiny_draft(dtype, max_position_embeddings=16, **changes)
    ids = [*PROMPT, *by_hand(llama, PROMPT, n + 2 * K, 1.0, seed=7)]
    row = {"input_ids": ids, "loss_mask": [1] * len(ids), "document_ids": [0] * len(ids)}
    features, last = llama.features(torch.tensor([ids]), torch.arange(len(ids))[None])
    trained = trained_logits(draft, row, TargetOutputs(features, last, llama.head_rows(draft.draft_token_ids)), K)
    drafter = Drafter(draft, K)

    def compare(slots: Tensor, anchor: int) -> None:
        for depth, found in enumerate(slots):
            expected = trained[anchor, depth]
            assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance, (anchor, depth)

    class Steered(Patched):
        def propose(self, tokens: Sequence[int], features_nF: Tensor) -> Tensor:
            compare(drafter.propose(tokens, features_nF), drafter.length - 1)
            return super().propose(tokens, features_nF)

    steered = Steered(lambda i: (ids[i] + (i in wrong)) % VOCAB, K)
    out = decode(CachedTarget(llama), steered, PROMPT, n, sampler(1.0, seeded(7)))
    assert drafter.length > 16 and {a for _, a in out.passes} == accepted
    assert torch.allclose(out.features, features[0, : len(out.features)], rtol=0, atol=1e-12)
    # One slot needs no mask token, and a prompt of one token has no context.
    compare(Drafter(draft, 1).propose(ids[1:2], features[0, :1]), 0)


@pytest.mark.parametrize("eos_at", [0, 2, 4, 5, 7])
def test_the_first_end_token_inside_a_draft_ends_the_text_there(llama, eos_at):
    own = by_hand(llama, PROMPT, 20)
    eos = frozenset(own[eos_at : eos_at + 2])  # a draft may hold both
    end = next(i for i, token in enumerate(own) if token in eos) + 1
    assert greedy_tokens(llama, PROMPT, 20, eos) == own[:end]
    perfect = Patched(lambda i: [*PROMPT, *own, *own][i], 4)
    out = decode(CachedTarget(llama), perfect, PROMPT, 20, sampler(0, seeded(0)), eos)
    assert out.tokens == own[:end]
    assert out.features.shape[0] == len(PROMPT) + end - 1
    assert sum(a for _, a in out.passes) == end - 1 - (end - 1) // 5
