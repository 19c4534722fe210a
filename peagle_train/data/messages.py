"""Rows of tables (Parquet, Arrow, data sets) as the same rows of JSON would be.

A table gives every mapping of a column the fields of all of them, and null where a row has none; JSON would not have the
field. And `datasets` keeps a `Sequence` of mappings as a mapping of lists.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# ---- bad_row
# A row of a data file that cannot be trained on, and why.


class BadRow(ValueError):
    """One row is unusable; the run counts it under `reason` and goes on, or stops, as the recipe says.

    reason: a short stable phrase, the same for every row with this fault ("broken JSON", "wrong roles", "empty turn",
        "lone surrogate", "id out of range", "null field", "no supervised token", "prefix is not a prefix",
        "template failed"): a counter's key. It never holds anything of the row itself.
    detail: one line on this row: what was found, and where.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        """Survives the way from a worker process to the main one with both fields."""
        return type(self), (self.reason, self.detail)


# ---- tool_calls
# Tool calls and tool schemas of a chat in the one shape that templates read. Arguments in a JSON string are parsed.


def tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call in the shape {"type": "function", "function": {"name", "arguments": a mapping}}; its id stays."""
    call = parse_json(call, where)
    if not isinstance(call, dict):
        raise BadRow("bad tool call", f"{where}: a tool call is a {type(call).__name__}, not a mapping")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("bad tool call", f"{where}: a tool call names no function")
    arguments = parse_json(function.get("arguments") or {}, where)
    if not isinstance(arguments, dict):
        raise BadRow("bad tool call", f"{where}: a tool call's arguments are a {type(arguments).__name__}, no mapping")
    outside = {} if function is call else {name: value for name, value in call.items() if value is not None}
    inside = {name: value for name, value in function.items() if value is not None}
    return {**outside, "type": "function", "function": {**inside, "arguments": arguments}}


def tool_schemas(tools: Any) -> list[dict[str, Any]] | None:
    """A row's tools, which may be a JSON string; None if there are none."""
    if tools is None or tools == "":
        return None
    tools = parse_json(tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong types", "tools is not a list of JSON schemas")
    return tools or None


def parse_json(value: Any, where: str) -> Any:
    """What a JSON string stands for; any other value is itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow("bad tool call", f"{where}: a string of broken JSON") from None


# ---- messages
# Rows of chats in the formats people have them in, as one: a list of messages, and which of them are learned from.
#
# Read are `messages` (role and content), ShareGPT's `conversations` (from and value), and `prompt` with `completion` (two
# lists of messages, or two strings: plain text without a chat template, as in TRL). Knows nothing of templates or tokens.

CHAT_KEYS = ("messages", "conversations", "prompt")
"""A row with one of these is a chat; the first that it has is read."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""What a message's thoughts are called in one place or another."""

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "ipython")},
    **{role: "user" for role in ("human",)},
    **{role: "assistant" for role in ("gpt", "chatgpt", "model", "bot", "function_call")},
    **{role: "tool" for role in ("function", "function_response", "observation")},
}
_UNREAD_LOSS_KEYS = ("train", "training", "trainable", "train_detail", "loss", "loss_weight", "mask", "masked")
"""Marks of other formats for what to learn from. Ignoring them would train on what they exclude."""


@dataclass(frozen=True)
class Conversation:
    """A chat as a chat template wants it, or (with `text`) a prompt and a completion without a template."""

    messages: list[dict[str, Any]]
    """Each with role and content (a string, or a list of {"type": "text", "text": ...}), and what else it came with."""
    learned: list[bool]
    """For each message whether its tokens are learned from: the assistant's, but for prompts and those of weight 0."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """The row's own variables of the template (`chat_template_kwargs`), such as enable_thinking."""
    text: tuple[str, str] | None = None
    """Prompt and completion; `messages` is then empty."""


def is_chat(row: dict[str, Any]) -> bool:
    """Whether `messages_of` is the reader of this row."""
    return any(key in row for key in CHAT_KEYS)


def keys_read(row: dict[str, Any]) -> set[str]:
    """The keys of this row that `messages_of` looks at; any other is ignored."""
    key = next((key for key in CHAT_KEYS if key in row), None)
    read = {"tools", "chat_template_kwargs", key or "messages"}
    return read | ({"completion"} if key == "prompt" else {"system"} if key == "conversations" else set())


