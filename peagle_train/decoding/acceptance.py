"""Measuring how many tokens a drafter's drafts really get accepted, prompt by prompt.

Per prompt one speculative decoding, the drafter as it is served, cache and all; from its text every K, and any other
drafter, is replayed (`decoding.replay` says why that is exact). The decoding is checked: greedy text against the
target's own, token for token, and its passes against their replay.

K: slots, V: the target's vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.decoding.eval_prompts import Case
from peagle_train.decoding.generate import Chance, Decoded, Drafter, decode
from peagle_train.decoding.replay import Tally, accept_probabilities, repeats, replay, tally_run
from peagle_train.decoding.verify import CachedTarget, greedy_tokens
from peagle_train.target.frozen import FrozenTarget

TIE_TOLERANCE = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float32: 1e-3, torch.float64: 1e-9}
"""Logits that lie closer may change places when a target runs several tokens at once and not one by one."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    num_slots: int
    """Of the decoding itself."""
    max_tokens: int = 128
    temperature: float = 0.0
    sample_drafts: bool = True
    seed: int = 0


@dataclass
class Drafted:
    """What one drafter gets out of one text."""

    by_k: list[tuple[Tally, Tally]]
    """For 1, 2, ... slots: passes outside of repetition, and within."""
    hits: list[float]
    """By slot: texts' tokens that it guesses, whatever the slots before guessed, outside of repetition."""
    totals: list[int]
    """By slot: texts' tokens that it could guess."""


@dataclass
class Result:
    """One turn of one prompt."""

    number: int
    """Of its prompt among all: turns of one prompt share it, and pieces of one module."""
    id: str
    data_set: str
    turn: int
    prompt: list[int]
    tokens: list[int]
    """The output, at most max_tokens."""
    repeated: int
    """Output tokens that are repetition."""
    ended: bool
    """Whether an end token came within max_tokens."""
    run: tuple[Tally, Tally]
    """The decoding itself, as `Drafted.by_k`."""
    drafted: list[Drafted]
    """By drafter, the first one being the one that decoded."""
    leads: list[float]
    draft_leads: list[float]
    """As `Decoded`'s, of the output and of all slots of `run`'s passes."""
    check: dict[str, Any] = field(default_factory=dict)
    """verdict: "same", "tie" or "bug" (greedy), "none" (sampled); where they part: at, gap, tolerance."""

    @property
    def replay_differs(self) -> bool:
        """Greedy: whether the decoding's passes are others than their replay's, which only numeric ties explain."""
        replayed = self.drafted[0].by_k[len(self.run[0].accepted) - 1]
        return any(a != b for a, b in zip(self.run, replayed))


