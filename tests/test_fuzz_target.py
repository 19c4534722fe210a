"""Target folders with any config and damaged weights: loaded and right, or refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peagle_train.target_model.frozen import FrozenTarget
from tests.tiny import make_target

QUIET = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

KEYS = """architectures attention_bias attention_dropout bos_token_id dtype eos_token_id head_dim hidden_act hidden_size
initializer_range intermediate_size layer_types max_position_embeddings mlp_bias model_type num_attention_heads
num_hidden_layers num_key_value_heads pad_token_id quantization_config rms_norm_eps rope_parameters tie_word_embeddings
torch_dtype transformers_version use_cache vocab_size auto_map""".split()
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-1, 7), max_size=3),
    st.dictionaries(st.text(max_size=6), st.integers(0, 3), max_size=2),
    st.sampled_from(["llama", "bfloat16", "mamba", {"rope_type": "yarn", "factor": 2.0}, {"quant_method": "gptq"}]),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("good"))


def features_of(folder: Path) -> torch.Tensor | None:
    """The features of a few tokens, or None where the folder was refused, in one line."""
    try:
        target = FrozenTarget.load(str(folder), dtype="float64")
        target.check()
    except ValueError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000, repr(str(error))
        return None
    features, _ = target.features(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]))
    return features


def copy_of(good: Path, factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(good, factory.mktemp("copy") / "target"))


@given(st.dictionaries(st.sampled_from(KEYS), odd, min_size=1, max_size=2))
@QUIET
def test_a_config_of_any_values_is_loaded_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, good: Path, changes: dict[str, Any]
) -> None:
    folder = copy_of(good, tmp_path_factory)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    features = features_of(folder)
    assert features is None or features.shape[:2] == (1, 3)


@given(st.data())
@QUIET
def test_damaged_weights_are_refused_in_one_line_or_change_a_value_alone(
    tmp_path_factory: pytest.TempPathFactory, good: Path, data: st.DataObject
) -> None:
    folder = copy_of(good, tmp_path_factory)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans(), label="truncated"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        at = data.draw(st.integers(0, header - 1), label="at")
        content[at] ^= data.draw(st.integers(1, 255), label="bits")
    weights.write_bytes(bytes(content))
    features = features_of(folder)
    assert features is None or features.shape == (1, 3, 48)


@given(st.binary(max_size=64) | st.sampled_from([b"{}", b"[]", b"null", b"\xff\xfe"]))
@QUIET
def test_a_config_file_of_any_bytes_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, good: Path, content: bytes
) -> None:
    folder = copy_of(good, tmp_path_factory)
    (folder / "config.json").write_bytes(content)
    assert features_of(folder) is None
