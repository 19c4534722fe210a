"""Chats to token ids and the loss mask: 1 on what the target generates, 0 on everything that it is given.

Which text the target generates is found by rendering prefixes with the template that serves: for the assistant's message
i, the prompt is the rendering of messages[:i] with the generation prompt, and what is generated is how the rendering of
messages[:i + 1] continues. That holds for tool calls, tool results and thoughts alike, and needs no marks in the template.

- The turn is generated up to and including its end-of-turn token. White space after that token is the template's.
- A generation prompt that opens the thoughts (`<think>`) is prompt.
- The ids are those of the whole text tokenized once, as a server does it: a special token that is spelt out in someone's
  text becomes that token there, so it does here, and is counted.
- A token across the border of a turn is not learned: the target, whose prompt ends at that border, cannot generate it.
- A turn that the template rewrites once others follow (reasoning templates drop the thoughts of turns before the user's
  last) does not stand in the text as it was generated, and cannot be learned there.

A span is (start, end) in characters; n: tokens of the text, S: spans.
"""

import copy
import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peagle_train.config import Data
from peagle_train.data.messages import (
    NOTHING,
    REASONING_KEYS,
    TEMPLATE,
    BadRow,
    Conversation,
    parts_of,
    strings_in,
)
from peagle_train.files import one_line

Span = tuple[int, int]

_VERSION = 1
"""Part of the fingerprint: raised whenever the same chat gets other ids or another mask."""
_USER, _ASSISTANT, _NEXT = "Qwhatq", "Aanswera", "Nnextn"
"""Words to look for in what the template makes of them."""

IDS_ALONE = {
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,  # no warning of documents longer than the model's window: they are split later, on purpose
}
"""What tokenizers are asked for."""

_TRAILING = "messages after the last learned one, dropped"
_UNLEARNED = "turns that cannot be learned in their chat"
_ENDLESS = "turns without an end-of-turn token"
_STRADDLING = "tokens across the border of a turn, not learned"
_SPELT_OUT = "special tokens spelt out in texts"
_OMITTED = "texts that the template changes or omits"


class TokenizedText(NamedTuple):
    """A text and its tokens: token t is characters starts_n[t] to ends_n[t], int64 [n] each."""

    text: str
    ids: list[int]
    starts_n: Tensor
    ends_n: Tensor


class EncodedChat(NamedTuple):
    """A chat in tokens."""

    input_ids: list[int]  # n ids
    loss_mask: list[int]  # 0 or 1 for each: 1 on what the target generates
    counts: Mapping[str, int]  # what was not learned, dropped or peculiar, by one of six phrases; nothing that is 0


