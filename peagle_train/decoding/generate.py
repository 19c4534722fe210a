"""Speculative decoding of one text with a P-EAGLE drafter, as vLLM does it: draft, verify, reject, roll back.

With x_0 ... x_m known and run through the target up to x_{m-1}, the drafter reads its context, then the real token x_m with
the real features h_{m-1} at position m - 1 (slot 0), then mask tokens at m, m + 1, ... (slots 1 to K - 1), under plain
causal attention; slot k guesses x_{m+1+k}. This is the training contract's anchor a = m - 1 (`core.elements`), and
tests compare the two slot by slot.

Drafts are the drafter's likeliest tokens at any temperature (vLLM's `draft_sample_method: greedy`). The rejection rule of
Leviathan et al. (arXiv:2211.17192) then accepts a guess x with the target's p(x), and replaces a rejected one by a token of
p without x. Drawing a token from p, and accepting the guess if it is that token, is the same.

K: slots, n: tokens of a call, T: the target's hidden size, F: feature size, V: the target's vocabulary, Vd: the
draft vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from peagle_train.core.draft import KV, PEagleDraft
from peagle_train.core.visibility import Causal
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.target_model.packed import cache_argument


class CachedTarget:
    """A frozen target over one growing text.

    Its cache keeps all tokens in every layer, in sliding ones too (whose masks transformers makes from the config), so that
    any number of tokens can be removed again.
    """

    def __init__(self, target: FrozenTarget) -> None:
        self.target, self.length, self._cache = target, 0, DynamicCache()

    @torch.no_grad()
    def extend(self, tokens: Sequence[int], num_logits: int) -> tuple[Tensor, Tensor]:
        """Run the next tokens of the text; returns features [n, F] of these tokens, and the logits [num_logits, V] of the
        last ones, in the target's dtype.
        """
        target, kept = self.target, list[Tensor]()
        with target.layer_inputs(lambda _, hidden: kept.append(hidden)):
            last_1nT = target.base(
                input_ids=torch.tensor([tokens], dtype=torch.int64, device=target.device),
                position_ids=torch.arange(self.length, self.length + len(tokens), device=target.device)[None],
                attention_mask=None,
                use_cache=True,
                **{cache_argument(target.base): self._cache},
            ).last_hidden_state
        self.length += len(tokens)
        features_nF = torch.cat([hidden[0] for hidden in kept], dim=-1)
        return features_nF, target.head(last_1nT[0, len(tokens) - num_logits :])

    def crop(self, length: int) -> None:
        """Remove all but the first `length` tokens."""
        assert 0 <= length <= self.length
        self._cache.crop(length - self.length)
        self.length = length


@torch.no_grad()
def greedy_tokens(target: FrozenTarget, prompt: Sequence[int], max_tokens: int, eos: Collection[int]) -> list[int]:
    """The target's own greedy output, one token a pass: what speculative decoding has to reproduce."""
    cached, tokens, given = CachedTarget(target), list[int](), prompt
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in eos):
        _, logits_1V = cached.extend(given, 1)
        tokens.append(int(logits_1V[0].argmax()))
        given = tokens[-1:]
    return tokens


class Drafter:
    """A drafter over one growing text, with the keys and values of its real tokens."""

    def __init__(self, draft: PEagleDraft, num_slots: int) -> None:
        self.draft, self.num_slots, self.length = draft, num_slots, 0
        self.token_ids = draft.draft_token_ids  # int64 [Vd]
        self._context: list[KV] | None = None

    @torch.no_grad()
    def propose(self, tokens: Sequence[int], features_nF: Tensor) -> Tensor:
        """Logits of all slots, [K, Vd], in the drafter's dtype.

        tokens: n >= 1, known since the last call, the bonus token last. features_nF: of the token before each of them.
        """
        n, K, device = len(tokens), self.num_slots, self.draft.device
        assert features_nF.shape[0] == n >= 1
        index = torch.arange(n + K - 1, device=device)[None]
        output = self.draft(
            torch.tensor([[*tokens, *[self.draft.mask_token_id] * (K - 1)]], device=device),
            self.length + index,
            features_nF[None].to(device),
            Causal((index - (n - 1)).clamp(min=0), self.draft.config.sliding_window),
            context=self._context,
            skip=n - 1,
        )
        # Mask slots are not kept: accepted tokens run again with their real ids and features.
        new = [(key[:, :, :n], value[:, :, :n]) for key, value in output.keys_values]
        for layer, (key, value) in enumerate(self._context or []):
            new[layer] = torch.cat([key, new[layer][0]], dim=2), torch.cat([value, new[layer][1]], dim=2)
        self._context = new
        self.length += n
        return self.draft.lm_head(output.hidden[0])


def sampler(temperature: float, generator: torch.Generator) -> Callable[[Tensor], int]:
    """What chooses the target's next token from its logits [V]: softmax(logits / temperature); at 0 the (first) largest."""

    def choose(logits_V: Tensor) -> int:
        if temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = (logits_V.to("cpu", torch.float64) / temperature).softmax(-1)
        return int(torch.multinomial(probabilities_V, 1, generator=generator))

    return choose


@dataclass
class Decoded:
    """One prompt's output and how it came about."""

    prompt: list[int]
    tokens: list[int]  # at most max_tokens; the last is an end token if there was one
    features: Tensor  # [prompt + tokens - 1, F]: of every token but the last
    passes: list[tuple[int, int]] = field(default_factory=list)
    """Of each verifying pass: the index in `tokens` of the bonus token that its draft followed, and how many drafted tokens
    were accepted (those after an end token do not count, those after max_tokens do)."""


@torch.no_grad()
def decode(
    target: CachedTarget,
    drafter: Drafter,
    prompt: Sequence[int],
    max_tokens: int,
    choose: Callable[[Tensor], int],
    eos: Collection[int] = (),
) -> Decoded:
    """Decode speculatively until `max_tokens` tokens or an end token; batch 1.

    target, drafter: without a text yet. choose: see `sampler`.
    """
    features, logits = target.extend(prompt, 1)
    tokens, passes, kept = [choose(logits[0])], list[tuple[int, int]](), [features]
    known, known_features = [*prompt[1:], *tokens], features
    while len(tokens) < max_tokens and tokens[-1] not in eos:
        drafted = drafter.token_ids[drafter.propose(known, known_features).argmax(-1)].tolist()
        bonus_at, length = len(tokens) - 1, len(prompt) + len(tokens)
        features, logits = target.extend([tokens[-1], *drafted], len(drafted) + 1)
        known = [choose(logits[0])]  # what the target says, one token further than it agrees with the draft
        while len(known) <= len(drafted) and known[-1] == drafted[len(known) - 1]:
            known.append(choose(logits[len(known)]))
        accepted = len(known) - 1
        target.crop(length + accepted)
        known_features = features[: accepted + 1]
        kept.append(known_features)
        ends = [i for i, token in enumerate(known) if token in eos]
        new = known[: ends[0] + 1] if ends else known
        tokens += new
        passes.append((bonus_at, min(accepted, len(new))))
    del tokens[max_tokens:]
    return Decoded([*prompt], tokens, torch.cat(kept)[: len(prompt) + len(tokens) - 1], passes)
