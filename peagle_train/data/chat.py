"""Chats to token ids and the loss mask: what the target generates is 1, all that it is given is 0.

Which text the target generates is found by rendering prefixes with the template that serves: for the assistant's message
i, the prompt is the rendering of messages[:i] with the generation prompt, and what is generated is how the rendering of
messages[:i + 1] goes on. That holds for tool calls, tool results and thoughts alike, and needs no marks in the template.

- Generated is all up to and with the end-of-turn token. White space behind that token is the template's, not learned.
- A generation prompt that opens the thoughts (`<think>`) is prompt.
- The ids are those of the whole text tokenized once, which is what a server makes of it: a special token that is spelt
  out in someone's text becomes that token there, so it does here, and is counted.
- A token that straddles the border of a turn is not learned: the target, whose prompt ends at that border, cannot have
  generated it.
- A turn that the rest of the chat makes the template rewrite (reasoning templates drop the thoughts of turns before the
  user's last) does not stand in the text as it was generated, and cannot be learned there.
"""

import copy
import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.data.messages import REASONING_KEYS, BadRow, Conversation, parts_of, strings_in
from peagle_train.files import one_line

# ---- chat_template
# A tokenizer's chat template: rendering with it, and what it does, found out by rendering a few words.

_USER, _ASSISTANT, _NEXT = "Qwhatq", "Aanswera", "Nnextn"
"""Words to look for in what the template makes of them."""


class ChatTemplate:
    """Renders lists of messages to text, just as `apply_chat_template` does for a server.

    Args:
        tokenizer: transformers' tokenizer.
        text: a Jinja template in place of the tokenizer's own.
        template_kwargs: variables of the template.

    Raises:
        ValueError: there is no template, it cannot be rendered, or a variable's name is taken.
    """

    def __init__(self, tokenizer: Any, text: str | None, template_kwargs: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self.text = text
        self.kwargs = template_kwargs
        if text is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the target's tokenizer has no chat template: set data.chat_template to a .jinja file, the template"
                " that your server uses"
            )
        source = str(text if text is not None else tokenizer.chat_template)
        self._taken = {*inspect.signature(type(tokenizer).apply_chat_template).parameters, "messages"}
        taken = self._taken.intersection(template_kwargs)
        if taken:
            raise ValueError(f"data.template_kwargs cannot set {', '.join(sorted(taken))}: it is the row's or ours")
        self.reads_tools = "tools" in source
        self.reads_tool_calls = "tool_calls" in source
        self.reads_clock = "strftime_now" in source
        self._probe()

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of the messages; BadRow("template failed") with what the template said."""
        taken = self._taken.intersection(kwargs or {})
        if taken:
            raise BadRow("template failed", f"chat_template_kwargs cannot set {', '.join(sorted(taken))}")
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **{**self.kwargs, **(kwargs or {})},
            )
        except (ImportError, MemoryError):
            raise  # no jinja2, or no memory: not the row's fault
        except Exception as error:  # a template is foreign code, and raises whatever it likes
            said = one_line(error, 200)
            raise BadRow("template failed", f"{type(error).__name__}: {said}") from None
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

        try:
            in_text, in_parts = rendered([user]), rendered([as_parts])
        except ImportError as error:
            raise ValueError(f"chat templates take the package jinja2: {error}") from None
        self.reads_text = _USER in in_text
        # What is no list to the template it writes as Python would.
        self.reads_parts = _USER in in_parts and "{'type'" not in in_parts and '{"type"' not in in_parts
        if not self.reads_text and not self.reads_parts:
            why = failure or "what the user says is not in it"
            raise ValueError(f"the chat template cannot render a user's message ({why}): set data.chat_template")

        user, answer = self.as_it_wants(user), self.as_it_wants(answer)
        prompt, whole = rendered([user], add_generation_prompt=True), rendered([user, answer])
        if _ASSISTANT not in whole:
            why = failure or "what the assistant says is not in it"
            raise ValueError(f"the chat template cannot render an assistant's message ({why}): set data.chat_template")
        self.adds_generation_prompt = prompt != rendered([user])
        self.before_answer = whole[len(prompt) : whole.rindex(_ASSISTANT)] if whole.startswith(prompt) else ""
        """What stands between the prompt and the answer in the whole chat."""
        self.behind_answer = whole[whole.rindex(_ASSISTANT) + len(_ASSISTANT) :]
        longer = rendered([user, answer, self.as_it_wants({"role": "user", "content": _NEXT})])
        at = longer.find(_ASSISTANT)
        self.behind_earlier_answer = longer[at + len(_ASSISTANT) : longer.find(_NEXT)] if at >= 0 else ""
        """The same where another turn of the user follows, with all that leads to what the user says."""


def read_template(path: str) -> str:
    """The text of the file that data.chat_template names; ValueError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: cannot read {path} ({error})") from None
    if not text.strip():
        raise ValueError(f"data.chat_template: {path} is empty")
    return text


