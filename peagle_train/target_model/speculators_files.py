"""Hidden states that speculators (vllm-project) wrote for offline training, as sequences of one document each.

hs_{i}.safetensors holds `token_ids` [n] and `hidden_states` [n, 4, T]: three layers and what enters the target's final
norm. The loss mask is in the file, or in the data set next to it (Arrow, written by `datasets`): its row i has `loss_mask`
[n] and the same tokens as `input_ids`.

T: the target's hidden size, n: tokens of a sample.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from peagle_train.files import partial_path, put
from peagle_train.target_model.check import relative
from peagle_train.target_model.frozen import FrozenTarget

logger = logging.getLogger(__name__)


class SpeculatorsFiles:
    """The samples in the order of i, with their features.

    Args:
        folder: of hs_{i}.safetensors, or the one above its `hidden_states`.
        target: the target that they are said to be of. max_length: of a sequence; a longer sample is a ValueError.

    Raises:
        ValueError: one line, for files that are something else, and for features that the target does not give.
    """

    def __init__(self, folder: str, target: FrozenTarget, max_length: int) -> None:
        root = Path(folder).expanduser()
        root = root / "hidden_states" if (root / "hidden_states").is_dir() else root
        numbered = {int(p.stem[3:]): p for p in root.glob("hs_*.safetensors") if p.stem[3:].isdigit()}
        if not numbered:
            raise ValueError(
                f"--speculators {folder} holds no hs_NUMBER.safetensors: give the folder that speculators wrote"
            )
        self.target, self.max_length = target, max_length
        self.samples = sorted(numbered.items())
        self.masks = _data_set(root)
        self.norm = target.final_norm()
        self.last_is_normed = self._is_last_normed()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids, loss_mask, document_ids int64 [n], as `PackedRows` gives them, and the file's path."""
        number, path = self.samples[index]
        try:
            with safe_open(path, framework="pt") as file:
                views = {name: file.get_slice(name) for name in file.keys()}
                has = {name: (view.get_dtype(), *view.get_shape()) for name, view in views.items()}
                ids, mask = (file.get_tensor(n) if n in has else torch.empty(0) for n in ("token_ids", "loss_mask"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        n, T, V = ids.numel(), self.target.hidden_size, self.target.vocab_size
        if "loss_mask" not in has and self.masks is not None:
            row = self.masks[number] if number < len(self.masks) else {"input_ids": None}
            if row["input_ids"] != ids.tolist():
                raise ValueError(f"{path}: row {number} of the data set next to it has other tokens")
            mask = torch.tensor(row["loss_mask"])
        elif "loss_mask" not in has:
            mask = torch.ones(n)
        is_ids = n > 0 and ids.dim() == 1 and not ids.is_floating_point() and 0 <= ids.min() <= ids.max() < V
        is_hidden = has.get("hidden_states") in [(dtype, n, 4, T) for dtype in ("F64", "F32", "BF16", "F16")]
        if not (is_ids and is_hidden and mask.numel() == n and bool(((mask == 0) | (mask == 1)).all())):
            raise ValueError(
                f"{path} has {has}; it must have token_ids [n], ids in 0..{V - 1}, hidden_states, floats [n, 4, {T}] (three"
                " layers and what enters the final norm), and a loss_mask, if any, of 0 or 1 [n]"
            )
        if n > self.max_length:
            raise ValueError(f"{path} has {n} tokens, data.max_length is {self.max_length}: raise data.max_length")
        mask, document_ids = mask.flatten().long(), torch.zeros(n, dtype=torch.int64)
        return {"input_ids": ids.long(), "loss_mask": mask, "document_ids": document_ids, "path": path}

    @torch.no_grad()
    def compute(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A sample's features [n, 3T] and last hidden states [n, T] after the final norm."""
        features, last = self._hidden(row)
        return features.cpu(), (last if self.last_is_normed else self.norm(last[None])[0]).cpu()

    def _hidden(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[n, 3T] and [n, T] of the file, in the target's dtype, on its device."""
        hidden_n4T = load_file(row["path"])["hidden_states"].to(self.target.device, self.target.dtype)
        return hidden_n4T[:, :3].flatten(1), hidden_n4T[:, 3]

    @torch.no_grad()
    def _is_last_normed(self) -> bool:
        """Whether the files' last hidden states have been through the final norm, which they don't say, nor of which layers
        they are: the target runs over the shortest of the first 16 samples with more than one token.
        """
        first = [self[i] for i in range(min(16, len(self)))]
        row = min(first, key=lambda row: (row["input_ids"].numel() == 1, row["input_ids"].numel()))
        ids = row["input_ids"][None]
        features, last = self.target.features(ids, torch.arange(ids.shape[1])[None])
        given, given_last = self._hidden(row)
        off = relative(given, features[0])
        before, after = relative(self.norm(given_last[None])[0], last[0]), relative(given_last, last[0])
        if off > 0.1 or min(before, after) > 0.1:
            raise ValueError(
                f"--speculators: features are {off:.0%} off what the target gives in layers {self.target.layer_ids}, last"
                f" hidden states {before:.0%} off before the final norm and {after:.0%} after it: they are of another"
                " target, or of other layers (give target.layer_ids)"
            )
        if after < before:
            logger.warning("speculators' last hidden states are after the final norm: taken as they are")
        return after < before

    def write_documents(self, path: Path) -> None:
        """The samples with their masks as a .jsonl source. Those with nothing to learn from are dropped, and counted."""
        dropped = 0
        with partial_path(path).open("w", encoding="utf-8") as file:
            for i in range(len(self)):
                row = {name: self[i][name].tolist() for name in ("input_ids", "loss_mask")}
                if 1 in row["loss_mask"][1:]:
                    file.write(json.dumps(row) + "\n")
                else:
                    dropped += 1
        put(partial_path(path), path)
        if dropped:
            logger.warning("%d samples with no token to learn from are not in %s", dropped, path)


def _data_set(root: Path) -> Any:
    """The Arrow data set in this folder or in the one above; None, with a line, where there is none."""
    for folder in (root, root.parent):
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            from datasets import load_from_disk

            found: Any = load_from_disk(str(folder)).with_format(None)  # it may have been saved as tensors
            if {"input_ids", "loss_mask"} <= set(found.column_names):
                return found
            raise ValueError(f"the data set {folder} has {found.column_names}, but not input_ids and loss_mask")
    logger.warning(
        "no data set next to %s: where a file has no loss_mask of its own, every token is learned from", root
    )
    return None
