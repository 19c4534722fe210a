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
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.bad_row import BadRow
from peagle_train.chat_template import ChatTemplate
from peagle_train.messages import REASONING_KEYS, Conversation, strings_in

_VERSION = 1
"""Part of the fingerprint: raised whenever the same chat gets other ids or another mask."""


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
        return self.counts.get("turns rewritten by the template, not learned", 0) > 0


class ChatEncoder:
    """Encodes chats with a tokenizer and its chat template.

    Args:
        tokenizer: transformers' fast tokenizer of the target.
        chat_template: text of a Jinja template in place of the tokenizer's own.
        on_rewrite: of a chat whose earlier turns the template rewrites, learn from the assistant's messages behind the
            user's last ("last_turn"), or refuse the chat ("refuse": BadRow).
        template_kwargs: variables of the template, such as enable_thinking.

    Raises:
        ValueError: no tokenizer, one without offsets, or no usable template.
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
        self.template = ChatTemplate(tokenizer, chat_template, template_kwargs or {})
        self.on_rewrite = on_rewrite
        self._tokenizer = copy.deepcopy(tokenizer)
        # Post-processors add special tokens, which templates write themselves, and cut the space off a token's offsets.
        self._tokenizer.backend_tokenizer.post_processor = None
        self._added_ids = torch.tensor(sorted(tokenizer.added_tokens_decoder), dtype=torch.int64)
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self._added = tuple(token.content for token in added)
        self._only_added = re.compile("|".join([r"\s", *map(re.escape, self._added)]))
        special = [re.escape(token.content) for token in added if token.special]
        self._special = re.compile("|".join(special) if special else r"(?!)")
        self._chat_end = self._find_chat_end()
        self._plain_start, self._plain_end = _plain_frame(tokenizer)
        self.fingerprint = self._make_fingerprint()

    @classmethod
    def from_recipe(cls, data: Any, tokenizer: Any) -> "ChatEncoder":
        """The encoder that section `data` of a recipe asks for; ValueError if its template cannot be read."""
        text = None if data.chat_template is None else _read_template(data.chat_template)
        return cls(tokenizer, text, data.on_rewrite, data.template_kwargs)

    @property
    def notices(self) -> list[str]:
        """What is peculiar about the template, in lines for the user."""
        lines = []
        if not self.template.adds_generation_prompt and any(t in self.template.before_answer for t in self._added):
            lines.append(
                "the chat template ignores add_generation_prompt: the header of the assistant's turns"
                f" ({self.template.before_answer!a}) is learned as generated"
            )
        if self.template.reads_clock:
            lines.append("the chat template may print today's date (strftime_now): see its variables, template_kwargs")
        return lines

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Ids and mask of a chat.

        Messages behind the last that is learned from are left out, and counted: they teach nothing.

        Raises:
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

        text = render(last + 1)
        ids, starts_n, ends_n = self._tokenize(text)
        turns = [i for i, is_learned in enumerate(conversation.learned[: last + 1]) if is_learned]
        if turns[0] == 0:
            counts["turns that open a chat, not learned"] = 1
            turns = turns[1:]
        spans: dict[int, tuple[int, int]] = {}
        for i in turns:
            span = self._generated(text, render(i, True), text if i == last else render(i + 1), starts_n, ends_n)
            if span is not None:
                spans[i] = span
        if len(spans) < len(turns):
            spans = self._on_rewrite(messages, turns, spans)
            counts["turns rewritten by the template, not learned"] = len(turns) - len(spans)
        ended = [self._end_of_turn(text, start, end, ids, starts_n, ends_n) for start, end in spans.values()]
        counts["turns without an end-of-turn token"] = sum(not has_end for _, _, has_end in ended)
        mask, counts["tokens across the border of a turn, not learned"] = _mask(
            [(start, end) for start, end, _ in ended], starts_n, ends_n
        )
        counts += self._peculiarities(messages, conversation.tools, text)
        if 1 not in mask:
            raise BadRow("no supervised token", f"{len(ids)} tokens of {len(messages)} messages")
        return EncodedChat(ids, mask, dict(+counts))

    def _tokenize(self, text: str) -> tuple[list[int], Tensor, Tensor]:
        """Ids, and where each token starts and ends in the text: int64 [n]."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets = torch.tensor(encoded["offset_mapping"], dtype=torch.int64).reshape(-1, 2)
        return encoded["input_ids"], offsets[:, 0].contiguous(), offsets[:, 1].contiguous()

    def _generated(
        self, text: str, prompt: str, until_turn: str, starts_n: Tensor, ends_n: Tensor
    ) -> tuple[int, int] | None:
        """Where in the text a turn stands as it was generated behind its prompt; None if it does not."""
        if not text.startswith(prompt) or not until_turn.startswith(prompt):
            return None
        if text.startswith(until_turn):
            end = len(until_turn)
            if end == len(text) and self._chat_end and text.endswith(self._chat_end):
                end -= len(self._chat_end)
            return len(prompt), end
        # Only the end of the turn may differ: some templates close the last turn with another token.
        common = _common_prefix(text, until_turn)
        inside_n = (starts_n < common) & (ends_n > common)
        common = min([common, *starts_n[inside_n].tolist()])
        rest = until_turn[common:]
        is_end_only = common > len(prompt) and not self._only_added.sub("", rest)
        return (len(prompt), common) if is_end_only else None

    def _end_of_turn(
        self, text: str, start: int, end: int, ids: list[int], starts_n: Tensor, ends_n: Tensor
    ) -> tuple[int, int, bool]:
        """The span up to and with its end-of-turn token, and whether it has one."""
        while end > start and text[end - 1].isspace():
            end -= 1
        if not text.endswith(self._added, start, end):
            return start, end, False
        # A token that takes the white space behind it along (rstrip) is one with it.
        for token in torch.nonzero((starts_n < end) & (ends_n > end)).flatten().tolist():
            if (self._added_ids == ids[token]).any() and text[end : int(ends_n[token])].isspace():
                end = int(ends_n[token])
        return start, end, True

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

    def _peculiarities(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str
    ) -> Counter[str]:
        counts: Counter[str] = Counter()
        for given in strings_in([messages, tools]):
            counts["special tokens spelt out in texts"] += sum(1 for _ in self._special.finditer(given))
        if tools and not self.template.reads_tools:
            counts["rows whose tools the template leaves out"] = 1
        thoughts = next((messages[-1][key] for key in REASONING_KEYS if key in messages[-1]), "")
        if thoughts.strip() not in text:
            counts["thoughts of the last turn that the template leaves out"] = 1
        at = 0
        for message in messages:
            said = message["content"] if message["role"] != "assistant" else ""
            for part in [said] if isinstance(said, str) else [part["text"] for part in said]:
                found = text.find(part.strip(), at)
                at = max(at, found)
                counts["texts that the template changes or leaves out"] += found < 0
        return counts

    def _encode_plain(self, prompt: str, completion: str) -> EncodedChat:
        """Prompt and completion without a template, as TRL has it: bos before, eos behind, the completion learned."""
        text = prompt + completion
        if not completion.endswith(self._plain_end):
            text += self._plain_end
        ids, starts_n, ends_n = self._tokenize(text)
        mask, straddling = _mask([(len(prompt), len(text))], starts_n, ends_n)
        counts = Counter({"tokens across the border of a turn, not learned": straddling})
        for given in (prompt, completion):
            counts["special tokens spelt out in texts"] += sum(1 for _ in self._special.finditer(given))
        if 1 not in mask:
            raise BadRow("no supervised token", f"{len(ids)} tokens of a prompt and a completion")
        return EncodedChat(self._plain_start + ids, [0] * len(self._plain_start) + mask, dict(+counts))

    def _find_chat_end(self) -> str:
        """What the template writes behind a chat's last end-of-turn token, and not behind earlier ones ("" mostly)."""
        last, earlier = self.template.behind_answer, self.template.behind_earlier_answer
        common = _common_prefix(last, earlier)
        while common and not last.endswith(self._added, 0, common):
            common -= 1
        chat_end = last[common:].lstrip() if common else ""
        return chat_end if chat_end and not self._only_added.sub("", chat_end) else ""

    def _make_fingerprint(self) -> str:
        """sha256 of all that decides about ids and mask: templates, vocabulary, special tokens, options."""
        own = getattr(self._tokenizer, "chat_template", None) if self.template.text is None else self.template.text
        options = {
            "version": _VERSION,
            "template": own,
            "template_kwargs": self.template.kwargs,
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


def _read_template(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: cannot read {path} ({error})") from None
    if not text.strip():
        raise ValueError(f"data.chat_template: {path} is empty")
    return text


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


def _mask(spans: list[tuple[int, int]], starts_n: Tensor, ends_n: Tensor) -> tuple[list[int], int]:
    """1 for the tokens wholly inside a span (ascending, disjoint), and how many straddle a span's border."""
    if not spans:
        return [0] * starts_n.numel(), 0
    first_S, last_S = torch.tensor(spans, dtype=torch.int64).T.contiguous()
    span_n = torch.searchsorted(first_S, starts_n, right=True) - 1
    last_n = last_S[span_n.clamp(min=0)]
    is_inside_n = (span_n >= 0) & (ends_n <= last_n) & (starts_n < last_n)
    borders = torch.cat([first_S, last_S]).unique()
    next_border_n = torch.searchsorted(borders, starts_n, right=True)
    straddles_n = next_border_n < torch.searchsorted(borders, ends_n)
    return is_inside_n.int().tolist(), int(straddles_n.sum())
