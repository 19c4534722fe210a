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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from peagle_train.data.bad_row import BadRow
from peagle_train.data.chat_template import ChatTemplate, read_template
from peagle_train.data.messages import REASONING_KEYS, Conversation, parts_of, strings_in
from peagle_train.data.turns import TokenizedText, TurnFinder, mask_spans

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
