"""A small byte-level tokenizer, chat templates in the shapes that models have, and chats in tokens one can read."""

import re
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from peagle_train.data.chat import ChatEncoder, EncodedChat
from peagle_train.data.messages import messages_of

SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <bos> <|channel|> <|return|> </s>".split()
"""With special=True."""
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""One token each, but not special."""

WORDS = (
    "system user assistant model tool You are short . What colour is the sea ? Blue . And the grass Green Why Light"
    " Hello Hi Bye Be brief Thinking about it more weather in Oslo name arguments city get Rain cold 3 degrees today"
    " so take a coat end of story answer question final analysis"
).split()


@cache
def make_tokenizer(trim_offsets: bool = True, stripping: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every one of WORDS is a token, alone and behind a space.

    trim_offsets: offsets without the leading space, as in Llama 3. stripping: special tokens take along the white space
    behind them, as in Phi 3.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    lines = [*WORDS, *(f"x {word}" for word in WORDS)]
    tokenizer.train_from_iterator([*lines * 3, *["\n\n"] * 9], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, rstrip=stripping) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<bos>")


# Every template marks what the assistant generates for the oracle; `stock` takes the marks out. (transformers drops a
# newline that stands right behind a tag, hence some in braces.)
CHATML = (
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts stay only behind the last user's message, as an empty pair of marks if there are none; thinking can be
# switched off in the generation prompt. Tools, calls and results as in ChatML.
REASONING = (
    "{% set ns = namespace(last_user=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}"
    "{% if loop.index0 > ns.last_user %}<think>\n{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>"
    "{% endfor %}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% elif m.role == 'tool' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# A token more at the end of the whole chat, as in Phi 3.
CHAT_END = CHATML[: CHATML.rindex("{% endif %}")] + "{% else %}<|endoftext|>{% endif %}"
# The last turn ends in another token than earlier ones do, as in gpt-oss.
LAST_END = (
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}<|channel|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|channel|>{% endif %}"
)
# No special tokens but eos, a space that the assistant's turn begins with, and answers without space around them.
PLAIN = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %} {{ m.content | trim }}</s>{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }} assistant:{% endif %}"
    "{% endfor %}"
)


def stock(template: str) -> str:
    """The template as models ship it, without marks of what is generated."""
    return re.sub(r"{%-? (end)?generation -?%}", "", template)


def encoder(template: str, tokenizer: Any = None, **options: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer or make_tokenizer(), stock(template), **options)


def encode(template: str, row: dict[str, Any], tokenizer: Any = None, **options: Any) -> EncodedChat:
    return encoder(template, tokenizer, **options).encode(messages_of(row))


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """A row of messages, each written as "role: content"."""
    messages = [dict(zip(("role", "content"), turn.split(": ", 1))) for turn in turns]
    return {"messages": messages, **more}


def readable(encoded: EncodedChat, tokenizer: Any = None) -> str:
    """Tokens with blanks between them, the learned ones in [brackets]; _ is a space and \\n a newline."""
    words = []
    for token, is_learned in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        word = (tokenizer or make_tokenizer()).decode([token]).replace(" ", "_").replace("\n", "\\n")
        words.append(f"[{word}]" if is_learned else word)
    return " ".join(words)


def marked_mask(template: str, row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and mask by another route: tokens that overlap what is marked in the template, as transformers renders it (whose
    own mask, before 5.24, went on to the end of the text where a mark ended in a space that the tokenizer drops).
    """
    chat, how = messages_of(row), {"chat_template": template, "return_assistant_tokens_mask": True}
    [text], [spans] = render_jinja_template([chat.messages], tools=chat.tools, **how, **tokenizer.special_tokens_map)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(begin < e and end > b for b, e in spans)) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], mask
