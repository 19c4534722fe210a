"""One entry of `data.sources`: a string, or a mapping with a weight and more. Knows nothing of what is on the disk."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from peagle_train.schema import RecipeError, option, read_section

HUB = "hf:"
"""In front of a name, it is that of a data set that Hugging Face's `datasets` loads."""


@dataclass(frozen=True)
class SourceSpec:
    """What a recipe says of one source."""

    path: str | None = option(None)
    """A file, a folder (of files, or written by `datasets.save_to_disk`), a glob, or stdlib."""
    datasets: str | None = option(None)
    """The name of a data set, for `datasets.load_dataset`. Either this or path."""
    weight: float = option(1.0, gt=0, le=1000)
    """How often each document comes in an epoch: 2.5 is twice, and once more for the half that their keys choose."""
    format: Literal["auto", "text", "jsonl", "json", "parquet", "arrow"] = "auto"
    """What the files are; auto goes by their extension. Given, it also chooses what a folder's files are."""
    split: str | None = option(None)
    """Of a data set that has splits; null: train."""
    name: str | None = option(None)
    """The data set's configuration."""
    streaming: bool = False
    """Never held in memory or on disk as a whole; has to be prepared before training."""

    def describe(self) -> str:
        """The source in the user's own words."""
        return self.path if self.path is not None else f"{HUB}{self.datasets}"


def parse_sources(items: Sequence[str | dict[str, Any]], key: str = "data.sources") -> list[SourceSpec]:
    """Each entry of `key`; RecipeError of one line for what is none."""
    return [_parse(item, f"{key}[{number}]") for number, item in enumerate(items)]


def _parse(item: str | dict[str, Any], key: str) -> SourceSpec:
    if isinstance(item, str):
        item = {"datasets": item.removeprefix(HUB)} if item.startswith(HUB) else {"path": item}
    if isinstance(item.get("path"), str) and item["path"].startswith(HUB) and "datasets" not in item:
        item = {**{name: value for name, value in item.items() if name != "path"}, "datasets": item["path"][len(HUB) :]}
    spec: SourceSpec = read_section(SourceSpec, key, item, [f"{key}.{spec.name}" for spec in fields(SourceSpec)])
    if (spec.path is None) == (spec.datasets is None):
        given = "both path and datasets" if spec.path is not None else "neither path nor datasets"
        raise RecipeError(f"{key} has {given}; give one of them")
    if spec.datasets is not None and spec.format != "auto":
        raise RecipeError(f"{key}.format is {spec.format}, which is of files; leave it out beside datasets")
    return spec
