"""Rows of tables (Parquet, Arrow, data sets) as the same rows of JSON would be.

A table gives every mapping of a column the fields of all of them, and null where a row has none; JSON would not have the
field. And `datasets` keeps a `Sequence` of mappings as a mapping of lists.
"""

from typing import Any

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
