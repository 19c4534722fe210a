"""What a drafter is measured on: chats, plain text, and held-out modules of the standard library, cut at a seeded place."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from peagle_train.data.files import STDLIB
from peagle_train.data.packing import split_train_eval
from peagle_train.data.sources import load_documents
from peagle_train.regenerate import BENCHMARKS, Prompt, load_prompts


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