def messages_of(row: dict[str, Any], to_ask: bool = False) -> Conversation:
    """The chat that a row holds. `to_ask`: answers will be generated, so the recorded ones may be empty or missing.

    Tool calls get one shape, {"type": "function", "function": {"name", "arguments"}}, arguments that are a JSON string
    are parsed (servers do so before they render), thoughts are there as reasoning_content and thinking, fields that are
    null are left out, and any other field is kept as it is: the template may read it.

    Raises:
        BadRow: wrong roles, wrong types, null field, empty turn, bad tool call, lone surrogate, unread loss mark,
            no assistant turn, no chat.
    """
    try:
        conversation = _read(row, to_ask)
        for text in strings_in([conversation.messages, conversation.tools, conversation.template_kwargs]):
            check_text(text)
        for text in conversation.text or ():
            check_text(text)
    except RecursionError:
        raise BadRow("wrong types", "values are nested too deeply") from None
    return conversation


def strings_in(value: Any) -> Iterator[str]:
    """Every string in nested lists and mappings, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings_in(name)
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def check_text(text: str) -> None:
    """BadRow if the string cannot be written as UTF-8: JSON allows half of a surrogate pair, no tokenizer does."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", f"character {error.start} of a text is {text[error.start]!a}") from None


def _read(row: dict[str, Any], to_ask: bool) -> Conversation:
    key = next((key for key in CHAT_KEYS if key in row), None)
    if key is None:
        raise BadRow("no chat", f"a chat has one of the keys {', '.join(CHAT_KEYS)}")
    template_kwargs = _present(row, "chat_template_kwargs", dict, {})
    if not all(isinstance(name, str) for name in template_kwargs):
        raise BadRow("wrong types", "chat_template_kwargs has a name that is no string")
    tools = tool_schemas(row.get("tools"))
    num_prompt = 0
    if key == "prompt":
        prompt, completion = _required(row, "prompt", "a row"), _required(row, "completion", "a row")
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise BadRow("empty turn", "the completion is empty")
            return Conversation([], [], text=(prompt, completion))
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise BadRow("wrong types", "prompt and completion must be two strings or two lists of messages")
        num_prompt = len(prompt)
        given = prompt + completion
    else:
        given = _required(row, key, "a row")
        if not isinstance(given, list):
            raise BadRow("wrong types", f"{key} is a {type(given).__name__}, not a list of messages")
    messages, learned = [], []
    if key == "conversations" and _present(row, "system", str, "").strip():
        messages.append({"role": "system", "content": row["system"]})
        learned.append(False)
    for number, raw in enumerate(given):
        message, weight = _message(raw, f"message {number}", to_ask)
        messages.append(message)
        learned.append(message["role"] == "assistant" and weight and number >= num_prompt)
    if to_ask:
        return Conversation(messages, learned, tools, template_kwargs)
    if not any(message["role"] == "assistant" for message in messages[num_prompt:]):
        raise BadRow("no assistant turn", f"{len(messages)} messages, none of them the assistant's to learn from")
    if not any(learned):
        raise BadRow("no assistant turn", "every message of the assistant has weight 0")
    return Conversation(messages, learned, tools, template_kwargs)


def _message(raw: Any, where: str, to_ask: bool) -> tuple[dict[str, Any], bool]:
    """The message in one shape, and whether its weight lets it be learned from."""
    if not isinstance(raw, dict):
        raise BadRow("wrong types", f"{where} is a {type(raw).__name__}, not a mapping")
    message = {name: value for name, value in raw.items() if value is not None}
    if "role" not in raw and "from" in raw:
        renamed = {"from": "role", "value": "content"}
        message = {renamed.get(name, name): value for name, value in message.items()}
    marks = [name for name in _UNREAD_LOSS_KEYS if name in message]
    if marks:
        raise BadRow("unread loss mark", f"{where} has {marks[0]}, which is not read: give weight 0 or 1")
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise BadRow("unread loss mark", f"{where} has a weight other than 0 and 1")
    if "role" not in message:
        raise BadRow("null field" if "role" in raw or "from" in raw else "wrong roles", f"{where} has no role")
    given_role = message["role"]
    if not isinstance(given_role, str) or given_role not in _ROLES:
        raise BadRow("wrong roles", f"{where} is by {str(given_role)[:40]!a}; known are {', '.join(_ROLES)}")
    role = message["role"] = _ROLES[given_role]
    if "content" in message:
        message["content"] = _content(message["content"], where)
    if given_role == "function_call":  # ShareGPT's way to write the assistant's call: its JSON is the text
        message["tool_calls"] = [message.pop("content", None)]
    if "function_call" in message:  # OpenAI's former name
        message["tool_calls"] = [message.pop("function_call")]
    if role == "assistant":
        _normalize_assistant(message, where)
    if "content" not in message:
        is_null = any(name in raw for name in ("content", "value"))
        raise BadRow("null field" if is_null else "wrong types", f"{where} (by {role}) has no content")
    is_empty = not any(part.strip() for part in parts_of(message["content"]))
    if is_empty and (role == "user" or (role == "assistant" and not (to_ask or _has_more_than_content(message)))):
        raise BadRow("empty turn", f"{where} (by {role}) is empty")
    return message, bool(weight)


