"""The draft vocabulary: the most frequent supervised tokens, or another drafter's, in the form that engines read."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peagle_train.config import Data, Draft
from peagle_train.data.vocab import choose_mask_token, choose_most_frequent, end_of_turn_ids, load_tokenizer
from peagle_train.serving.start import always_drafted
from peagle_train.target_model.frozen import FrozenTarget
from tests.tiny import VOCAB, make_target
from tests.tiny_chat import END, TEMPLATE, make_chat_target, make_tokenizer


def test_the_most_frequent_are_chosen_the_first_of_equals_with_those_that_are_always_drafted():
    counts = torch.tensor([0, 3, 1, 3, 3, 0])
    for size, always, expected in ((1, (), [1]), (3, (5,), [1, 3, 5]), (4, (5, 2), [1, 2, 3, 5]), (6, (), [*range(6)])):
        ids = choose_most_frequent(counts, size, always)
        assert ids.dtype == torch.int64 and ids.tolist() == expected
    with pytest.raises(ValueError, match="draft_vocab_size is 2; give at least 3"):
        choose_most_frequent(counts, 2, (1, 2, 3, 3))


def word_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "gap": 5}, unk_token="a"))
    core.add_special_tokens(list(special))  # they take the ids after the highest, or free ones: either way known ones
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_the_mask_token_is_the_first_id_after_all_that_the_tokenizer_knows_or_one_that_it_reserves():
    tokenizer = word_tokenizer("<end>", "<|reserved_7|>")
    first_unused = max(tokenizer.get_vocab().values()) + 1
    assert choose_mask_token(Draft(), tokenizer, first_unused + 1) == first_unused
    assert choose_mask_token(Draft(), tokenizer, first_unused) == tokenizer.get_vocab()["<|reserved_7|>"]
    assert choose_mask_token(Draft(mask_token_id=1), tokenizer, first_unused) == 1
    with pytest.raises(ValueError, match=r"draft\.mask_token_id is 5; it must lie in 0\.\.4"):
        choose_mask_token(Draft(mask_token_id=5), tokenizer, 5)


def test_without_a_certain_mask_token_the_error_names_special_tokens_that_texts_do_not_begin_or_end_with():
    tokenizer = word_tokenizer("<fim>", "<bos>", "<eos>", "<pad>", "<end>")
    tokenizer.add_tokens(["reserved_word"])  # it is no special one: it may be in texts
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<bos>", "<eos>", "<pad>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    for known, shown in ((tokenizer, f"{tokenizer.get_vocab()['<fim>']} (<fim>)"), (None, "none")):
        with pytest.raises(ValueError, match=r"draft\.mask_token_id is missing .* may be free: ") as caught:
            choose_mask_token(Draft(), known, max(tokenizer.get_vocab().values()) + 1)
        assert str(caught.value).endswith(f": {shown}")


def test_a_target_without_a_tokenizer_is_nothing_to_warn_of_and_one_that_is_broken_is(tmp_path, caplog):
    folder = make_target(tmp_path / "target")
    assert load_tokenizer(str(folder), False) is None and caplog.text == ""
    (folder / "tokenizer.json").write_text("{")
    assert load_tokenizer(str(folder), False) is None and "no usable tokenizer" in caplog.text


def test_end_tokens_of_configs_tokenizer_and_chat_template_are_always_drafted(tmp_path):
    """Each from its own place: 3 of the config, 4 and 5 of the generation config, <end> of the chats."""
    target = FrozenTarget.load(str(make_chat_target(tmp_path / "target")), dtype="float64", layer_ids=[0, 1, 2])
    for tokenizer in (make_tokenizer(), make_tokenizer(eos_token="w7"), make_tokenizer(extra_special_tokens=["w8"])):
        always = always_drafted(tokenizer, target, mask_token_id=1)
        assert {3, 4, 5, END, tokenizer.eos_token_id} <= set(always)
    assert {8, END} <= set(always)
    assert END not in always_drafted(make_tokenizer(), target, END)


def test_the_end_of_a_turn_is_read_off_the_chat_template_the_recipes_own_before_the_tokenizers(tmp_path, caplog):
    tokenizer = make_tokenizer(eos_token="w7")
    tokenizer.add_tokens(["w8"])  # no special one, which would be drafted anyway
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("<end>", "{{ finish }}"))
    own = Data(["x"], chat_template=str(tmp_path / "own.jinja"), template_kwargs={"finish": "w8"})
    for template, data, expected in (
        (TEMPLATE, None, [END]),
        (TEMPLATE, Data(["x"]), [END]),
        (TEMPLATE, own, [8]),
        (None, own, [8]),
        (None, None, []),
        (TEMPLATE.replace("<end>", "w9"), None, []),  # a word
        (TEMPLATE.replace("<end>", ""), None, []),
    ):
        tokenizer.chat_template = template
        assert end_of_turn_ids(tokenizer, data) == expected
    assert end_of_turn_ids(None, own) == [] and caplog.text == ""
    target = SimpleNamespace(vocab_size=VOCAB, eos_token_ids=lambda: [])
    assert 8 in always_drafted(tokenizer, target, 1, own)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert end_of_turn_ids(tokenizer) == [] and "the end of a turn is not known" in caplog.text
