"""Every K replayed from one text against decodings of their own; repetition; intervals."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from peagle_train.decoding.generate import CachedTarget, Chance, Decoded, Drafter, decode, distribution
from peagle_train.decoding.measure import ratio_interval
from peagle_train.decoding.replay import ANCHORS_AT_A_TIME, Tally, accept_probabilities, repeats, replay, tally_run
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import make_draft, seeded
from tests.test_generate import PROMPT, ToyDrafter, ToyTarget, tiny_draft, toy_decodings
from tests.tiny import MASK, VOCAB
from tests.tiny import make_target as make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return FrozenTarget.load(str(make_llama(tmp_path_factory.mktemp("target"))), dtype="float64")


def agreeing_draft(llama: FrozenTarget, prompt: list[int], n: int) -> Any:
    """A drafter that is right now and then: its head's rows are trained on the target's own text for a few steps."""
    draft = make_draft(vocab_size=VOCAB, target_hidden_size=16, ptd_token_id=MASK, draft_vocab_size=VOCAB)
    target = CachedTarget(llama)
    text = decode(target, Drafter(draft, 1), prompt, n, chance=Chance(seeded(0)))
    from peagle_train.decoding.replay import slot_logits

    K, first = 5, len(prompt) - 1
    ids = [*text.prompt, *text.tokens]
    kept: list[torch.Tensor] = []
    hook = draft.lm_head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    for _ in slot_logits(draft, ids, text.features, first, K):
        pass
    hook.remove()
    hidden, wanted = (
        torch.cat(kept),
        torch.arange(first + 2, first + 2 + len(text.tokens) - 1)[:, None] + torch.arange(K),
    )
    inside = wanted < len(ids)
    x, y = hidden[inside], torch.tensor(ids)[wanted[inside]]
    head = draft.lm_head.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([head], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ head.T, y).backward()
        optimizer.step()
    draft.lm_head.weight.data.copy_(head)
    return draft


def test_replay_of_every_k_is_a_decoding_of_its_own(llama):
    n, K_max = ANCHORS_AT_A_TIME + 3, 4
    draft = agreeing_draft(llama, PROMPT, n + K_max)
    target = CachedTarget(llama)
    runs = {K: decode(target, Drafter(draft, K), PROMPT, n + K_max, chance=Chance(seeded(0))) for K in (1, 2, K_max)}
    apart = [i % 7 == 3 for i in range(n + K_max)]
    for text in (runs[1], runs[K_max]):
        accept = accept_probabilities(draft, text, K_max)
        assert set(accept.unique().tolist()) == {0.0, 1.0}
        for K, run in runs.items():
            assert run.tokens == text.tokens
            found, expected = replay(accept, K, n, apart), tally_run(run, K, n, apart)
            assert found == expected
            assert found[0].passes > 0 and found[1].passes > 0
    lengths = [sum(tally_run(runs[K], K, n, apart), Tally()) for K in runs]
    lengths = [t.tokens / t.passes for t in lengths]
    assert all(a <= b for a, b in pairwise(lengths)) and 1.2 < lengths[-1] < 5.5, "neither hopeless nor perfect"


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=["prompt", "one token"])
@pytest.mark.parametrize("sample_drafts", [True, False])
def test_accept_probabilities_are_those_of_drafts_made_one_by_one(llama, prompt, sample_drafts):
    K, draft, T = 3, tiny_draft(), 0.8
    target = CachedTarget(llama)
    text = decode(target, Drafter(draft, K), prompt, 12, temperature=T, chance=Chance(seeded(4)))
    accept = accept_probabilities(draft, text, K, T, sample_drafts)
    ids, ids_of = [*text.prompt, *text.tokens], draft.draft_token_ids.tolist()
    for i in range(len(text.tokens) - 1):
        known = len(prompt) + i + 1
        logits = Drafter(draft, K).propose(ids[1:known], text.features[: known - 1])
        for k in range(K):
            expected = 0.0
            if known + k < len(ids) and ids[known + k] in ids_of:
                q = distribution(logits[k], T if sample_drafts else 0.0)[ids_of.index(ids[known + k])]
                expected = min(1.0, float(q) / text.probabilities[i + 1 + k])
            assert float(accept[i, k]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("K, n, sample_drafts", [(1, 4, True), (2, 3, True), (2, 3, False)])
def test_replay_expects_what_sampling_does_given_its_text(K, n, sample_drafts):
    """By visiting every outcome: for each text, passes, tokens and accepted slots of all decodings that give it."""
    target, drafter = ToyTarget(), ToyDrafter(K)
    by_text: dict[tuple[int, ...], list[tuple[Decoded, float]]] = {}
    for out, probability in toy_decodings(K, n, sample_drafts):
        by_text.setdefault(tuple(out.tokens), []).append((out, probability))
    partly = 0
    for text, decodings in by_text.items():
        m = len(text) - 1
        accept = torch.zeros(m, K, dtype=torch.float64)
        for i in range(m):
            q_Kd = distribution(drafter.propose([text[i]], torch.zeros(1, 1)), 1.0 if sample_drafts else 0.0)
            for k in range(min(K, m - i)):
                if text[i + 1 + k] in (1, 3):
                    p = float(target.next([0, 0, *text[: i + 1 + k]])[text[i + 1 + k]])
                    accept[i, k] = min(1.0, float(q_Kd[k, [1, 3].index(text[i + 1 + k])]) / p)
        # passes of which all is seen: those that the text does not cut short
        begins = [i for i in range(m) if i + K <= m or text[-1] == 4]
        total = sum(probability for _, probability in decodings)
        expected = Tally(accepted=(0.0,) * K)
        for out, probability in decodings:
            counted = Decoded(out.prompt, out.tokens, out.probabilities, [p for p in out.passes if p[0] in begins])
            run = tally_run(counted, K, n, [False] * m)[0]
            share = probability / total
            expected += Tally(run.passes * share, run.tokens * share, tuple(a * share for a in run.accepted))
        found = replay(accept, K, max(begins, default=-1) + 2, [False] * m)[0]
        assert found.passes == pytest.approx(expected.passes, abs=1e-12), text
        assert found.tokens == pytest.approx(expected.tokens, abs=1e-12), text
        assert found.accepted == pytest.approx(expected.accepted, abs=1e-12), text
        partly += any(0 < a < found.passes for a in found.accepted)
    assert partly > 0 or not sample_drafts


def test_a_draft_that_reaches_the_end_token_gives_no_token_of_the_targets():
    accept = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert replay(accept, 3, 9, [False] * 2)[0] == Tally(1.0, 2.0, (1.0, 1.0, 0.0))
    assert replay(accept, 1, 9, [False] * 2)[0] == Tally(1.0, 2.0, (1.0,))
    assert replay(torch.zeros(0, 3), 3, 9, [])[0] == Tally(0.0, 0.0, (0.0, 0.0, 0.0))


def test_passes_begin_before_max_tokens_and_count_whole():
    accept = torch.ones(12, 3, dtype=torch.float64)
    assert replay(accept, 3, 10, [False] * 12)[0] == Tally(3.0, 12.0, (3.0, 3.0, 3.0))
    assert replay(accept, 3, 9, [False] * 12)[0] == Tally(2.0, 8.0, (2.0, 2.0, 2.0))
    assert replay(accept, 3, 1, [False] * 12)[0].passes == 0


@pytest.mark.parametrize("period", [1, 3, 40, 64])
def test_a_loop_is_repetition_from_its_second_period_on(period):
    head, unit = list(range(1000, 1030)), list(range(period))
    needed = max(24, 2 * period)
    text = head + unit + (unit * needed)[:needed] + [7000]
    assert repeats([9], text) == [False] * (30 + period) + [True] * needed + [False]
    text = head + unit + (unit * needed)[: needed - 1] + [7000]
    assert not any(repeats([9], text))


def test_a_longer_period_is_no_loop_and_a_prompt_can_hold_the_first():
    unit = list(range(65))
    assert not any(repeats([], unit * 5))
    assert all(repeats([5, 6], [5, 6] * 12)) and not any(repeats([5, 7], [5, 6] * 12)[:2])
    assert not any(repeats([5, 6] * 12, [5, 6] * 11)), "what the prompt repeats is not the output's"


def test_intervals_are_seeded_hold_the_ratio_and_shrink_with_prompts():
    g = seeded(0)
    passes = torch.randint(20, 40, (50,), generator=g).tolist()
    tokens = [p * (1 + float(torch.rand((), generator=g))) for p in passes]
    interval = ratio_interval(tokens, passes, seed=3)
    assert interval == ratio_interval(tokens, passes, seed=3) != ratio_interval(tokens, passes, seed=4)
    assert interval[0] < sum(tokens) / sum(passes) < interval[1]
    few = ratio_interval(tokens[:5], passes[:5], seed=3)
    assert few[1] - few[0] > interval[1] - interval[0]
    assert ratio_interval(tokens[:1], passes[:1]) is None
    assert ratio_interval([*tokens, 0.0], [*passes, 0.0], seed=3) == interval


def test_a_paired_interval_is_narrow_where_two_drafters_differ_by_the_same_everywhere():
    passes = [20.0, 31.0, 25.0, 40.0]
    tokens = [22.0, 60.0, 30.0, 79.0]
    better = [t + 0.1 * p for t, p in zip(tokens, passes)]
    low, high = ratio_interval(better, passes, less=(tokens, passes))
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    wide = ratio_interval(tokens, passes)
    assert wide[1] - wide[0] > 0.2
