#!/usr/bin/env python
"""The target's own continuations of a recipe's documents: a source to train on beside them (docs/quality.md).

    python tools/own_text.py recipes/smollm2_cpu.yaml --out runs/own_text.jsonl --pieces 1024

Each piece is --prompt-tokens of a document of data.sources that data.eval_fraction (give the training's) does not hold
out, up to a place drawn from the seed and the document's key, continued greedily for --max-tokens, or up to an
end token, and cut 32 tokens after it begins to repeat itself. All documents are cut once, then all twice, ... Rows are
`input_ids` and `loss_mask`, every token learned. For plain text only; for chats use `peagle-train regenerate`.
"""

import argparse
import json
import math
import sys
import time
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from measure import at_least_one
from transformers import GenerationConfig

from peagle_train.cli import recipe_path
from peagle_train.config import load_recipe
from peagle_train.core.cod import seeded
from peagle_train.data.documents import find_all, read_documents
from peagle_train.data.packing import held_out_documents
from peagle_train.data.training_data import encoder_of
from peagle_train.data.vocab import eos_token_ids
from peagle_train.decoding.measure import repeats
from peagle_train.files import run_tool, write_bytes
from peagle_train.serving.start import with_start
from peagle_train.target_model.loading import load_model, resolve_dtype

KEPT = 32
"""Tokens that are kept of a text which repeats itself: what starts a repetition is worth learning."""


def cut_pieces(documents: list[tuple[np.ndarray, str]], count: int, length: int, seed: int) -> list[list[int]]:
    """`count` pieces of `length` tokens: of (ids, key), each longer than that, in any order."""
    pieces = []
    for number in range(count):
        round_, at = divmod(number, len(documents))
        ids, key = documents[at]
        end = int(torch.randint(length, len(ids), (), generator=seeded("own text", seed, key, round_)))
        pieces.append(ids[end - length : end].tolist())
    return pieces


def without_repetition(prompt: list[int], tokens: list[int]) -> list[int]:
    """The text up to the first KEPT tokens that only repeat."""
    again = repeats(prompt, tokens)
    return tokens[: again.index(True) + KEPT] if True in again else tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", type=recipe_path, help="a YAML file, or a name from peagle-train recipes")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    add("--out", required=True, type=Path, metavar="FILE.jsonl", help="a new file")
    add("--pieces", type=at_least_one, default=1024, help="how many (default %(default)s)")
    add("--prompt-tokens", type=at_least_one, default=256, help="tokens taken from a document (default %(default)s)")
    add("--max-tokens", type=at_least_one, default=128, help="most tokens that the target adds (default %(default)s)")
    add("--batch-size", type=at_least_one, default=64, help="pieces at a time (default %(default)s)")
    add("--seed", type=int, default=0, help="decides the places (default %(default)s)")
    options = parser.parse_intermixed_args()
    recipe = with_start(load_recipe(options.recipe, options.overrides), for_data=True)
    prompt_tokens = options.prompt_tokens
    if recipe.data.eval_sources:
        raise ValueError("data.eval_sources hold out what is not known here: remove them, or give data.eval_fraction")
    if options.out.exists():
        raise ValueError(f"--out {options.out} exists: remove it, or give another")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    encoder, settings = encoder_of(recipe), recipe.target
    report = find_all(recipe.data)["sources"]
    read = [made for _, made in read_documents(report, encoder)]
    print(f"data: {report.describe()}")
    if not all(x.loss_mask[1:].all() for x in read):
        raise ValueError("data.sources has chats, or tokens not to be learned: for those, peagle-train regenerate")
    keys_D32 = np.frombuffer(b"".join(x.key for x in read), np.uint8).reshape(-1, 32)
    is_out_D = held_out_documents(keys_D32, recipe.data.eval_fraction)
    if recipe.data.eval_fraction and not is_out_D.any():
        held_out = f"data.eval_fraction {recipe.data.eval_fraction:g} holds out no document"
        raise ValueError(f"{held_out}, so that training may hold out one that is not known here: raise it, or give 0")
    trained = compress(read, ~is_out_D)
    documents = sorted(
        ((x.input_ids, x.key.hex()) for x in trained if x.input_ids.size > prompt_tokens), key=lambda x: x[1]
    )
    if not documents:
        raise ValueError(f"no document to train on has more than {prompt_tokens} tokens: lower --prompt-tokens")
    pieces = cut_pieces(documents, options.pieces, prompt_tokens, options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, how = resolve_dtype(settings.dtype, device), (settings.attn_implementation, settings.trust_remote_code)
    model = load_model(settings.path, dtype, *how).to(device).eval()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if prompt_tokens + options.max_tokens > context:
        raise ValueError(f"--prompt-tokens plus --max-tokens is more than the target's context of {context} tokens")
    ends = eos_token_ids(model.config.get_text_config(), model.generation_config, encoder.tokenizer)
    # In place of the model's own, whose penalties `generate` would apply to greedy texts, too.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=(ends or [0])[0],
        suppress_tokens=[encoder.mask_token_id],  # which no row may hold
    )
    rows, written, started = list[str](), 0, time.monotonic()
    for first in range(0, len(pieces), options.batch_size):
        ids_BP = torch.tensor(pieces[first : first + options.batch_size], device=device)
        # On a CPU a cache of fixed size is several times as fast as one that is copied for each token.
        how_fast = {"cache_implementation": "static"} if device.type == "cpu" else {}
        mask_BP, most = torch.ones_like(ids_BP), options.max_tokens
        made = model.generate(input_ids=ids_BP, attention_mask=mask_BP, max_new_tokens=most, **how_fast)
        for prompt, tokens in zip(ids_BP.tolist(), made[:, prompt_tokens:].tolist()):
            end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
            ids = prompt + without_repetition(prompt, tokens[: end + 1])
            written += len(ids)
            rows.append(json.dumps({"input_ids": ids, "loss_mask": [1] * len(ids)}) + "\n")
        minutes = (time.monotonic() - started) / 60
        print(f"{len(rows)} of {len(pieces)} pieces, {written} tokens, {minutes:.1f} min", flush=True)
    write_bytes(options.out, "".join(rows).encode())


if __name__ == "__main__":
    sys.exit(run_tool("own_text", main))
