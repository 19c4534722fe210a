"""Drafting as served against drafting as trained, slot by slot; speculative output against the target's own."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from peagle_train.core.passes import Passes, TargetOutputs, visibility_of
from peagle_train.decoding.generate import (
    CachedTarget,
    Chance,
    Decoded,
    Drafter,
    decode,
    distribution,
    greedy_tokens,
    spread,
    verify,
)
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import make_batch, make_draft, make_rows, make_target, seeded
from tests.tiny import MASK, VOCAB
from tests.tiny import make_target as make_llama


def trained_logits(draft: Any, row: dict[str, Any], target: TargetOutputs, K: int) -> dict[tuple[int, int], Tensor]:
    """Logits of every element of the flat training pass, by (anchor, depth)."""
    L = len(row["input_ids"])
    batch = make_batch([row], L, 1, K, down_sample_ratio=1.0)
    passes = Passes(draft, batch, target, K, None, "kl", 384)
    segment = passes.plan.segments[0]
    own = passes.own(segment)
    visibility = visibility_of(own, K, M=segment.num_depth0, first_rollout=segment.first_rollout)
    with torch.no_grad():
        hidden = passes.run(own, segment.anchors, visibility).hidden
        logits = draft.lm_head(hidden[0])
    who = zip(own.anchor[0].tolist(), own.depth[0].tolist(), logits)
    return {(anchor, depth): rows for anchor, depth, rows in who if depth >= 0}


# what happens after a prompt of 5: how many of the K drafted tokens are accepted, pass by pass
HISTORIES = {
    "none": [0] * 12,
    "all": [5] * 5,
    "some": [2, 4, 1, 3, 2, 4],
    "mixed": [0, 5, 3, 0, 0, 5, 1, 5],
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(
    "changes, dtype, tolerance",
    [
        ({}, torch.float32, 1e-5),
        ({"num_hidden_layers": 1}, torch.float64, 1e-12),
        ({"norm_before_residual": True}, torch.float64, 1e-12),
    ],
    ids=str,
)
def test_every_slot_after_any_acceptance_is_the_training_row(history, changes, dtype, tolerance):
    K, L, prompt = 5, 37, 5
    # serving continues where the drafter's own max_position_embeddings (and the training length) end
    draft = make_draft(dtype, max_position_embeddings=16, **changes)
    row = make_rows(L, padding=0)[0]
    ids = row["input_ids"]
    target = make_target(make_batch([row], L, 1, K), dtype)
    trained = trained_logits(draft, row, target, K)
    drafter = Drafter(draft, K)
    known, compared = prompt, set()
    given = 0
    for accepted in HISTORIES[history]:
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


def test_one_slot_needs_no_mask_token_and_a_prompt_of_one_token_no_context():
    draft = make_draft()
    row = make_rows(9, padding=0)[0]
    target = make_target(make_batch([row], 9, 1, 3))
    trained = trained_logits(draft, row, target, 3)
    slots = Drafter(draft, 1).propose(row["input_ids"][1:2], target.features[0, :1])
    assert slots.shape[0] == 1 and torch.allclose(slots[0], trained[0, 0], rtol=0, atol=1e-12)


# a tiny target


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return FrozenTarget.load(str(make_llama(tmp_path_factory.mktemp("target"))), dtype="float64")


def tiny_draft(dtype: torch.dtype = torch.float64, seed: int = 7) -> Any:
    draft = make_draft(dtype, vocab_size=VOCAB, target_hidden_size=16, ptd_token_id=MASK, draft_vocab_size=41)
    draft.set_draft_vocab(torch.randperm(VOCAB, generator=seeded(seed))[:41].sort().values)
    return draft


class Patched:
    """A drafter whose slots say what a function of the index of the next token says."""

    def __init__(self, text: Callable[[int], int], K: int) -> None:
        self.text, self.K, self.token_ids = text, K, torch.arange(VOCAB)

    def clear(self) -> None:
        self.known = 0

    def propose(self, tokens: Sequence[int], features_nF: Tensor) -> Tensor:
        self.known += len(tokens)
        logits = torch.zeros(self.K, VOCAB)
        for k in range(self.K):
            logits[k, self.text(self.known + 1 + k)] = 9.0
        return logits


PROMPT = [3, 14, 15, 9, 26, 5, 35]


def greedy_by_hand(target: FrozenTarget, prompt: Sequence[int], n: int) -> list[int]:
    """No cache: the whole text again for every token."""
    ids = [*prompt]
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(target.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("n, K", [(1, 4), (6, 4), (31, 4), (7, 1)])
def test_greedy_output_is_the_targets_own_whatever_the_drafter(llama, n, K):
    own = greedy_by_hand(llama, PROMPT, n)
    target = CachedTarget(llama)
    assert greedy_tokens(target, PROMPT, n, frozenset()) == own
    random = Drafter(tiny_draft(), K)
    good = Patched(lambda i: [*PROMPT, *own, *[0] * 9][i] if i % 3 else 1, K)
    for drafter in (random, good):
        out = decode(target, drafter, PROMPT, n, chance=Chance(seeded(0)))
        assert out.tokens == own and len(out.probabilities) == n
        assert out.features.shape == (len(PROMPT) + n - 1, 48)
    assert not llama.layers[2]._forward_pre_hooks


def test_the_cached_targets_features_and_logits_are_the_trainings(llama):
    ids = torch.randint(0, VOCAB, (1, 23), generator=seeded(1))
    expected, last = llama.features(ids, torch.arange(23)[None])
    tokens = ids[0].tolist()
    target = CachedTarget(llama)
    features = [target.extend(tokens[:9], 1)[0]]
    features.append(target.extend(tokens[9:14], 5)[0][:2])
    target.crop(11)
    more, logits = target.extend(tokens[11:], 12)
    assert torch.allclose(torch.cat([*features, more]), expected[0], rtol=0, atol=1e-12)
    assert torch.allclose(logits, llama.head(last[0, 11:]), rtol=0, atol=1e-12)


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

    target = CachedTarget(llama)
    out = decode(target, Recorded(draft, K), PROMPT, 40, temperature=1.0, chance=Chance(seeded(3)))
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


@pytest.mark.parametrize("eos_at", [0, 4, 5])
def test_an_end_token_inside_a_draft_ends_the_text_there(llama, eos_at):
    own = greedy_by_hand(llama, PROMPT, 20)
    eos = frozenset([own[eos_at]])
    end = own.index(own[eos_at]) + 1
    target = CachedTarget(llama)
    assert greedy_tokens(target, PROMPT, 20, eos) == own[:end]
    out = decode(target, Patched(lambda i: [*PROMPT, *own, *own][i], 4), PROMPT, 20, eos=eos, chance=Chance(seeded(0)))
    assert out.tokens == own[:end]
    assert out.features.shape[0] == len(PROMPT) + end - 1
    assert sum(a for _, a in out.passes) == end - 1 - (end - 1) // 5


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_perfect_drafter_is_accepted_every_time_and_a_hopeless_one_never(llama, temperature):
    K, n = 4, 26
    own = greedy_by_hand(llama, PROMPT, n + K)

    class OneHot(CachedTarget):
        def extend(self, tokens: Sequence[int], num_logits: int) -> tuple[Tensor, Tensor]:
            features, logits = super().extend(tokens, num_logits)
            return features, distribution(logits, 0.0) * 1e4  # certain at any temperature

    perfect = Patched(lambda i: [*PROMPT, *own][i], K)
    hopeless = Patched(lambda i: ([*PROMPT, *own][i] + 1) % VOCAB, K)
    target = OneHot(llama)
    options = {"temperature": temperature, "chance": Chance(seeded(0)), "sample_drafts": False}
    out = decode(target, perfect, PROMPT, n, **options)
    assert out.passes == [(i, K) for i in range(0, n - 1, K + 1)] and out.tokens == own[:n]
    out = decode(target, hopeless, PROMPT, n, **options)
    assert out.passes == [(i, 0) for i in range(n - 1)] and out.tokens == own[:n]


def test_generate_of_transformers_agrees(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "again"), dtype=torch.float64)
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=17, pad_token_id=0)
    target = CachedTarget(llama)
    own = greedy_tokens(target, PROMPT, 17, FrozenTarget(model).eos_token_ids())
    assert out[0, len(PROMPT) :].tolist() == own


# the rejection rule, by visiting every outcome


class Script:
    """Chance that takes given turns, then the first possible one, and knows how likely all of them together are."""

    def __init__(self, turns: Sequence[int]) -> None:
        self.turns, self.options, self.probability = [*turns], [], 1.0
        self.at = 0

    def _take(self, probabilities: list[float]) -> int:
        possible = [i for i, p in enumerate(probabilities) if p > 0]
        if self.at == len(self.turns):
            self.turns.append(possible[0])
        taken = self.turns[self.at]
        self.at += 1
        self.options.append(possible)
        self.probability *= probabilities[taken]
        return taken

    def accepts(self, probability: float) -> bool:
        return self._take([1 - probability, probability]) == 1

    def choose(self, probabilities_V: Tensor) -> int:
        return self._take(probabilities_V.tolist())


def outcomes(run: Callable[[Any], Any]) -> Iterator[tuple[Any, float]]:
    """Every result of a random procedure, with its probability."""
    waiting: list[list[int]] = [[]]
    while waiting:
        given = waiting.pop()
        script = Script(given)
        result = run(script)
        yield result, script.probability
        for i in range(len(given), len(script.turns)):
            waiting += [[*script.turns[:i], other] for other in script.options[i] if other != script.turns[i]]


def some_distributions(n: int, V: int, seed: int, zeros: bool = False) -> Tensor:
    weights = torch.rand(n, V, generator=seeded(seed), dtype=torch.float64) ** 3
    if zeros:
        weights[:, 1] = 0
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "K, drafted_ids, zeros", [(1, [4], False), (2, [0, 1, 2, 3, 4], True), (3, [0, 2, 3], False), (3, [0, 2, 3], True)]
)
def test_the_rejection_rule_gives_exactly_the_targets_distribution(K, drafted_ids, zeros):
    V = 5
    q_KV = spread(some_distributions(K, len(drafted_ids), 1), torch.tensor(drafted_ids), V)
    p_K1V = some_distributions(K + 1, V, 2, zeros)
    first = torch.zeros(V, dtype=torch.float64)  # of the token at slot 0
    accepted_k, emitted_kV = torch.zeros(K), torch.zeros(K + 1, V, dtype=torch.float64)
    for drafted in product(drafted_ids, repeat=K):
        likely = float(torch.stack([q_KV[k, x] for k, x in enumerate(drafted)]).prod())
        for (accepted, bonus), probability in outcomes(lambda chance: verify(drafted, q_KV, p_K1V, chance)):  # noqa: B023
            text = [*drafted[:accepted], bonus]
            first[text[0]] += likely * probability
            emitted_kV[accepted, bonus] += likely * probability
            accepted_k[:accepted] += likely * probability
    assert torch.allclose(first, p_K1V[0], rtol=0, atol=1e-14)
    assert float(emitted_kV.sum()) == pytest.approx(1, abs=1e-13)
    # slot k is accepted with sum_x min(p, q), given all slots before it
    rates = torch.minimum(p_K1V[:K], q_KV).sum(-1).cumprod(0)
    assert torch.allclose(accepted_k.double(), rates, rtol=0, atol=1e-6)


class ToyTarget:
    """Five tokens, the next one's distribution a function of the last two."""

    V = 5

    def __init__(self) -> None:
        self.table = some_distributions(self.V**2, self.V, 5).view(self.V, self.V, self.V)
        self.table[0, 0] = torch.tensor(
            [0, 0, 1.0, 0, 0]
        )  # the prompt's: one first token, so that fewer outcomes are left

    def clear(self) -> None:
        self.text: list[int] = []

    def crop(self, length: int) -> None:
        del self.text[length:]

    def extend(self, tokens: Sequence[int], num_logits: int) -> tuple[Tensor, Tensor]:
        self.text += tokens
        ends = range(len(self.text) - num_logits, len(self.text))
        rows = torch.stack([self.next(self.text[: i + 1]) for i in ends])
        return torch.zeros(len(tokens), 1), rows.log()

    def next(self, text: Sequence[int]) -> Tensor:
        return self.table[text[-2], text[-1]]


