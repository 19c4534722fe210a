"""What a run learns from: its recipe's sequences, made now or prepared once for many runs, their collator, and which of
them a rank trains on in which step.

A prepared folder is whole or not there:
    sources-ids.bin, sources-mask.bin   tokens of all documents, see `TokenStore`; also eval_sources-...
    train.safetensors                   where the sequences' tokens are, see `PackedRows`, and counts_V
    held_out.safetensors                the same of the held-out sequences
    index.json                          the settings it was made with, the sums of the files and its own, what is said of it
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler

from peagle_train.config import Recipe
from peagle_train.core.attention import uses_flex
from peagle_train.core.cod import seeded
from peagle_train.core.collator import CODCollator
from peagle_train.core.flex import BLOCK_SIZE
from peagle_train.data.chat import read_template
from peagle_train.data.documents import find_all, open_tokens, read_documents
from peagle_train.data.encode import Encoder
from peagle_train.data.packing import EMPTY_ROW, PackedRows, PackReport, TrainingData, make_data
from peagle_train.data.vocab import choose_mask_token, load_config, load_tokenizer
from peagle_train.files import alone_in, checksum, one_line, read_sealed, sha256_of, write_folder, write_json

INDEX, TRAIN, HELD_OUT = "index.json", "train.safetensors", "held_out.safetensors"
FORMAT = 7  # raised whenever the same recipe and files give other bytes
_DATA_KEYS = ("sources extensions exclude eval_sources eval_fraction max_length pack template_kwargs").split()
"""Of the recipe's data section, what decides the sequences. (max_bad_rows only decides whether there are any.)"""


def load_training_data(encoder: Encoder, say: Callable[[str], object] = print) -> TrainingData:
    """The sequences that the encoder's data section names, made now or prepared before: the same on every machine and rank,
    and no rank waits for another here. `say` takes each line of the report. ValueError: a user's mistake.
    """
    data = encoder.data
    if data.prepared is not None:
        made = open_prepared(Path(data.prepared), settings_of(encoder))
        say(f"data: as prepared in {data.prepared}, checksums verified")
    else:
        made = make_data(encoder, find_all(data))
    for line in made.lines:
        say(line)
    eval_rows = made.eval_rows.limit(data.max_eval_rows)
    if len(eval_rows) < len(made.eval_rows):
        say(f"held out: {len(eval_rows)} of these sequences are evaluated on (data.max_eval_rows)")
    if data.eval_fraction > 0 and not len(eval_rows):
        say("no evaluation: the only document is trained on: give more, or data.eval_sources")
    return made._replace(eval_rows=eval_rows)


def encoder_of(recipe: Recipe, vocab_size: int | None = None, num_workers: int = 1, progress: bool = False) -> Encoder:
    """The recipe's encoder; `vocab_size` is the target's (None: what its config.json says). ValueError: a mistake."""
    path, trusted = recipe.target.path, recipe.target.trust_remote_code
    tokenizer = load_tokenizer(path, trusted)
    size = vocab_size or load_config(path, trusted).get_text_config().vocab_size
    if (drafted := recipe.draft.draft_vocab_size or 1) > size:
        raise ValueError(f"draft.draft_vocab_size is {drafted}; the target's vocabulary has {size}")
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, size)
    return Encoder(recipe.data, tokenizer, size, mask_token_id, num_workers, progress)


def make_collator(recipe: Recipe, seed: int, device: torch.device | None = None) -> CODCollator:
    """`device`: that the drafter trains on, for its attention's blocks."""
    cod, multiple = recipe.cod, BLOCK_SIZE if device and uses_flex(device) else 1
    sizes = recipe.data.max_length, cod.num_depths, cod.down_sample_ratio, cod.down_sample_ratio_min, cod.segments
    return CODCollator(*sizes, cod.boundaries, seed, capacity_multiple=multiple, max_anchors=cod.max_anchors)