class ChatTemplate:
    """Renders messages as `apply_chat_template` does for a server, and finds what the target generates in the result.

    What the template does is found out by rendering a few words. Added tokens (`<|im_end|>`, `<tool_call>`, ...) are those
    that the tokenizer never makes of parts of other text.

    Args:
        tokenizer: transformers' tokenizer.
        text: a Jinja template in place of the tokenizer's own.
        template_kwargs: variables of the template.

    Raises:
        ValueError: there is no template, it cannot be rendered, or a variable's name is taken.
    """

    def __init__(self, tokenizer: Any, text: str | None, template_kwargs: dict[str, Any]) -> None:
        self._tokenizer, self._text, self._kwargs = tokenizer, text, template_kwargs
        source = text if text is not None else getattr(tokenizer, "chat_template", None)
        if not source and text is None:
            raise ValueError(
                "the target's tokenizer has no chat template: set data.chat_template to a .jinja file, the template"
                " that your server uses"
            )
        self._taken = {*inspect.signature(type(tokenizer).apply_chat_template).parameters, "messages"}
        if taken := self._taken.intersection(template_kwargs):
            raise ValueError(f"data.template_kwargs cannot set {', '.join(sorted(taken))}: these are not yours to set")
        self.reads_tools, self.reads_tool_calls = "tools" in str(source), "tool_calls" in str(source)
        self.reads_clock = "strftime_now" in str(source)
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.added, self._added_ids = tuple(added.values()), frozenset(added)
        self._added_or_space = re.compile("|".join([r"\s", *map(re.escape, self.added)]))
        self._probe()

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of the messages; BadRow with what the template said."""
        if taken := self._taken.intersection(kwargs or {}):
            raise BadRow(TEMPLATE, f"chat_template_kwargs cannot set {', '.join(sorted(taken))}")
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._text,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **{**self._kwargs, **(kwargs or {})},
            )
        except MemoryError:
            raise  # not the example's fault
        except Exception as error:  # a template is foreign code, and raises whatever it likes
            raise BadRow(TEMPLATE, f"{type(error).__name__}: {one_line(error, 200)}") from None
        assert isinstance(text, str)
        return text

    def as_it_wants(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content as text or as a list of parts, whichever the template reads.

        As servers do: parts are joined by a newline where it reads text only, text becomes one part where it reads
        lists only.
        """
        content = message["content"]
        if isinstance(content, list) and not self.reads_parts:
            return {**message, "content": "\n".join(parts_of(content))}
        if isinstance(content, str) and not self.reads_text and content:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _probe(self) -> None:
        user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
        as_parts = {"role": "user", "content": [{"type": "text", "text": _USER}]}
        failure = ""

        def rendered(messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
            nonlocal failure
            try:
                return self.render(messages, add_generation_prompt=add_generation_prompt)
            except BadRow as error:
                failure = error.detail
                return ""

        def must_hold(word: str, text: str, who: str) -> None:
            if word not in text:
                why = failure or f"what the {who} says is not in it"
                raise ValueError(f"the chat template cannot render the {who}'s message ({why}): set data.chat_template")

        in_text, in_parts = rendered([user]), rendered([as_parts])
        self.reads_text = _USER in in_text
        # A template that expects no list writes it as Python would.
        self.reads_parts = _USER in in_parts and "{'type'" not in in_parts and '{"type"' not in in_parts
        must_hold(_USER, in_parts if self.reads_parts else in_text, "user")
        user, answer = self.as_it_wants(user), self.as_it_wants(answer)
        prompt, whole = rendered([user], add_generation_prompt=True), rendered([user, answer])
        must_hold(_ASSISTANT, whole, "assistant")
        self.adds_generation_prompt = prompt != rendered([user])
        header, _, last = whole.rpartition(_ASSISTANT)
        self.before_answer = header[len(prompt) :] if whole.startswith(prompt) else ""
        """What stands between the prompt and the answer in the whole chat."""
        # What the template writes after a chat's last end-of-turn token but not after earlier ones (mostly "").
        longer = rendered([user, answer, self.as_it_wants({"role": "user", "content": _NEXT})])
        earlier = longer.partition(_ASSISTANT)[2].partition(_NEXT)[0]
        common = _common_prefix(last, earlier)
        while common and not last.endswith(self.added, 0, common):
            common -= 1
        chat_end = last[common:].lstrip() if common else ""
        self._chat_end = "" if self._added_or_space.sub("", chat_end) else chat_end

    def generated(self, whole: TokenizedText, prompt: str, until_turn: str) -> Span | None:
        """The span of a turn as the target generates it; None if the whole chat does not hold it in that form.

        Args:
            whole: the chat.
            prompt: the rendering of all messages before the turn, with the generation prompt.
            until_turn: the rendering up to and including the turn.
        """
        text = whole.text
        if not text.startswith(prompt) or not until_turn.startswith(prompt):
            return None
        if text.startswith(until_turn):
            end = len(until_turn)
            if end == len(text) and self._chat_end and text.endswith(self._chat_end):
                end -= len(self._chat_end)
            return len(prompt), end
        # Only what ends the turn may differ: some templates close the last one with another token (gpt-oss, Phi 3).
        end = _common_prefix(text, until_turn)
        cut_n = (whole.starts_n < end) & (whole.ends_n > end)
        end = min([end, *whole.starts_n[cut_n].tolist()])
        is_same = end > len(prompt) and not self._added_or_space.sub("", until_turn[end:])
        return (len(prompt), end) if is_same else None

    def with_its_end(self, whole: TokenizedText, span: Span) -> tuple[Span, bool]:
        """The span up to and including the end-of-turn token, and whether there is one.

        That is the last added token, if nothing but white space follows it; without one the span ends before its trailing
        white space.
        """
        text, (start, end) = whole.text, span
        end = start + len(text[start:end].rstrip())
        if not text.endswith(self.added, start, end):
            return (start, end), False
        # A token that takes the white space after it along (rstrip, as in Phi 3) is one with it.
        for token in torch.nonzero((whole.starts_n < end) & (whole.ends_n > end)).flatten().tolist():
            token_end = int(whole.ends_n[token])
            if whole.ids[token] in self._added_ids and text[end:token_end].isspace():
                end = token_end
        return (start, end), True


def _common_prefix(first: str, second: str) -> int:
    """How many characters two strings have in common at their start, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def mask_spans(whole: TokenizedText, spans: list[Span]) -> tuple[list[int], int]:
    """1 for each token wholly inside a span (ascending, disjoint), else 0; and how many straddle a span's border."""
    if not spans:
        return [0] * len(whole.ids), 0
    first_S, last_S = torch.tensor(spans, dtype=torch.int64).T.contiguous()
    span_n = torch.searchsorted(first_S, whole.starts_n, right=True) - 1
    last_n = last_S[span_n.clamp(min=0)]
    is_inside_n = (span_n >= 0) & (whole.ends_n <= last_n) & (whole.starts_n < last_n)
    borders = torch.cat([first_S, last_S]).unique()
    next_border_n = torch.searchsorted(borders, whole.starts_n, right=True)
    is_straddling_n = next_border_n < torch.searchsorted(borders, whole.ends_n)
    return is_inside_n.int().tolist(), int(is_straddling_n.sum())


class ChatEncoder:
    """Encodes chats with a tokenizer and its chat template, which is looked at when the first chat needs it.

    Args:
        tokenizer: transformers' fast tokenizer of the target.
        chat_template: text of a Jinja template in place of the tokenizer's own.
        on_rewrite: of a chat whose earlier turns the template rewrites, learn from the assistant's messages after the
            user's last ("last_turn"), or refuse the chat ("refuse": BadRow).
        template_kwargs: variables of the template, such as enable_thinking.

    Raises:
        ValueError: no tokenizer, or one without offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        on_rewrite: str = "last_turn",
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            given = "it has none" if tokenizer is None else f"it has a {type(tokenizer).__name__}"
            raise ValueError(
                "chats take a fast tokenizer (tokenizer.json) in target.path, which says where in the text a token"
                f" stands; {given}"
            )
        self._on_rewrite, self._template_text, self._template_kwargs = on_rewrite, chat_template, template_kwargs or {}
        self._given, self._tokenizer = tokenizer, copy.deepcopy(tokenizer)
        # Post-processors add special tokens, which templates write themselves, and cut the space off a token's offsets.
        self._tokenizer.backend_tokenizer.post_processor = None
        special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
        self._special = re.compile("|".join(special) if special else r"(?!)")
        # What a text without a template is put between: bos by the tokenizer's own rule, and eos.
        bare, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        self._plain_start, self._plain_end = framed[:at], tokenizer.eos_token or ""

    @classmethod
    def from_recipe(cls, data: Data, tokenizer: Any) -> "ChatEncoder":
        """The encoder that section `data` of a recipe asks for; ValueError if its template cannot be read."""
        return cls(tokenizer, read_template(data.chat_template), data.on_rewrite, data.template_kwargs)

    @cached_property
    def template(self) -> ChatTemplate:
        """ValueError where there is none that can be used: plain prompts and completions need none."""
        return ChatTemplate(self._given, self._template_text, self._template_kwargs)

    @property
    def notices(self) -> list[str]:
        """What is peculiar about the template, in lines for the user; none without one that works (it rendered nothing)."""
        try:
            template = self.template
        except ValueError:
            return []
        lines = []
        if not template.adds_generation_prompt and any(token in template.before_answer for token in template.added):
            lines.append(
                "the chat template ignores add_generation_prompt: the header of the assistant's turns"
                f" ({template.before_answer!a}) is learned as generated"
            )
        if template.reads_clock:
            lines.append("the chat template may print today's date (strftime_now): see its variables, template_kwargs")
        return lines

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides ids and mask: templates, vocabulary, special tokens, options."""
        text = self._template_text
        options = {
            "version": _VERSION,
            "template": getattr(self._tokenizer, "chat_template", None) if text is None else text,
            "template_kwargs": self._template_kwargs,
            "on_rewrite": self._on_rewrite,
            "special_tokens": {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()},
            "plain": [self._plain_start, self._plain_end],
        }
        backend = copy.deepcopy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return hashlib.sha256((json.dumps(options, sort_keys=True) + backend.to_str()).encode()).hexdigest()

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Ids and mask of a chat.

        Messages after the last that is learned from are dropped, and counted: they teach nothing.

        Raises:
            ValueError: no usable template.
            BadRow: the template fails, reads no tool calls or rewrites the last turn; nothing to learn from.
        """
        if conversation.text is not None:
            return self._encode_plain(*conversation.text)
        template, counts = self.template, Counter[str]()
        last = max(i for i, is_learned in enumerate(conversation.learned) if is_learned)
        counts[_TRAILING] = len(conversation.messages) - last - 1
        messages = [template.as_it_wants(message) for message in conversation.messages[: last + 1]]
        if not template.reads_tool_calls and any("tool_calls" in message for message in messages):
            raise BadRow(TEMPLATE, "a message of the assistant has tool_calls, which the template does not read")

        def render(end: int, add_generation_prompt: bool = False) -> str:
            return template.render(
                messages[:end], conversation.tools, conversation.template_kwargs, add_generation_prompt
            )

        whole = self._tokenize(render(last + 1))
        # The first message has no prompt to be generated from.
        turns = [i for i, is_learned in enumerate(conversation.learned[: last + 1]) if is_learned and i > 0]
        found = {
            i: template.generated(whole, render(i, True), whole.text if i == last else render(i + 1)) for i in turns
        }
        spans = {i: span for i, span in found.items() if span is not None}
        if len(spans) < len(turns):
            if turns[-1] not in spans:
                raise BadRow(
                    TEMPLATE,
                    "it does not render the last turn as its generation prompt and what follows (does it drop thoughts?):"
                    " set data.chat_template or data.template_kwargs",
                )
            if self._on_rewrite == "refuse":
                rewritten = next(i for i in turns if i not in spans)
                raise BadRow(
                    TEMPLATE,
                    f"it rewrites message {rewritten} once others follow; data.on_rewrite: last_turn learns from the last"
                    " turn",
                )
            users = [i for i, message in enumerate(messages) if message["role"] == "user"]
            spans = {i: span for i, span in spans.items() if i > max(users, default=turns[-1] - 1)}
        counts[_UNLEARNED] = sum(conversation.learned) - len(spans)
        ended = [template.with_its_end(whole, span) for span in spans.values()]
        counts[_ENDLESS] = sum(not has_end for _, has_end in ended)
        mask, counts[_STRADDLING] = mask_spans(whole, [span for span, _ in ended])
        # A message's thoughts stand in it under several names.
        given = [{name: value for name, value in m.items() if name not in REASONING_KEYS[1:]} for m in messages]
        counts[_SPELT_OUT] = self._count_special(*strings_in([given, conversation.tools]))
        counts[_OMITTED] = _count_omitted(given, whole.text, spans)
        counts[_OMITTED] += bool(conversation.tools) and not template.reads_tools
        return _learnable(whole.ids, mask, counts)

    def _encode_plain(self, prompt: str, completion: str) -> EncodedChat:
        """Prompt and completion without a template, as TRL has it: bos first, eos last, the completion learned."""
        end = "" if completion.endswith(self._plain_end) else self._plain_end
        whole = self._tokenize(prompt + completion + end)
        mask, straddling = mask_spans(whole, [(len(prompt), len(whole.text))])
        counts = Counter({_STRADDLING: straddling, _SPELT_OUT: self._count_special(prompt, completion)})
        return _learnable(self._plain_start + whole.ids, [0] * len(self._plain_start) + mask, counts)

    def _tokenize(self, text: str) -> TokenizedText:
        encoded = self._tokenizer(text, return_offsets_mapping=True, **IDS_ALONE)
        starts_n, ends_n = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2).T.contiguous()
        return TokenizedText(text, encoded["input_ids"], starts_n, ends_n)

    def _count_special(self, *texts: str) -> int:
        return sum(len(self._special.findall(text)) for text in texts)


def _count_omitted(messages: list[dict[str, Any]], text: str, exact_turns: Collection[int]) -> int:
    """How many texts of the messages are not in the chat's; of the assistant's only those of turns that are learned."""
    omitted = int(messages[-1].get(REASONING_KEYS[0], "").strip() not in text)
    at = 0  # texts are looked for in their order, so that all of it is one pass
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i not in exact_turns:
            continue
        for part in parts_of(message["content"]):
            found = text.find(part.strip(), at)
            at = max(at, found)
            omitted += found < 0
    return omitted


def _learnable(ids: list[int], mask: list[int], counts: Counter[str]) -> EncodedChat:
    if 1 not in mask:
        raise BadRow(NOTHING, f"none of the {len(mask)} tokens is generated after a prompt")
    return EncodedChat(ids, mask, dict(+counts))


def read_template(path: str | None) -> str | None:
    """The text of the file that data.chat_template names, None for none; ValueError if it cannot be read."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: cannot read {path} ({error})") from None
    if not text.strip():
        raise ValueError(f"data.chat_template: {path} is empty")
    return text
