"""From measured prompts to a report: figures per data set and K with intervals, checks, and a table for a person."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.data.documents import STDLIB, load_documents
from peagle_train.data.packing import split_train_eval
from peagle_train.decoding.generate import CachedTarget, Chance, Decoded, Drafter, decode, greedy_tokens
from peagle_train.decoding.replay import Tally, accept_probabilities, repeats, replay, tally_run
from peagle_train.regenerate import BENCHMARKS, Prompt, load_prompts
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.training.metrics import expected_accepted_length

# ---- bootstrap
# Intervals by resampling prompts: tokens of one text depend on each other, prompts do not.
#
# R: resamples, n: prompts.

RESAMPLES, LEVEL = 2000, 0.95


def ratio_interval(tokens: Sequence[float], passes: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(tokens) / sum(passes) over resampled prompts.

    Prompts without a pass say nothing and are left out; None for fewer than two others.
    """
    return _interval(_ratios([(tokens, passes)], seed))


def difference_interval(
    tokens: Sequence[float],
    passes: Sequence[float],
    other_tokens: Sequence[float],
    other_passes: Sequence[float],
    seed: int = 0,
) -> tuple[float, float] | None:
    """The same for the ratio of one drafter less that of another on the same prompts, resampled together."""
    both = _ratios([(tokens, passes), (other_tokens, other_passes)], seed)
    return None if both is None else _interval(both[0] - both[1])


def _ratios(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> Tensor | None:
    """[pairs, R], every pair over the same resamples."""
    kept = [i for i in range(len(pairs[0][0])) if all(passes[i] > 0 for _, passes in pairs)]
    if len(kept) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    index_Rn = torch.randint(len(kept), (RESAMPLES, len(kept)), generator=generator)
    ratios = []
    for tokens, passes in pairs:
        t_n, p_n = (torch.tensor([float(values[i]) for i in kept], dtype=torch.float64) for values in (tokens, passes))
        ratios.append(t_n[index_Rn].sum(1) / p_n[index_Rn].sum(1))
    return torch.stack(ratios)


def _interval(values: Tensor | None) -> tuple[float, float] | None:
    if values is None:
        return None
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = values.flatten().quantile(tails).tolist()
    return low, high


# ---- eval_prompts
# What a drafter is measured on: chats, plain text, and held-out modules of the standard library, cut at a seeded place.


@dataclass(frozen=True)
class Case:
    """A prompt: token ids, or a chat whose turns are asked one after the other."""

    id: str
    data_set: str
    ids: tuple[int, ...] = ()
    chat: Prompt | None = None
    group: str = ""
    """Cases of one group are no independent samples: intervals resample them as one."""

    @property
    def num_turns(self) -> int:
        return len(self.chat.turns) if self.chat else 1

    def prompt_ids(self, answers: Sequence[str], tokenizer: Any) -> list[int]:
        """Token ids of turn `len(answers)`, the turns before answered as given (by the target itself)."""
        if self.chat is None:
            return [*self.ids]
        messages: list[dict[str, Any]] = []
        for turn, answer in zip(self.chat.turns, [*answers, None]):
            messages += turn
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(token) for token in ids]

    def generator(self, seed: int, turn: int) -> torch.Generator:
        """Of one turn's decoding: the same whatever else is measured."""
        return _generator("decode", seed, self.data_set, self.id, turn)


