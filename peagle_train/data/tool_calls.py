"""Tool calls and tool schemas of a chat in the one shape that templates read. Arguments in a JSON string are parsed."""

import json
from typing import Any

from peagle_train.data.bad_row import BadRow


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
