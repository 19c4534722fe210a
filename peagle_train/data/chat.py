"""Chats to token ids and the loss mask: 1 on what the target generates, 0 on everything that it is given.

Which text the target generates is found by rendering prefixes with the template that serves: for the assistant's message
i, the prompt is the rendering of messages[:i] with the generation prompt, and what is generated is how the rendering of
messages[:i + 1] continues. That holds for tool calls, tool results and thoughts alike, and needs no marks in the template.

- The turn is generated up to and including its end-of-turn token. White space after that token is the template's.
- A generation prompt that opens the thoughts (`<think>`) is prompt.
- The ids are those of the whole text tokenized once, as a server does it: a special token that is spelt out in someone's
  text becomes that token there, so it does here.
- A token across the border of a turn is not learned: the target, whose prompt ends at that border, cannot generate it.
- A turn that the template rewrites once others follow (reasoning templates drop the thoughts of turns before the user's
  last) does not stand in the text as it was generated, and cannot be learned there.

A span is (start, end) in characters; n: tokens of the text.
"""

import copy
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peagle_train.data.messages import NOTHING, TEMPLATE, BadRow, Conversation
from peagle_train.files import one_line

Span = tuple[int, int]

# verbose: no warning of documents longer than the model's window, which are split later, on purpose
IDS_ALONE = dict.fromkeys(("add_special_tokens", "return_attention_mask", "return_token_type_ids", "verbose"), False)


class TokenizedText(NamedTuple):
    """A text and its tokens: token t is characters starts_n[t] to ends_n[t], int64 [n] each."""

    text: str
    ids: list[int]
    starts_n: Tensor
    ends_n: Tensor

    def cut_at(self, border: int) -> Tensor:
        """bool [n]: tokens that begin before a character and end after it."""
        return (self.starts_n < border) & (self.ends_n > border)


class EncodedChat(NamedTuple):
    """A chat in tokens."""

    input_ids: list[int]  # n ids
    loss_mask: list[int]  # 0 or 1 for each: 1 on what the target generates
    counts: Counter[str]  # what was not learned or dropped; nothing that is 0


class ChatTemplate:
    """Renders messages as `apply_chat_template` does for a server, and finds what the target generates in the result.
    `text` is a Jinja template in place of the tokenizer's own; ValueError if there is none or it cannot render a few
    words. Added tokens (`<|im_end|>`, `<tool_call>`, ...) are those that the tokenizer never makes of parts of other
    text.
    """

    def __init__(self, tokenizer: Any, text: str | None, template_kwargs: dict[str, Any]) -> None:
        self._tokenizer, self._text, self._kwargs = tokenizer, text, template_kwargs
        source = tokenizer.chat_template if text is None else text
        if not source:
            raise ValueError("no chat template: set data.chat_template to a .jinja file, the one that your server uses")
        self.reads_tool_calls = "tool_calls" in str(source)
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self._added, self._added_ids = tuple(added.values()), frozenset(added)
        self._added_or_space = re.compile("|".join([r"\s", *map(re.escape, added.values())]))

        user, answer, following = "Qwhatq", "Aanswera", "Nnextn"
        chat = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        whole, why = "", "what is said in it is missing"
        try:
            whole = self.render(chat)
        except BadRow as error:
            why = error.detail
        if user not in whole or answer not in whole:
            raise ValueError(f"the chat template cannot render a chat ({why}): set data.chat_template")
        self.after_answer = whole.rpartition(answer)[2]
        # What the template writes after a chat's last end-of-turn token but not after earlier ones (mostly "").
        try:
            longer = self.render([*chat, {"role": "user", "content": following}])
        except BadRow:
            longer = ""
        earlier = longer.partition(answer)[2].partition(following)[0]
        common = _common_prefix(self.after_answer, earlier)
        while common and not self.after_answer.endswith(self._added, 0, common):
            common -= 1
        chat_end = self.after_answer[common:].lstrip() if common else ""
        self._chat_end = "" if self._added_or_space.sub("", chat_end) else chat_end

    def render(self, messages: list[Any], is_prompt: bool = False, tools: Any = None, kwargs: Any = None) -> str:
        """The text of the messages, and the generation prompt if `is_prompt`; BadRow with what the template said."""
        try:
            how = {"tools": tools, "chat_template": self._text, "add_generation_prompt": is_prompt}
            variables = {**self._kwargs, **(kwargs or {})}
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **how, **variables))
        except Exception as error:  # a template is foreign code, and raises whatever it likes
            raise BadRow(TEMPLATE, f"{type(error).__name__}: {one_line(error, 200)}") from None

    def generated(self, whole: TokenizedText, prompt: str, until_turn: str) -> Span | None:
        """The span of a turn as the target generates it, with its end-of-turn token: the last added token, if nothing but
        white space follows it; without one it ends before its trailing white space. None if the whole chat does not hold
        it in that form. `prompt` renders all messages before the turn, with the generation prompt; `until_turn` those up
        to it and itself.
        """
        text, start = whole.text, len(prompt)
        if not text.startswith(prompt) or not until_turn.startswith(prompt):
            return None
        if text.startswith(until_turn):
            end = len(until_turn)
            if end == len(text) and text.endswith(self._chat_end):
                end -= len(self._chat_end)
        else:
            # Only what ends the turn may differ: some templates close the last one with another token (gpt-oss, Phi 3).
            end = _common_prefix(text, until_turn)
            end = min([end, *whole.starts_n[whole.cut_at(end)].tolist()])
            if end <= start or self._added_or_space.sub("", until_turn[end:]):
                return None
        end = start + len(text[start:end].rstrip())
        if text.endswith(self._added, start, end):
            # A token that takes the white space after it along (rstrip, as in Phi 3) is one with it.
            cut = torch.nonzero(whole.cut_at(end)).flatten().tolist()
            end = max([end, *(int(whole.ends_n[token]) for token in cut if whole.ids[token] in self._added_ids)])
        return start, end