def check_template(path: str | None) -> None:
    """ValueError for a data.chat_template that cannot be read, be there chats or not: rows may come to be chats later."""
    if path is not None:
        read_template(path)


# ---- turns
# Where in the text of a chat the assistant's turns stand, and which tokens lie in them.
#
# A span is (start, end) in characters; n: tokens of the text, S: spans.


@dataclass(frozen=True)
class TokenizedText:
    """A text and its tokens."""

    text: str
    ids: list[int]
    starts_n: Tensor
    """int64 [n]: the character that a token begins at."""
    ends_n: Tensor
    """int64 [n]: the character behind a token's last one."""


class TurnFinder:
    """Knows the tokens and the habits of a template that tell where a turn ends.

    Added tokens (`<|im_end|>`, `<tool_call>`, ...) are those that the tokenizer never makes of other text's parts.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.added = tuple(added.values())
        self._added_ids = frozenset(added)
        self._added_or_space = re.compile("|".join([r"\s", *map(re.escape, self.added)]))
        self._chat_end = self._find_chat_end(template)

    def generated(self, whole: TokenizedText, prompt: str, until_turn: str) -> tuple[int, int] | None:
        """The span of a turn as the target generates it; None if the whole chat does not hold it so.

        Args:
            whole: the chat.
            prompt: the rendering of all messages before the turn, with the generation prompt.
            until_turn: the rendering up to and with the turn.
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

    def with_its_end(self, whole: TokenizedText, span: tuple[int, int]) -> tuple[tuple[int, int], bool]:
        """The span up to and with the end-of-turn token, and whether there is one.

        That is the last added token, if nothing but white space stands behind it; without one the span ends before its
        trailing white space.
        """
        text, (start, end) = whole.text, span
        while end > start and text[end - 1].isspace():
            end -= 1
        if not text.endswith(self.added, start, end):
            return (start, end), False
        # A token that takes the white space behind it along (rstrip, as in Phi 3) is one with it.
        for token in torch.nonzero((whole.starts_n < end) & (whole.ends_n > end)).flatten().tolist():
            token_end = int(whole.ends_n[token])
            if whole.ids[token] in self._added_ids and text[end:token_end].isspace():
                end = token_end
        return (start, end), True

    def _find_chat_end(self, template: ChatTemplate) -> str:
        """What the template writes behind a chat's last end-of-turn token but not behind earlier ones (mostly "")."""
        last, earlier = template.behind_answer, template.behind_earlier_answer
        common = _common_prefix(last, earlier)
        while common and not last.endswith(self.added, 0, common):
            common -= 1
        chat_end = last[common:].lstrip() if common else ""
        return chat_end if not self._added_or_space.sub("", chat_end) else ""


def mask_spans(whole: TokenizedText, spans: list[tuple[int, int]]) -> tuple[list[int], int]:
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


# ---- chat
# Chats to token ids and the loss mask: what the target generates is 1, all that it is given is 0.
#
# Which text the target generates is found by rendering prefixes with the template that serves: for the assistant's message
# i, the prompt is the rendering of messages[:i] with the generation prompt, and what is generated is how the rendering of
# messages[:i + 1] goes on. That holds for tool calls, tool results and thoughts alike, and needs no marks in the template.
#
# - Generated is all up to and with the end-of-turn token. White space behind that token is the template's, not learned.
# - A generation prompt that opens the thoughts (`<think>`) is prompt.
# - The ids are those of the whole text tokenized once, which is what a server makes of it: a special token that is spelt
#   out in someone's text becomes that token there, so it does here, and is counted.
# - A token that straddles the border of a turn is not learned: the target, whose prompt ends at that border, cannot have
#   generated it.
# - A turn that the rest of the chat makes the template rewrite (reasoning templates drop the thoughts of turns before the
#   user's last) does not stand in the text as it was generated, and cannot be learned there.

_VERSION = 1
"""Part of the fingerprint: raised whenever the same chat gets other ids or another mask."""

_REWRITTEN = "turns rewritten by the template, not learned"
_STRADDLING = "tokens across the border of a turn, not learned"
_SPELT_OUT = "special tokens spelt out in texts"


