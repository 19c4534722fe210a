"""Rows of parquet and Arrow files, of saved data sets and of data sets by name, through Hugging Face's `datasets`.

Imported only where a recipe names one.
"""

import glob
from collections.abc import Iterator
from typing import Any

import datasets
from datasets.utils.logging import disable_progress_bar

from peagle_train.data.files import SourceFile

_ROWS_AT_ONCE = 256


def table_rows(file: SourceFile) -> Iterator[dict[str, Any]]:
    """Each row as a mapping of plain values, in order, a few hundred of them in memory at a time.

    Raises:
        ValueError: one line, for what cannot be opened or read.
    """
    try:
        for batch in _open(file).iter(batch_size=_ROWS_AT_ONCE):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
    except Exception as error:  # pyarrow, datasets and the hub's client each raise types of their own
        lines = str(error).split("\n")
        raise ValueError(
            f"cannot read {file.path} ({file.format}): {type(error).__name__}: {lines[0][:300]}"
        ) from error


def _open(file: SourceFile) -> Any:
    disable_progress_bar()
    split = file.split or "train"
    if file.format in ("parquet", "arrow"):
        # Streaming reads the file itself; without it `datasets` would first copy it to its cache.
        pattern = glob.escape(file.path)  # which the name would otherwise be taken for
        # Given a size, it does not take that of the first row group, which is 0 in a parquet file without rows.
        size = {"batch_size": _ROWS_AT_ONCE} if file.format == "parquet" else {}
        return datasets.load_dataset(file.format, data_files=pattern, split="train", streaming=True, **size)
    if file.format == "saved":
        saved = datasets.load_from_disk(file.path).with_format(None)  # it may have been saved as arrays or tensors
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has no split {split}, only {', '.join(saved)}")
            return saved[split]
        if file.split is not None:
            raise ValueError("it has no splits: leave out split")
        return saved
    return datasets.load_dataset(file.path, file.config, split=split, streaming=file.streaming)
