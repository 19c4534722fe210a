"""Every K replayed from one text against decodings of their own; repetition; intervals."""

from typing import Any

import pytest
import torch

from peagle_train.decoding.generate import CachedTarget, Decoded, Drafter, decode, sampler
from peagle_train.decoding.measure import accepted_slots, count, ratio_interval, repeats, replay
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import make_draft, seeded
from tests.test_generate import PROMPT, tiny_draft
from tests.tiny import MASK, VOCAB
from tests.tiny import make_target as make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return FrozenTarget.load(str(make_llama(tmp_path_factory.mktemp("target"))), dtype="float64")


def decoded(llama: FrozenTarget, draft: Any, K: int, n: int, temperature: float = 0.0) -> Decoded:
    return decode(CachedTarget(llama), Drafter(draft, K), PROMPT, n, sampler(temperature, seeded(0)))


def agreeing_draft(text: Decoded, window: int | None = None) -> Any:
    """A drafter that is right now and then: it only knows the text's two commonest tokens."""
    draft = make_draft(
        vocab_size=VOCAB, target_hidden_size=16, ptd_token_id=MASK, draft_vocab_size=2, sliding_window=window
    )
    draft.set_draft_vocab(torch.tensor(text.tokens).bincount().topk(2).indices.sort().values)
    return draft


@pytest.mark.parametrize(("temperature", "window"), [(0.0, None), (0.3, None), (0.0, 4)])
def test_replay_of_every_k_is_a_decoding_of_its_own(llama, temperature, window):
    n, K_max = 67, 4
    draft = agreeing_draft(decoded(llama, tiny_draft(), 1, n + K_max, temperature), window)
    runs = {K: decoded(llama, draft, K, n + K_max, temperature) for K in (1, 2, K_max)}
    lengths = []
    for text in (runs[1], runs[K_max]):
        accepted = accepted_slots(draft, text, K_max)
        for K, run in runs.items():
            assert run.tokens == text.tokens
            passes = replay(accepted, K, n)
            assert passes == [(i, a) for i, a in run.passes if i < n - 1]
            lengths.append(sum(a + 1 for _, a in passes) / len(passes))
    assert 1.1 < lengths[0] < lengths[1] <= lengths[2] < 2, (
        "neither hopeless nor perfect, and not in the first slot alone"
    )


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=["prompt", "one token"])
def test_accepted_slots_are_those_of_drafts_made_one_by_one(llama, prompt):
    K, draft = 3, tiny_draft()
    text = decode(CachedTarget(llama), Drafter(draft, K), prompt, 12, sampler(0.8, seeded(4)))
    ids, found = [*text.prompt, *text.tokens], accepted_slots(draft, text, K)
    assert len(found) == 11
    for i, accepted in enumerate(found):
        known = len(prompt) + i + 1
        logits = Drafter(draft, K).propose(ids[1:known], text.features[: known - 1])
        guesses = draft.draft_token_ids[logits.argmax(-1)].tolist()
        right = [guess == token for guess, token in zip(guesses, ids[known:])]
        assert accepted == [*right, False].index(False)


def test_passes_begin_before_max_tokens_and_are_counted_whole_by_slot_without_repetition():
    assert replay([3] * 12, 3, 10) == [(0, 3), (4, 3), (8, 3)]
    assert replay([3] * 12, 3, 9) == [(0, 3), (4, 3)]
    assert replay([3] * 12, 2, 3) == [(0, 2)]
    assert replay([3] * 12, 3, 1) == replay([], 3, 9) == []
    # A drafted end token brings none of the target's.
    sides = [False, True, True, True, False, True, False]
    assert count([(0, 2), (3, 0), (4, 3)], 3, sides) == [2, 6, 2, 2, 1]
    assert count([], 2, []) == [0, 0, 0, 0]


@pytest.mark.parametrize("period", [1, 3, 40, 64])
def test_a_loop_of_at_most_64_tokens_is_repetition_from_its_second_period_on(period):
    head, unit = list(range(1000, 1030)), list(range(period))
    needed = max(24, 2 * period)
    text = head + unit + (unit * needed)[:needed] + [7000]
    assert repeats([9], text) == [False] * (30 + period) + [True] * needed + [False]
    text = head + unit + (unit * needed)[: needed - 1] + [7000]
    assert not any(repeats([9], text))
    # A longer period is no loop, and a prompt can hold the first.
    assert not any(repeats([], list(range(65)) * 5))
    assert all(repeats([5, 6], [5, 6] * 12)) and not any(repeats([5, 7], [5, 6] * 12)[:2])
    assert not any(repeats([5, 6] * 12, [5, 6] * 11)), "what the prompt repeats is not the output's"


def test_intervals_are_seeded_hold_the_ratio_and_shrink_with_prompts_and_with_pairs():
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
    # A paired one is narrow where two drafters differ by the same everywhere.
    passes = [20.0, 31.0, 25.0, 40.0]
    tokens = [22.0, 60.0, 30.0, 79.0]
    better = [t + 0.1 * p for t, p in zip(tokens, passes)]
    low, high = ratio_interval(better, passes, less=(tokens, passes))
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    wide = ratio_interval(tokens, passes)
    assert wide[1] - wide[0] > 0.2
