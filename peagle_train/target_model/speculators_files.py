"""Hidden states that speculators (vllm-project) wrote for offline training, as sequences of one document each.

hs_{i}.safetensors holds `token_ids` [n] and `hidden_states` [n, F + 1, T]: the feature layers and what enters the target's
final norm. The loss mask is in the file, or in the data set next to it (Arrow, written by `datasets`): its row i has
`loss_mask` [n] and the same tokens as `input_ids`.

T: the target's hidden size, F: feature layers, n: tokens of a sample.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peagle_train.files import partial_path, put
from peagle_train.target_model.frozen import FrozenTarget
from peagle_train.target_model.loading import open_tensors
from peagle_train.target_model.packed import relative

logger = logging.getLogger(__name__)


class SpeculatorsFiles:
    """The samples in the order of i, with their features; of at most `max_length` tokens.

    folder: of hs_{i}.safetensors, or the one above its `hidden_states`. target: the one that they are said to be of.
    ValueError: one line, for files that are something else, and for features that the target does not give.
    """

    def __init__(self, folder: str, target: FrozenTarget, max_length: int) -> None:
        root = Path(folder).expanduser()
        root = root / "hidden_states" if (root / "hidden_states").is_dir() else root
        numbered = {int(p.stem[3:]): p for p in root.glob("hs_*.safetensors") if p.stem[3:].isdigit()}
        if not numbered:
            raise ValueError(f"--speculators {folder} has no hs_NUMBER.safetensors: give the folder that has them")
        self.target, self.max_length = target, max_length
        self.samples = sorted(numbered.items())
        self.masks = _data_set(root)
        self.norm = target.final_norm()
        self._compare()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids, loss_mask, document_ids int64 [n], as `PackedRows` gives them, and the file's path."""
        number, path = self.samples[index]
        with open_tensors(path) as file:
            has = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            ids, mask = (file.get_tensor(n) if n in has else torch.empty(0) for n in ("token_ids", "loss_mask"))
        n, T, V, layers = ids.numel(), self.target.hidden_size, self.target.vocab_size, len(self.target.layer_ids) + 1
        if "hidden_states_scales" in has:
            raise ValueError(f"{path} has hidden states in FP8 (hidden_states_scales), unsupported: write 16 bits")
        if "loss_mask" not in has and self.masks is not None:
            row = self.masks[number] if number < len(self.masks) else {"input_ids": None}
            if row["input_ids"] != ids.tolist():
                raise ValueError(f"{path}: row {number} of the data set next to it has other tokens")
            mask = torch.tensor(row["loss_mask"])
        elif "loss_mask" not in has:
            mask = torch.ones(n)
        is_ids = n > 0 and ids.dim() == 1 and not ids.is_floating_point() and 0 <= ids.min() <= ids.max() < V
        if not (is_ids and has.get("hidden_states") == (n, layers, T) and mask.shape == (n,)):
            wanted = f"token_ids [n], ids in 0..{V - 1}, hidden_states [n, {layers}, {T}] (of target.layer_ids and what"
            raise ValueError(f"{path} has {has}; it must have {wanted} enters the final norm), perhaps loss_mask [n]")
        if n > self.max_length:
            raise ValueError(f"{path} has {n} tokens, data.max_length is {self.max_length}: raise data.max_length")
        document_ids = torch.zeros(n, dtype=torch.int64)
        return {"input_ids": ids.long(), "loss_mask": mask.long(), "document_ids": document_ids, "path": path}

    @torch.no_grad()
    def compute(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each sample's features [n, F*T] and last hidden states [n, T] after the final norm."""
        for row in rows:
            with open_tensors(row["path"]) as file:
                hidden_nFT = file.get_tensor("hidden_states").to(self.target.device, self.target.dtype)
            yield hidden_nFT[:, :-1].flatten(1).cpu(), self.norm(hidden_nFT[None, :, -1])[0].cpu()

    def _compare(self) -> None:
        """ValueError unless the target gives a sample's first features, that of the most tokens of the first 16."""
        sample = max((self[i] for i in range(min(16, len(self)))), key=lambda sample: sample["input_ids"].numel())
        ids = sample["input_ids"][None, :32]
        own = self.target.features(ids, torch.arange(ids.shape[1])[None])
        part = slice(int(ids.shape[1] > 1), ids.shape[1])  # beside a first token's activations others may not count
        pairs = zip(next(self.compute([sample])), own, strict=True)
        off, off_last = (relative(theirs[part], ours[0, part].cpu()) for theirs, ours in pairs)
        if max(off, off_last) > 0.1:
            offs = f"features are {off:.0%}, last hidden states after the final norm {off_last:.0%} off the target's"
            ids = f"{self.target.layer_ids} (give target.layer_ids)"
            why = f"of another target, of other layers than {ids}, or through that norm before"
            raise ValueError(f"--speculators: {offs}: they are {why}")

    def write_documents(self, path: Path) -> None:
        """The samples with their masks as a .jsonl source. Those with nothing to learn from are dropped, and counted."""
        dropped = 0
        with partial_path(path).open("w", encoding="utf-8") as file:
            for i in range(len(self)):
                sample = self[i]
                row = {name: sample[name].tolist() for name in ("input_ids", "loss_mask")}
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
    logger.warning("no data set next to %s: without a loss_mask of its own, a file's tokens are all learned from", root)
    return None
