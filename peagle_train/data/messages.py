"""Rows, bad rows, and chats in the formats that people have them in, read as one: messages, and which are learned from.

Read are `messages` (role and content), ShareGPT's `conversations` (from and value), and `prompt` with `completion` (two
lists of messages, or two strings: plain text without a chat template, as in TRL). Templates and tokens come later.
"""

import json
from typing import Any, NamedTuple

from peagle_train.files import one_line

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # what thoughts are called
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "ipython")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation"), "tool"),
}
_UNREAD_LOSS_KEYS = ("train", "training", "trainable", "train_detail", "loss", "loss_weight", "mask", "masked")
"""Marks of other formats for what to learn from. Ignoring them would train on what they exclude."""

UNREADABLE, FORMAT, BAD_IDS = "unreadable text", "wrong format", "bad ids"
TEMPLATE, NOTHING = "does not fit the chat template", "nothing to learn from"


class BadRow(ValueError):
    """An example that cannot be trained on: `reason` is one of the five above, `detail` one line on what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def parse(content: Any) -> dict[str, Any]:
    """The mapping in a line of JSON, or a table's row, without its null fields; BadRow for anything else."""
    if isinstance(content, bytes):
        text = decode(content)
        try:
            content = _from_json(text)
        except ValueError as error:
            what = f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            raise BadRow(UNREADABLE, f"not valid JSON ({what})") from None
    elif isinstance(content, dict):
        as_given = ("input_ids", "loss_mask")  # long, and without fields
        content = {k: v if k in as_given else _without_null(v) for k, v in content.items() if v is not None}
    if not isinstance(content, dict):
        raise BadRow(FORMAT, f'give {{"messages": [...]}} or the like instead of {shown(content)}')
    return content