class ToyDrafter:
    """Guesses two tokens only, from the last token and the slot."""

    def __init__(self, K: int) -> None:
        self.K, self.token_ids = K, torch.tensor([1, 3])
        self.table = some_distributions(K * 5, 2, 6).view(5, K, 2)

    def clear(self) -> None:
        pass

    def propose(self, tokens: Sequence[int], features_nF: Tensor) -> Tensor:
        return self.table[tokens[-1]].log()


def toy_decodings(K: int, n: int, sample_drafts: bool) -> list[tuple[Decoded, float]]:
    target, drafter = ToyTarget(), ToyDrafter(K)
    options: dict[str, Any] = {"temperature": 1.0, "sample_drafts": sample_drafts, "eos": frozenset([4])}
    return [*outcomes(lambda chance: decode(target, drafter, [0, 0], n, chance=chance, **options))]


@pytest.mark.parametrize("K, n", [(1, 3), (2, 3)])
@pytest.mark.parametrize("sample_drafts", [True, False])
def test_every_text_is_as_likely_as_under_the_target(K, n, sample_drafts):
    target = ToyTarget()
    found: dict[tuple[int, ...], float] = {}
    for out, probability in toy_decodings(K, n, sample_drafts):
        found[tuple(out.tokens)] = found.get(tuple(out.tokens), 0.0) + probability
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    for text, probability in found.items():
        likely, known = 1.0, [0, 0]
        for token in text:
            likely *= float(target.next(known)[token])
            known.append(token)
        assert probability == pytest.approx(likely, abs=1e-13), text
        assert len(text) == n or text[-1] == 4
