"""The real vLLM, on a CPU, serves our drafters: texts, draft tokens and counts are those of our own decoder.

Needs vLLM beside this project: `bash tools/vllm_setup.sh`, then `.venv-vllm/bin/python -m pytest -m vllm`.
"""

import gc
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peagle_train.core.collator import CODCollator
from peagle_train.core.draft import PEagleDraft
from peagle_train.core.passes import TargetOutputs
from peagle_train.core.relay import RelayBuffers, relay_step
from peagle_train.decoding.generate import CachedTarget, Drafter, decode, greedy_tokens, sampler
from peagle_train.serving.drafter_io import load_drafter, save_drafter
from peagle_train.serving.export import check_folder, export_drafter, is_loadable
from peagle_train.serving.start import new_drafter
from peagle_train.target_model.frozen import FrozenTarget
from tests.helpers import command, make_draft, seeded
from tests.test_check_drafter import set_config, set_masks, set_tensors, tensor
from tests.test_draft import LLAMA3
from tests.tiny import MASK, VOCAB, make_target
from tests.tiny_chat import make_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here: bash tools/vllm_setup.sh"),
]

HIDDEN, DRAFTED, TRAINED_LENGTH, TRAINED_K, TOKENS = 64, 37, 24, 5, 23
TARGET = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
LAYERS = "eagle_aux_hidden_state_layer_ids"
PROMPTS = [[7], [3, 14, 15, 9, 26], [(5 * i * i + i) % MASK for i in range(2 * TRAINED_LENGTH + 1)], [1, 2], [41, 8, 8]]
"""One token, some, and more than a training row has; one more than vLLM runs at once."""


@dataclass
class Decoding:
    """What a decoding of all prompts gave, by prompt."""

    texts: list[list[int]]
    drafts: list[
        list[list[int]]
    ]  # all, with the unverified one after the text's end: K tokens of the target's vocabulary
    num_drafts: int  # verified ones
    accepted: list[int]  # by slot


@pytest.fixture(scope="module")
def vllm_drafts():
    """By request, every draft that vLLM makes from now on."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        made: dict[str, list[list[int]]] = {}
        original = GPUModelRunner.propose_draft_token_ids

        def recorded(runner: Any, *arguments: Any, **keywords: Any) -> Any:
            drafts = original(runner, *arguments, **keywords)
            for request, draft in zip(runner.input_batch.req_ids, drafts.tolist()):
                made.setdefault(request, []).append(draft)
            return drafts

        patch.setattr(GPUModelRunner, "propose_draft_token_ids", recorded)
        yield made


def by_vllm(made: dict[str, list[list[int]]], model: Path, speculative: dict[str, Any] | None) -> Decoding:
    """All prompts, up to four at once."""
    from vllm import LLM, SamplingParams

    options = {} if speculative is None else {"speculative_config": speculative}
    llm = LLM(
        str(model), enforce_eager=True, max_num_seqs=4, enable_prefix_caching=False, dtype="float32",
        kv_cache_memory_bytes=1 << 26, skip_tokenizer_init=True, disable_log_stats=False, **options,
    )  # fmt: skip
    made.clear()
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    counters = {metric.name: metric for metric in llm.get_metrics()}
    decoding = Decoding(
        [list(output.outputs[0].token_ids) for output in outputs],
        list(made.values()),
        counters["vllm:spec_decode_num_drafts"].value,
        counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
    )
    del llm
    gc.collect()
    return decoding


class Recorded(Drafter):
    """A drafter that keeps every draft."""

    drafts: list[list[int]]

    def propose(self, tokens: Sequence[int], features_nF: Tensor) -> Tensor:
        logits = super().propose(tokens, features_nF)
        self.drafts.append(self.token_ids[logits.argmax(-1)].tolist())
        return logits


def frozen_for(draft: PEagleDraft, target: Path) -> FrozenTarget:
    return FrozenTarget.load(str(target), dtype="float32", layer_ids=draft.config.eagle_aux_hidden_state_layer_ids)


def by_ours(folder: Path, draft: PEagleDraft, K: int) -> Decoding:
    """Prompt by prompt. folder: the target's."""
    target, result = frozen_for(draft, folder), Decoding([], [], 0, [0] * K)
    for prompt in PROMPTS:
        drafter = Recorded(draft, K)
        drafter.drafts = []
        # longer than asked for, so that the draft after the end is made as well
        decoded = decode(CachedTarget(target), drafter, prompt, TOKENS + K + 1, sampler(0, seeded(0)))
        verified = [accepted for bonus_at, accepted in decoded.passes if bonus_at < TOKENS - 1]
        result.texts.append(decoded.tokens[:TOKENS])
        result.drafts.append(drafter.drafts[: len(verified) + 1])
        result.num_drafts += len(verified)
        result.accepted = [n + sum(a > k for a in verified) for k, n in enumerate(result.accepted)]
    return result


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = make_target(tmp_path_factory.mktemp("target"), **TARGET)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drafter(tmp_path_factory, target):
    """An export of the first shape."""
    folder = tmp_path_factory.mktemp("drafter")
    taught(folder / "trained", target)
    export_drafter(folder / "trained", folder / "out", "eagle3", target=target, speculative_tokens=TRAINED_K)
    return folder / "out"