def load_cases(
    name: str,
    tokenizer: Any,
    *,
    limit: int | None = None,
    plain: bool = False,
    seed: int = 0,
    recipe: Any = None,
    prompt_tokens: int = 256,
    vocab_size: int = 0,
    cuts: int = 1,
) -> tuple[list[Case], list[str]]:
    """The prompts that `name` stands for, and what there is to say of them.

    Args:
        name: `stdlib`, `humaneval`, `mt-bench` or a file: .jsonl of `{"text": ...}` (given to the target as it is) or
            of what `load_prompts` reads (asked through the chat template).
        plain: give every prompt's only user message to the target as it is, without the chat template.
        recipe, prompt_tokens, vocab_size, cuts: for `stdlib`, see `stdlib_cases`.

    Raises:
        ValueError: one line.
    """
    if name == STDLIB:
        return stdlib_cases(
            recipe, tokenizer, vocab_size, limit=limit, prompt_tokens=prompt_tokens, seed=seed, cuts=cuts
        )
    file = Path(name).expanduser()
    if name not in BENCHMARKS and (not file.exists() or file.is_dir()):
        known = ", ".join([STDLIB, *sorted(BENCHMARKS)])
        raise ValueError(f"prompts {name} is no file; give a .jsonl file or one of {known}")
    if tokenizer is None:
        raise ValueError(f"prompts {name} need the target's tokenizer, and its folder has none")
    data_set = name if name in BENCHMARKS else Path(name).name
    texts = None if name in BENCHMARKS else _texts(file)
    if texts is not None:
        cases = [
            Case(str(i), data_set, tuple(tokenizer(text, add_special_tokens=True)["input_ids"]))
            for i, text in enumerate(texts[:limit], start=1)
        ]
        return cases, [f"{data_set}: {len(cases)} texts"]
    prompts = load_prompts(name, limit)
    if not plain:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"prompts {name} are chats, and the target's tokenizer has no chat template: give --plain")
        return [Case(p.id, data_set, chat=p) for p in prompts], [f"{data_set}: {len(prompts)} chats"]
    cases = []
    for prompt in prompts:
        if len(prompt.turns) != 1 or len(prompt.turns[0]) != 1:
            raise ValueError(f"prompts {name}: {prompt.id} is a conversation, which cannot be given as plain text")
        ids = tokenizer(prompt.turns[0][0]["content"], add_special_tokens=True)["input_ids"]
        cases.append(Case(prompt.id, data_set, tuple(ids)))
    return cases, [f"{data_set}: {len(cases)} prompts as plain text"]


def stdlib_cases(
    recipe: Any, tokenizer: Any, vocab_size: int, *, limit: int | None, prompt_tokens: int, seed: int, cuts: int = 1
) -> tuple[list[Case], list[str]]:
    """Pieces of `prompt_tokens` tokens out of standard-library modules that the recipe's split holds out.

    The split is by the document's key alone, so it is the training run's if `data.eval_fraction` is. The piece ends at a
    place drawn from the seed and the key; documents come in an order drawn likewise, all with their first piece, then with
    their second, up to `cuts` of them.
    """
    if recipe is None:
        raise ValueError(
            "--prompts stdlib needs the recipe.yaml that a run leaves beside its drafters: it says what is held out"
        )
    if tokenizer is None:
        raise ValueError("--prompts stdlib needs the target's tokenizer, and its folder has none")
    data = recipe.data
    if data.eval_sources or data.eval_fraction == 0:
        raise ValueError(
            "--prompts stdlib needs a recipe that holds out documents by data.eval_fraction: this one would let the drafter"
            " be measured on what it was trained on"
        )
    documents, _ = load_documents(
        [STDLIB],
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        extensions=data.extensions,
        exclude=data.exclude,
    )
    _, held_out = split_train_eval(documents, data.eval_fraction)
    long_enough = [d for d in held_out if d.input_ids.numel() > prompt_tokens]
    if not long_enough:
        raise ValueError(f"no held-out module has more than {prompt_tokens} tokens: lower --prompt-tokens")
    long_enough.sort(key=lambda d: hashlib.sha256(f"order,{seed},{d.key}".encode()).hexdigest())
    cases = []
    for cut, document in islice(product(range(cuts), long_enough), limit):
        generator = _generator("cut", seed, document.key, *([cut] if cut else []))
        end = int(torch.randint(prompt_tokens, document.input_ids.numel(), (), generator=generator))
        name = document.name.removeprefix(f"{STDLIB}/")
        piece = tuple(document.input_ids[end - prompt_tokens : end].tolist())
        cases.append(Case(f"{name}, piece {cut + 1}" if cut else name, STDLIB, piece, group=name))
    short = len(held_out) - len(long_enough)
    return cases, [
        f"{STDLIB}: {len(cases)} pieces of {prompt_tokens} tokens, of {min(len(cases), len(long_enough))} of the"
        f" {len(held_out)} held-out modules" + (f"; {short} are shorter" if short else "")
    ]