@dataclass(eq=False)
class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one rank, lists of `(epoch, index)`, `accumulation` of them for every optimizer step.

    Epoch e visits every sequence once, in an order drawn from (seed, e). A step takes the next batch_size *
    accumulation * world_size sequences: number j of them belongs to micro-batch j // (world_size * batch_size) of
    rank j // batch_size % world_size, so that one process with twice the accumulation trains on the same sequences
    as two processes. The last step of an epoch is filled up with `EMPTY_ROW`: nothing is repeated or skipped.

    With `reuse` R, R epochs go together, in the order of the first of them cut into blocks of `block_steps` steps: each
    block is visited R times, once for each epoch, before the next one. Every visit but the first mixes the block's steps
    anew, but a sequence keeps its place j in a step, and so its rank.

    The ranks' shares are divided here: Accelerate must not prepare the loader whose `batch_sampler` it is.
    """

    num_rows: int
    batch_size: int = 1
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_step: int = 0  # done already
    num_steps: int = 0  # optimizer steps of the whole run; 0: those of one epoch
    reuse: int = 1
    block_steps: int = 0  # 0: those of one epoch

    def __post_init__(self) -> None:
        self.num_steps = self.num_steps or self.steps_per_epoch
        self.block_steps = self.block_steps or self.steps_per_epoch

    @property
    def global_batch_size(self) -> int:
        """Sequences of an optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        made, table = None, torch.empty(0)
        for step in range(self.start_step, self.num_steps):
            visit, at = self._visit(step)
            if visit != made:
                made, table = visit, self._sequences(*visit)
            for micro_batch in range(self.accumulation):
                first = (micro_batch * self.world_size + self.rank) * self.batch_size
                yield [(visit[0], index) for index in table[at, first : first + self.batch_size].tolist()]

    def comes_again(self, step: int) -> bool:
        """Whether a step (counted from 0) is not in the last visit to its block."""
        return self._visit(step)[0][0] % self.reuse < self.reuse - 1

    def _visit(self, step: int) -> tuple[tuple[int, int, int], int]:
        """A step's visit (its epoch, the block's first step in the order, the block's number of steps), and place there."""
        group, in_group = divmod(step, self.reuse * self.steps_per_epoch)
        first = in_group // (self.reuse * self.block_steps) * self.block_steps
        steps = min(self.block_steps, self.steps_per_epoch - first)
        number, at = divmod(in_group - self.reuse * first, steps)
        return (group * self.reuse + number, first, steps), at

    def _sequences(self, epoch: int, first: int, steps: int) -> Tensor:
        """int64 [steps, global batch]: those of a visit."""
        group, number = divmod(epoch, self.reuse)
        table = torch.full((steps, self.global_batch_size), EMPTY_ROW)
        rows = epoch_order(self.num_rows, self.seed, group)[first * self.global_batch_size :][: table.numel()]
        table.view(-1)[: rows.numel()] = rows
        if number > 0:
            draw = torch.rand(table.shape, generator=seeded("block order", self.seed, epoch, first))
            table = table.gather(0, draw.argsort(stable=True, dim=0))
        return table


def epoch_order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """int64 [num_rows]: the order in which an epoch visits the sequences."""
    return torch.randperm(num_rows, generator=seeded("row order", seed, epoch))


