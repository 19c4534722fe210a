"""Documents made in a test, in bytes: read from files as a run reads them, and packed as a run packs them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peagle_train.config import Data
from peagle_train.data.documents import Documents, Kept, SourceReport, find_all, read_documents, store_documents
from peagle_train.data.encode import EncodedExample, Encoder, RawExample
from peagle_train.data.packing import PackedRows, PackReport, pack_table
from tests.chats import CHATML, stock
from tests.tiny import make_target

BYTES_VOCAB = 300
"""Ids of a target that goes with it; those from 259 on are never produced."""
BYTES_MASK = BYTES_VOCAB - 1


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens can be read: every byte is one, and so are the markers of turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=stock(CHATML))


def make_byte_target(folder: Path) -> Path:
    """A random target with this tokenizer, for texts of 4,096 bytes."""
    make_target(folder, vocab_size=BYTES_VOCAB, max_position_embeddings=4096)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


def write_stdlib_recipe(path: Path, target: Path, output: str) -> Path:
    """A recipe of two steps on a few modules of the standard library, half of which are held out."""
    exclude = ["[!s]*", "s[!et]*", "statistics.py"]
    recipe = {
        "target": {"path": str(target)},
        "data": {"sources": ["stdlib"], "exclude": exclude, "max_length": 64, "eval_fraction": 0.5, "max_eval_rows": 2},
        "draft": {"draft_vocab_size": 100, "mask_token_id": BYTES_MASK},
        "cod": {"num_depths": 4, "num_segments": 2},
        "train": {"max_steps": 2, "save_steps": 1, "log_steps": 1},
        "output": {"dir": output},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


TOKENIZER = make_byte_tokenizer()


class Document(NamedTuple):
    input_ids: Tensor  # int64 [n]
    loss_mask: Tensor  # uint8 [n]
    name: str = ""
    key: str = "0" * 64


def load(
    *sources: Any, tokenizer: Any = TOKENIZER, mask_token_id: int = -1, **data: Any
) -> tuple[list[Document], SourceReport]:
    """The documents of `sources`, in bytes, with other keys of the recipe's section in `data`."""
    section = Data([str(source) if isinstance(source, Path) else source for source in sources], **data)
    encoder, report = Encoder(section, tokenizer, BYTES_VOCAB, mask_token_id), find_all(section)["sources"]
    documents = [
        Document(torch.from_numpy(made.input_ids).long(), torch.from_numpy(made.loss_mask), raw.name, made.key.hex())
        for raw, made in read_documents(report, encoder)
    ]
    return documents, report


def write_lines(path: Path, *lines: Any) -> Path:
    """A .jsonl file of values, or of bytes as they are."""
    texts = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def table_of(documents: Sequence[Document]) -> Documents:
    raw, kept = RawExample(1.0, "", "", None), list[Kept]()
    for ids, mask, _, key in documents:
        kept.append((raw, EncodedExample("", ids.int().numpy(), mask.numpy(), bytes.fromhex(key), None)))
    return store_documents(kept)


def pack_documents(documents: Sequence[Document], max_length: int, pack: bool = True) -> tuple[PackedRows, PackReport]:
    """A few documents, once each."""
    return pack_table(table_of(documents), np.ones(len(documents), np.int64), max_length, pack)
