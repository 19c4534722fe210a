"""What a run learns from: its recipe's sequences, made now or prepared once for many runs, and their collator.

A prepared folder is whole or not there:
    sources-ids.bin, sources-mask.bin   tokens of all documents, see `TokenStore`; also eval_sources-...
    train.safetensors                   where the sequences' tokens are, see `PackedRows`, and counts_V
    held_out.safetensors                the same of the held-out sequences
    index.json                          the settings it was made with, the sums of the files and its own, what is said of it
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

from peagle_train.config import Recipe
from peagle_train.core.attention import uses_flex
from peagle_train.core.collator import CODCollator
from peagle_train.core.flex import BLOCK_SIZE
from peagle_train.data.chat import read_template
from peagle_train.data.documents import SourceReport, find_all, open_tokens, read_documents
from peagle_train.data.encode import Encoder
from peagle_train.data.packing import PackedRows, PackReport, TrainingData, make_data
from peagle_train.data.vocab import choose_mask_token, load_config, load_tokenizer
from peagle_train.files import alone_in, checksum, one_line, read_sealed, sha256_of, write_folder, write_json

INDEX, TRAIN, HELD_OUT = "index.json", "train.safetensors", "held_out.safetensors"
FORMAT = 7  # raised whenever the same recipe and files give other bytes
_DATA_KEYS = ("sources extensions exclude eval_sources eval_fraction max_length pack template_kwargs").split()
"""Of the recipe's data section, what decides the sequences. (max_bad_rows only decides whether there are any.)"""


def load_training_data(encoder: Encoder, say: Callable[[str], object] = print) -> TrainingData:
    """The sequences that the encoder's data section names: read, tokenized and packed now, or as they were prepared.
    The same on every machine and rank, and no rank waits for another here. `say` takes each line of the report.
    ValueError, one line, for a user's mistake.
    """
    data = encoder.data
    if data.prepared is not None:
        made = open_prepared(Path(data.prepared), settings_of(encoder))
        say(f"data: as prepared in {data.prepared}, checksums verified")
    else:
        read_template(data.chat_template)  # a mistake even where no example is a chat
        made = make_data(encoder, find_all(data))
    for line in made.lines:
        say(line)
    eval_rows = made.eval_rows.limit(data.max_eval_rows)
    if len(eval_rows) < len(made.eval_rows):
        say(f"held out: {len(eval_rows)} of these sequences are evaluated on (data.max_eval_rows)")
    if data.eval_fraction > 0 and not len(eval_rows):
        say("no evaluation: a single document can be learned from, and is; give more, or data.eval_sources")
    return made._replace(eval_rows=eval_rows)


def encoder_of(recipe: Recipe, vocab_size: int | None = None, **how: Any) -> Encoder:
    """The recipe's encoder; `how`: its other fields. ValueError: a user's mistake.

    vocab_size: the target's; None: as its config.json says, so that of the target only config and tokenizer are read.
    """
    path, trusted = recipe.target.path, recipe.target.trust_remote_code
    tokenizer, size = (
        load_tokenizer(path, trusted),
        vocab_size or load_config(path, trusted).get_text_config().vocab_size,
    )
    mask_token_id = choose_mask_token(recipe.draft, recipe.data, tokenizer, size)
    return Encoder(recipe.data, tokenizer, size, mask_token_id, **how)


def make_collator(recipe: Recipe, seed: int, device: torch.device | None = None) -> CODCollator:
    """`device`: that the drafter trains on, for its attention's blocks."""
    cod, multiple = recipe.cod, BLOCK_SIZE if device and uses_flex(device) else 1
    sizes = recipe.data.max_length, cod.num_depths, cod.down_sample_ratio, cod.down_sample_ratio_min, cod.segments
    return CODCollator(*sizes, cod.boundaries, seed, capacity_multiple=multiple, max_anchors=cod.max_anchors)


