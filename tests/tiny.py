"""A target small enough for a test, rows for it, and recipes: real parts, nothing downloaded."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, MASK = 61, 60


def make_target(folder: Path, **changes: Any) -> Path:
    """A random Llama of six layers in transformers' format."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    return folder


def write_rows(path: Path, lengths: list[int], prompt: float = 0.0, seed: int = 0) -> Path:
    """A .jsonl of random ids; the first `prompt` share of each document is not supervised."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for n in lengths:
            first = max(1, int(n * prompt))
            row = {"input_ids": [rng.randrange(MASK) for _ in range(n)], "loss_mask": [0] * first + [1] * (n - first)}
            file.write(json.dumps(row) + "\n")
    return path


def write_recipe(folder: Path, target_path: Path, source: Path, output_path: Path, **sections: dict[str, Any]) -> Path:
    """A recipe in float64 throughout; `sections` override it."""
    recipe: dict[str, dict[str, Any]] = {
        "target": {"path": str(target_path), "dtype": "float64"},
        "data": {"sources": [str(source)], "max_length": 32, "eval_fraction": 0.0},
        "draft": {"num_layers": 2, "draft_vocab_size": 40, "mask_token_id": MASK},
        "cod": {"num_depths": 4, "num_segments": 3},
        "train": {"dtype": "float64", "learning_rate": 1e-2, "log_steps": 1},
        "output": {"dir": str(output_path)},
    }
    for name, values in sections.items():
        recipe.setdefault(name, {}).update(values)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
