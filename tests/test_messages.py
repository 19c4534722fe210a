"""Chats in every format that is read, and what is refused with which reason."""

import json
import pickle
from typing import Any

import pytest

from peagle_train.data.messages import FORMAT, NOTHING, UNREADABLE, BadRow, messages_of, without_null

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_sharegpt_is_the_same_as_messages() -> None:
    row = {
        "system": "Be brief",
        "conversations": [
            {"from": "human", "value": "Hi", "weight": None},
            {"from": "gpt", "value": "Bye", "weight": 0},
            {"from": "user", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "Rain"},
            {"from": "chatgpt", "value": "Rain."},
        ],
    }
    conversation = messages_of(row)
    assert conversation.messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Bye"},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "Rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    assert conversation.learned == [False, False, False, False, True, False, True]


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}', "strict": None}, "id": None}],
        [CALL["function"]],
        json.dumps([CALL]),
        None,
    ],
)
def test_tool_calls_get_one_shape(calls: Any) -> None:
    given = {"function_call": CALL["function"]} if calls is None else {"tool_calls": calls}
    row = {"messages": [USER, {"role": "assistant", "content": None, **given}], "tools": "[]"}
    assert messages_of(row).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages_of(row).tools is None
    row["tools"] = json.dumps([{"name": "weather"}])
    assert messages_of(row).tools == [{"name": "weather"}]


def test_an_id_of_a_tool_call_stays_and_missing_arguments_are_none() -> None:
    call = {"id": "7", "function": {"name": "now", "arguments": ""}}
    row = {"messages": [USER, {"role": "assistant", "content": "So", "tool_calls": [call]}]}
    expected = {"id": "7", "type": "function", "function": {"name": "now", "arguments": {}}}
    assert messages_of(row).messages[1]["tool_calls"] == [expected]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_there_under_the_names_that_templates_read(name: str) -> None:
    message = messages_of({"messages": [USER, {**ANSWER, name: "Because"}]}).messages[1]
    assert message["reasoning_content"] == message["thinking"] == "Because"
    # Thoughts alone are an answer cut short, not an empty one.
    alone = messages_of({"messages": [USER, {"role": "assistant", "content": "", name: "Because"}]})
    assert alone.learned == [False, True]


def test_parts_of_content_are_joined_by_a_newline() -> None:
    parts = [{"type": "text", "text": "Hi"}, "So?"]
    for content, text in ((parts[:1], "Hi"), (parts, "Hi\nSo?")):
        assert messages_of({"messages": [{**USER, "content": content}, ANSWER]}).messages[0]["content"] == text


def test_null_fields_are_left_out_but_arguments_keep_theirs_unless_a_table_made_them() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": None}}}
    row = {"messages": [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": [call]}], "tools": None}
    first, second = messages_of(row).messages
    assert first == USER
    assert second["tool_calls"][0]["function"]["arguments"] == {"city": None}
    assert without_null({"a": None, "b": [{"c": None}, None, {"d": [None]}]}) == {"b": [{}, None, {"d": [None]}]}


def test_the_given_row_stays_as_it_was() -> None:
    row = {
        "messages": [USER, {**ANSWER, "weight": 1, "thinking": "x", "tool_calls": [CALL["function"]]}],
        "tools": "[]",
    }
    before = json.dumps(row)
    messages_of(row)
    assert json.dumps(row) == before


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ANSWER, **changes}]}


BAD = {
    FORMAT: [
        {"text": "Hi"},
        {"messages": None},
        {"messages": [["user", "Hi"]]},
        {"messages": [{"role": "user", "content": None}, ANSWER]},
        {"messages": [USER, {"role": "assistant"}]},
        {"prompt": "Hi"},
        {"prompt": "Hi", "completion": [ANSWER]},
        {"conversations": [{"from": "human", "value": None}]},
        {"conversations": [{"from": "human", "value": "Hi"}], "system": 7},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "no JSON"}]},
        turn(role="narrator"),
        turn(content=7),
        turn(content=[{"type": "image_url", "image_url": "x"}]),
        turn(thinking=["x"]),
        turn(thinking="x", reasoning="y"),
        turn(tool_calls={"a": 1}),
        turn(tool_calls=[7]),
        turn(tool_calls=[{"function": {"arguments": {}}}]),
        turn(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        turn(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
        {**turn(), "tools": [1]},
        {**turn(), "tools": "no JSON"},
        {**turn(), "chat_template_kwargs": [1]},
        turn(weight=0.5),
        turn(train=True),
    ],
    NOTHING: [
        turn(content=" \n"),
        turn(content="", tool_calls=[]),
        turn(content="", thinking=" "),
        turn(weight=0),
        {"messages": [{"role": "user", "content": "\t"}, ANSWER]},
        {"messages": [USER]},
        {"prompt": "Hi", "completion": ""},
        {"prompt": [USER, ANSWER], "completion": [USER]},
    ],
    UNREADABLE: [
        turn(content="a\ud800b"),
        turn(name="\udfff"),
        turn(tool_calls=[{"function": {"name": "f", "arguments": '{"\\ud800": 1}'}}]),
        {**turn(), "tools": [{"name": "\ud800"}]},
        {"prompt": "\ud800", "completion": "x"},
    ],
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in BAD.items() for row in rows])
def test_a_bad_row_has_a_reason_to_count_by_and_one_line_of_detail(reason: str, row: dict[str, Any]) -> None:
    with pytest.raises(BadRow) as caught:
        messages_of(row)
    error = pickle.loads(pickle.dumps(caught.value))  # as it comes from a worker process
    assert (error.reason, str(error)) == (reason, f"{reason}: {error.detail}")
    assert error.detail and error.detail.isascii() and "\n" not in error.detail and len(error.detail) < 300