def prepare_recipe(recipe: Recipe, folder: Path, num_workers: int = 1) -> TrainingData:
    """Make the folder that `data.prepared` may name; returns what training will read. A finished one is only checked.
    ValueError, one line, for a user's mistake, for a folder of something else, and for sources that have changed.
    """
    data, encoder = recipe.data, encoder_of(recipe, num_workers=num_workers, progress=True)
    settings, found = settings_of(encoder), find_all(data)
    names = {
        role: [(f.name, f.format, 0 if f.format == "hub" else os.path.getsize(f.path)) for f in files.files]
        for role, files in found.items()
    }
    settings["names and sizes of the sources' files"] = checksum(names)
    if (folder / INDEX).exists():
        print(f"{folder} is finished: checking it (named data sets are compared by their names only)")
        return open_prepared(folder, settings)

    def fill(partial: Path) -> None:
        made = make_data(encoder, found, partial)
        save_file({**made.train_rows.layout, "counts_V": made.counts_V.numpy()}, partial / TRAIN)
        save_file(made.eval_rows.layout, partial / HELD_OUT)
        index = {
            "settings": settings,
            "files": {path.name: sha256_of(path) for path in sorted(partial.iterdir())},
            "report": asdict(made.report),
            "lines": made.lines,
        }
        write_json(partial / INDEX, {**index, "sha256": checksum(index)})

    with alone_in(folder, "preparing"):
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no prepared data; give another folder")
        write_folder(folder, fill)
    return open_prepared(folder, settings)


def check_data(recipe: Recipe, num_workers: int) -> None:
    """Read everything and print what cannot be used, by reason, with the first of each. ValueError: a run would stop."""
    encoder, reports = encoder_of(recipe, num_workers=num_workers, progress=True), list[SourceReport]()
    for role, found in find_all(recipe.data).items():
        reports.append(SourceReport())
        for _ in read_documents(found, reports[-1], encoder, max_bad_rows="100%"):
            pass
        print(f"data.{role}: {reports[-1].describe()}")
    for report in reports:
        report.check_bad(recipe.data.max_bad_rows)


def settings_of(encoder: Encoder) -> dict[str, Any]:
    """All that decides the sequences besides the files, by its name for users. ValueError for an unreadable template."""
    data, tokenizer = encoder.data, encoder.tokenizer
    own_template, backend = getattr(tokenizer, "chat_template", None), None
    if getattr(tokenizer, "is_fast", False):
        # Padding and truncation are how it was last called, not what it is.
        backend = {**json.loads(tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
    elif tokenizer is not None:
        backend = tokenizer.get_vocab()
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    settings = {
        "the format of prepared data": FORMAT,
        **{f"data.{key}": getattr(data, key) for key in _DATA_KEYS},
        "the target's vocabulary": encoder.vocab_size,
        "draft.mask_token_id": encoder.mask_token_id,
        "the target's tokenizer": checksum([type(tokenizer).__name__, special, backend]),
        "the chat template": checksum(read_template(data.chat_template) or own_template),
    }
    return dict(json.loads(json.dumps(settings)))  # as it is read back


def open_prepared(folder: Path, settings: dict[str, Any]) -> TrainingData:
    """The sequences of a prepared folder; the same as if they were made now, but mapped from their files. ValueError, one
    line, for a folder that is not finished, was made for other settings, or whose files were changed.
    """
    index = read_sealed(folder / INDEX)
    if index is None:
        raise ValueError(f"data.prepared {folder} holds no prepared data; peagle-train prepare makes it")
    for key, now in settings.items():
        if now != (then := index["settings"].get(key)):
            change = f"{key} {one_line(json.dumps(then), 60)}, while it is {one_line(json.dumps(now), 60)} now"
            raise ValueError(f"data.prepared {folder} was made with {change}: change that, or prepare anew elsewhere")
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one process of a machine is enough: if it fails, all end
        for name, written in index["files"].items():
            if not (folder / name).is_file() or sha256_of(folder / name) != written:
                remedy = "remove the folder and prepare it again"
                raise ValueError(f"data.prepared {folder}: {name} is missing or was changed: {remedy}")
    train, held_out = load_file(folder / TRAIN), load_file(folder / HELD_OUT)
    counts_V = torch.from_numpy(train.pop("counts_V"))
    eval_role = "eval_sources" if settings["data.eval_sources"] else "sources"
    train_rows, eval_rows = (
        PackedRows(open_tokens(folder / role), layout) for role, layout in (("sources", train), (eval_role, held_out))
    )
    return TrainingData(train_rows, eval_rows, counts_V, PackReport(**index["report"]), index["lines"])
