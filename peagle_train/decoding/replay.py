"""How long every K's drafts would have been accepted on a text that is already there: exact, from one drafter pass.

The output of speculative decoding does not depend on the drafter (`decoding.generate`), and neither do a slot's logits on
K or on what was drafted before: slot d of the draft at anchor a reads the real tokens and features up to a and mask tokens,
nothing else. So one pass over the text gives the draft of every anchor (training's flat pass, all depths), a draft of K
slots is the first K of each, a guess is accepted where it is the text's token, and what is left is to follow the passes.

m: tokens with a successor (bonus tokens that a pass may follow), K: slots, n: tokens, F: feature size, Vd: draft
vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from peagle_train.core.draft import KV, PEagleDraft
from peagle_train.core.elements import make_elements
from peagle_train.core.passes import visibility_of
from peagle_train.decoding.generate import Decoded, join_context

ANCHORS_AT_A_TIME = 64
LONGEST_PERIOD, SHORTEST_RUN = 64, 24


def slot_logits(
    draft: PEagleDraft, ids: Sequence[int], features_nF: Tensor, first_anchor: int, num_slots: int
) -> Iterator[Tensor]:
    """Logits [rows, K, Vd] of all anchors from `first_anchor` to n - 3 in order, some at a time: those whose first slot
    guesses a token of the text. It is training's pass, each part's context entering as keys and values.
    """
    K, n, device, window = num_slots, len(ids), draft.device, draft.config.sliding_window
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
        elements = make_elements(batch, who[..., 0], who[..., 1], who[..., 0] >= 0, draft.mask_token_id, window)
        rows = stop - start
        context_of = {"num_context": start, "context_end": torch.tensor([start])}
        visibility = visibility_of(elements, K, M=rows, first_rollout=rows, **context_of)
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
                yield draft.lm_head(torch.cat([real_R1H, masks_RkH], dim=1))


def accepted_slots(draft: PEagleDraft, decoded: Decoded, num_slots: int) -> list[int]:
    """[m]: how many of the first slots of the draft after token i guess the text's tokens; none beyond its end."""
    ids, first, m = [*decoded.prompt, *decoded.tokens], len(decoded.prompt) - 1, len(decoded.tokens) - 1
    if m == 0:
        return []
    logits = slot_logits(draft, ids, decoded.features, first, num_slots)
    guess_mK = torch.cat([draft.draft_token_ids[logits_RKV.argmax(-1)].cpu() for logits_RKV in logits])
    at_mK = torch.arange(m)[:, None] + 1 + torch.arange(num_slots)  # the token that slot k after token i guesses
    is_right_mK = (guess_mK == torch.tensor(decoded.tokens)[at_mK.clamp(max=m)]) & (at_mK <= m)
    return is_right_mK.cumprod(1).sum(1).tolist()


def replay(accepted_m: Sequence[int], num_slots: int, max_tokens: int) -> list[tuple[int, int]]:
    """`Decoded.passes` of drafts of `num_slots` tokens, as in decoding until `max_tokens` are out.

    A pass that crosses `max_tokens` counts whole: the text continues for `num_slots` tokens after it, or ends with an end
    token before. `accepted_m`: `accepted_slots`, of num_slots or more slots.
    """
    passes, i = [], 0
    while i < min(len(accepted_m), max_tokens - 1):
        passes.append((i, min(accepted_m[i], num_slots)))
        i += passes[-1][1] + 1
    return passes


def count(passes: Sequence[tuple[int, int]], num_slots: int, apart_m: Sequence[bool]) -> list[int]:
    """Counts [2 + K] of the passes that are not left apart: passes; tokens (accepted ones, and the one that the target adds
    to each pass, none to a pass that drafted the end token); by slot, passes in which its token, and so every one before,
    was accepted.
    """
    kept = [(i, accepted) for i, accepted in passes if not apart_m[i]]
    tokens = sum(min(accepted + 1, len(apart_m) - i) for i, accepted in kept)
    return [len(kept), tokens, *(sum(k < accepted for _, accepted in kept) for k in range(num_slots))]


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