def prepare_recipe(recipe: Recipe, folder: Path, num_workers: int = 1) -> TrainingData:
    """Make the folder that `data.prepared` may name, or check it; returns what training reads. ValueError: a mistake."""
    data, encoder = recipe.data, encoder_of(recipe, num_workers=num_workers, progress=True)
    settings, found = settings_of(encoder), find_all(data)
    names = {
        role: [(f.name, f.format, 0 if f.format == "hub" else os.path.getsize(f.path)) for f in report.files]
        for role, report in found.items()
    }
    settings["names and sizes of the sources' files"] = checksum(names)
    if (folder / INDEX).exists():
        print(f"{folder} is finished: checking it (named data sets are compared by their names only)")
        return open_prepared(folder, settings)

    def fill(partial: Path) -> None:
        made = make_data(encoder, found, partial)
        save_file({**made.train_rows.layout, "counts_V": made.counts_V.numpy()}, partial / TRAIN)
        save_file(made.eval_rows.layout, partial / HELD_OUT)
        index = {
            "settings": settings,
            "files": {path.name: sha256_of(path) for path in sorted(partial.iterdir())},
            "report": asdict(made.report),
            "lines": made.lines,
        }
        write_json(partial / INDEX, {**index, "sha256": checksum(index)})

    with alone_in(folder, "preparing"):
        if any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no prepared data; give another folder")
        write_folder(folder, fill)
    return open_prepared(folder, settings)


def check_data(recipe: Recipe, num_workers: int) -> None:
    """Read everything and print what cannot be used, by reason, with the first of each. ValueError: a run would stop."""
    encoder, found = encoder_of(recipe, num_workers=num_workers, progress=True), find_all(recipe.data)
    for role, report in found.items():
        for _ in read_documents(report, encoder, stops=False):
            pass
        print(f"data.{role}: {report.describe()}")
    for role, report in found.items():
        if mistake := report.mistake(recipe.data.max_bad_rows):
            raise ValueError(f"data.{role}: {mistake}")


def settings_of(encoder: Encoder) -> dict[str, Any]:
    """All that decides the sequences besides the files, by its name for users. ValueError for an unreadable template."""
    data, tokenizer = encoder.data, encoder.tokenizer
    own_template, backend = getattr(tokenizer, "chat_template", None), None
    if getattr(tokenizer, "is_fast", False):
        # Padding and truncation are how it was last called, not what it is.
        backend = {**json.loads(tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
    elif tokenizer is not None:
        backend = tokenizer.get_vocab()
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    settings = {
        "the format of prepared data": FORMAT,
        **{f"data.{key}": getattr(data, key) for key in _DATA_KEYS},
        "the target's vocabulary": encoder.vocab_size,
        "draft.mask_token_id": encoder.mask_token_id,
        "the target's tokenizer": checksum([type(tokenizer).__name__, special, backend]),
        "the chat template": checksum(read_template(data.chat_template) or own_template),
    }
    return dict(json.loads(json.dumps(settings)))  # as it is read back


def open_prepared(folder: Path, settings: dict[str, Any]) -> TrainingData:
    """A prepared folder's sequences, mapped from files. ValueError: not finished, changed, or made for other settings."""
    index = read_sealed(folder / INDEX)
    if index is None:
        raise ValueError(f"data.prepared {folder} holds no prepared data; peagle-train prepare makes it")
    for key, now in settings.items():
        if now != (then := index["settings"].get(key)):
            change = f"{key} {one_line(json.dumps(then), 60)}, while it is {one_line(json.dumps(now), 60)} now"
            raise ValueError(f"data.prepared {folder} was made with {change}: change that, or prepare anew elsewhere")
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one process of a machine is enough: if it fails, all end
        for name, written in index["files"].items():
            if not (folder / name).is_file() or sha256_of(folder / name) != written:
                remedy = "remove the folder and prepare it again"
                raise ValueError(f"data.prepared {folder}: {name} is missing or changed: {remedy}")
    train, held_out = load_file(folder / TRAIN), load_file(folder / HELD_OUT)
    counts_V = torch.from_numpy(train.pop("counts_V"))
    eval_role = "eval_sources" if settings["data.eval_sources"] else "sources"
    train_rows = PackedRows(open_tokens(folder / "sources"), train)
    eval_rows = PackedRows(open_tokens(folder / eval_role), held_out)
    return TrainingData(train_rows, eval_rows, counts_V, PackReport(**index["report"]), index["lines"])
