"""Chats: the formats that are read, and what is learned, typed out token by token, for templates as models have them."""

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import NFC
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from peagle_train.data.chat import ChatEncoder, read_template
from peagle_train.data.messages import NOTHING, TEMPLATE, BadRow, messages_of
from tests import chats
from tests.chats import WORDS, chat, encode, encoder, make_tokenizer, marked_mask, readable, stock

SEA = chat("system: You are short.", "user: What colour is the sea?", "assistant: Blue.")
WHY = chat("user: Why?", "assistant: Light.")
CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
CALLING = {"role": "assistant", "content": None, "reasoning": "Thinking about it."}
CALLING["tool_calls"] = [{"type": "function", "id": "1", "function": CALL}]
WEATHER = {
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
    "messages": [
        {"role": "user", "content": "What weather is today in Oslo?"},
        CALLING,
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
    ]
}
BORDER = "tokens across the border of a turn, not learned"
UNLEARNED = "turns that cannot be learned in their chat"
# What a row becomes: template, row, options of the encoder, tokens, counts.
SHOWN: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, dict[str, int]]] = {
    "earlier thoughts are dropped, so that the last turn is learned with its own": (
        chats.REASONING, THOUGHTFUL, {},
        r"<|im_start|> user \n What _colour _is _the _sea ? <|im_end|> \n "
        r"<|im_start|> assistant \n Blue . <|im_end|> \n "
        r"<|im_start|> user \n Why ? <|im_end|> \n "
        r"<|im_start|> assistant \n "
        r"[<think>] [\n] [Thinking] [_more] [\n] [</think>] [\n] [\n] [Light] [.] [<|im_end|>] \n", {UNLEARNED: 1},
    ),
    "thoughts that the generation prompt opens and closes are prompt": (
        chats.REASONING, {**WHY, "chat_template_kwargs": {"enable_thinking": False}},
        {"template_kwargs": {"enable_thinking": True}},
        r"<|im_start|> user \n Why ? <|im_end|> \n "
        r"<|im_start|> assistant \n <think> \n\n </think> \n \n [Light] [.] [<|im_end|>] \n", {},
    ),
    "end tokens that differ in the last turn": (
        chats.LAST_END, chat("user: Hello", "assistant: Hi", "user: Bye", "assistant: Bye"), {},
        "<|im_start|> user <|channel|> Hello <|im_end|> <|im_start|> assistant <|channel|> [Hi] <|im_end|> "
        "<|im_start|> user <|channel|> Bye <|im_end|> <|im_start|> assistant <|channel|> [Bye] [<|return|>]",
        {},
    ),
    "an end token that takes the newline after it along": (  # none of its own: it is part of that token
        chats.CHATML, chat("user: Hello", "assistant: Hi"), {"tokenizer": make_tokenizer(stripping=True)},
        r"<|im_start|> user \n Hello <|im_end|> <|im_start|> assistant \n [Hi] [<|im_end|>]", {},
    ),
    "a chat that the assistant opens is learned from its second turn": (
        chats.CHATML, chat("assistant: Hello", "user: Hi", "assistant: Bye"), {},
        r"<|im_start|> assistant \n Hello <|im_end|> \n <|im_start|> user \n Hi <|im_end|> \n "
        r"<|im_start|> assistant \n [Bye] [<|im_end|>] \n", {UNLEARNED: 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SHOWN)
def test_a_chat_in_tokens(what):
    template, row, options, expected, counts = SHOWN[what]
    encoded = encode(template, row, **options)
    assert readable(encoded, options.get("tokenizer")) == expected and encoded.counts == counts


ORACLE_ROWS = [
    chat("user: Hello", "assistant:  Hi \n\n", "user: Bye ", "assistant: \n Bye", "user: So?", "assistant: So\n"),
    chat("system: ", "user: Hello", "assistant: Hi", "assistant: Bye"),
    chat("user: \u00e9t\u00e9 \U0001f600 \u4f60\u597d", "assistant: \u4f60\u597d, \U0001f600\u00e9"),
]
PIECES = [*WORDS[:20], " ", "\n", "\n\n", " \n", "\t", "\u00e9", "e\u0301", "\U0001f600", "\u4f60", "\u00a0", "\r\n"]
PIECES += ["a\u0323\u0307", "<|im_end|>", "<think>", "</s>"]


def test_masks_are_those_of_the_same_template_with_marks():
    rng = random.Random(0)
    nfc = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    nfc.normalizer = NFC()
    rows: list[dict[str, Any]] = []
    for _ in range(25):
        texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 6))) + rng.choice(["x", "x\n"]) for _ in range(4)]
        rows.append(chat(*(f"{('user', 'assistant')[i % 2]}: {text}" for i, text in enumerate(texts))))
    tried = [(make_tokenizer(trim_offsets=False), [*ORACLE_ROWS, *rows[:5]]), (make_tokenizer(), rows)]
    tried += [(make_tokenizer(stripping=True), rows), (PreTrainedTokenizerFast(tokenizer_object=nfc), rows)]
    straddling = 0
    for template in (chats.CHATML, chats.PLAIN, chats.CHAT_END, chats.REASONING):
        for tokenizer, examples in tried:
            encodes = encoder(template, tokenizer)
            # Thoughts before the last of several users are marked, and not learned.
            for row in [WEATHER] if template == chats.REASONING else examples:
                encoded = encodes.encode(messages_of(row))
                ids, mask = marked_mask(template, row, tokenizer)
                assert encoded.input_ids == ids
                # transformers also marks a token that begins in the prompt and ends in the answer; we count it.
                differences = [(ours, theirs) for ours, theirs in zip(encoded.loss_mask, mask) if ours != theirs]
                assert differences == [(0, 1)] * encoded.counts.get(BORDER, 0), (row, template)
                straddling += len(differences)
    assert straddling > 0, "some texts run into the prompt before them"