class Measurement:
    """A target and drafters for it, ready to take prompts.

    Args:
        drafters: with the largest K of each; the first one decodes, the others are replayed on its text.
        tokenizer: transformers'; needed for chats only.
        eos: the target's end tokens.
    """

    def __init__(
        self,
        target: FrozenTarget,
        drafters: Sequence[tuple[PEagleDraft, int]],
        settings: Settings,
        *,
        tokenizer: Any = None,
        eos: frozenset[int] = frozenset(),
    ) -> None:
        for draft, slots in drafters:
            check_fit(target, draft)
            if slots < 1:
                raise ValueError(f"K is {slots}; give at least 1")
        self.target, self.drafters, self.settings = target, list(drafters), settings
        self.drafters[0][0].to(target.device)  # type: ignore[arg-type]
        self.tokenizer, self.eos = tokenizer, eos
        self.largest = max(settings.num_slots, *(slots for _, slots in drafters))
        """Tokens that a text goes on for behind max_tokens, so that its last passes are whole."""
        self.left_out: dict[str, int] = {}
        """Prompts that could not be taken, by reason."""

    @torch.no_grad()
    def __call__(self, cases: Sequence[Case], say: Callable[[str], None] = lambda _: None) -> list[Result]:
        """Decode every case; a turn's randomness depends on the seed, the data set, the prompt's id and the turn alone."""
        results: list[Result] = []
        groups: dict[tuple[str, str], int] = {}
        for at, case in enumerate(cases, start=1):
            number = groups.setdefault((case.data_set, case.group), at) if case.group else at
            answers: list[str] = []
            for turn in range(case.num_turns):
                ids = case.prompt_ids(answers, self.tokenizer)
                reason = self._unfit(ids)
                if reason:
                    self.left_out[reason] = self.left_out.get(reason, 0) + 1
                    break
                result = self._turn(case, number, turn, ids)
                results.append(result)
                say(f"{at}/{len(cases)}  {case.data_set} {case.id}  {len(result.tokens)} tokens")
                if turn + 1 < case.num_turns:
                    answers.append(self.tokenizer.decode(result.tokens, skip_special_tokens=True))
        return results

    def _unfit(self, ids: list[int]) -> str:
        limit = getattr(self.target.config, "max_position_embeddings", None)
        needed = len(ids) + self.settings.max_tokens + 2 * self.largest
        if not ids:
            return "empty prompt"
        if limit is not None and needed > limit:
            return f"prompt and max_tokens longer than the target's {limit} positions"
        return ""

    def _turn(self, case: Case, number: int, turn: int, ids: list[int]) -> Result:
        s = self.settings
        length = s.max_tokens + self.largest
        with CachedTarget(self.target) as cached:
            decoded = decode(
                cached,
                Drafter(self.drafters[0][0], s.num_slots),
                ids,
                length,
                eos=self.eos,
                temperature=s.temperature,
                chance=Chance(case.generator(s.seed, turn)),
                sample_drafts=s.sample_drafts,
            )
            own = greedy_tokens(cached, ids, s.max_tokens, self.eos) if s.temperature == 0 else None
        output = decoded.tokens[: s.max_tokens]
        repeated = repeats(ids, decoded.tokens)
        apart = repeated[1:]  # a pass belongs to where the first token lies that it drafts
        drafted = []
        for i, (draft, slots) in enumerate(self.drafters):
            if i:
                draft.to(self.target.device)  # type: ignore[arg-type]
            accept_mK = accept_probabilities(draft, decoded, slots, s.temperature, s.sample_drafts)
            by_k = [replay(accept_mK, k, s.max_tokens, apart) for k in range(1, slots + 1)]
            drafted.append(Drafted(by_k, *_agreement(accept_mK, s.max_tokens, apart)))
            if i:  # a run's checkpoints together may be larger than the device
                draft.to("cpu")  # type: ignore[arg-type]
        return Result(
            number=number,
            id=case.id,
            data_set=case.data_set,
            turn=turn,
            prompt=ids,
            tokens=output,
            repeated=sum(repeated[: len(output)]),
            ended=output[-1] in self.eos,
            run=tally_run(decoded, s.num_slots, s.max_tokens, apart),
            drafted=drafted,
            leads=decoded.leads[: s.max_tokens],
            draft_leads=[
                x for (i, _), slots in zip(decoded.passes, decoded.draft_leads) if i < s.max_tokens - 1 for x in slots
            ],
            check={"verdict": "none"} if own is None else self.compare(decoded, own, output),
        )

    def compare(self, decoded: Decoded, own: list[int], output: list[int]) -> dict[str, Any]:
        """Where a greedy text parts from the target's own, and whether two logits as good as equal explain it."""
        if output == own:
            return {"verdict": "same"}
        at = next((i for i, (a, b) in enumerate(zip(output, own)) if a != b), min(len(output), len(own)))
        found = {"verdict": "bug", "at": at}
        if at == min(len(output), len(own)):
            return found  # one of them ends, and nothing was to be chosen
        # A third opinion: the text up to there in one forward, without any cache.
        ids = torch.tensor([decoded.prompt + own[:at]], device=self.target.device)
        _, hidden = self.target.features(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        logits_V: Tensor = self.target.head(hidden[0, -1]).double()
        gap = float(logits_V.max() - torch.minimum(logits_V[output[at]], logits_V[own[at]]))
        tolerance = TIE_TOLERANCE[hidden.dtype]
        return {**found, "verdict": "tie" if gap <= tolerance else "bug", "gap": gap, "tolerance": tolerance}


def _agreement(accept_mK: Tensor, max_tokens: int, apart_m: Sequence[bool]) -> tuple[list[float], list[int]]:
    m, K = accept_mK.shape
    outside = ~torch.tensor([*apart_m], dtype=torch.bool)
    outside[max_tokens - 1 :] = False
    hits, totals = [], []
    for k in range(K):
        counted = outside & (torch.arange(m) + k < m)
        hits.append(float(accept_mK[counted, k].sum()))
        totals.append(int(counted.sum()))
    return hits, totals


def check_fit(target: FrozenTarget, draft: PEagleDraft) -> None:
    """ValueError if a drafter was made for another target."""
    config = draft.config
    if config.vocab_size > target.vocab_size or config.target_hidden_size != target.hidden_size:
        raise ValueError(
            f"the drafter is for a target with {config.vocab_size} tokens and hidden size {config.target_hidden_size}; this"
            f" one has {target.vocab_size} and {target.hidden_size}: give the target that it was trained for"
        )
    layers = config.eagle_aux_hidden_state_layer_ids
    if layers is not None and list(layers) != target.layer_ids:
        raise ValueError(f"the drafter reads the target's layers {layers}, but {target.layer_ids} were loaded")
