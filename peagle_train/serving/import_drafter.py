"""Another's drafter in this project's names, completed to a P-EAGLE drafter where it is an EAGLE-3 one."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peagle_train.serving.check_drafter import Finding, check_folder, is_loadable
from peagle_train.serving.drafter_files import DrafterFiles, read_drafter, weight_files
from peagle_train.serving.drafter_tensors import expected_shapes
from peagle_train.serving.export import Export, check_new, write_drafter, write_new_folder


def import_drafter(
    source: Path, out: Path, *, target: Path | None = None, mask_token_id: int | None = None, seed: int = 0
) -> Export:
    """Write a drafter of either format and any of the known names as `model.safetensors` and `config.json` of our own.

    Args:
        source: a drafter's folder. out: a folder that does not exist yet, or an empty one.
        target: the target's folder, for embeddings and head where the drafter has none.
        mask_token_id: needed where the drafter has none.
        seed: of `mask_hidden` where the drafter has none.

    Raises:
        ValueError: one line; nothing is written then.
    """
    check_new(out)
    files = read_drafter(source)
    notes, config = list(files.notes), files.config
    if config.ptd_token_id is None:
        if mask_token_id is None:
            raise ValueError(f"{source} has no mask token: give --mask-token-id, a token that never occurs in text")
        config.mask_token_id = config.pard_token = config.ptd_token_id = mask_token_id
        notes.append(f"the mask token is {mask_token_id}, as given")
    elif mask_token_id not in (None, config.ptd_token_id):
        raise ValueError(f"--mask-token-id is {mask_token_id}, but {source} was trained with {config.ptd_token_id}")
    config.check_trainable()
    if "mask_hidden" in files.missing:
        shape = expected_shapes(config)["mask_hidden"]
        random = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * config.initializer_range
        files.tensors["mask_hidden"] = random.to(files.tensors["fc.weight"].dtype)
        notes.append("mask_hidden was drawn at random (an EAGLE-3 drafter has none): train before serving")
    _take_from_target(files, target, notes)
    config.dtype = files.tensors["fc.weight"].dtype
    findings: list[Finding] = []

    def fill(temporary: Path) -> None:
        write_drafter(temporary, config.to_json_string(), files.tensors)
        findings.extend(check_folder(temporary))
        if not is_loadable(findings):
            bad = [f"{finding.what}: {finding.detail}" for finding in findings if finding.level == "BAD"]
            raise ValueError(f"{source} does not make a drafter: {'; '.join(bad)}")

    write_new_folder(out, fill)
    return Export(out, findings, notes)


def _take_from_target(files: DrafterFiles, target: Path | None, notes: list[str]) -> None:
    """Fill in embeddings and head from the target's files, where the drafter has none."""
    lost = [name for name in files.missing if name != "mask_hidden"]
    if not lost:
        return
    if target is None:
        raise ValueError(f"{files.folder} lacks {', '.join(lost)}, which are the target's: give --target DIR")
    shapes = expected_shapes(files.config)
    for name in lost:
        found = target_tensor(target, name)
        if found is None and name == "lm_head.weight":
            found = target_tensor(target, "embed_tokens.weight")  # tied
        if found is None:
            raise ValueError(f"{target} has no tensor that ends in {name}")
        if found.shape[0] != files.config.vocab_size:
            raise ValueError(f"{target} has {found.shape[0]} tokens, the drafter is for {files.config.vocab_size}")
        tensor = found[files.draft_token_ids] if name == "lm_head.weight" else found
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} of {target} is {list(tensor.shape)}; the drafter's is {list(shapes[name])}")
        files.tensors[name] = tensor.to(files.tensors["fc.weight"].dtype)
        notes.append(f"{name} is the target's")


def target_tensor(target: Path, name: str) -> Tensor | None:
    """The one tensor of a model's folder whose name ends in `name`; None if there is none."""
    found = []
    try:
        if not target.is_dir():
            raise ValueError("no folder")
        for shard in weight_files(target):
            with safe_open(target / shard, framework="pt") as file:
                found += [file.get_tensor(key) for key in file.keys() if key == name or key.endswith(f".{name}")]
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"--target {target} cannot be read: {error}") from None
    if len(found) > 1:
        raise ValueError(f"--target {target} has {len(found)} tensors that end in {name}")
    return found[0] if found else None