def test_tokens_across_the_border_of_a_turn_are_not_learned():
    """A word with the space that the prompt ends in, as in Vicuna; a full stop with the line break after the turn."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    for trim_offsets in (False, True):
        encoded = encode(template, chat("user: Hello", "assistant: Blue."), make_tokenizer(trim_offsets))
        assert readable(encoded) == r"user : _Hello \n assistant : _Blue [.] \n" and encoded.counts == {BORDER: 1}
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator([".\n"] * 9, trainer)  # a token of a full stop and a line break, as Llama 3 and Qwen have
    encoded = encode(template, chat("user: Hi", "assistant: No."), PreTrainedTokenizerFast(tokenizer_object=core))
    assert encoded.loss_mask[-3:] == [1, 1, 0] and encoded.counts == {BORDER: 1}


def test_a_chat_that_the_template_does_not_render_as_it_is_generated_is_refused():
    opening = chats.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # in the prompt alone
    for template, row, detail in ((opening, SEA, "does it drop thoughts"), (chats.CHATML, WEATHER, "has tool_calls")):
        with pytest.raises(BadRow, match=detail) as error:
            encode(template, row)
        assert error.value.reason == TEMPLATE


def test_last_turn_means_the_steps_of_the_assistant_after_the_last_user():
    both = {"tools": WEATHER["tools"], "messages": THOUGHTFUL["messages"] + WEATHER["messages"]}
    alone, encoded = encode(chats.REASONING, WEATHER), encode(chats.REASONING, both)
    assert encoded.counts == {UNLEARNED: 2} and sum(encoded.loss_mask) == sum(alone.loss_mask)
    steps = len(alone.loss_mask) - alone.loss_mask.index(1)
    assert encoded.loss_mask[-steps:] == alone.loss_mask[-steps:]


def test_messages_after_the_last_learned_one_are_dropped_and_counted():
    row = {"messages": [*SEA["messages"], *WHY["messages"][:1], {**WHY["messages"][1], "weight": 0}]}
    encoded = encode(chats.CHATML, row)
    assert encoded.input_ids == encode(chats.CHATML, SEA).input_ids
    assert encoded.counts == {"messages after the last learned one, dropped": 2}
    # Or else the user's last word would make the template drop the thoughts of the answer before it.
    row = {"messages": THOUGHTFUL["messages"][:3]}
    assert "[Light] [\\n] [</think>] [\\n] [\\n] [Blue]" in readable(encode(chats.REASONING, row))


def test_a_prompt_and_a_completion_in_strings_get_bos_and_eos_and_no_template():
    core = make_tokenizer().backend_tokenizer
    closed = {"prompt": "What colour is the sea?", "completion": " Blue.<|endoftext|>"}
    assert readable(encode(chats.CHATML, closed)) == "What _colour _is _the _sea ? [_Blue] [.] [<|endoftext|>]"
    with_bos = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    bos = [("<bos>", with_bos.convert_tokens_to_ids("<bos>"))]
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    encoded = encode(chats.CHATML, {"prompt": "Hello", "completion": " Bye"}, with_bos)
    assert readable(encoded, with_bos) == "<bos> Hello [_Bye] [</s>]"
    for row, tokenizer in (  # Hello is one token, which straddles the border
        ({"prompt": "Hel", "completion": "lo"}, PreTrainedTokenizerFast(tokenizer_object=core)),
        (chat("assistant: Hello"), None),
    ):
        with pytest.raises(BadRow) as error:
            encode(chats.CHATML, row, tokenizer)
        assert error.value.reason == NOTHING


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "no chat template: set data.chat_template to a .jinja file"),
        ("{% for", {}, "the chat template cannot render a chat (TemplateSyntaxError"),
        ("{{ messages[0].content }}", {}, "what is said in it is missing"),
        ("{{ raise_exception('no') }}", {}, "(TemplateError: no): set data.chat_template"),
        (stock(chats.CHATML), {"template_kwargs": {"tools": []}}, "multiple values for keyword argument 'tools'"),
    ],
)
def test_a_template_that_cannot_work_is_one_line_at_the_first_chat(template, options, message):
    with pytest.raises(ValueError) as error:
        ChatEncoder(make_tokenizer(), template, **options).encode(messages_of(SEA))
    assert message in str(error.value) and "\n" not in str(error.value) and not isinstance(error.value, BadRow)


def test_an_empty_template_file_is_named(tmp_path):
    (tmp_path / "own.jinja").write_text("\n")
    with pytest.raises(ValueError, match=r"own\.jinja is empty"):
        read_template(str(tmp_path / "own.jinja"))


def test_chats_take_a_fast_tokenizer_which_stays_as_it_was():
    for tokenizer in (None, object()):
        with pytest.raises(ValueError, match="chats take a fast tokenizer"):
            ChatEncoder(tokenizer)
    tokenizer = make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    encode(chats.CHATML, SEA, tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


# Messages in every format that is read

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}
A_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def answered(**changes: Any) -> dict[str, Any]:
    """How an answer with these fields is read."""
    return messages_of({"messages": [USER, {**ANSWER, **changes}]}).messages[1]


def test_sharegpt_is_the_same_as_messages():
    turns = [
        {"from": "human", "value": "Hi", "weight": None},
        {"from": "gpt", "value": "Bye", "weight": 0},
        {"from": "user", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "Rain"},
        {"from": "chatgpt", "value": "Rain."},
    ]
    conversation = messages_of({"system": "Be brief", "conversations": turns})
    assert conversation.messages == [
        *chat("system: Be brief", "user: Hi", "assistant: Bye", "user: Weather?")["messages"],
        {"role": "assistant", "content": "", "tool_calls": [A_CALL]},
        *chat("tool: Rain", "assistant: Rain.")["messages"],
    ]
    learned = [False, False, False, False, True, False, True]  # weight 0 is context, as prompts are
    assert conversation.learned == learned
    plain = {"prompt": conversation.messages[1:3], "completion": conversation.messages[3:]}
    assert messages_of(plain)[:2] == (conversation.messages[1:], conversation.learned[1:])


def test_tool_calls_get_one_shape_and_keep_their_ids():
    written = {"name": "weather", "arguments": '{"city": "Oslo"}', "strict": None}
    for given in (
        {"tool_calls": [A_CALL]},
        {"tool_calls": [{"function": written, "id": None}]},
        {"tool_calls": [A_CALL["function"]]},
        {"tool_calls": json.dumps([A_CALL])},
        {"function_call": A_CALL["function"]},
    ):
        assert answered(content=None, **given) == {"role": "assistant", "content": "", "tool_calls": [A_CALL]}
    call = {"id": "7", "function": {"name": "now", "arguments": ""}}  # missing arguments are none
    expected = {"id": "7", "type": "function", "function": {"name": "now", "arguments": {}}}
    assert answered(tool_calls=[call])["tool_calls"] == [expected]
    for tools, read in (("[]", None), (json.dumps([{"name": "weather"}]), [{"name": "weather"}])):
        assert messages_of({"messages": [USER, ANSWER], "tools": tools}).tools == read


def test_thoughts_are_there_under_the_names_that_templates_read():
    for name in ("reasoning_content", "reasoning", "thinking"):
        message = answered(**{name: "Because"})
        assert message["reasoning_content"] == message["thinking"] == "Because"
        # Thoughts alone are an answer cut short, not an empty one.
        alone = messages_of({"messages": [USER, {"role": "assistant", "content": "", name: "Because"}]})
        assert alone.learned == [False, True]


def test_parts_are_joined_and_null_fields_left_out_but_arguments_keep_theirs():
    parts = [{"type": "text", "text": "Hi"}, "So?"]
    assert [answered(content=parts[:n])["content"] for n in (1, 2)] == ["Hi", "Hi\nSo?"]
    call = {"function": {"name": "weather", "arguments": {"city": None}}}
    row = {"messages": [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": [call]}], "tools": None}
    before = json.dumps(row)
    first, second = messages_of(row).messages
    assert first == USER and json.dumps(row) == before, "the given row stays as it was"
    assert second["tool_calls"][0]["function"]["arguments"] == {"city": None}