def _common_prefix(first: str, second: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


class ChatEncoder:
    """Encodes chats with a tokenizer and its chat template (or `text`, a Jinja template), which is looked at when the
    first chat needs it. Of a chat whose earlier turns the template rewrites, the assistant's messages after the user's
    last are learned. ValueError for no tokenizer, or one without offsets.
    """

    def __init__(self, tokenizer: Any, text: str | None = None, template_kwargs: dict[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("chats take a fast tokenizer: target.path has no usable tokenizer.json")
        self._text, self._kwargs = text, template_kwargs or {}
        self._tokenizer = copy.deepcopy(tokenizer)
        # Post-processors add special tokens, which templates write themselves, and cut the space off a token's offsets.
        self._tokenizer.backend_tokenizer.post_processor = None
        # What a text without a template is put between: bos by the tokenizer's own rule, and eos.
        bare, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        self._plain_start, self._plain_end = framed[:at], tokenizer.eos_token or ""

    @cached_property
    def template(self) -> ChatTemplate:
        """ValueError where there is none that can be used: plain prompts and completions need none."""
        return ChatTemplate(self._tokenizer, self._text, self._kwargs)

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Messages after the last that is learned from are dropped, and counted: they teach nothing. A prompt and a
        completion without a template are put between bos and eos, as in TRL. ValueError: no usable template. BadRow: the
        template fails, reads no tool calls or rewrites the last turn; nothing to learn from.
        """
        counts = Counter[str]()
        if conversation.text is None:
            whole, spans = self._render_chat(conversation, counts)
        else:
            prompt, completion = conversation.text
            end = "" if completion.endswith(self._plain_end) else self._plain_end
            whole = self._tokenize(prompt + completion + end)
            spans = [(len(prompt), len(whole.text))]
        is_inside_n = torch.zeros(len(whole.ids), dtype=torch.bool)
        straddles_n = torch.zeros_like(is_inside_n)
        for first, last in spans:
            is_inside_n |= (whole.starts_n >= first) & (whole.ends_n <= last) & (whole.starts_n < last)
            straddles_n |= whole.cut_at(first) | whole.cut_at(last)
        if not is_inside_n.any():
            raise BadRow(NOTHING, f"none of the {len(whole.ids)} tokens is generated after a prompt")
        counts["tokens across the border of a turn, not learned"] = int(straddles_n.sum())
        start = [] if conversation.text is None else self._plain_start
        return EncodedChat(start + whole.ids, [0] * len(start) + is_inside_n.int().tolist(), +counts)

    def _render_chat(self, conversation: Conversation, counts: Counter[str]) -> tuple[TokenizedText, list[Span]]:
        """The chat's text, and the spans of it that are learned."""
        template = self.template
        last = max(i for i, is_learned in enumerate(conversation.learned) if is_learned)
        messages = conversation.messages[: last + 1]
        if not template.reads_tool_calls and any("tool_calls" in message for message in messages):
            raise BadRow(TEMPLATE, "a message of the assistant has tool_calls, which the template does not read")

        def render(end: int, is_prompt: bool = False) -> str:
            return template.render(messages[:end], is_prompt, conversation.tools, conversation.template_kwargs)

        whole = self._tokenize(render(last + 1))
        # The first message has no prompt to be generated from.
        turns = [i for i, is_learned in enumerate(conversation.learned[: last + 1]) if is_learned and i > 0]
        spans = {}
        for i in turns:
            span = template.generated(whole, render(i, True), whole.text if i == last else render(i + 1))
            if span is not None:
                spans[i] = span
            elif i == last:
                what = "it does not render the last turn as its generation prompt and what follows (does it drop thoughts?)"
                raise BadRow(TEMPLATE, f"{what}: set data.chat_template or data.template_kwargs")
        if len(spans) < len(turns):
            users = [i for i, message in enumerate(messages) if message["role"] == "user"]
            spans = {i: span for i, span in spans.items() if i > max(users, default=last - 1)}
        counts["messages after the last learned one, dropped"] = len(conversation.messages) - last - 1
        counts["turns that cannot be learned in their chat"] = sum(conversation.learned) - len(spans)
        return whole, [*spans.values()]

    def _tokenize(self, text: str) -> TokenizedText:
        encoded = self._tokenizer(text, return_offsets_mapping=True, **IDS_ALONE)
        starts_n, ends_n = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2).T.contiguous()
        return TokenizedText(text, encoded["input_ids"], starts_n, ends_n)


def read_template(path: str | None) -> str | None:
    """The text of the file that data.chat_template names, None for none; ValueError if it cannot be read or is empty."""
    try:
        text = None if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: cannot read {path} ({error})") from None
    if text is not None and not text.strip():
        raise ValueError(f"data.chat_template: {path} is empty; give the template that your server uses")
    return text