def taught(folder: Path, target: Path, **changes: Any) -> PEagleDraft:
    """A drafter's folder; it has learned some of the target's texts, so that drafts are accepted to any depth."""
    shape: dict[str, Any] = {"vocab_size": VOCAB, "ptd_token_id": MASK, "draft_vocab_size": DRAFTED, "head_dim": 32}
    shape |= {"hidden_size": HIDDEN, "target_hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"intermediate_size": 80, "max_position_embeddings": 256, LAYERS: [1, 2, 4]}
    draft = make_draft(torch.float32, **{**shape, **changes})
    frozen = frozen_for(draft, target)
    texts = [prompt + greedy_tokens(frozen, prompt, TRAINED_LENGTH, frozenset()) for prompt in PROMPTS[:2]]
    occurring = {token for text in texts for token in text}
    ids = sorted(range(VOCAB), key=lambda token: (token not in occurring, token))
    draft.set_draft_vocab(torch.tensor(sorted(ids[: draft.config.draft_vocab_size])))
    rows = [{"input_ids": text[:TRAINED_LENGTH], "loss_mask": [1] * TRAINED_LENGTH} for text in texts]
    batch = CODCollator(TRAINED_LENGTH, num_depths=TRAINED_K, down_sample_ratio=1.0)(rows)
    outputs = TargetOutputs(
        *frozen.features(batch["input_ids"], batch["position_ids"]), frozen.head_rows(draft.draft_token_ids)
    )
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for _ in range(150):
        relay_step(draft, batch, outputs, scale=1 / batch["supervised"].sum(), buffers=RelayBuffers())
        optimizer.step()
        optimizer.zero_grad()
    draft.save_pretrained(folder)
    return draft.eval()


SHAPES: dict[str, dict[str, Any]] = {
    "2 layers": {},
    "1 layer, norm before residual, fewer tokens": {"num_hidden_layers": 1, "norm_before_residual": True},
    "4 layers, a key for every head, more tokens": {"num_hidden_layers": 4, "num_key_value_heads": 2},
    "one token": {"norm_before_residual": True},
    "biases": {"attention_bias": True},
    "eps and theta": {"rms_norm_eps": 0.1, "rope_theta": 3.0},
    "wider": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
    "narrower": {"hidden_size": 32, "num_attention_heads": 1},
    "four heads a key, wide heads": {"num_attention_heads": 4, "head_dim": 64},
    "other features": {LAYERS: [0, 3, 5]},
    "features of one layer": {LAYERS: [3]},
    "features of five layers": {LAYERS: [0, 1, 3, 4, 5]},
    "qwen3 layers": {"layer_type": "qwen3"},
    "1 qwen3 layer, features of two": {"layer_type": "qwen3", "num_hidden_layers": 1, LAYERS: [2, 5]},
    "norm before fc": {"norm_before_fc": True},
    "a norm of each layer's features": {"fc_norm": True, LAYERS: [1, 4]},
    "qwen3, five layers, each normed": {"layer_type": "qwen3", "fc_norm": True, LAYERS: [0, 1, 3, 4, 5]},
    "window": {"sliding_window": TRAINED_K},
    "wider window, 1 layer": {"sliding_window": 9, "num_hidden_layers": 1},
    "qwen3 window": {"layer_type": "qwen3", "sliding_window": 7},
    "full vocabulary": {"draft_vocab_size": VOCAB},
    "full vocabulary, 1 layer": {"draft_vocab_size": VOCAB, "num_hidden_layers": 1},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 16}
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}},
}
DRAFTS = {"fewer tokens": TRAINED_K - 2, "more tokens": TRAINED_K + 3, "one token": 1}


def speculative(folder: Path, K: int) -> dict[str, Any]:
    return {"method": "eagle3", "model": str(folder), "num_speculative_tokens": K, "parallel_drafting": True}


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_drafts_and_counts_are_our_decoders_in_both_formats(tmp_path, target, vllm_drafts, shape):
    K = DRAFTS.get(shape.rpartition(", ")[2], TRAINED_K)
    draft = taught(tmp_path / "trained", target, **SHAPES[shape])
    ours = by_ours(target, draft, K)
    assert 0 < ours.accepted[-1] < ours.num_drafts and len(ours.texts[0]) == TOKENS
    for format in ("eagle3", "speculators"):
        out = tmp_path / format
        export_drafter(tmp_path / "trained", out, format, target=target, speculative_tokens=K)
        assert is_loadable(check_folder(out))
        theirs = by_vllm(vllm_drafts, *((target, speculative(out, K)) if format == "eagle3" else (out, None)))
        assert theirs == ours, format


