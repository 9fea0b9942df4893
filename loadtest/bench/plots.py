"""Draws a comparison: bars of rates as multiples of the constant, and of CPU time a purchase.

The colours are of Okabe and Ito, which colour-blind people can tell apart; hatching and figures say
the same without colour.
"""

import sys
from pathlib import Path
from typing import Any, Final

from loadtest.bench.compare import Comparison
from loadtest.bench.figures import Case

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("plots: matplotlib is not installed: pip install -e '.[plots]'")

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"
STYLE: Final[dict[Any, Any]] = {
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
Row = tuple[str, Case, Case | None]
PLAIN: Final = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def draw(result: Comparison, folder: Path) -> list[Path]:
    """Draw a comparison as two PNG files; return them. Raises OSError."""
    ours = {case.name: case for case in result.ours}
    rows: list[Row] = [("this engine", ours["purchases"], ours["sold_out"])]
    rows.append(("aiohttp, constant", result.constant, None))
    rows += [(each.title, each.purchases, each.sold_out) for each in result.peers if each.purchases]
    with rc_context(STYLE):
        figure, axes = _figure(len(rows), 0.75)
        for at, (_, bought, refused) in enumerate(rows):
            sells = at == 0 or refused is not None
            colour, label = (BLUE, "durable purchases") if sells else (GREY, "constant answers")
            bars = [(at - 0.2 * sells, bought, {"color": colour, "label": label})]
            if refused is not None:
                style = {"color": ORANGE, "hatch": "//", "label": "sold-out refusals"}
                bars.append((at + 0.2, refused, style))
            for place, case, style in bars:
                drawn = axes.barh(place, case.ratio, 0.38, edgecolor="white", **style)
                words = f"{case.ratio:.2f} ×  ({case.rate:,.0f}/s)"
                axes.bar_label(drawn, [words], padding=4, bbox=PLAIN)
        axes.axvline(1.0, color="black", linewidth=1, linestyle="--", zorder=0)
        title = "One core for API and Redis, same client, same run"
        across = "answers a second, as a multiple of aiohttp's constant answer (dashed)"
        ratio = _saved(figure, rows, title, across, folder / "peers-ratio.png")

        rows = [row for row in rows if row[1].redis_us and row[2]]
        figure, axes = _figure(len(rows), 0.55)
        for at, (_, case, _refused) in enumerate(rows):
            axes.barh(at, case.api_us, 0.6, color=BLUE, edgecolor="white", label="API")
            style = {"color": ORANGE, "hatch": "//", "label": "Redis"}
            drawn = axes.barh(at, case.redis_us, 0.6, left=case.api_us, edgecolor="white", **style)
            words = f"{case.api_us:.0f} + {case.redis_us:.0f} µs"
            axes.bar_label(drawn, [words], padding=4, bbox=PLAIN)
        across = "CPU time a durable purchase, µs"
        cpu = _saved(figure, rows, "What a purchase costs", across, folder / "peers-cpu.png")
    return [ratio, cpu]


def _figure(rows: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, height * rows + 1.6), layout="constrained")
    return figure, figure.subplots()


def _saved(figure: Figure, rows: list[Row], title: str, across: str, file: Path) -> Path:
    axes = figure.axes[0]
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(across)
    axes.margins(x=0.2)
    axes.set_title(title, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="lower right", frameon=False)
    figure.savefig(file, dpi=150)
    return file
