"""Hidden states that speculators (vllm-project) has written for offline training, as rows and features.

Its folder holds hs_{i}.safetensors, one a sample i, with `token_ids` [n] and `hidden_states` [n, 4, T]: three layers and
what enters the target's final norm. The loss mask is in the data set next to it (Arrow, written by `datasets`): row i has
`loss_mask` [n] and the same tokens as `input_ids`. T: the target's hidden size, n: tokens.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peagle_train.durable import partial_path, put
from peagle_train.target.frozen import FrozenTarget
from peagle_train.target.target_check import relative

logger = logging.getLogger(__name__)
DOCUMENTS = "documents.jsonl"
"""In the folder that is written: the samples as a data source."""


class SpeculatorsFiles:
    """Each file is a row of one document, in the order of i.

    Args:
        folder: of hs_{i}.safetensors, or the one above its `hidden_states`.
        target: the target that they are said to be of. max_length: of a row; a longer sample is a ValueError.

    Raises:
        ValueError: one line, for files that are something else, and for features that the target does not give.
    """

    def __init__(self, folder: str, target: FrozenTarget, max_length: int) -> None:
        root = Path(folder)
        root = root / "hidden_states" if (root / "hidden_states").is_dir() else root
        numbered = {int(p.stem[3:]): p for p in root.glob("hs_*.safetensors") if p.stem[3:].isdigit()}
        if not numbered:
            raise ValueError(
                f"--speculators {folder} holds no hs_NUMBER.safetensors: give the folder that speculators wrote"
            )
        self.target, self.max_length = target, max_length
        self.samples = sorted(numbered.items())
        self.data_set = _data_set(root)
        self.last_is_normed = self._compare_with_target()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """input_ids, loss_mask, document_ids int64 [n], as `PackedRows` gives them, and the file's path."""
        number, path = self.samples[index]
        ids, mask = self._read(path, ["token_ids", "loss_mask"])
        n, V = ids.numel(), self.target.vocab_size
        if ids.dim() != 1 or ids.is_floating_point() or n == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise ValueError(f"{path}: token_ids must be a flat list of ids in 0..{V - 1}, the target's vocabulary")
        if n > self.max_length:
            raise ValueError(
                f"{path} has {n} tokens, more than data.max_length {self.max_length}: raise data.max_length"
            )
        if mask is None and self.data_set is not None:
            mask = self._mask_of(number, path, ids)
        mask = torch.ones(n, dtype=torch.int64) if mask is None else mask.flatten().to(torch.int64)
        if mask.numel() != n or bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(f"{path} has {n} tokens; its loss_mask must be 0 or 1 for each of them")
        document_ids = torch.zeros(n, dtype=torch.int64)
        return {"input_ids": ids.to(torch.int64), "loss_mask": mask, "document_ids": document_ids, "path": path}

    def compute(self, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A row's features [n, 3T] and last hidden states [n, T] after the final norm."""
        hidden = self._hidden(row)
        return hidden[:, :3].flatten(1).cpu(), self._normed(hidden[:, 3]).cpu()

    def write_documents(self, folder: Path) -> None:
        """The samples with their masks as a .jsonl source, whole or not at all.

        Those with nothing to learn from would be bad rows there: they are left out, and counted.
        """
        partial, left_out = partial_path(folder / DOCUMENTS), 0
        with partial.open("w", encoding="ascii") as file:
            for index in range(len(self)):
                row = self[index]
                pair = {"input_ids": row["input_ids"].tolist(), "loss_mask": row["loss_mask"].tolist()}
                if 1 not in pair["loss_mask"][1:]:
                    left_out += 1
                    continue
                file.write(json.dumps(pair) + "\n")
        put(partial, folder / DOCUMENTS)
        if left_out:
            logger.warning("%d samples with no token to learn from are not in %s", left_out, folder / DOCUMENTS)

    def _hidden(self, row: dict[str, Any]) -> Tensor:
        """[n, 4, T], in the target's dtype, on its device."""
        path, T = row["path"], self.target.hidden_size
        hidden = self._read(path, ["hidden_states"])[0]
        shape = (row["input_ids"].numel(), 4, T)
        if hidden is None or tuple(hidden.shape) != shape or not hidden.is_floating_point():
            given = "missing" if hidden is None else f"{hidden.dtype} {list(hidden.shape)}"
            raise ValueError(
                f"{path}: hidden_states is {given}; it must be floats {list(shape)}: three layers and what enters the final"
                " norm, for every token"
            )
        return hidden.to(self.target.device, self.target.head_weight().dtype)

    @torch.no_grad()
    def _normed(self, last: Tensor) -> Tensor:
        return last if self.last_is_normed else self.target.final_norm()(last[None])[0]

    def _compare_with_target(self) -> bool:
        """Run the target over the shortest of the first 16 samples with more than one token. Returns whether the last slot
        is behind the final norm already.

        The files do not say of which layers they are: this does.
        """
        rows = [self[i] for i in range(min(16, len(self)))]
        row = min(rows, key=lambda row: (row["input_ids"].numel() == 1, row["input_ids"].numel()))
        hidden = self._hidden(row)
        ids = row["input_ids"][None]
        features, last = self.target.features(ids, torch.arange(ids.shape[1])[None])
        off = relative(hidden[:, :3].flatten(1), features[0])
        if off > 0.1:
            raise ValueError(
                f"{row['path']}: its features are {off:.0%} off what the target gives in layers {self.target.layer_ids}:"
                " they are of another target, or of other layers (give target.layer_ids)"
            )
        self.last_is_normed = False
        before, behind = relative(self._normed(hidden[:, 3]), last[0]), relative(hidden[:, 3], last[0])
        if min(before, behind) > 0.1:
            raise ValueError(
                f"{row['path']}: its last hidden state is not the target's, neither before the final norm ({before:.0%}"
                f" off) nor behind it ({behind:.0%} off)"
            )
        if behind < before:
            logger.warning(
                "the last hidden states of %s are behind the final norm: taken as they are", row["path"].parent
            )
        return behind < before

    def _mask_of(self, number: int, path: Path, ids: Tensor) -> Tensor:
        if number >= len(self.data_set):
            raise ValueError(f"{path}: the data set next to it has {len(self.data_set)} rows only")
        sample = self.data_set[number]
        if list(sample["input_ids"]) != ids.tolist():
            raise ValueError(
                f"{path}: row {number} of the data set next to it has other tokens: another data set, or a cut one"
            )
        return torch.as_tensor(sample["loss_mask"])

    def _read(self, path: Path, names: list[str]) -> list[Any]:
        """Tensors by name, None where the file has no such one."""
        try:
            with safe_open(path, framework="pt") as file:
                known = set(file.keys())
                if "token_ids" not in known:
                    raise ValueError(
                        f"{path} has no token_ids (it has {', '.join(sorted(known))}): not speculators' format"
                    )
                return [file.get_tensor(name) if name in known else None for name in names]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _data_set(root: Path) -> Any:
    """The Arrow data set in this folder or in the one above; None, with a line, where there is none."""
    for folder in (root, root.parent):
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            from datasets import load_from_disk

            found: Any = load_from_disk(str(folder)).with_format(None)  # it may have been saved as tensors
            if not {"input_ids", "loss_mask"} <= set(found.column_names):
                raise ValueError(
                    f"the data set {folder} has no columns input_ids and loss_mask (has {found.column_names})"
                )
            return found
    logger.warning(
        "no data set next to %s: where a file has no loss_mask of its own, every token is learned from", root
    )
    return None
