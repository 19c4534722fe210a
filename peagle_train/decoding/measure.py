"""How many drafted tokens really get accepted: from prompts to figures per data set and K, with intervals.

Per prompt one speculative decoding, the drafter as it is served, cache and all; from its text every K, and any other
drafter, is replayed. Greedy text is checked against the target's own, token for token.

A replay is exact, and one pass of the drafter: neither the text (`decoding.generate`) nor a slot's logits depend on K or on
what was drafted before. Slot d of the draft at anchor a reads the real tokens and features up to a, and mask tokens. So
training's flat pass, all depths, gives the draft of every anchor, a draft of K slots is the first K of each, a guess is
accepted where it is the text's token, and what is left is to follow the passes.

K: slots, m: tokens with a successor (bonus tokens that a pass may follow), N: elements, M: real tokens that are read, F:
feature size, H: the drafter's hidden size, V: the target's vocabulary, R: resamples, n: prompts.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peagle_train.config import Data, Recipe
from peagle_train.core.cod import seeded
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.elements import make_elements
from peagle_train.core.passes import visibility_of
from peagle_train.data.documents import STDLIB, SourceFile, find_all, read_documents, read_examples
from peagle_train.data.encode import Encoder
from peagle_train.data.messages import FORMAT, BadRow, parse
from peagle_train.data.packing import held_out_documents
from peagle_train.decoding.generate import CachedTarget, Decoded, Drafter, decode, greedy_tokens, sampler
from peagle_train.files import one_line
from peagle_train.regenerate import Prompt, read_prompts
from peagle_train.serving.drafter_io import check_fit
from peagle_train.target_model.frozen import FrozenTarget

RESAMPLES, LEVEL = 2000, 0.95
LONGEST_PERIOD, SHORTEST_RUN = 64, 24
HEAD_ROWS = 512  # as many have logits at a time
ALL = "all"  # the name of all data sets together
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
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [*tokenizer.apply_chat_template(messages, **how)]


def load_cases(name: str, tokenizer: Any, limit: int | None = None) -> tuple[list[Case], str]:
    """The prompts of `humaneval`, `mt-bench` or a file, and a line about them. Files are .jsonl of `{"text": ...}`, given
    to the target as it is, or of what `read_prompts` reads, asked through the chat template if there is one.
    """
    path, kind = Path(name).expanduser(), "texts"
    texts = _texts(str(path)) if path.suffix == ".jsonl" else []
    if not texts:
        prompts = read_prompts(name, limit)
        if getattr(tokenizer, "chat_template", None):
            return [Case(p.id, path.name, chat=p) for p in prompts], f"{path.name}: {len(prompts)} chats"
        if odd := [p.id for p in prompts if [len(turn) for turn in p.turns] != [1]]:
            raise ValueError(f"prompts {name}: {odd[0]} is a conversation, and the target has no chat template for it")
        texts = [(p.id, p.turns[0][0]["content"]) for p in prompts]
        kind = "prompts as plain text (the target has no chat template)"
    cases = [Case(id, path.name, tuple(tokenizer(text)["input_ids"])) for id, text in texts[:limit]]
    return cases, f"{path.name}: {len(cases)} {kind}"


def _texts(path: str) -> list[tuple[str, str]]:
    """(number, text) of a .jsonl of `{"text": ...}`; empty if its first line has no text."""
    texts: list[tuple[str, str]] = []
    for raw in read_examples([SourceFile(path, path, "jsonl")]):
        try:
            text = parse(raw.content)["text"]
            if not isinstance(text, str):
                raise BadRow(FORMAT, "text is no text")
            texts.append((str(len(texts) + 1), text))
        except (BadRow, KeyError):
            if not texts:
                return []
            raise ValueError(f'{raw.where}: no "text"; the lines before have text') from None
    return texts


def stdlib_cases(
    recipes: Sequence[Recipe | None], tokenizer: Any, vocab_size: int, limit: int | None, prompt_tokens: int, seed: int
) -> tuple[list[Case], str]:
    """Pieces of standard-library modules that all drafters' recipes hold out, and a line about them.

    The split is by the document's key alone, so it is the training run's if `data.eval_fraction` is, and a smaller share's
    documents are among a larger's. The piece ends at a place drawn from the seed and the key; documents come in an order
    drawn likewise, all with their first piece, then, up to `limit` pieces, with their second, third, ...
    """
    fraction = min(r.data.eval_fraction if r and not r.data.eval_sources else 0.0 for r in recipes)
    if fraction == 0 or recipes[0] is None:
        needed = "the recipe.yaml beside each drafter, with documents held out by data.eval_fraction"
        raise ValueError(f"--prompts stdlib needs {needed}: else it may be measured on what it was trained on")
    data = recipes[0].data
    modules = find_all(Data([STDLIB], extensions=data.extensions, exclude=data.exclude))["sources"]
    read = read_documents(modules, Encoder(data, tokenizer, vocab_size))
    documents = [(raw.name.removeprefix(f"{STDLIB}/"), made.input_ids.tolist(), made.key) for raw, made in read]
    keys_D32 = np.frombuffer(b"".join(key for _, _, key in documents), np.uint8).reshape(-1, 32)
    held_out = [*compress(documents, held_out_documents(keys_D32, fraction))]
    long_enough = [(name, ids, key.hex()) for name, ids, key in held_out if len(ids) > prompt_tokens]
    if not long_enough:
        raise ValueError(f"no held-out module has more than {prompt_tokens} tokens: lower --prompt-tokens")
    long_enough.sort(key=lambda document: hashlib.sha256(f"order,{seed},{document[2]}".encode()).hexdigest())
    cases = []
    for number in range(limit or len(long_enough)):
        cut, at = divmod(number, len(long_enough))
        name, ids, key = long_enough[at]
        generator = seeded("cut", seed, key, *([cut] if cut else []))
        end = int(torch.randint(prompt_tokens, len(ids), (), generator=generator))
        piece = tuple(ids[end - prompt_tokens : end])
        cases.append(Case(f"{name}, piece {cut + 1}" if cut else name, STDLIB, piece, group=name))
    used, short = min(len(cases), len(long_enough)), len(held_out) - len(long_enough)
    pieces = f"{len(cases)} pieces of {prompt_tokens} tokens, of {used} of the {len(held_out)} held-out modules"
    return cases, f"{STDLIB}: {pieces}; {short} are shorter"


# Decoding


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
    passes: list[tuple[int, int]]  # `Decoded.passes` until max_tokens are out
    counts: list[list[list[int]]]  # by drafter, the first one decoded; by K - 1: `count`, without repetition
    check: dict[str, Any]  # verdict: same, tie or bug (greedy), none (sampled); where they part: at, gap, tolerance


@torch.no_grad()
def measure(
    target: FrozenTarget,
    drafts: Sequence[PEagleDraft],
    cases: Sequence[Case],
    K: int,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: Any = None,
    eos: Collection[int] = (),
) -> tuple[list[Result], dict[str, int]]:
    """Decode every case; a turn's randomness depends on the seed, the data set, the prompt's id and the turn alone. Returns
    the results, and how many prompts could not be taken, by reason.

    drafts: the first one decodes, the others are replayed on its text; they run in the target's dtype, as in engines.
    K: slots of the decoding itself, and the most that are replayed. tokenizer: needed for chats only.
    """
    for draft in drafts:
        check_fit(draft.config, target, "the drafter")
        if (window := draft.config.sliding_window) is not None and window < K:
            raise ValueError(f"the drafter's window is {window} positions, but K is {K}: give fewer as --k")
        draft.to(target.dtype)  # type: ignore[arg-type]
        draft.rotary_emb = draft.make_rotary(draft.config)  # whose table stays float32
        draft.to(target.device)  # type: ignore[arg-type]
    results: list[Result] = []
    left_out: Counter[str] = Counter()
    groups: dict[tuple[str, str], int] = {}
    limit = getattr(target.config, "max_position_embeddings", None)
    for at, case in enumerate(cases, start=1):
        number = groups.setdefault((case.data_set, case.group), at) if case.group else at
        answers: list[str] = []
        for turn in range(len(case.chat.turns) if case.chat else 1):
            try:
                ids = case.prompt_ids(answers, tokenizer)
            except Exception as error:  # templates raise what they like
                left_out[f"the chat template fails ({one_line(error, 100)})"] += 1
                break
            if not ids:
                left_out["empty prompt"] += 1
                break
            if limit is not None and len(ids) + max_tokens + 2 * K > limit:
                left_out[f"prompt and max_tokens longer than the target's {limit} positions"] += 1
                break
            choose = sampler(temperature, seeded("decode", seed, case.data_set, case.id, turn))
            # K tokens more, so that the last passes are whole
            decoded = decode(CachedTarget(target), Drafter(drafts[0], K), ids, max_tokens + K, choose, eos)
            tokens, repeated = decoded.tokens[:max_tokens], repeats(ids, decoded.tokens)
            apart_m = repeated[1:]  # a pass is repetition if the first token that it drafts is
            accepted = (accepted_slots(draft, decoded, K) for draft in drafts)
            counts = [[count(replay(a_m, k, max_tokens), k, apart_m) for k in range(1, K + 1)] for a_m in accepted]
            own = greedy_tokens(target, ids, max_tokens, eos) if temperature == 0 else None
            result = Result(
                number=number,
                id=case.id,
                data_set=case.data_set,
                turn=turn,
                prompt=ids,
                tokens=tokens,
                repeated=sum(repeated[: len(tokens)]),
                passes=[(i, n) for i, n in decoded.passes if i < max_tokens - 1],
                counts=counts,
                check={"verdict": "none"} if own is None else verdict(target, ids, own, tokens),
            )
            results.append(result)
            print(f"{at}/{len(cases)}  {case.data_set} {case.id}  {len(tokens)} tokens", file=sys.stderr)
            if case.chat:
                answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return results, dict(left_out)


def verdict(target: FrozenTarget, prompt: list[int], own: list[int], output: list[int]) -> dict[str, Any]:
    """Where a greedy text parts from the target's own, and whether two all but equal logits explain it."""
    if output == own:
        return {"verdict": "same"}
    shorter = min(len(output), len(own))
    at = next((i for i, (a, b) in enumerate(zip(output, own)) if a != b), shorter)
    if at == shorter:
        return {"verdict": "bug", "at": at}  # one of them ends, and nothing was to be chosen
    # A third opinion: the text up to there in one forward, without any cache.
    ids = torch.tensor([prompt + own[:at]], device=target.device)
    _, hidden = target.features(ids, torch.arange(ids.shape[1], device=ids.device)[None])
    logits_V: Tensor = target.head(hidden[0, -1]).double()
    gap = float(logits_V.max() - torch.minimum(logits_V[output[at]], logits_V[own[at]]))
    tolerance = TIE_TOLERANCE[hidden.dtype]
    return {"verdict": "tie" if gap <= tolerance else "bug", "at": at, "gap": gap, "tolerance": tolerance}


