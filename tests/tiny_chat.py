"""A random target that can be asked: words for tokens, and a chat template."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.tiny import VOCAB, make_target

END, TURN = VOCAB - 1, VOCAB - 2
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<turn> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<turn> {% endif %}"
    "{% if think is defined %}w1 {% endif %}"
)


def make_chat_target(folder: Path, **changes: Any) -> Path:
    """Its config names the end token 3, its generation config 4 and 5, its tokenizer <end>: each other ones."""
    make_target(folder, **{"eos_token_id": 3, "max_position_embeddings": 64, **changes})
    make_tokenizer().save_pretrained(folder)
    # What a model's own settings ask for must not change what is drawn.
    GenerationConfig(do_sample=True, top_k=2, repetition_penalty=5.0, eos_token_id=[4, 5]).save_pretrained(folder)
    return folder


def make_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB - 2)}
    core = Tokenizer(models.WordLevel({**words, "<turn>": TURN, "<end>": END}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<turn>", "<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<end>", **changes})
    tokenizer.chat_template = TEMPLATE
    return tokenizer
