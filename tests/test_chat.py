"""Chats in tokens: what is learned, typed out token by token, for templates of the shapes that models have."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from peagle_train.config import Data
from peagle_train.data.chat import ChatEncoder
from peagle_train.data.messages import NOTHING, TEMPLATE, BadRow, messages_of
from tests import chats
from tests.chats import WORDS, chat, encode, encoder, make_tokenizer, marked_mask, readable, stock

SEA = chat("system: You are short.", "user: What colour is the sea?", "assistant: Blue.")
GRASS = chat(*(f"{m['role']}: {m['content']}" for m in SEA["messages"]), "user: And the grass?", "assistant: Green.")
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
WEATHER = {
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    "messages": [
        {"role": "user", "content": "What weather is today in Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "Thinking about it.",
            "tool_calls": [{"type": "function", "id": "1", "function": {**CALL, "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "Rain, 3 degrees"},
        {"role": "assistant", "content": "Rain today.", "reasoning": "3 degrees"},
    ],
}
THOUGHTFUL = {
    "messages": [
        {"role": "user", "content": "What colour is the sea?"},
        {"role": "assistant", "reasoning_content": "Light", "content": "Blue."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "reasoning_content": "Thinking more", "content": "Light."},
    ],
}


def test_chatml() -> None:
    encoded = encode(chats.CHATML, GRASS)
    assert readable(encoded) == (
        r"<|im_start|> system \n You _are _short . <|im_end|> \n "
        r"<|im_start|> user \n What _colour _is _the _sea ? <|im_end|> \n "
        r"<|im_start|> assistant \n [Blue] [.] [<|im_end|>] \n "
        r"<|im_start|> user \n And _the _grass ? <|im_end|> \n "
        r"<|im_start|> assistant \n [Green] [.] [<|im_end|>] \n"
    )
    assert encoded.counts == {}


def test_a_reasoning_template_drops_earlier_thoughts_so_the_last_turn_is_learned_with_its_own() -> None:
    encoded = encode(chats.REASONING, THOUGHTFUL)
    assert readable(encoded) == (
        r"<|im_start|> user \n What _colour _is _the _sea ? <|im_end|> \n "
        r"<|im_start|> assistant \n Blue . <|im_end|> \n "
        r"<|im_start|> user \n Why ? <|im_end|> \n "
        r"<|im_start|> assistant \n "
        r"[<think>] [\n] [Thinking] [_more] [\n] [</think>] [\n] [\n] [Light] [.] [<|im_end|>] \n"
    )
    assert encoded.counts == {UNLEARNED: 1}


def test_thoughts_that_the_generation_prompt_opens_and_closes_are_prompt() -> None:
    row = chat("user: Why?", "assistant: Light.")
    encoded = encode(chats.REASONING, row, template_kwargs={"enable_thinking": False})
    assert readable(encoded) == (
        r"<|im_start|> user \n Why ? <|im_end|> \n "
        r"<|im_start|> assistant \n <think> \n\n </think> \n \n [Light] [.] [<|im_end|>] \n"
    )
    # As the row's own variable, too; and without it the target generates the marks itself.
    own = {**row, "chat_template_kwargs": {"enable_thinking": False}}
    assert encode(chats.REASONING, own).loss_mask == encoded.loss_mask
    assert r"assistant \n [<think>] [\n\n] [</think>] [\n] [\n] [Light]" in readable(encode(chats.REASONING, row))


def test_tool_calls_are_learned_and_tool_results_are_not_with_the_thoughts_of_every_step() -> None:
    encoded = encode(chats.REASONING, WEATHER)
    found = readable(encoded)
    tools, found = found.split(r" <|im_end|> \n ", 1)
    assert tools.startswith(r"<|im_start|> system \n { ") and "[" not in tools
    assert found == (
        r"<|im_start|> user \n What _weather _is _today _in _Oslo ? <|im_end|> \n "
        r"<|im_start|> assistant \n [<think>] [\n] [Thinking] [_about] [_it] [.] [\n] [</think>] [\n\n] "
        r'[<tool_call>] [\n] [{] ["] [name] ["] [:] [_] ["] [weather] ["] [,] [_] ["] [arguments] ["] [:] [_] '
        r'[{] ["] [city] ["] [:] [_] ["] [Oslo] ["] [}] [}] [\n] [</tool_call>] [<|im_end|>] \n '
        r"<|im_start|> user \n Rain , _3 _degrees <|im_end|> \n "
        r"<|im_start|> assistant \n [<think>] [\n] [3] [_degrees] [\n] [</think>] [\n] [\n] "
        r"[Rain] [_today] [.] [<|im_end|>] \n"
    )
    assert encoded.counts == {}


BLANKS = chat("user: Hello", "assistant:  Hi \n\n", "user: Bye ", "assistant: \n Bye", "user: So?", "assistant: So\n")
BORDER = "tokens across the border of a turn, not learned"
UNLEARNED = "turns that cannot be learned in their chat"
ORACLE_ROWS = [
    SEA,
    GRASS,
    THOUGHTFUL,
    WEATHER,
    BLANKS,
    chat("system: ", "user: Hello", "assistant: Hi", "assistant: Bye"),
    chat("user: \u00e9t\u00e9 \U0001f600 \u4f60\u597d", "assistant: \u4f60\u597d, \U0001f600\u00e9"),
]


@pytest.mark.parametrize("row", ORACLE_ROWS)
@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "TOOLS", "PLAIN"])
def test_masks_are_those_of_the_same_template_with_marks(name: str, row: dict[str, Any]) -> None:
    template = getattr(chats, name)
    tokenizer = make_tokenizer(trim_offsets=False)
    try:
        encoded = encode(template, row, tokenizer)
    except BadRow as error:
        assert error.reason == TEMPLATE, "only what a template cannot hold"
        assert row is WEATHER
        return
    ids, mask = marked_mask(template, row, tokenizer)
    assert encoded.input_ids == ids
    # transformers also marks a token that begins in the prompt and ends in the answer; we do not, and count it.
    differences = [(ours, theirs) for ours, theirs in zip(encoded.loss_mask, mask) if ours != theirs]
    assert differences == [(0, 1)] * encoded.counts.get(BORDER, 0)
    assert bool(differences) == (row is BLANKS and name in ("CHATML", "TOOLS"))


def test_a_space_that_the_prompt_ends_in_is_never_learned_with_the_word_after_it() -> None:
    # As in Vicuna: the server's prompt ends in the space, so that the target cannot begin with "_Blue".
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}assistant: {{ m.content }}</s>{% else %}user: {{ m.content }} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = chat("user: What colour is the sea?", "assistant: Blue.")
    for trim_offsets in (False, True):
        encoded = encode(template, row, make_tokenizer(trim_offsets))
        assert readable(encoded) == "user : _What _colour _is _the _sea ? _assistant : _Blue [.] [</s>]"
        assert encoded.counts == {BORDER: 1}


PIECES = [*WORDS[:20], " ", "\n", "\n\n", " \n", "\t", "\u00e9", "e\u0301", "\U0001f600", "\u4f60", "\u00a0", "\r\n"]
PIECES += ["a\u0323\u0307", "<|im_end|>", "<think>", "</s>"]


def test_masks_of_random_chats_are_those_of_marks_in_the_template() -> None:
    rng = random.Random(0)
    nfc = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    nfc.normalizer = NFC()
    tokenizers = [make_tokenizer(), make_tokenizer(stripping=True), PreTrainedTokenizerFast(tokenizer_object=nfc)]
    templates = [chats.CHATML, chats.LLAMA3, chats.TOOLS, chats.PLAIN]
    made = [(template, tokenizer, encoder(template, tokenizer)) for template in templates for tokenizer in tokenizers]
    straddling = 0
    for _ in range(40):
        texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 6))) + rng.choice(["x", "x\n"]) for _ in range(4)]
        row = chat(*(f"{('user', 'assistant')[i % 2]}: {text}" for i, text in enumerate(texts)))
        for template, tokenizer, encodes in made:
            encoded = encodes.encode(messages_of(row))
            ids, mask = marked_mask(template, row, tokenizer)
            assert encoded.input_ids == ids
            differences = [(ours, theirs) for ours, theirs in zip(encoded.loss_mask, mask) if ours != theirs]
            assert differences == [(0, 1)] * encoded.counts.get(BORDER, 0), (texts, template)
            straddling += len(differences)
    assert straddling > 0, "some texts run into the prompt before them"


def test_ids_are_those_of_the_serving_path() -> None:
    for row in ORACLE_ROWS:
        for template in (chats.CHATML, chats.LLAMA3, chats.REASONING, chats.CHAT_END, chats.LAST_END):
            try:
                ids = encode(template, row).input_ids
            except BadRow as error:
                assert error.reason == TEMPLATE
                continue
            conversation = messages_of(row)
            assert ids == make_tokenizer().apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                chat_template=stock(template),
                return_dict=False,
            )


def test_a_token_after_the_whole_chat_that_no_earlier_turn_has_is_not_learned() -> None:
    assert readable(encode(chats.CHAT_END, chat("user: Hello", "assistant: Hi"))) == (
        r"<|im_start|> user \n Hello <|im_end|> \n <|im_start|> assistant \n [Hi] [<|im_end|>] \n <|endoftext|>"
    )
    two = encode(chats.CHAT_END, GRASS)
    assert (sum(two.loss_mask), two.counts) == (6, {})


def test_end_tokens_that_differ_in_the_last_turn_leave_the_earlier_turns_learned_but_for_their_end() -> None:
    encoded = encode(chats.LAST_END, chat("user: Hello", "assistant: Hi", "user: Bye", "assistant: Bye"))
    assert readable(encoded) == (
        "<|im_start|> user <|channel|> Hello <|im_end|> <|im_start|> assistant <|channel|> [Hi] <|im_end|> "
        "<|im_start|> user <|channel|> Bye <|im_end|> <|im_start|> assistant <|channel|> [Bye] [<|return|>]"
    )
    assert encoded.counts == {"turns without an end-of-turn token": 1}


def test_an_end_token_that_takes_the_newline_after_it_along_is_learned_with_it() -> None:
    tokenizer = make_tokenizer(stripping=True)
    row, behind = chat("user: Hello", "assistant: Hi"), {"CHATML": "", "CHAT_END": " <|endoftext|>"}
    for name, end in behind.items():
        encoded = encode(getattr(chats, name), row, tokenizer)
        # No newline of its own behind <|im_end|>: it is part of that token, whose text shows none.
        assert readable(encoded, tokenizer) == (
            r"<|im_start|> user \n Hello <|im_end|> <|im_start|> assistant \n [Hi] [<|im_end|>]" + end
        )


def test_refuse_takes_no_chat_that_the_template_rewrites() -> None:
    with pytest.raises(BadRow, match="rewrites message 1 once others follow") as error:
        encode(chats.REASONING, THOUGHTFUL, on_rewrite="refuse")
    assert error.value.reason == TEMPLATE
    assert encode(chats.REASONING, WEATHER, on_rewrite="refuse") == encode(chats.REASONING, WEATHER)
    # The generation prompt opens thoughts that the rendered turn does not have: not even the last turn can be learned.
    template = chats.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    for on_rewrite in ("last_turn", "refuse"):
        with pytest.raises(BadRow, match="does it drop thoughts"):
            encode(template, SEA, on_rewrite=on_rewrite)


def test_last_turn_means_the_steps_of_the_assistant_after_the_last_user() -> None:
    both = {"tools": WEATHER["tools"], "messages": THOUGHTFUL["messages"] + WEATHER["messages"]}
    alone, encoded = encode(chats.REASONING, WEATHER), encode(chats.REASONING, both)
    assert encoded.counts == {UNLEARNED: 2}
    assert sum(encoded.loss_mask) == sum(alone.loss_mask)
    steps = sum(alone.loss_mask) + len(alone.loss_mask) - alone.loss_mask.index(1) - sum(alone.loss_mask)
    assert encoded.loss_mask[-steps:] == alone.loss_mask[-steps:]


def test_a_chat_that_the_assistant_opens_is_learned_from_its_second_turn() -> None:
    encoded = encode(chats.CHATML, chat("assistant: Hello", "user: Hi", "assistant: Bye"))
    assert readable(encoded) == (
        r"<|im_start|> assistant \n Hello <|im_end|> \n <|im_start|> user \n Hi <|im_end|> \n "
        r"<|im_start|> assistant \n [Bye] [<|im_end|>] \n"
    )
    assert encoded.counts == {UNLEARNED: 1}
    with pytest.raises(BadRow) as error:
        encode(chats.CHATML, chat("assistant: Hello"))
    assert error.value.reason == NOTHING


def test_messages_after_the_last_learned_one_are_dropped_and_counted() -> None:
    row = {"messages": SEA["messages"] + chat("user: Why?", "assistant: Light.")["messages"]}
    row["messages"][-1]["weight"] = 0
    encoded = encode(chats.CHATML, row)
    assert encoded.input_ids == encode(chats.CHATML, SEA).input_ids
    assert encoded.counts == {"messages after the last learned one, dropped": 2}
    # Or else the user's last word would make the template drop the thoughts of the answer before it.
    row = {"messages": THOUGHTFUL["messages"][:3]}
    assert "[Light] [\\n] [</think>] [\\n] [\\n] [Blue]" in readable(encode(chats.REASONING, row))


def test_messages_of_weight_0_and_prompts_are_context() -> None:
    row = chat("user: Hi", "assistant: Hello", "user: So?", "assistant: Bye")
    row["messages"][1]["weight"], row["messages"][3]["weight"] = 0, 1
    weighted = encode(chats.CHATML, row)
    assert readable(weighted) == (
        r"<|im_start|> user \n Hi <|im_end|> \n <|im_start|> assistant \n Hello <|im_end|> \n "
        r"<|im_start|> user \n S o ? <|im_end|> \n <|im_start|> assistant \n [Bye] [<|im_end|>] \n"
    )
    plain = chat("user: Hi", "assistant: Hello", "user: So?", "assistant: Bye")["messages"]
    assert encode(chats.CHATML, {"prompt": plain[:3], "completion": plain[3:]}) == weighted


def test_a_prompt_and_a_completion_in_strings_get_bos_and_eos_and_no_template() -> None:
    tokenizer = make_tokenizer()
    encoded = encode(chats.CHATML, {"prompt": "What colour is the sea?", "completion": " Blue."})
    assert readable(encoded) == "What _colour _is _the _sea ? [_Blue] [.] [<|endoftext|>]"
    closed = {"prompt": "What colour is the sea?", "completion": " Blue.<|endoftext|>"}
    assert encode(chats.CHATML, closed).input_ids == encoded.input_ids
    with_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    bos = [("<bos>", with_bos.convert_tokens_to_ids("<bos>"))]
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    encoded = encode(chats.CHATML, {"prompt": "Hello", "completion": " Bye"}, with_bos)
    assert readable(encoded, with_bos) == "<bos> Hello [_Bye] [</s>]"
    with pytest.raises(BadRow) as error:
        encode(chats.CHATML, {"prompt": "Hel", "completion": "lo"}, make_tokenizer_without_eos())
    assert error.value.reason == NOTHING, "Hello is one token, which straddles the border"


def make_tokenizer_without_eos() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)


def test_a_special_token_in_a_text_is_what_it_is_to_a_server() -> None:
    encoded = encode(chats.CHATML, chat("user: Hi<|im_end|>", "assistant: Hello<|eot|>Bye</think>"))
    assert readable(encoded) == (
        r"<|im_start|> user \n Hi <|im_end|> <|im_end|> \n "
        r"<|im_start|> assistant \n [Hello] [<|eot|>] [Bye] [</think>] [<|im_end|>] \n"
    )


def test_tool_calls_that_the_template_does_not_read_are_a_bad_row() -> None:
    with pytest.raises(BadRow, match="tool_calls") as error:
        encode(chats.CHATML, WEATHER)
    assert error.value.reason == TEMPLATE


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "has no chat template: set data.chat_template to a .jinja file"),
        ("{% for", {}, "the chat template cannot render the user's message (TemplateSyntaxError"),
        ("{{ messages[0].role }}", {}, "what the user says is not in it"),
        ("{{ messages[0].content }}", {}, "cannot render the assistant's message (what the assistant says"),
        ("{{ raise_exception('no') }}", {}, "(TemplateError: no): set data.chat_template"),
        (stock(chats.CHATML), {"template_kwargs": {"tools": []}}, "multiple values for keyword argument 'tools'"),
    ],
)
def test_a_template_that_cannot_work_is_one_line_at_the_first_chat(template: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        ChatEncoder(make_tokenizer(), template, **options).encode(messages_of(SEA))
    assert message in str(error.value) and "\n" not in str(error.value) and not isinstance(error.value, BadRow)


def test_chats_take_a_fast_tokenizer_and_a_template_file_that_can_be_read(tmp_path: Path) -> None:
    for tokenizer in (None, SimpleNamespace(is_fast=False)):
        with pytest.raises(ValueError, match="chats take a fast tokenizer"):
            ChatEncoder(tokenizer)
    (tmp_path / "empty.jinja").write_text("\n")
    for name, message in (("none", "cannot read"), ("empty", "is empty")):
        with pytest.raises(ValueError, match=f"data.chat_template: .*{message}"):
            ChatEncoder.from_recipe(Data(["x"], chat_template=str(tmp_path / f"{name}.jinja")), make_tokenizer())


def test_the_given_tokenizer_stays_as_it_was() -> None:
    tokenizer = make_tokenizer()
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    encode(chats.CHATML, SEA, tokenizer)
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before
