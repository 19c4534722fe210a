"""A tokenizer's chat template: rendering with it, and what it does, found out by rendering a few words."""

import inspect
from pathlib import Path
from typing import Any

from peagle_train.data.bad_row import BadRow
from peagle_train.data.messages import parts_of
from peagle_train.errors import one_line

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
