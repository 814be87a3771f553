"""Style and saving of all figures: readable in greyscale and by colour-blind readers, in any language.

Lines differ in colour, marker and dash; heat maps use cividis, whose lightness rises with the value.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
MAP = "cividis"
KINDS = {"png": {"Software": None}, "pdf": {"CreationDate": None}}  # kind of file -> metadata that is left out
FONTS = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC")  # for Chinese, if installed
LONGEST_NAME = 28  # characters of a name on an axis


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns panels, each width x height inches, without a window; "$" is an ordinary character."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9, "axes.titlesize": 9, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
            "axes.spines.top": False, "axes.spines.right": False,
            "legend.edgecolor": "none", "legend.framealpha": 0.85, "legend.fontsize": 8,
            "pdf.fonttype": 42, "savefig.dpi": 160, "text.parse_math": False, "font.family": font_families(),
        }
    )  # fmt: skip
    figure, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False,
                                layout="constrained")  # fmt: skip
    return figure, [list(row) for row in axes]


def font_families() -> list[str]:
    """DejaVu Sans, then the installed fonts of ``FONTS``: each character is taken from the first font that has it."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FONTS if name in installed)]


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """``name``.png and ``name``.pdf in ``out``, without dates: equal inputs give equal bytes.

    One line names a font to install where none that is installed has a character.
    """
    import matplotlib.pyplot as plt

    paths = [out / f"{name}.{kind}" for kind in KINDS]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path, metadata in zip(paths, KINDS.values(), strict=True):
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:], metadata=metadata)
    if any("missing from" in str(warning.message) for warning in caught):
        print(f"note: figure {name} has characters that no installed font has; install one, as in fonts-noto-cjk")
    plt.close(figure)
    return paths


def line(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the ``number``-th line of a panel."""
    return {
        "color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4,
        "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.4,
    }  # fmt: skip


def whole_ticks(axes: Axes) -> None:
    """Only integers on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plain_log(axes: Axes, digits: Sequence[int] = (1,)) -> None:
    """A logarithmic horizontal axis with plain numbers at ``digits`` times the powers of 10."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.3g}" if value < 1 else f"{value:,.0f}")
    axes.minorticks_off()


def short(name: str, longest: int = LONGEST_NAME) -> str:
    """The name, cut if it is too long for an axis."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def heat_map(
    axes: Axes,
    values: NDArray[np.float64],
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    *,
    limits: tuple[float, float] | None = None,
    text: str | None = None,
) -> Any:
    """Draw values [rows, columns], NaN white; ``text`` is the format of the numbers in the cells, None without."""
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    image = axes.imshow(values, cmap=MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.grid(False)
    for names, ticks in ((row_names, axes.set_yticks), (column_names, axes.set_xticks)):
        if names is not None:
            ticks(range(len(names)), [short(name) for name in names])
    if text is not None:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = value <= (low + high) / 2  # a single value is drawn as the lowest one
                axes.text(column, row, format(value, text), ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")  # fmt: skip
    return image