def decode(data: bytes) -> str:
    """A text in UTF-8, without a byte order mark; BadRow for anything else."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRow(UNREADABLE, f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})") from None


def _from_json(text: str) -> Any:
    """What a JSON text holds. ValueError if it is broken, or escapes half of a surrogate pair, which no tokenizer takes."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _without_null(value: Any) -> Any:
    """Without null fields, in mappings at any depth: a table (Parquet, Arrow, a data set) gives every mapping of a column
    the fields of all of them. Null as an item of a list stays: it was given.
    """
    if isinstance(value, dict):
        return {name: _without_null(item) for name, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    return one_line(ascii(value), 60)


class Conversation(NamedTuple):
    """A chat as a chat template wants it, or (with `text`) a prompt and a completion without a template."""

    messages: list[dict[str, Any]]  # each with role, content (a string), and what else it had
    learned: list[bool]  # for each message: the assistant's, except in prompts and with weight 0
    template_kwargs: dict[str, Any]  # the example's own variables of the template, such as enable_thinking
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the tools that the assistant may call
    text: tuple[str, str] | None = None  # prompt and completion; `messages` is then empty


def messages_of(row: dict[str, Any], to_ask: bool = False) -> Conversation:
    """The chat of an example that has `messages`, `conversations` or `prompt`, of which the first is read; BadRow: it is
    in none of the formats, or nothing to learn from. `to_ask`: answers will be generated, so the recorded ones may be
    empty or missing.

    Tool calls get one shape, {"type": "function", "function": {"name", "arguments"}}; arguments that are a JSON string
    are parsed (servers do so before they render); thoughts appear as reasoning_content and thinking; text parts are
    joined by newlines; fields that are null are removed, and any other field stays: the template may read it.
    """
    key = next(key for key in ("messages", "conversations", "prompt") if key in row)
    given, num_prompt = row[key], 0
    if key == "prompt":
        completion = row.get("completion")
        if isinstance(given, str) and isinstance(completion, str):
            if not completion:
                raise BadRow(NOTHING, "the completion is empty")
            return Conversation([], [], {}, text=(given, completion))
        if not isinstance(given, list) or not isinstance(completion, list):
            remedy = "" if completion else ": peagle-train regenerate answers prompts that have no completion"
            raise BadRow(FORMAT, f"prompt and completion must be two strings or two lists of messages{remedy}")
        num_prompt, given = len(given), given + completion
    messages, learned = [], []
    if key == "conversations" and _typed(row.get("system") or "", str, "system").strip():
        messages.append({"role": "system", "content": row["system"]})
        learned.append(False)
    for number, raw in enumerate(_typed(given, list, key)):
        message, weight = _message(raw, f"message {number}", to_ask)
        messages.append(message)
        learned.append(message["role"] == "assistant" and weight == 1 and number >= num_prompt)
    if not to_ask and not any(learned):
        raise BadRow(NOTHING, f"none of {len(messages)} messages is the assistant's, of weight 1, after the prompt")
    kwargs = _typed(row.get("chat_template_kwargs") or {}, dict, "chat_template_kwargs")
    tools = _typed(_parsed(row.get("tools") or [], "tools"), list, "tools")
    for tool in tools:
        _typed(tool, dict, "one of the tools")
    return Conversation(messages, learned, kwargs, tools or None)


def _message(raw: Any, where: str, may_be_empty: bool) -> tuple[dict[str, Any], int]:
    """The message in one shape, and its weight, 0 or 1. `may_be_empty`: if it is an answer."""
    message = {name: value for name, value in _typed(raw, dict, where).items() if value is not None}
    if "role" not in raw and "from" in raw:
        renamed = {"from": "role", "value": "content"}
        message = {renamed.get(name, name): value for name, value in message.items()}
    weight = message.pop("weight", 1)
    marks = [name for name in _UNREAD_LOSS_KEYS if name in message]
    if marks or weight not in (0, 1):
        given = marks[0] if marks else f"weight {weight!a}"
        raise BadRow(FORMAT, f"{where} has {given[:40]}, which is not read: give weight 0 or 1")
    given_role = message.get("role")
    if not isinstance(given_role, str) or given_role not in _ROLES:
        raise BadRow(FORMAT, f"{where} has the role {str(given_role)[:40]!a}; known are {', '.join(_ROLES)}")
    role = message["role"] = _ROLES[given_role]
    if "content" in message:
        message["content"] = _content(message["content"], where)
    if given_role == "function_call":  # ShareGPT's way to write the assistant's call: its JSON is the text
        message["tool_calls"] = [message.pop("content", None)]
    if "function_call" in message:  # OpenAI's former name
        message["tool_calls"] = [message.pop("function_call")]
    if role == "assistant":
        calls = _typed(_parsed(message.pop("tool_calls", []), where), list, f"tool_calls of {where}")
        if calls:
            message["tool_calls"] = [_tool_call(call, where) for call in calls]
        thoughts = [_typed(message[name], str, f"{name} of {where}") for name in _REASONING_KEYS if name in message]
        if len(set(thoughts) - {""}) > 1:
            raise BadRow(FORMAT, f"{where} has different thoughts under two names ({', '.join(_REASONING_KEYS)})")
        if thought := max(thoughts, key=len, default=""):
            message.update(reasoning_content=thought, thinking=thought)
        if calls or thought.strip():
            message.setdefault("content", "")  # null beside tool calls; a template may search it
            may_be_empty = True
    if "content" not in message:
        raise BadRow(FORMAT, f"{where} (by {role}) has no content")
    if not message["content"].strip() and (role == "user" or (role == "assistant" and not may_be_empty)):
        raise BadRow(NOTHING, f"{where} (by {role}) is empty")
    return message, weight


def _content(content: Any, where: str) -> str:
    """A string, or text parts joined by newlines, as servers do."""
    if isinstance(content, str):
        return content
    texts = []
    for part in _typed(content, list, f"content of {where}"):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise BadRow(FORMAT, f"content of {where} has a part that is not text; only text is read")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call as {"type": "function", "function": {"name", "arguments": a mapping}}; its id stays."""
    call = _typed(_parsed(call, where), dict, f"a tool call of {where}")
    function = _typed(call.get("function", call), dict, f"the function of a tool call of {where}")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(FORMAT, f"a tool call of {where} names no function")
    arguments = _typed(_parsed(function.get("arguments") or {}, where), dict, f"arguments of a tool call of {where}")
    outside = {} if function is call else {name: value for name, value in call.items() if value is not None}
    inside = {name: value for name, value in function.items() if value is not None}
    return {**outside, "type": "function", "function": {**inside, "arguments": arguments}}


def _parsed(value: Any, where: str) -> Any:
    """What a JSON string stands for; any other value is itself."""
    try:
        return _from_json(value) if isinstance(value, str) else value
    except ValueError:
        raise BadRow(FORMAT, f"{where}: a string of broken JSON") from None


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        given = "null" if value is None else f"a {type(value).__name__}"
        raise BadRow(FORMAT, f"{what} is {given}, not a {kind.__name__}")
    return value
