"""A tokenizer whose tokens can be read: every byte is one, and so are the markers of turns."""

from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.chats import CHATML, stock
from tests.tiny import make_target

BYTES_VOCAB = 300
"""Ids of a target that goes with it; those from 259 on are never produced."""
BYTES_MASK = BYTES_VOCAB - 1


def make_byte_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer; also saved to `folder`, where one is given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=stock(CHATML))
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def make_byte_target(folder: Path) -> Path:
    """A random target with this tokenizer, for texts of 4,096 bytes."""
    make_target(folder, vocab_size=BYTES_VOCAB, max_position_embeddings=4096)
    make_byte_tokenizer(folder)
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