# Replay


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


# Figures


def summarize(results: Sequence[Result], drafter: int, seed: int) -> dict[str, Any]:
    """One drafter's figures: by data set (and all together, where there are several), then by K."""
    summary = {}
    for name, rows in _sets(results).items():
        by_k = []
        for k in range(1, len(rows[0].counts[drafter]) + 1):
            passes_n, tokens_n, *slots = _by_prompt(rows, drafter, k)
            passes, interval = sum(passes_n), ratio_interval(tokens_n, passes_n, seed)
            shares = [_ratio(sum(accepted_n), passes) for accepted_n in slots]
            length = {"accepted_length": _ratio(sum(tokens_n), passes), "interval": interval}
            by_k.append({"k": k, **length, "passes": passes, "accepted_by_position": shares})
        summary[name] = {
            "prompts": len({r.number for r in rows}),
            "turns": len(rows),
            "tokens": sum(len(r.tokens) for r in rows),
            "repeated_tokens": sum(r.repeated for r in rows),
            "by_k": by_k,
        }
    return summary


def compare(results: Sequence[Result], seed: int, other: int = 1) -> dict[str, Any]:
    """Accepted length of the first drafter less another's, on the same texts, with paired intervals."""
    out: dict[str, Any] = {}
    for name, rows in _sets(results).items():
        out[name] = []
        for k in range(1, len(rows[0].counts[0]) + 1):
            first, less = (_by_prompt(rows, drafter, k)[:2] for drafter in (0, other))
            lengths = [_ratio(sum(tokens_n), sum(passes_n)) for passes_n, tokens_n in (first, less)]
            difference = None if None in lengths else lengths[0] - lengths[1]  # type: ignore[operator]
            interval = ratio_interval(first[1], first[0], seed, less=(less[1], less[0]))
            out[name].append({"k": k, "difference": difference, "interval": interval})
    return out


def _sets(results: Sequence[Result]) -> dict[str, list[Result]]:
    names = dict.fromkeys(result.data_set for result in results)
    sets = {name: [result for result in results if result.data_set == name] for name in names}
    return {**sets, ALL: list(results)} if len(sets) > 1 else sets


def _by_prompt(rows: Sequence[Result], drafter: int, k: int) -> list[list[int]]:
    """[2 + k, n]: `count` by prompt; turns of one conversation belong together, and are resampled as one."""
    prompts: dict[int, Tensor] = {}
    for row in rows:
        prompts[row.number] = prompts.get(row.number, 0) + torch.tensor(row.counts[drafter][k - 1])
    return torch.stack(list(prompts.values()), dim=1).tolist()


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


# Intervals: prompts are resampled, since tokens of one text depend on each other and prompts do not.


def ratio_interval(
    tokens: Sequence[float],
    passes: Sequence[float],
    seed: int = 0,
    less: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(tokens) / sum(passes) over resampled prompts; None for fewer than two that have a
    pass. `less`: another drafter's tokens and passes of the same prompts, resampled together: of the difference.
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
    return found_R.quantile((1 - LEVEL) / 2).item(), found_R.quantile((1 + LEVEL) / 2).item()
