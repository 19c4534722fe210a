"""Which files the sources of a recipe name, in an order that is the same on every machine."""

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from peagle_train.data.source_spec import HUB, SourceSpec, parse_sources

STDLIB = "stdlib"
"""The source that stands for the modules of the running Python's own library."""
TEXT_EXTENSIONS = (".py", ".txt", ".md")
ROW_FORMATS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""Files of rows by their extension; any other file is text."""
_SAVED = ("state.json", "dataset_dict.json")
"""A folder with one of these was written by `datasets.save_to_disk`."""

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """A file to read, or a data set that is read as one."""

    path: str
    """Where it is, in the user's own words."""
    name: str
    """`source/path/below/it`: the same on every machine."""
    format: str = "text"
    """text, jsonl, json, parquet, arrow, saved (a folder of `datasets.save_to_disk`) or hub (a name)."""
    source: int = 0
    """Which of the sources names it."""
    split: str | None = None
    """Of a saved data set or one of the hub."""
    config: str | None = None
    """Of one of the hub."""
    streaming: bool = False
    """Whether one of the hub is read without a copy on disk."""
    size: int = 0
    """Bytes; 0 where they are not known."""


@dataclass
class FoundFiles:
    """What the sources name, and what of it is left out."""

    files: list[SourceFile] = field(default_factory=list)
    """Sources in the order given; within one, by the path below it."""
    excluded: int = 0
    """Files that an exclude pattern matches."""
    other: int = 0
    """Files of folders and globs with another extension."""
    linked_folders: int = 0
    """Symbolic links to folders, which are not entered."""


def find_files(
    sources: Sequence[str | SourceSpec], extensions: Sequence[str] = TEXT_EXTENSIONS, exclude: Sequence[str] = ()
) -> FoundFiles:
    """Resolve files, folders, globs, `stdlib`, saved data sets and names of data sets.

    Folders are searched, at any depth, for `extensions` (or for those of the source's own format). Files and globs may
    also name text and row files of any extension that is known. `exclude` holds fnmatch patterns on the path below the
    source, with or without the source's own name in front.

    Raises:
        ValueError: a source that names nothing to read.
    """
    if isinstance(sources, str) or len(sources) == 0:
        raise ValueError(f"data sources are {sources!r}; give a non-empty list of files, folders, globs or {STDLIB}")
    found = FoundFiles()
    for number, source in enumerate(sources):
        spec = parse_sources([source])[0] if isinstance(source, str) else source
        before = (len(found.files), found.excluded, found.other)
        wanted = tuple(extensions) if spec.format in ("auto", "text") else (f".{spec.format}",)
        _add_source(found, number, spec, wanted, exclude)
        if len(found.files) == before[0]:
            raise ValueError(
                f"data source {spec.describe()} has no file to read: {found.excluded - before[1]} are excluded and"
                f" {found.other - before[2]} are not {' '.join(wanted)}: change data.exclude or data.extensions"
                + (" (what ends in .gz is not read: unpack it)" if spec.describe().endswith(".gz") else "")
            )
    return found


def _add_source(
    found: FoundFiles, number: int, spec: SourceSpec, extensions: tuple[str, ...], exclude: Sequence[str]
) -> None:
    as_rows: dict[str, Any] = {"source": number, "split": spec.split, "config": spec.name, "streaming": spec.streaming}
    if spec.path is None:
        found.files.append(SourceFile(str(spec.datasets), spec.describe(), "hub", **as_rows))
        return
    source, path = spec.path, os.path.expanduser(spec.path)
    if os.path.isdir(path) and any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
        if spec.name is not None:
            raise ValueError(f"data source {source} is a saved data set, which has no name to choose: leave out name")
        found.files.append(SourceFile(path, os.path.basename(os.path.abspath(path)), "saved", **as_rows))
        return
    if spec.split is not None or spec.name is not None:
        raise ValueError(f"data source {source} is no data set with splits and names: leave out split and name")
    explicit = (*extensions, *TEXT_EXTENSIONS, *ROW_FORMATS) if spec.format == "auto" else ("",)
    if source == STDLIB:
        root, prefix, extensions = sysconfig.get_paths()["stdlib"], STDLIB, (".py",)
        below = list(_walk(root, found, _NOT_LIBRARY))
    elif os.path.isdir(path):
        root, prefix = path, os.path.basename(os.path.abspath(path))
        below = list(_walk(root, found))
    elif os.path.isfile(path):
        root, prefix, extensions = os.path.dirname(path), "", explicit
        below = [os.path.basename(path)]
    elif glob.has_magic(path):
        root, extensions = _fixed_part(path), explicit
        prefix = os.path.basename(os.path.abspath(root))
        matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        below = [os.path.relpath(match, root or os.curdir).replace(os.sep, "/") for match in matches]
        if not below:
            raise ValueError(f"data source {source} matches no file")
    else:
        raise ValueError(
            f"data source {source} does not exist; give a file, a folder, a glob, {STDLIB} or {HUB}NAME (a data set)"
        )
    for item in sorted(below):
        name = f"{prefix}/{item}" if prefix else item
        if not item.endswith(extensions):
            found.other += 1
        elif any(fnmatch.fnmatchcase(text, pattern) for text in (item, name) for pattern in exclude):
            found.excluded += 1
        else:
            full = os.path.join(root, item)
            kind = ROW_FORMATS.get(os.path.splitext(item)[1], "text") if spec.format == "auto" else spec.format
            size = os.path.getsize(full) if os.path.exists(full) else 0  # a broken link is told when it is read
            found.files.append(SourceFile(full, name, kind, number, size=size))


def _walk(root: str, found: FoundFiles, skipped: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths below `root` of all files in it, with forward slashes; folders named in `skipped` do not count."""

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from None

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        found.linked_folders += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _fixed_part(pattern: str) -> str:
    """The folder in front of a glob's first wildcard."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern
