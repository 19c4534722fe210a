"""How long every K's drafts would have been accepted on a text that is already there: exact, from one drafter pass.

The output of speculative decoding does not depend on the drafter (`decoding.generate`), and neither do a slot's logits on
K or on what was drafted before: slot d of the draft at anchor a reads the real tokens and features up to a and mask tokens,
nothing else. So one pass over the text gives the draft of every anchor (training's flat pass, all depths), a draft of K
slots is the first K of each, a guess is accepted where it is the text's token, and what is left is to follow the passes.

m: tokens with a successor (bonus tokens that a pass may follow), K: slots, n: tokens, N: elements, F: feature size, M: real
tokens that are read, H: the drafter's hidden size.
"""

from collections.abc import Sequence

import torch

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.elements import make_elements
from peagle_train.core.passes import visibility_of
from peagle_train.decoding.generate import Decoded

LONGEST_PERIOD, SHORTEST_RUN = 64, 24
HEAD_ROWS = 512  # as many have logits at a time


@torch.no_grad()
def accepted_slots(draft: PEagleDraft, decoded: Decoded, num_slots: int) -> list[int]:
    """[m]: how many of the first slots of the draft after token i guess the text's tokens; none beyond its end."""
    ids, first, m = [*decoded.prompt, *decoded.tokens], len(decoded.prompt) - 1, len(decoded.tokens) - 1
    if m == 0:
        return []
    K, n, device = num_slots, len(ids), draft.device
    # Real tokens as far as one that an anchor's first slot guesses, then the mask tokens of each draft.
    elements = [(a, 0) for a in range(n - 2)] + [(a, d) for a in range(first, n - 2) for d in range(1, K)]
    anchor_1N, depth_1N = torch.tensor(elements, device=device).T[:, None]
    batch = {"input_ids": torch.tensor([ids], device=device), "position_ids": torch.arange(n, device=device)[None]}
    made = make_elements(batch, anchor_1N, depth_1N, depth_1N >= 0, draft.mask_token_id, draft.config.sliding_window)
    visibility = visibility_of(made, K, M=n - 2, first_rollout=n - 2)
    features_1MF = decoded.features[None, : n - 2].to(device)
    hidden_NH = draft(made.token, made.position, features_1MF, visibility).hidden[0]
    rows = [draft.draft_token_ids[draft.lm_head(part).argmax(-1)] for part in hidden_NH[first:].split(HEAD_ROWS)]
    real_m, masks = torch.cat(rows).cpu().split([m, m * (K - 1)])
    guess_mK = torch.cat([real_m[:, None], masks.view(m, K - 1)], dim=1)
    at_mK = torch.arange(m)[:, None] + 1 + torch.arange(K)  # the token that slot k after token i guesses
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
