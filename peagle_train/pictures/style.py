"""What all pictures share: matplotlib where it is installed, one look, colours, PNG files that are whole or not there.

matplotlib is an optional extra; nothing but the tools that draw imports this file.
"""

import io
from pathlib import Path
from typing import Any

from peagle_train.durable import partial_path, put

DOCUMENTS = ("#a9c9ea", "#f6c592", "#b5dcae", "#d9b8e3")
"""Of documents, in turn."""
RUNS = ("#1f6fb4", "#d1601c", "#2b8a3e", "#8b3fa8", "#a8323a", "#4d6a7a", "#b08800", "#128f8b")
"""Of runs and methods."""
GREY, DARK = "#c9ced4", "#20262d"

STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7d8790",
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.color": DARK,
    "axes.labelcolor": DARK,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "figure.dpi": 110,
}


def load_matplotlib() -> Any:
    """matplotlib.pyplot, without a display and in this project's look; ValueError that says what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "drawing needs matplotlib, which is not installed: pip install matplotlib (the extra peagle-train[report])"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = pyplot.rcParams  # whose type names every key
    settings.update(STYLE)
    return pyplot


def depth_colour(depth: int, num_depths: int) -> Any:
    """Of a depth: dark for shallow ones, and light enough to tell from white for the deepest."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.02 + 0.86 * depth / max(1, num_depths - 1))


def png_of(figure: Any, dpi: int = 110) -> bytes:
    """The figure as a PNG of few bytes; the figure is closed."""
    from matplotlib import pyplot

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.12)
    pyplot.close(figure)
    return data.getvalue()


def write_bytes(path: Path, data: bytes) -> None:
    """A file that is whole or not there; ValueError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path(path).write_bytes(data)
        put(partial_path(path), path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
