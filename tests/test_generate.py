"""Drafting as served against drafting as trained, slot by slot; speculative output against the target's own."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from peagle_train.core.passes import Passes, TargetOutputs, visibility_of
from peagle_train.decoding.generate import CachedTarget, Drafter, decode, greedy_tokens, sampler
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import make_batch, make_draft, make_rows, make_target, seeded
from tests.tiny import MASK, VOCAB


def trained_logits(draft: Any, row: dict[str, Any], target: TargetOutputs, K: int) -> dict[tuple[int, int], Tensor]:
    """Logits of every element of the flat training pass, by (anchor, depth)."""
    L = len(row["input_ids"])
    batch = make_batch([row], L, 1, K, down_sample_ratio=1.0)
    passes = Passes(draft, batch, target, None, "kl", 384, 1.0)
    segment = passes.plan.segments[0]
    own = passes.own(segment)
    visibility = visibility_of(own, K, M=segment.num_depth0, first_rollout=segment.first_rollout)
    with torch.no_grad():
        hidden = passes.run(own, segment.anchors, visibility).hidden
        logits = draft.lm_head(hidden[0])
    who = zip(own.anchor[0].tolist(), own.depth[0].tolist(), logits)
    return {(anchor, depth): rows for anchor, depth, rows in who if depth >= 0}


# what happens after a prompt of 5: how many of the K drafted tokens are accepted, pass by pass
HISTORIES = ([0] * 12, [5] * 5, [0, 5, 3, 0, 0, 5, 1, 5])


@pytest.mark.parametrize(
    "changes, dtype, tolerance",
    [
        ({}, torch.float32, 1e-5),
        ({"norm_before_residual": True, "num_hidden_layers": 1}, torch.float64, 1e-12),
        ({"sliding_window": 5}, torch.float64, 1e-12),
        ({"sliding_window": 8, "num_hidden_layers": 3}, torch.float64, 1e-12),
    ],
    ids=str,
)
def test_every_slot_after_any_acceptance_is_the_training_row(changes, dtype, tolerance):
    K, L, prompt = 5, 37, 5
    # serving continues where the drafter's own max_position_embeddings (and the training length) end
    draft = make_draft(dtype, max_position_embeddings=16, **changes)
    row = make_rows(L, padding=0)[0]
    ids = row["input_ids"]
    target = make_target(make_batch([row], L, 1, K), dtype)
    trained = trained_logits(draft, row, target, K)
    for history in HISTORIES:
        drafter = Drafter(draft, K)
        given, known, compared = 0, prompt, set()
        for accepted in history:
            # tokens x_0 .. x_known, the last of them the bonus token, whose features the target does not have yet
            slots = drafter.propose(ids[given + 1 : known + 1], target.features[0, given:known])
            anchor = known - 1
            for depth in range(K):
                if (anchor, depth) in trained:
                    found, expected = slots[depth], trained[anchor, depth]
                    assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance, (anchor, depth)
                    compared.add((anchor, depth))
            given, known = known, known + accepted + 1
            if known >= L:
                break
        assert known > 16 and {depth for _, depth in compared} == set(range(K))
    # One slot needs no mask token, and a prompt of one token has no context.
    slots = Drafter(draft, 1).propose(ids[1:2], target.features[0, :1])
    assert slots.shape[0] == 1
    assert float((slots[0] - trained[0, 0]).abs().max() / trained[0, 0].abs().max()) <= tolerance


# a tiny target


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


def test_served_drafts_over_a_served_target_are_the_training_rows(llama):
    """The whole way: cached features, cached context, real rejections, against one flat pass of both models."""
    K, draft = 4, tiny_draft()
    drafted: list[tuple[int, Tensor]] = []

    class Recorded(Drafter):
        def propose(self, tokens: Sequence[int], features_nF: Tensor) -> Tensor:
            slots = super().propose(tokens, features_nF)
            drafted.append((self.length - 1, slots))
            return slots

    out = decode(CachedTarget(llama), Recorded(draft, K), PROMPT, 40, sampler(1.0, seeded(7)))
    ids = [*out.prompt, *out.tokens]
    row = {"input_ids": ids, "loss_mask": [1] * len(ids), "document_ids": [0] * len(ids)}
    features, last = llama.features(torch.tensor([ids]), torch.arange(len(ids))[None])
    assert torch.allclose(out.features, features[0, :-1], rtol=0, atol=1e-12)
    trained = trained_logits(draft, row, TargetOutputs(features, last, llama.head_rows(draft.draft_token_ids)), K)
    accepted = {a for _, a in out.passes}
    assert 0 in accepted and len(accepted) > 1, "the seed must give passes of several lengths"
    errors = [
        float((slots[d] - trained[a, d]).abs().max()) for a, slots in drafted for d in range(K) if (a, d) in trained
    ]
    assert len(errors) > 2 * len(drafted) and max(errors) < 1e-10


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