@dataclass(frozen=True)
class EncodedChat:
    """A chat in tokens."""

    input_ids: list[int]
    """n ids."""
    loss_mask: list[int]
    """0 or 1 for each: 1 on what the target generates."""
    counts: Mapping[str, int]
    """What was not learned, left out or peculiar, by a stable phrase each; nothing that is 0."""

    @property
    def last_turn_only(self) -> bool:
        """Whether earlier turns of the assistant are not learned because the template rewrites them."""
        return self.counts.get(_REWRITTEN, 0) > 0


class ChatEncoder:
    """Encodes chats with a tokenizer and its chat template, which is looked at when the first chat comes that takes one.

    Args:
        tokenizer: transformers' fast tokenizer of the target.
        chat_template: text of a Jinja template in place of the tokenizer's own.
        on_rewrite: of a chat whose earlier turns the template rewrites, learn from the assistant's messages behind the
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
        if tokenizer is None:
            raise ValueError("chats take a tokenizer, and target.path has none: add its files there")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "chats take a fast tokenizer (tokenizer.json), which says where in the text a token stands; that of"
                f" target.path is a {type(tokenizer).__name__}"
            )
        if on_rewrite not in ("last_turn", "refuse"):
            raise ValueError(f"on_rewrite is {on_rewrite!r}; give last_turn or refuse")
        self.on_rewrite = on_rewrite
        self._given = tokenizer
        self._template_text, self._template_kwargs = chat_template, template_kwargs or {}
        self._tokenizer = copy.deepcopy(tokenizer)
        # Post-processors add special tokens, which templates write themselves, and cut the space off a token's offsets.
        self._tokenizer.backend_tokenizer.post_processor = None
        special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special and t.content]
        self._special = re.compile("|".join(special) if special else r"(?!)")
        self._plain_start, self._plain_end = _plain_frame(tokenizer)
        self.fingerprint = self._make_fingerprint()

    @classmethod
    def from_recipe(cls, data: Any, tokenizer: Any) -> "ChatEncoder":
        """The encoder that section `data` of a recipe asks for; ValueError if its template cannot be read."""
        text = None if data.chat_template is None else read_template(data.chat_template)
        return cls(tokenizer, text, data.on_rewrite, data.template_kwargs)

    @cached_property
    def template(self) -> ChatTemplate:
        """ValueError where there is none that can be used: plain prompts and completions need none."""
        return ChatTemplate(self._given, self._template_text, self._template_kwargs)

    @cached_property
    def _turns(self) -> TurnFinder:
        return TurnFinder(self._given, self.template)

    @property
    def notices(self) -> list[str]:
        """What is peculiar about the template, in lines for the user; none without one that works (it rendered nothing)."""
        try:
            template = self.template
        except ValueError:
            return []
        lines = []
        header = template.before_answer
        if not template.adds_generation_prompt and any(token in header for token in self._turns.added):
            lines.append(
                "the chat template ignores add_generation_prompt: the header of the assistant's turns"
                f" ({header!a}) is learned as generated"
            )
        if template.reads_clock:
            lines.append("the chat template may print today's date (strftime_now): see its variables, template_kwargs")
        return lines

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Ids and mask of a chat.

        Messages behind the last that is learned from are left out, and counted: they teach nothing.

        Raises:
            ValueError: no usable template.
            BadRow: template failed, template reads no tool calls, prefix is not a prefix, no supervised token.
        """
        counts: Counter[str] = Counter()
        if conversation.text is not None:
            return self._encode_plain(*conversation.text)
        last = max(i for i, is_learned in enumerate(conversation.learned) if is_learned)
        counts["messages behind the last learned one, left out"] = len(conversation.messages) - last - 1
        messages = [self.template.as_it_wants(message) for message in conversation.messages[: last + 1]]
        if not self.template.reads_tool_calls and any("tool_calls" in message for message in messages):
            raise BadRow("template reads no tool calls", "a message of the assistant has tool_calls")

        def render(end: int, add_generation_prompt: bool = False) -> str:
            return self.template.render(
                messages[:end], conversation.tools, conversation.template_kwargs, add_generation_prompt
            )

        whole = self._tokenize(render(last + 1))
        turns = [i for i, is_learned in enumerate(conversation.learned[: last + 1]) if is_learned]
        if turns[0] == 0:
            counts["turns that open a chat, not learned"] = 1
            turns = turns[1:]
        spans: dict[int, tuple[int, int]] = {}
        for i in turns:
            span = self._turns.generated(whole, render(i, True), whole.text if i == last else render(i + 1))
            if span is not None:
                spans[i] = span
        if len(spans) < len(turns):
            spans = self._on_rewrite(messages, turns, spans)
            counts[_REWRITTEN] = len(turns) - len(spans)
        ended = [self._turns.with_its_end(whole, span) for span in spans.values()]
        counts["turns without an end-of-turn token"] = sum(not has_end for _, has_end in ended)
        mask, counts[_STRADDLING] = mask_spans(whole, [span for span, _ in ended])
        self._count_peculiarities(messages, conversation.tools, whole.text, spans, counts)
        if 1 not in mask:
            raise BadRow("no supervised token", f"{len(mask)} tokens of {len(messages)} messages")
        return EncodedChat(whole.ids, mask, dict(+counts))

    def _tokenize(self, text: str) -> TokenizedText:
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning of chats longer than the model's window: what becomes of them is said elsewhere
        )
        offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
        return TokenizedText(text, encoded["input_ids"], offsets[:, 0].contiguous(), offsets[:, 1].contiguous())

    def _on_rewrite(
        self, messages: list[dict[str, Any]], turns: list[int], spans: dict[int, tuple[int, int]]
    ) -> dict[int, tuple[int, int]]:
        if not turns or turns[-1] not in spans:
            raise BadRow(
                "prefix is not a prefix",
                "the template does not render the last turn as its generation prompt and what follows (does it drop"
                " thoughts?): set data.chat_template or data.template_kwargs",
            )
        if self.on_rewrite == "refuse":
            rewritten = next(i for i in turns if i not in spans)
            raise BadRow(
                "prefix is not a prefix",
                f"the template rewrites message {rewritten} once others follow; data.on_rewrite: last_turn learns"
                " from the last turn",
            )
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=turns[-1] - 1)
        return {i: span for i, span in spans.items() if i > last_user}

    def _count_peculiarities(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        text: str,
        exact_turns: Collection[int],
        counts: Counter[str],
    ) -> None:
        given = [{name: value for name, value in m.items() if name not in REASONING_KEYS[1:]} for m in messages]
        counts[_SPELT_OUT] = sum(self._count_special(string) for string in strings_in([given, tools]))
        counts["rows whose tools the template leaves out"] = int(bool(tools) and not self.template.reads_tools)
        thoughts = given[-1].get(REASONING_KEYS[0], "").strip()
        counts["thoughts of the last turn that the template leaves out"] = int(thoughts not in text)
        at = 0  # texts are looked for in their order, so that all of it is one pass
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i not in exact_turns:
                continue
            for part in parts_of(message["content"]):
                found = text.find(part.strip(), at)
                at = max(at, found)
                counts["texts that the template changes or leaves out"] += found < 0

    def _count_special(self, text: str) -> int:
        return sum(1 for _ in self._special.finditer(text))

    def _encode_plain(self, prompt: str, completion: str) -> EncodedChat:
        """Prompt and completion without a template, as TRL has it: bos before, eos behind, the completion learned."""
        end = "" if completion.endswith(self._plain_end) else self._plain_end
        whole = self._tokenize(prompt + completion + end)
        mask, straddling = mask_spans(whole, [(len(prompt), len(whole.text))])
        special = self._count_special(prompt) + self._count_special(completion)
        if 1 not in mask:
            raise BadRow("no supervised token", f"{len(mask)} tokens of a prompt and a completion")
        counts = Counter({_STRADDLING: straddling, _SPELT_OUT: special})
        return EncodedChat(self._plain_start + whole.ids, [0] * len(self._plain_start) + mask, dict(+counts))

    def _make_fingerprint(self) -> str:
        """sha256 of all that decides about ids and mask: templates, vocabulary, special tokens, options."""
        text = self._template_text
        own = getattr(self._tokenizer, "chat_template", None) if text is None else text
        options = {
            "version": _VERSION,
            "template": own,
            "template_kwargs": self._template_kwargs,
            "on_rewrite": self.on_rewrite,
            "special_tokens": {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()},
            "plain": [self._plain_start, self._plain_end],
        }
        backend = copy.deepcopy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        content = json.dumps(options, sort_keys=True) + backend.to_str()
        return hashlib.sha256(content.encode()).hexdigest()


def _plain_frame(tokenizer: Any) -> tuple[list[int], str]:
    """Ids that the tokenizer puts before a text (bos), and the text of eos ("" if it has none)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return framed[:at], tokenizer.eos_token or ""
