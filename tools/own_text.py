#!/usr/bin/env python
"""The target's own continuations of a recipe's documents: a source to train on beside them (docs/quality.md).

    python tools/own_text.py recipes/smollm2_cpu.yaml --out runs/own_text.jsonl --pieces 1024

Each piece is --prompt-tokens of a document that the recipe trains on, up to a place drawn from the seed and the document's
key, continued greedily for --max-tokens, or up to an end token, and cut 32 tokens after it begins to repeat itself. All
documents are cut once, then all twice, ... Rows are `input_ids` and `loss_mask`, every token but the first learned.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measure import at_least_one

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
AGAIN = 32
"""Tokens that are kept of a text which repeats itself: what starts a repetition is worth learning."""


def cut_pieces(documents: list[tuple[list[int], str]], count: int, length: int, seed: int) -> list[list[int]]:
    """`count` pieces of `length` tokens: of (ids, key), each longer than that, in an order of no meaning."""
    from peagle_train.core.cod import seeded

    pieces = []
    for number in range(count):
        again, at = divmod(number, len(documents))
        ids, key = documents[at]
        end = int(torch.randint(length, len(ids), (), generator=seeded("own text", seed, key, again)))
        pieces.append(ids[end - length : end])
    return pieces


def without_repetition(prompt: list[int], tokens: list[int]) -> list[int]:
    """The text up to the first AGAIN tokens that only repeat."""
    from peagle_train.decoding.replay import repeats

    again = repeats(prompt, tokens)
    return tokens[: again.index(True) + AGAIN] if True in again else tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--out", required=True, metavar="FILE.jsonl")
    add("--pieces", type=at_least_one, default=1024)
    add("--prompt-tokens", type=at_least_one, default=256)
    add("--max-tokens", type=at_least_one, default=128)
    add("--batch-size", type=at_least_one, default=64)
    add("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()

    from peagle_train.config import load_recipe
    from peagle_train.data.documents import SourceReport, find_all, read_documents
    from peagle_train.data.encode import Encoder
    from peagle_train.data.packing import held_out_documents
    from peagle_train.data.vocab import eos_token_ids, load_tokenizer
    from peagle_train.target_model.loading import load_model, resolve_dtype

    recipe, prompt_tokens = load_recipe(options.recipe, options.overrides), options.prompt_tokens
    path, device = recipe.target.path, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path, resolve_dtype(recipe.target.dtype, device)).to(device).eval()
    tokenizer = load_tokenizer(path, False)
    ends = set(eos_token_ids(model.config, model.generation_config, tokenizer))
    encoder = Encoder(recipe.data, tokenizer, model.config.vocab_size)
    read = [made for _, made in read_documents(find_all(recipe.data)["sources"], SourceReport(), encoder)]
    is_out = held_out_documents(np.stack([np.frombuffer(x.key, np.uint8) for x in read]), recipe.data.eval_fraction)
    long_enough = [x for x, out in zip(read, is_out) if not out and x.input_ids.size > prompt_tokens]
    long_enough.sort(key=lambda x: x.key)
    documents = [(x.input_ids.tolist(), x.key.hex()) for x in long_enough]
    pieces, written, started = cut_pieces(documents, options.pieces, prompt_tokens, options.seed), 0, time.monotonic()
    with open(options.out, "w", encoding="utf-8") as file:
        for first in range(0, len(pieces), options.batch_size):
            ids_BP = torch.tensor(pieces[first : first + options.batch_size], device=device)
            how = {"max_new_tokens": options.max_tokens, "do_sample": False, "cache_implementation": "static"}
            made = model.generate(input_ids=ids_BP, attention_mask=torch.ones_like(ids_BP), **how)
            for prompt, tokens in zip(ids_BP.tolist(), made[:, prompt_tokens:].tolist()):
                end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
                ids = prompt + without_repetition(prompt, tokens[: end + 1])
                written += len(ids)
                file.write(json.dumps({"input_ids": ids, "loss_mask": [1] * len(ids)}) + "\n")
            done, minutes = first + len(ids_BP), (time.monotonic() - started) / 60
            print(f"{done} of {len(pieces)} pieces, {written} tokens, {minutes:.1f} min", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
