"""Draws a comparison: bars of rates as multiples of the constant, and of CPU time a purchase.

``python -m loadtest.bench.plots RESULT.json DIR`` draws what ``bench --compare --json`` wrote. The
colours are of Okabe and Ito, which colour-blind people can tell apart; hatching and figures say the
same without colour.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from loadtest.bench.compare import Comparison
from loadtest.bench.figures import Case
from sale.files import LARGE_MAX_BYTES, UnreadableFile, read_json

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("plots: matplotlib is not installed: pip install -e '.[plots]'")

BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
GREY: Final = "#999999"
STYLE: Final[dict[Any, Any]] = {
    "font.size": 11,
    "svg.hashsalt": "sale",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
PLAIN: Final = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
RATIOS: Final = "peers-ratio"
CPU: Final = "peers-cpu"

Row = tuple[str, Case, Case | None]


def draw(result: Comparison, folder: Path) -> list[Path]:
    """Draw a comparison as PNG and SVG; return the files. Raises OSError."""
    rows = _rows(result)
    with rc_context(STYLE):
        return [
            *_saved(_ratios(rows), folder / RATIOS),
            *_saved(_cpu([row for row in rows if row[1].redis_us and row[2]]), folder / CPU),
        ]


def _rows(result: Comparison) -> list[Row]:
    """Name, purchases and sold-out refusals of everybody who was measured."""
    ours = {case.name: case for case in result.ours}
    theirs = [
        (peer.title, peer.purchases, peer.sold_out)
        for peer in result.peers
        if peer.purchases is not None
    ]
    return [
        ("this engine", ours["purchases"], ours["sold_out"]),
        ("aiohttp, constant", result.constant, None),
        *theirs,
    ]


def _ratios(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(9, 0.75 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    for number, (_, purchases, sold_out) in enumerate(rows):
        constant = number > 0 and sold_out is None
        kind = (GREY, "", "constant answers") if constant else (BLUE, "", "durable purchases")
        _bar(axes, number if constant else number - 0.2, purchases, *kind)
        if sold_out is not None:
            _bar(axes, number + 0.2, sold_out, ORANGE, "//", "sold-out refusals")
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--", zorder=0)
    _names(axes, rows)
    axes.set_xlabel("answers a second, as a multiple of aiohttp's constant answer (dashed)")
    axes.margins(x=0.2)
    axes.set_title("One core for API and Redis, same client, same run", loc="left")
    _legend(axes)
    return figure


def _bar(axes: Any, at: float, case: Case, colour: str, hatch: str, label: str) -> None:  # noqa: ANN401
    bars = axes.barh(
        at, case.ratio, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label
    )
    axes.bar_label(bars, [f"{case.ratio:.2f} ×  ({case.rate:,.0f}/s)"], padding=4, bbox=PLAIN)


def _cpu(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(9, 0.55 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    for number, (_, case, _) in enumerate(rows):
        axes.barh(number, case.api_us, 0.6, color=BLUE, edgecolor="white", label="API")
        bars = axes.barh(
            number,
            case.redis_us,
            0.6,
            left=case.api_us,
            color=ORANGE,
            hatch="//",
            edgecolor="white",
            label="Redis",
        )
        axes.bar_label(bars, [f"{case.api_us:.0f} + {case.redis_us:.0f} µs"], padding=4, bbox=PLAIN)
    _names(axes, rows)
    axes.set_xlabel("CPU time a durable purchase, µs")
    axes.margins(x=0.2)
    axes.set_title("What a purchase costs", loc="left")
    _legend(axes)
    return figure


def _names(axes: Any, rows: list[Row]) -> None:  # noqa: ANN401
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def _legend(axes: Any) -> None:  # noqa: ANN401
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="lower right", frameon=False)


def _saved(figure: Figure, stem: Path) -> list[Path]:
    made = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for file in made:
        # Without a date, so that the same figures give the same file.
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=150, metadata=metadata)
    return made


def main() -> None:
    """Command line: draw a result that was written before."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.plots", description=__doc__.splitlines()[0]
    )
    parser.add_argument("result", type=Path, help="what bench --compare --json wrote")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        result = read_json(options.result, Comparison, most=LARGE_MAX_BYTES)
        options.folder.mkdir(parents=True, exist_ok=True)
        made = draw(result, options.folder)
    except (OSError, UnreadableFile) as error:
        print(f"plots: {error}", file=sys.stderr)
        sys.exit(1)
    print(*made, sep="\n")


if __name__ == "__main__":
    main()
