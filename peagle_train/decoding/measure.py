"""How many drafted tokens really get accepted: from prompts to figures per data set and K, with intervals.

Per prompt one speculative decoding, the drafter as it is served, cache and all; from its text every K, and any other
drafter, is replayed (`decoding.replay` says why that is exact). The decoding is checked: greedy text against the
target's own, token for token, and its passes against their replay.

K: slots, m: output tokens but one, V: the target's vocabulary, R: resamples, n: prompts.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, product
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peagle_train.config import Data
from peagle_train.core.draft import PEagleDraft
from peagle_train.data.documents import STDLIB, SourceFile, SourceReport, find_all, read_documents, read_examples
from peagle_train.data.encode import Encoder, parse
from peagle_train.data.messages import BadRow
from peagle_train.data.packing import held_out_documents
from peagle_train.decoding.generate import CachedTarget, Chance, Decoded, Drafter, decode, greedy_tokens
from peagle_train.decoding.replay import Tally, accept_probabilities, repeats, replay, tally_run
from peagle_train.regenerate import BENCHMARKS, Prompt, load_prompts
from peagle_train.target_model.frozen import FrozenTarget

RESAMPLES, LEVEL = 2000, 0.95
ALL = "all"
"""The name of all data sets together."""
TIE_TOLERANCE = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float32: 1e-3, torch.float64: 1e-9}
"""Logits that lie closer may change places when a target runs several tokens at once and not one by one."""

# Prompts


@dataclass(frozen=True)
class Case:
    """A prompt: token ids, or a chat whose turns are asked one after the other."""

    id: str
    data_set: str
    ids: tuple[int, ...] = ()
    chat: Prompt | None = None
    group: str = ""  # cases of one group are no independent samples: intervals resample them as one

    def prompt_ids(self, answers: Sequence[str], tokenizer: Any) -> list[int]:
        """Token ids of turn `len(answers)`, the turns before answered as given (by the target itself)."""
        if self.chat is None:
            return [*self.ids]
        messages: list[dict[str, Any]] = [*self.chat.turns[0]]
        for answer, turn in zip(answers, self.chat.turns[1:]):
            messages += [{"role": "assistant", "content": answer}, *turn]
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )


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
) -> tuple[list[Case], str]:
    """The prompts that `name` stands for, and a line about them.

    Args:
        name: `stdlib`, `humaneval`, `mt-bench` or a file: .jsonl of `{"text": ...}` (given to the target as it is) or
            of what `load_prompts` reads (asked through the chat template).
        tokenizer: the target's; None if it has none.
        plain: give every prompt's only user message to the target as it is, without the chat template.
        recipe, prompt_tokens, vocab_size, cuts: for `stdlib`, see `_stdlib_cases`.

    Raises:
        ValueError: one line.
    """
    path = Path(name).expanduser()
    if name not in (STDLIB, *BENCHMARKS) and not path.is_file():
        raise ValueError(
            f"prompts {name} is not a file; give a .jsonl file or one of {', '.join([STDLIB, *BENCHMARKS])}"
        )
    if tokenizer is None:
        raise ValueError(f"prompts {name} need the target's tokenizer, and its folder has none")
    if name == STDLIB:
        return _stdlib_cases(recipe, tokenizer, vocab_size, limit, prompt_tokens, seed, cuts)
    data_set, texts, kind = path.name, list[tuple[str, str]](), "texts"
    if name not in BENCHMARKS and path.suffix == ".jsonl":
        texts = _texts(str(path))
    if not texts:
        prompts = load_prompts(name, limit)
        if not plain:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError(f"prompts {name} are chats, and the target's tokenizer has no template: give --plain")
            return [Case(p.id, data_set, chat=p) for p in prompts], f"{data_set}: {len(prompts)} chats"
        if odd := [p.id for p in prompts if [len(turn) for turn in p.turns] != [1]]:
            raise ValueError(f"prompts {name}: {odd[0]} is a conversation, which cannot be given as plain text")
        texts, kind = [(p.id, p.turns[0][0]["content"]) for p in prompts], "prompts as plain text"
    cases = [Case(id, data_set, tuple(tokenizer(t, add_special_tokens=True)["input_ids"])) for id, t in texts[:limit]]
    return cases, f"{data_set}: {len(cases)} {kind}"


def _texts(path: str) -> list[tuple[str, str]]:
    """(number, text) of a .jsonl of `{"text": ...}`; empty if its first example has no text."""
    texts: list[tuple[str, str]] = []
    for raw in read_examples([SourceFile(path, path, "jsonl")]):
        try:
            text = parse(raw.content)["text"]
        except (BadRow, LookupError, TypeError):
            text = None
        if not isinstance(text, str) or not text:
            if not texts:
                return []
            raise ValueError(f'{raw.where}: no "text", or an empty one; the lines before have text')
        texts.append((str(len(texts) + 1), text))
    return texts


def _stdlib_cases(
    recipe: Any, tokenizer: Any, vocab_size: int, limit: int | None, prompt_tokens: int, seed: int, cuts: int
) -> tuple[list[Case], str]:
    """Pieces of `prompt_tokens` tokens out of standard-library modules that the recipe's split holds out.

    The split is by the document's key alone, so it is the training run's if `data.eval_fraction` is. The piece ends at a
    place drawn from the seed and the key; documents come in an order drawn likewise, all with their first piece, then with
    their second, up to `cuts` of them.
    """
    if recipe is None or recipe.data.eval_sources or recipe.data.eval_fraction == 0:
        raise ValueError(
            "--prompts stdlib needs the recipe.yaml beside the drafter, with documents held out by data.eval_fraction:"
            " otherwise the drafter may be measured on what it was trained on"
        )
    data = recipe.data
    files = find_all(Data([STDLIB], extensions=data.extensions, exclude=data.exclude))["sources"]
    encode = Encoder(data, tokenizer, vocab_size, mask_token_id=None).encode
    documents = [
        (raw.name.removeprefix(f"{STDLIB}/"), made.input_ids.tolist(), made.key)
        for raw, made in read_documents(files, SourceReport(), encode)
    ]
    keys_D32 = np.frombuffer(b"".join(key for _, _, key in documents), np.uint8).reshape(-1, 32)
    is_out = held_out_documents(keys_D32, data.eval_fraction)
    held_out = [document for document, is_held_out in zip(documents, is_out) if is_held_out]
    long_enough = [(name, ids, key.hex()) for name, ids, key in held_out if len(ids) > prompt_tokens]
    if not long_enough:
        raise ValueError(f"no held-out module has more than {prompt_tokens} tokens: lower --prompt-tokens")
    long_enough.sort(key=lambda document: hashlib.sha256(f"order,{seed},{document[2]}".encode()).hexdigest())
    cases = []
    for cut, (name, ids, key) in islice(product(range(cuts), long_enough), limit):
        generator = _generator("cut", seed, key, *([cut] if cut else []))
        end = int(torch.randint(prompt_tokens, len(ids), (), generator=generator))
        piece = tuple(ids[end - prompt_tokens : end])
        cases.append(Case(f"{name}, piece {cut + 1}" if cut else name, STDLIB, piece, group=name))
    return cases, (
        f"{STDLIB}: {len(cases)} pieces of {prompt_tokens} tokens, of {min(len(cases), len(long_enough))} of the"
        f" {len(held_out)} held-out modules; {len(held_out) - len(long_enough)} are shorter"
    )


def _generator(*words: object) -> torch.Generator:
    digest = hashlib.sha256(",".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# Decoding


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    num_slots: int  # of the decoding itself
    max_tokens: int = 128
    temperature: float = 0.0
    sample_drafts: bool = True
    seed: int = 0


@dataclass
class Drafted:
    """How one drafter does on one text."""

    by_k: list[tuple[Tally, Tally]]  # for 1, 2, ... slots: passes outside of repetition, and within
    hits: list[float]  # by slot: tokens that it guesses outside of repetition, whatever the slots before guessed
    totals: list[int]  # by slot: tokens that it could guess


@dataclass
class Result:
    """One turn of one prompt."""

    number: int  # of its prompt among all: turns of one prompt share it, and pieces of one module
    id: str
    data_set: str
    turn: int
    prompt: list[int]
    tokens: list[int]  # the output, at most max_tokens
    repeated: int  # how many of them are repetition
    ended: bool  # whether an end token came within max_tokens
    run: tuple[Tally, Tally]  # the decoding itself, as `Drafted.by_k`
    drafted: list[Drafted]  # by drafter; the first one decoded
    leads: list[float]  # `Decoded.leads` of the output
    draft_leads: list[float]  # `Decoded.draft_leads` of all slots of `run`'s passes
    check: dict[str, Any]  # verdict: same, tie or bug (greedy), none (sampled); where they part: at, gap, tolerance


class Measurement:
    """A target and drafters for it, ready to take prompts. The drafters run in the target's dtype, as in engines.

    Args:
        drafters: with the largest K of each; the first one decodes, the others are replayed on its text.
        tokenizer: transformers'; needed for chats only.
    """

    def __init__(
        self,
        target: FrozenTarget,
        drafters: Sequence[tuple[PEagleDraft, int]],
        settings: Settings,
        *,
        tokenizer: Any = None,
        eos: Collection[int] = (),
    ) -> None:
        dtype = target.model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        for draft, _ in drafters:
            check_fit(target, draft)
            draft.to(dtype)  # type: ignore[arg-type]
            draft.rotary_emb = draft.make_rotary(draft.config)  # whose table stays float32
        self.target, self.drafters, self.settings = target, list(drafters), settings
        self.drafters[0][0].to(target.device)  # type: ignore[arg-type]
        self.tokenizer, self.eos = tokenizer, eos
        self.largest = max(settings.num_slots, *(slots for _, slots in drafters))
        """Tokens that a text continues for after max_tokens, so that its last passes are whole."""
        self.left_out: dict[str, int] = {}
        """Prompts that could not be taken, by reason."""

    @torch.no_grad()
    def __call__(self, cases: Sequence[Case], say: Callable[[str], None] = lambda _: None) -> list[Result]:
        """Decode every case; a turn's randomness depends on the seed, the data set, the prompt's id and the turn alone."""
        results: list[Result] = []
        groups: dict[tuple[str, str], int] = {}
        limit = getattr(self.target.config, "max_position_embeddings", None)
        for at, case in enumerate(cases, start=1):
            number = groups.setdefault((case.data_set, case.group), at) if case.group else at
            answers: list[str] = []
            for turn in range(len(case.chat.turns) if case.chat else 1):
                ids = case.prompt_ids(answers, self.tokenizer)
                reason = "" if ids else "empty prompt"
                if limit is not None and len(ids) + self.settings.max_tokens + 2 * self.largest > limit:
                    reason = f"prompt and max_tokens longer than the target's {limit} positions"
                if reason:
                    self.left_out[reason] = self.left_out.get(reason, 0) + 1
                    break
                result = self._turn(case, number, turn, ids)
                results.append(result)
                say(f"{at}/{len(cases)}  {case.data_set} {case.id}  {len(result.tokens)} tokens")
                if case.chat:
                    answers.append(self.tokenizer.decode(result.tokens, skip_special_tokens=True))
        return results

    def _turn(self, case: Case, number: int, turn: int, ids: list[int]) -> Result:
        s, most = self.settings, self.settings.max_tokens
        chance = Chance(_generator("decode", s.seed, case.data_set, case.id, turn))
        how: dict[str, Any] = {"temperature": s.temperature, "sample_drafts": s.sample_drafts}
        cached, drafter = CachedTarget(self.target), Drafter(self.drafters[0][0], s.num_slots)
        decoded = decode(cached, drafter, ids, most + self.largest, eos=self.eos, chance=chance, **how)
        own = greedy_tokens(cached, ids, most, self.eos) if s.temperature == 0 else None
        output, repeated = decoded.tokens[:most], repeats(ids, decoded.tokens)
        apart_m = repeated[1:]  # a pass is repetition if the first token that it drafts is
        drafted = []
        for i, (draft, slots) in enumerate(self.drafters):
            if i:
                draft.to(self.target.device)  # type: ignore[arg-type]
            accept_mK = accept_probabilities(draft, decoded, slots, **how)
            by_k = [replay(accept_mK, k, most, apart_m) for k in range(1, slots + 1)]
            drafted.append(Drafted(by_k, *_agreement(accept_mK, most, apart_m)))
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
            run=tally_run(decoded, s.num_slots, most, apart_m),
            drafted=drafted,
            leads=decoded.leads[:most],
            draft_leads=[
                x for (i, _), slots in zip(decoded.passes, decoded.draft_leads) if i < most - 1 for x in slots
            ],
            check={"verdict": "none"} if own is None else self.compare(decoded, own, output),
        )

    def compare(self, decoded: Decoded, own: list[int], output: list[int]) -> dict[str, Any]:
        """Where a greedy text parts from the target's own, and whether two all but equal logits explain it."""
        if output == own:
            return {"verdict": "same"}
        shorter = min(len(output), len(own))
        at = next((i for i, (a, b) in enumerate(zip(output, own)) if a != b), shorter)
        if at == shorter:
            return {"verdict": "bug", "at": at}  # one of them ends, and nothing was to be chosen
        # A third opinion: the text up to there in one forward, without any cache.
        ids = torch.tensor([decoded.prompt + own[:at]], device=self.target.device)
        _, hidden = self.target.features(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        logits_V: Tensor = self.target.head(hidden[0, -1]).double()
        gap = float(logits_V.max() - torch.minimum(logits_V[output[at]], logits_V[own[at]]))
        tolerance = TIE_TOLERANCE[hidden.dtype]
        return {"verdict": "tie" if gap <= tolerance else "bug", "at": at, "gap": gap, "tolerance": tolerance}


def _agreement(accept_mK: Tensor, max_tokens: int, apart_m: Sequence[bool]) -> tuple[list[float], list[int]]:
    """`Drafted`'s hits and totals."""
    m, K = accept_mK.shape
    outside_m = ~torch.tensor([*apart_m], dtype=torch.bool)
    outside_m[max_tokens - 1 :] = False
    counted_mK = outside_m[:, None] & (torch.arange(m)[:, None] + torch.arange(K) < m)
    return (accept_mK * counted_mK).sum(0).tolist(), counted_mK.sum(0).tolist()


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


# Figures


def summarize(
    results: Sequence[Result], drafter: int, seed: int, trained_accuracy: Sequence[float] = ()
) -> dict[str, Any]:
    """One drafter's figures: by data set (and all together, where there are several), then by K.

    trained_accuracy: by depth, of the run's evaluation at the drafter's step; its expected lengths stand beside real ones.
    """
    summary = {}
    for name, rows in _sets(results).items():
        drafted = [r.drafted[drafter] for r in rows]
        hits, totals = ([sum(at) for at in zip(*(getattr(d, key) for d in drafted))] for key in ("hits", "totals"))
        accuracy = [h / t if t else 0.0 for h, t in zip(hits, totals)]
        tokens, by_k = sum(len(r.tokens) for r in rows), []
        for k in range(1, len(drafted[0].by_k) + 1):
            plain, apart = (_by_prompt(rows, [d.by_k[k - 1][side] for d in drafted]) for side in (0, 1))
            together = [a + b for a, b in zip(plain, apart)]
            total = sum(plain, Tally())
            row = {
                "k": k,
                **_length(plain, seed),
                "accepted_by_position": [_ratio(a, total.passes) for a in total.accepted],
                "in_repetition": _length(apart, seed),
                "with_repetition": _length(together, seed),
                # each prompt's own pass counted
                "tokens_per_target_pass": _ratio(tokens, sum(t.passes for t in together) + len(rows)),
                "expected_from_teacher_forcing": _expected(accuracy, k),
                "expected_in_training": _expected(trained_accuracy, k),
            }
            by_k.append(row)
        summary[name] = {
            "prompts": len({r.number for r in rows}),
            "turns": len(rows),
            "tokens": tokens,
            "repeated_tokens": sum(r.repeated for r in rows),
            "ended": sum(r.ended for r in rows),
            "teacher_forced_accuracy": accuracy,
            "by_k": by_k,
        }
    return summary


def compare(results: Sequence[Result], seed: int, other: int = 1) -> dict[str, Any]:
    """Accepted length of the first drafter less another's, on the same texts, with paired intervals."""
    out: dict[str, Any] = {}
    for name, rows in _sets(results).items():
        out[name] = []
        for k in range(min(len(rows[0].drafted[d].by_k) for d in (0, other))):
            both = [_by_prompt(rows, [r.drafted[d].by_k[k][0] for r in rows]) for d in (0, other)]
            (tokens, passes), less = (([t.tokens for t in one], [t.passes for t in one]) for one in both)
            lengths = [_ratio(sum(t), sum(p)) for t, p in ((tokens, passes), less)]
            difference = None if None in lengths else lengths[0] - lengths[1]  # type: ignore[operator]
            interval = ratio_interval(tokens, passes, seed, less)
            out[name].append({"k": k + 1, "accepted_lengths": lengths, "difference": difference, "interval": interval})
    return out


def checks(results: Sequence[Result]) -> dict[str, Any]:
    """Whether the texts are the target's own, and the decodings' passes those of their replay."""
    where = [{"data_set": r.data_set, "id": r.id, "turn": r.turn} for r in results]
    verdicts = [r.check["verdict"] for r in results]
    return {
        "texts": {verdict: verdicts.count(verdict) for verdict in ("same", "tie", "bug", "none")},
        "differences": [w | r.check for w, r in zip(where, results) if r.check["verdict"] in ("tie", "bug")],
        # greedy: only numeric ties explain it
        "replays_that_differ": [
            w
            for w, r in zip(where, results)
            if r.check["verdict"] != "none" and r.run != r.drafted[0].by_k[len(r.run[0].accepted) - 1]
        ],
    }


def run_figures(results: Sequence[Result], seed: int) -> dict[str, Any]:
    """The decoding itself, without replay: accepted length outside of repetition, by data set."""
    return {
        name: _length(_by_prompt(rows, [r.run[0] for r in rows]), seed) | {"k": len(rows[0].run[0].accepted)}
        for name, rows in _sets(results).items()
    }


def _sets(results: Sequence[Result]) -> dict[str, list[Result]]:
    sets: dict[str, list[Result]] = {}
    for result in results:
        sets.setdefault(result.data_set, []).append(result)
    return {**sets, ALL: list(results)} if len(sets) > 1 else sets


def _by_prompt(rows: Sequence[Result], tallies: Sequence[Tally]) -> list[Tally]:
    """Turns of one conversation belong together: they are resampled as one."""
    prompts: dict[int, Tally] = {}
    for row, tally in zip(rows, tallies):
        prompts[row.number] = prompts.get(row.number, Tally()) + tally
    return list(prompts.values())


def _length(tallies: Sequence[Tally], seed: int) -> dict[str, Any]:
    tokens, passes = [t.tokens for t in tallies], [t.passes for t in tallies]
    length = _ratio(sum(tokens), sum(passes))
    return {"accepted_length": length, "interval": ratio_interval(tokens, passes, seed), "passes": sum(passes)}


def _expected(accuracy: Sequence[float], k: int) -> float | None:
    """Tokens a pass yields if slots' hits were independent: 1 + sum_j prod_{i <= j} accuracy_i."""
    return sum(accumulate(accuracy[:k], mul), 1.0) if k <= len(accuracy) else None


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


# Intervals: prompts are resampled, since tokens of one text depend on each other and prompts do not.


def ratio_interval(
    tokens: Sequence[float],
    passes: Sequence[float],
    seed: int = 0,
    less: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(tokens) / sum(passes) over resampled prompts.

    Prompts without a pass are dropped; None for fewer than two others.

    Args:
        less: another drafter's tokens and passes of the same prompts, resampled together: of the difference.
    """
    values_P2n = torch.tensor([(tokens, passes), *([less] if less else [])], dtype=torch.float64)
    values_P2n = values_P2n[:, :, (values_P2n[:, 1] > 0).all(0)]
    n = values_P2n.shape[2]
    if n < 2:
        return None
    index_Rn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    sums_P2R = values_P2n[:, :, index_Rn].sum(-1)
    ratios_PR = sums_P2R[:, 0] / sums_P2R[:, 1]
    found_R = ratios_PR[0] - ratios_PR[1] if less else ratios_PR[0]
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = found_R.quantile(tails).tolist()
    return low, high
