"""How long every K's drafts would have been accepted on a text that is already there: exact, from one drafter pass.

The output of speculative decoding does not depend on the drafter (greedy: it is the target's own text; sampled: it is
distributed as the target's own), and neither do a slot's logits on K or on what was drafted before: slot d of the draft at
anchor a reads the real tokens and features up to a and mask tokens, nothing else. So one pass over the text gives the draft
of every anchor (training's flat pass, all depths), a draft of K slots is the first K of each, and what is left to know is
where the passes of each K begin:
- greedy, slot d is accepted where its guess is the text's token;
- sampled, given that the text has token x there, the drafted token was accepted with probability min(1, q(x) / p(x)):
  drafted-and-accepted has probability min(p(x), q(x)), x comes out with p(x), and the coins of all slots are independent.
  (Likeliest drafts have q 0 or 1: 1 where the guess is x, else 0.)
Following all of a text's passes at once, each with the probability that there is one, gives expected counts: for greedy
decoding, where every probability is 0 or 1, these are the counts.

m: tokens with a successor (bonus tokens that a pass may follow), K: slots, n: tokens, F: feature size, Vd: draft
vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
from torch import Tensor

from peagle_train.core.draft import KV, PEagleDraft
from peagle_train.core.elements import make_elements
from peagle_train.core.passes import visibility_of
from peagle_train.decoding.generate import Decoded, distribution, join_context

ANCHORS_AT_A_TIME = 64
LONGEST_PERIOD, SHORTEST_RUN = 64, 24


def slot_logits(
    draft: PEagleDraft, ids: Sequence[int], features_nF: Tensor, first_anchor: int, num_slots: int
) -> Iterator[tuple[int, Tensor]]:
    """(anchor of the first row, logits [rows, K, Vd]) for all anchors from `first_anchor` to n - 3, some at a time: those
    whose first slot guesses a token of the text.

    Training's pass under training's visibility, each part's context entering as keys and values.
    """
    K, n, device = num_slots, len(ids), draft.device
    position_1n = torch.arange(n, device=device)[None]
    batch = {"input_ids": torch.tensor([ids], device=device), "position_ids": position_1n}
    context: list[KV] | None = None
    edges = [0, *range(first_anchor, n - 2, ANCHORS_AT_A_TIME), n - 2]
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        drafts = start >= first_anchor
        rollouts = [(a, d) for a in range(start, stop) for d in range(1, K)] if drafts else []
        who = torch.tensor([[(a, 0) for a in range(start, stop)] + rollouts], device=device)
        elements = make_elements(batch, who[..., 0], who[..., 1], who[..., 0] >= 0, draft.mask_token_id)
        rows = stop - start
        visibility = visibility_of(
            elements, K, M=rows, first_rollout=rows, num_context=start, context_end=torch.tensor([start])
        )
        with torch.no_grad():
            output = draft(
                elements.token,
                elements.position,
                features_nF[None, start:stop].to(device),
                visibility,
                context=context,
                keys_values_only=not drafts,
            )
            context = join_context(context, output.keys_values, rows)
            if drafts:
                hidden = output.hidden[0]
                real_R1H, masks_RkH = hidden[:rows, None], hidden[rows:].unflatten(0, (rows, K - 1))
                yield start, draft.lm_head(torch.cat([real_R1H, masks_RkH], dim=1))


def accept_probabilities(
    draft: PEagleDraft, decoded: Decoded, num_slots: int, temperature: float = 0.0, sample_drafts: bool = True
) -> Tensor:
    """[m, K] float64: the probability that slot k of the draft after token i is accepted, given that all before it are.

    0 beyond the text's end.
    """
    assert decoded.features is not None
    ids, first = [*decoded.prompt, *decoded.tokens], len(decoded.prompt) - 1
    m, K = len(decoded.tokens) - 1, num_slots
    index_V = torch.full((draft.config.vocab_size,), -1)
    draft_ids = draft.draft_token_ids.cpu()
    index_V[draft_ids] = torch.arange(draft_ids.numel())
    accept_mK = torch.zeros(m, K, dtype=torch.float64)
    # token i + 1 + k, which slot k after token i guesses
    guessed_mK = torch.arange(m)[:, None] + 1 + torch.arange(K)
    inside_mK = guessed_mK <= m
    guessed_mK = guessed_mK.clamp(max=m)
    column_mK = index_V[torch.tensor(decoded.tokens)[guessed_mK]]
    p_mK = torch.tensor(decoded.probabilities, dtype=torch.float64)[guessed_mK]
    for anchor, logits_RKV in slot_logits(draft, ids, decoded.features, first, K):
        rows = slice(anchor - first, anchor - first + logits_RKV.shape[0])
        q_RKV = distribution(logits_RKV, temperature if sample_drafts else 0.0)
        q_RK = q_RKV.gather(2, column_mK[rows].clamp(min=0)[:, :, None])[:, :, 0]
        accept_mK[rows] = (q_RK / p_mK[rows]).clamp(max=1)
    return accept_mK.masked_fill_(~inside_mK | (column_mK < 0), 0.0)


@dataclass
class Tally:
    """Counts of verifying passes, expected ones where drafts are drawn; tallies add up."""

    passes: float = 0.0
    tokens: float = 0.0
    """Accepted ones, and the one that the target adds to each pass (none to a pass that drafted the end token)."""
    accepted: tuple[float, ...] = ()
    """By slot: passes in which its token, and so every one before, was accepted."""

    def __add__(self, other: "Tally") -> "Tally":
        accepted = tuple(a + b for a, b in zip_longest(self.accepted, other.accepted, fillvalue=0.0))
        return Tally(self.passes + other.passes, self.tokens + other.tokens, accepted)


def replay(accept_mK: Tensor, num_slots: int, max_tokens: int, apart_m: Sequence[bool]) -> tuple[Tally, Tally]:
    """The passes of drafts of `num_slots` over a text of m + 1 tokens, as in decoding it until `max_tokens` are out.

    A pass that crosses `max_tokens` counts whole; the text continues for `num_slots` tokens after it, or ends with an end
    token before.

    Args:
        accept_mK: `accept_probabilities`, of num_slots or more slots.
        apart_m: whether a pass that follows token i is counted apart.

    Returns:
        The passes that are not counted apart, and those that are.
    """
    m, K = accept_mK.shape[0], num_slots
    assert accept_mK.shape[1] >= K or m == 0
    chain_mK = accept_mK[:, :K].cumprod(1).tolist()
    begins = [1.0] + [0.0] * (m + K + 1)
    both = [Tally(accepted=(0.0,) * K), Tally(accepted=(0.0,) * K)]
    for i in range(min(m, max_tokens - 1)):
        if begins[i] == 0.0:
            continue
        reach = [begins[i] * share for share in (1.0, *chain_mK[i], 0.0)]  # reach[j]: at least j are accepted
        exactly = [more - most for more, most in pairwise(reach)]
        for j, share in enumerate(exactly):
            begins[i + j + 1] += share
        tokens = sum(share * min(j + 1, m - i) for j, share in enumerate(exactly))
        both[bool(apart_m[i])] += Tally(begins[i], tokens, tuple(reach[1:-1]))
    return both[0], both[1]


def tally_run(decoded: Decoded, num_slots: int, max_tokens: int, apart_m: Sequence[bool]) -> tuple[Tally, Tally]:
    """The passes that a decoding really made, in `replay`'s terms."""
    m = len(decoded.tokens) - 1
    both = [Tally(accepted=(0.0,) * num_slots), Tally(accepted=(0.0,) * num_slots)]
    for i, accepted in decoded.passes:
        if i < min(m, max_tokens - 1):
            slots = tuple(float(k < accepted) for k in range(num_slots))
            both[bool(apart_m[i])] += Tally(1.0, float(min(accepted + 1, m - i)), slots)
    return both[0], both[1]


def repeats(prompt: Sequence[int], tokens: Sequence[int]) -> list[bool]:
    """Which tokens only repeat: [n] for `tokens`.

    A token is a repetition if it lies in a stretch of at least max(24, 2p) tokens that each equal the one p places before,
    for some period p of at most 64. So a text's first period is no repetition, and a loop is one from its second on. The
    places before may lie in the prompt, the stretch does not.
    """
    text, start = [*prompt, *tokens], len(prompt)
    found = [False] * len(tokens)
    for period in range(1, LONGEST_PERIOD + 1):
        needed, run = max(SHORTEST_RUN, 2 * period), 0
        for i in range(start, len(text) + 1):
            if i < len(text) and i >= period and text[i] == text[i - period]:
                run += 1
                continue
            if run >= needed:
                found[i - start - run : i - start] = [True] * run
            run = 0
    return found
