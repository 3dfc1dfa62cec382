"""Size and kind of the plots of a report."""

from dataclasses import dataclass
from typing import Any, Literal

FONT = 8  # points


@dataclass(frozen=True)
class PlotSpec:
    """Size and kind of the plots.

    Attributes:
        width: inches, with letters of 8 points, as in the column of a paper; null: 6 inches, for a screen.
        format: of the files; null writes both.

    Raises:
        ValueError: a width that no page has.
    """

    width: float | None = None
    format: Literal["png", "pdf"] | None = None

    def __post_init__(self) -> None:
        check_width(self.width)

    def parameters(self) -> Any:
        """Return matplotlib's settings, by their names."""
        if self.width is None:
            return {"figure.figsize": (6, 4)}
        sizes = dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), FONT)
        small = {"legend.fontsize": FONT - 1, "legend.labelspacing": 0.3, "legend.handlelength": 1.5}
        lines = {"lines.linewidth": 1.0, "lines.markersize": 3.5, "axes.linewidth": 0.6}
        # Publishers refuse matplotlib's Type 3 fonts.
        return {"figure.figsize": (self.width, self.width * 2 / 3), "pdf.fonttype": 42, **sizes, **small, **lines}


def check_width(width: float | None) -> None:
    """Check the width of a picture in inches.

    Raises:
        ValueError: it is not in 1..40.
    """
    if width is not None and not 1 <= width <= 40:
        raise ValueError(f"width={width} must be 1 to 40 inches; the column of a paper has about 3.25.")