def test_what_a_loop_of_ones_own_saves_is_served_as_it_is(tmp_path, target, vllm_drafts):
    draft = new_drafter(target, MASK, torch.arange(DRAFTED), num_layers=2)
    save_drafter(tmp_path / "out", draft)
    assert by_vllm(vllm_drafts, target, speculative(tmp_path / "out", TRAINED_K)) == by_ours(target, draft, TRAINED_K)


FULL = {"d2t": torch.zeros(VOCAB).long(), "t2d": torch.ones(VOCAB).bool(), "lm_head__weight": torch.ones(VOCAB, HIDDEN)}
BROKEN: dict[str, Callable[[Path], Any]] = {
    "d2t with the full vocabulary": lambda f: (set_config(f, draft_vocab_size=VOCAB), set_tensors(f, **FULL)),
    "missing": lambda f: set_tensors(f, fc__weight=None),
    "misnamed": lambda f: set_tensors(f, norm__weight=None, norms__weight=tensor(f, "norm.weight")),
    "a shape": lambda f: set_tensors(f, norm__weight=torch.ones(HIDDEN + 1)),
    "mask id beyond the vocabulary": lambda f: set_masks(f, VOCAB),
    "another architecture": lambda f: set_config(f, architectures=["LlamaForCausalLMEagle2"]),
    "no mask_hidden": lambda f: set_tensors(f, mask_hidden=None),
    "two feature layers": lambda f: set_config(f, eagle_aux_hidden_state_layer_ids=[1, 2]),
    "d2t holds ids": lambda f: set_tensors(f, d2t=tensor(f, "d2t") + torch.arange(DRAFTED)),
    "no d2t": lambda f: set_tensors(f, d2t=None),
    "prefixed names": lambda f: set_tensors(f, norm__weight=None, **{"model.norm.weight": tensor(f, "norm.weight")}),
    "another file of tensors": lambda f: save_file({"exp_avg": torch.ones(2)}, f / "optimizer.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_the_check_refuses_vllm_refuses_or_drafts_other_tokens_from(tmp_path, target, drafter, vllm_drafts, case):
    broken = tmp_path / "broken"
    shutil.copytree(drafter, broken)
    assert is_loadable(check_folder(broken))
    BROKEN[case](broken)
    assert not is_loadable(check_folder(broken))
    try:
        theirs = by_vllm(vllm_drafts, target, speculative(broken, TRAINED_K))
    except Exception:
        return  # refused
    assert theirs.drafts != by_ours(target, load_drafter(drafter), TRAINED_K).drafts


def test_other_peoples_names_that_the_check_takes_load_and_draft_the_same(tmp_path, target, drafter, vllm_drafts):
    other = tmp_path / "other"
    shutil.copytree(drafter, other)
    tensors = load_file(other / "model.safetensors")
    del tensors["t2d"], tensors["embed_tokens.weight"]  # which are the target's then
    tensors = {name.replace("layers.0.", "midlayer."): each for name, each in tensors.items()}
    save_file({**tensors, "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(16)}, other / "model.safetensors")
    set_masks(other, None)
    set_config(other, dflash_config={"mask_token_id": MASK}, architectures=["LlamaForCausalLM"])
    assert is_loadable(check_folder(other))
    draft = load_drafter(drafter)
    draft.embed_tokens.weight.data.copy_(frozen_for(draft, target).embedding_rows())
    assert by_vllm(vllm_drafts, target, speculative(other, TRAINED_K)) == by_ours(target, draft, TRAINED_K)


def test_evaluate_has_vllms_figures_beside_ours(tmp_path, target, drafter, vllm_drafts, capsys):
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps({"text": " ".join(f"w{i % 59}" for i in ids)}) + "\n" for ids in PROMPTS))
    arguments = [drafter, "--target", target, "--prompts", prompts, "--dtype", "float32", "--max-tokens", TOKENS]
    assert command("evaluate", *arguments, "--k", TRAINED_K, "--json", file, "--engine", "vllm") == 0
    assert f"vLLM: {len(PROMPTS)} of {len(PROMPTS)} texts" in capsys.readouterr().out
    report = json.loads(file.read_text())["vllm"]
    assert report["vllm"] == report["ours"] and report["vllm"]["accepted_by_position"][-1] > 0
    assert report["texts"] == len(PROMPTS) and report["texts_that_differ"] == []