def _texts(path: Path) -> list[str] | None:
    """The texts of a .jsonl of `{"text": ...}`; None if its first row has none."""
    texts: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    if not texts:
                        return None
                    raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
                if not isinstance(row, dict) or "text" not in row:
                    if not texts:
                        return None
                    raise ValueError(f'{path}, line {number}: has no "text", the lines before have')
                if not isinstance(row["text"], str) or not row["text"]:
                    raise ValueError(f"{path}, line {number}: text is empty or no text")
                texts.append(row["text"])
    except (OSError, UnicodeDecodeError):
        return None  # load_prompts says what is wrong, and reads what is packed
    return texts or None


def _generator(*words: object) -> torch.Generator:
    digest = hashlib.sha256(",".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---- acceptance
# Measuring how many tokens a drafter's drafts really get accepted, prompt by prompt.
#
# Per prompt one speculative decoding, the drafter as it is served, cache and all; from its text every K, and any other
# drafter, is replayed (`decoding.replay` says why that is exact). The decoding is checked: greedy text against the
# target's own, token for token, and its passes against their replay.
#
# K: slots, V: the target's vocabulary.

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


# ---- acceptance_report
# From measured prompts to a report: figures per data set and K with intervals, checks, and a table for a person.

ALL = "all"
"""The name of all data sets together."""


def summarize(
    results: Sequence[Result], drafter: int, seed: int, trained_accuracy: Sequence[float] = ()
) -> dict[str, Any]:
    """One drafter's figures: by data set (and all together, where there are several), then by K.

    trained_accuracy: by depth, of the run's evaluation at the drafter's step; its expected lengths stand beside real ones.
    """
    return {
        name: {
            "prompts": len(_by_prompt(rows)),
            "turns": len(rows),
            "tokens": sum(len(r.tokens) for r in rows),
            "repeated_tokens": sum(r.repeated for r in rows),
            "ended": sum(r.ended for r in rows),
            "teacher_forced_accuracy": _teacher_forced(rows, drafter),
            "by_k": [
                _figures(rows, drafter, k, seed)
                | {
                    "expected_from_teacher_forcing": _expected(_teacher_forced(rows, drafter), k),
                    "expected_in_training": _expected(trained_accuracy, k),
                }
                for k in range(1, len(rows[0].drafted[drafter].by_k) + 1)
            ],
        }
        for name, rows in _sets(results).items()
    }


def compare(results: Sequence[Result], seed: int, other: int = 1) -> dict[str, Any]:
    """Accepted length of the first drafter less another's, on the same texts, with paired intervals."""
    out: dict[str, Any] = {}
    for name, rows in _sets(results).items():
        out[name] = []
        for k in range(1, min(len(rows[0].drafted[d].by_k) for d in (0, other)) + 1):
            series = []
            for drafter in (0, other):
                tallies = _tallies(rows, drafter, k, apart=False)
                series += [[t.tokens for t in tallies], [t.passes for t in tallies]]
            lengths = [_ratio(sum(series[i]), sum(series[i + 1])) for i in (0, 2)]
            difference = None if None in lengths else lengths[0] - lengths[1]  # type: ignore[operator]
            interval = difference_interval(series[0], series[1], series[2], series[3], seed)
            out[name].append({"k": k, "accepted_lengths": lengths, "difference": difference, "interval": interval})
    return out


def checks(results: Sequence[Result]) -> dict[str, Any]:
    """Whether the texts are the target's own, and the decodings' passes those of their replay."""
    verdicts = [r.check["verdict"] for r in results]
    return {
        "texts": {verdict: verdicts.count(verdict) for verdict in ("same", "tie", "bug", "none")},
        "differences": [
            {"data_set": r.data_set, "id": r.id, "turn": r.turn, **r.check}
            for r in results
            if r.check["verdict"] in ("tie", "bug")
        ],
        "replays_that_differ": [
            {"data_set": r.data_set, "id": r.id, "turn": r.turn}
            for r in results
            if r.check["verdict"] != "none" and r.replay_differs
        ],
    }


def run_figures(results: Sequence[Result], seed: int) -> dict[str, Any]:
    """The decoding itself, without replay: accepted length outside of repetition, by data set."""
    out = {}
    for name, rows in _sets(results).items():
        tallies = [sum((r.run[0] for r in prompt), Tally()) for prompt in _by_prompt(rows)]
        out[name] = _length(tallies, seed) | {"k": len(rows[0].run[0].accepted)}
    return out


def details(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every turn, for the JSON file."""
    return [
        {
            "data_set": r.data_set,
            "id": r.id,
            "turn": r.turn,
            "prompt_tokens": len(r.prompt),
            "tokens": r.tokens,
            "repeated": r.repeated,
            "ended": r.ended,
            "check": r.check,
            "run": [vars(t) for t in r.run],
            "drafters": [
                {"by_k": [[vars(t) for t in pair] for pair in d.by_k], "hits": d.hits, "totals": d.totals}
                for d in r.drafted
            ],
        }
        for r in results
    ]


def _sets(results: Sequence[Result]) -> dict[str, list[Result]]:
    sets: dict[str, list[Result]] = {}
    for result in results:
        sets.setdefault(result.data_set, []).append(result)
    if len(sets) > 1:
        sets[ALL] = list(results)
    return sets


def _by_prompt(rows: Sequence[Result]) -> list[list[Result]]:
    """Turns of one conversation belong together: they are resampled as one."""
    prompts: dict[int, list[Result]] = {}
    for row in rows:
        prompts.setdefault(row.number, []).append(row)
    return list(prompts.values())


def _tallies(rows: Sequence[Result], drafter: int, k: int, apart: bool) -> list[Tally]:
    return [sum((r.drafted[drafter].by_k[k - 1][apart] for r in prompt), Tally()) for prompt in _by_prompt(rows)]


def _figures(rows: Sequence[Result], drafter: int, k: int, seed: int) -> dict[str, Any]:
    plain, apart = (_tallies(rows, drafter, k, side) for side in (False, True))
    together = [a + b for a, b in zip(plain, apart)]
    total, repeating, both = (sum(t, Tally()) for t in (plain, apart, together))
    chain = [_ratio(a, total.passes) for a in total.accepted]
    given = [_ratio(a, before) for a, before in zip(total.accepted, [total.passes, *total.accepted])]
    emitted = sum(len(r.tokens) for r in rows)
    return {
        "k": k,
        **_length(plain, seed),
        "accepted_by_position": chain,
        "accepted_by_position_given_those_before": given,
        "in_repetition": _length(apart, seed),
        "with_repetition": _length(together, seed),
        "tokens_per_target_pass": _ratio(emitted, both.passes + len(rows)),  # a prompt's own pass counted
        "passes_in_repetition": repeating.passes,
    }


def _length(tallies: Sequence[Tally], seed: int) -> dict[str, Any]:
    tokens, passes = [t.tokens for t in tallies], [t.passes for t in tallies]
    return {
        "accepted_length": _ratio(sum(tokens), sum(passes)),
        "interval": ratio_interval(tokens, passes, seed),
        "passes": sum(passes),
    }


def _expected(accuracy: Sequence[float], k: int) -> float | None:
    return expected_accepted_length(accuracy[:k]) if k <= len(accuracy) else None


def _teacher_forced(rows: Sequence[Result], drafter: int) -> list[float]:
    """By slot: what training's figure would say of these texts: every position, not only those where passes begin."""
    drafted = [r.drafted[drafter] for r in rows]
    hits = [sum(column) for column in zip(*(d.hits for d in drafted))]
    totals = [sum(column) for column in zip(*(d.totals for d in drafted))]
    return [h / t if t else 0.0 for h, t in zip(hits, totals)]


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def describe_table(summary: dict[str, Any]) -> str:
    """A line per data set and K."""
    header = ["data set", "K", "accepted length", "95 %", "teacher-forced", "in training", "in loops", "with loops"]
    header += ["tokens/pass", "accepted by position"]
    lines = [header]
    for name, figures in summary.items():
        for row in figures["by_k"]:
            positions = " ".join(_number(p) for p in row["accepted_by_position"])
            in_loops, with_loops = (row[key]["accepted_length"] for key in ("in_repetition", "with_repetition"))
            numbers = [_number(row[f"expected_{key}"], 3) for key in ("from_teacher_forcing", "in_training")]
            numbers += [_number(v) for v in (in_loops, with_loops, row["tokens_per_target_pass"])]
            cells = [name, str(row["k"]), _number(row["accepted_length"], 3), show_interval(row["interval"])]
            lines.append([*cells, *numbers, positions])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def show_interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
