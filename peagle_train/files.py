"""Which files the sources of a recipe name, in an order that is the same on every machine."""

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

STDLIB = "stdlib"
"""The source that stands for the modules of the running Python's own library."""
JSONL = ".jsonl"
TEXT_EXTENSIONS = (".py", ".txt", ".md")

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """A file to read."""

    path: str
    """Where it is, in the user's own words."""
    name: str
    """`source/path/below/it`: the same on every machine."""


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


def find_files(sources: Sequence[str], extensions: Sequence[str], exclude: Sequence[str]) -> FoundFiles:
    """Resolve files, folders, globs and `stdlib`.

    Folders are searched, at any depth, for `extensions`. Files and globs may also name .jsonl, .py, .txt and
    .md. `exclude` holds fnmatch patterns on the path below the source, with or without the source's own name
    in front.

    Raises:
        ValueError: a source that names nothing to read.
    """
    if isinstance(sources, str) or len(sources) == 0:
        raise ValueError(f"data sources are {sources!r}; give a non-empty list of files, folders, globs or {STDLIB}")
    found = FoundFiles()
    for source in sources:
        before = (len(found.files), found.excluded, found.other)
        _add_source(found, source, tuple(extensions), exclude)
        if len(found.files) == before[0]:
            raise ValueError(
                f"data source {source} has no file to read: {found.excluded - before[1]} are excluded and"
                f" {found.other - before[2]} are not {' '.join(extensions)}: change data.exclude or"
                " data.extensions"
            )
    return found


def _add_source(found: FoundFiles, source: str, extensions: tuple[str, ...], exclude: Sequence[str]) -> None:
    path = os.path.expanduser(source)
    explicit = (*extensions, *TEXT_EXTENSIONS, JSONL)
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
        raise ValueError(f"data source {source} does not exist; give a file, a folder, a glob or {STDLIB}")
    for item in sorted(below):
        name = f"{prefix}/{item}" if prefix else item
        if not item.endswith(extensions):
            found.other += 1
        elif any(fnmatch.fnmatchcase(text, pattern) for text in (item, name) for pattern in exclude):
            found.excluded += 1
        else:
            found.files.append(SourceFile(os.path.join(root, item), name))


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
