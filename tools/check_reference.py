"""Compare the drafter with a dump of a reference implementation: loss and every gradient.

    python tools/check_reference.py tests/golden/draft_2layer.safetensors

Prints the relative error (max|difference| / max|reference|) of each and exits with 1 above 1e-5, with 2 if the file is
no such dump. The dump's inputs are already shifted, so they are shifted back first: the check runs through the same
gather as training does.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peagle_train.core.draft import PEagleDraft
from peagle_train.core.draft_config import PEagleDraftConfig
from peagle_train.core.passes import TargetOutputs, recompute_step
from peagle_train.files import run_tool

TOLERANCE = 1e-5


def load(path: str) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, json.loads((file.metadata() or {})["config"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no reference dump: {type(error).__name__}: {error}") from error


def build(tensors: dict[str, Tensor], config: dict) -> PEagleDraft:
    ids = tensors["draft_token_ids"]
    weights = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    fields += ("num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta")
    draft = PEagleDraft(
        PEagleDraftConfig(
            **{name: config[name] for name in fields if name in config},
            draft_vocab_size=ids.numel(),
            target_hidden_size=weights["fc.weight"].shape[1] // 3,
            ptd_token_id=config["mask_token_id"],
            norm_before_residual=config.get("norm_before_residual", False),
        )
    ).to(torch.float64)
    draft.set_draft_vocab(ids)
    missing, unexpected = draft.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in ("d2t", "t2d")]
    if missing or unexpected:
        raise ValueError(f"the dump's weights do not fit: missing {missing}, unexpected {unexpected}")
    return draft


def batch_of(tensors: dict[str, Tensor], num_depths: int) -> dict[str, Tensor]:
    """The dump's rows and draw as a collator's batch: one token more in front, since row p reads token p + 1."""
    ids, anchor, depth = tensors["input_ids"], tensors["anchor"], tensors["depth"]
    # Our order (depth 0, then rollouts): the dump is depth-major.
    order = ((depth > 0) * ids.numel() + anchor).mul(int(depth.max()) + 1).add(depth).argsort()
    anchor, depth = anchor[order], depth[order]
    supervised = tensors["loss_mask"][anchor + depth] != 0
    columns = torch.arange(ids.numel() + 1)
    return {
        "input_ids": torch.cat([ids[:1], ids])[None],
        "position_ids": columns[None],
        "document_ids": torch.zeros_like(columns)[None],
        "anchor": anchor[None],
        "depth": depth[None],
        "segment_ids": torch.zeros_like(anchor)[None],
        "supervised": supervised[None],
        "supervised_per_depth": torch.bincount(depth[supervised], minlength=num_depths)[None],
    }


def check(path: str) -> dict[str, float]:
    """Relative error of "loss" and of every gradient in the dump."""
    tensors, config = load(path)
    draft, batch = build(tensors, config), batch_of(tensors, config["num_depths"])
    # Labels come as logits: they are the "hidden states" of a head that is the identity.
    logits = tensors["target_logits"][:, tensors["draft_token_ids"]]
    features = tensors["aux_hidden_states"]
    target = TargetOutputs(
        features=torch.cat([features, features[-1:]])[None],
        last_hidden=torch.cat([logits[:1], logits])[None],
        head=torch.eye(logits.shape[1], dtype=logits.dtype),
    )
    scale = 1.0 / max(1, int(batch["supervised"].sum()))
    stats = recompute_step(draft, batch, target, scale=scale)
    errors = {"loss": relative_error(stats.loss * scale, tensors["loss"].reshape(()))}
    parameters = dict(draft.named_parameters())
    for name in sorted(n.removeprefix("grad.") for n in tensors if n.startswith("grad.")):
        gradient = parameters[name].grad
        assert gradient is not None, f"{name} got no gradient"
        errors[name] = relative_error(gradient, tensors[f"grad.{name}"])
    return errors


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max|difference| / max|reference|; not-a-number counts as infinite."""
    difference = float((ours - reference).abs().max())
    scale = float(reference.abs().max())
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a .safetensors dump laid out like tests/golden/draft_2layer.safetensors")
    errors = check(parser.parse_args().file)
    for name, error in errors.items():
        print(f"{'ok ' if error <= TOLERANCE else 'BAD'}  {error:9.2e}  {name}")
    worst = max(errors.values())
    print(f"{'passed' if worst <= TOLERANCE else 'FAILED'}: worst relative error {worst:.2e}, allowed {TOLERANCE:.0e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(run_tool("check_reference", main))