def _normalize_assistant(message: dict[str, Any], where: str) -> None:
    calls = parse_json(message.pop("tool_calls", []), where)
    if not isinstance(calls, list):
        raise BadRow("wrong types", f"{where}: tool_calls is a {type(calls).__name__}, not a list")
    if calls:
        message["tool_calls"] = [tool_call(call, where) for call in calls]
    thoughts = {name: message[name] for name in REASONING_KEYS if name in message}
    for name, text in thoughts.items():
        if not isinstance(text, str):
            raise BadRow("wrong types", f"{where}: {name} is a {type(text).__name__}, not a string")
    if len(set(thoughts.values())) > 1:
        raise BadRow("wrong types", f"{where} has different thoughts as {' and '.join(thoughts)}")
    if thoughts:
        thought = next(iter(thoughts.values()))
        message.update(reasoning_content=thought, thinking=thought)
    if _has_more_than_content(message):
        message.setdefault("content", "")  # null beside tool calls; a template may search it


def _has_more_than_content(message: dict[str, Any]) -> bool:
    return "tool_calls" in message or bool(message.get("reasoning_content", "").strip())


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """A string, or several text parts; one part alone is its text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow("wrong types", f"{where}: content is a {type(content).__name__}, not a text or a list of texts")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if text is None:
            raise BadRow("null field", f"{where}: a part of content has no text")
        if not isinstance(text, str):
            raise BadRow("wrong types", f"{where}: content has a part that is no text; only texts are read")
        parts.append({"type": "text", "text": text})
    return parts if len(parts) > 1 else parts[0]["text"] if parts else ""


def parts_of(content: str | list[dict[str, Any]]) -> list[str]:
    """The texts of a message's content."""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _required(row: dict[str, Any], key: str, where: str) -> Any:
    if row.get(key) is None:
        raise BadRow("null field" if key in row else "wrong types", f"{where} has no {key}")
    return row[key]


def _present(row: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise BadRow("wrong types", f"{key} is a {type(value).__name__}, not a {kind.__name__}")
    return value


# ---- table_values
# Rows of tables (Parquet, Arrow, data sets) as the same rows of JSON would be.
#
# A table gives every mapping of a column the fields of all of them, and null where a row has none; JSON would not have the
# field. And `datasets` keeps a `Sequence` of mappings as a mapping of lists.

_MESSAGE_KEYS = ("messages", "conversations", "prompt", "completion")


def as_in_json(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the columns that are null, and without the fields that its chat's mappings do not have.

    A message's own fields stay null: those of JSON may be, too, and what that means is decided where messages are read.
    """
    row = {key: value for key, value in row.items() if value is not None}
    for key in _MESSAGE_KEYS:
        if key in row:
            row[key] = _messages(row[key])
    for key in ("tools", "chat_template_kwargs"):
        if key in row:
            row[key] = _without_null(_as_list(row[key]) if key == "tools" else row[key])
    return row


def _messages(value: Any) -> Any:
    messages = _as_list(value)
    return [_table_message(message) for message in messages] if isinstance(messages, list) else messages


def _table_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    lists = {name: _as_list(message[name]) for name in ("content", "value", "tool_calls") if name in message}
    return {
        name: value if name in ("content", "value") else _without_null(value)
        for name, value in {**message, **lists}.items()
    }


def _as_list(value: Any) -> Any:
    """A mapping of equally long lists as a list of mappings; any other value as it is."""
    if not isinstance(value, dict):
        return value
    columns = {name: column for name, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return value
    if len({len(column) for column in columns.values()}) != 1:
        return value
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _without_null(value: Any) -> Any:
    """Without the fields that are null, in mappings at any depth. Null as an item of a list stays: it was given."""
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
