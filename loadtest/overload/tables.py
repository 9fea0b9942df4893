"""An overload run as tables to read."""

from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.bench.figures import CLEAN
from loadtest.overload.measure import OVERLOADED, Overload, Plan, Scene, Step

SHARE_GOAL: Final = 0.9
COST_GOAL: Final = 0.1


def print_overload(result: Overload, plan: Plan, console: Console) -> None:
    """Print the tables."""
    console.print(
        "One API process and Redis on one core; the open loop, PostgreSQL and writer on another. "
        f"Capacity by {result.client}, closed loop. {plan.connections:,} connections at most."
    )
    for scene in result.scenes:
        console.print(_scene(scene, plan))
        for step in scene.steps:
            if step.other:
                other = ", ".join(f"{count:,} {code}" for code, count in step.other.items())
                console.print(f"{step.times:g} ×: else {other}")
            if step.bottleneck:
                console.print(f"[yellow]{step.times:g} ×: the generator's limit: {step.bottleneck}")
    console.print(_costs(result))
    print_books(result.compared, result.audit, console)


def print_books(compared: int, audit: str, console: Console) -> None:
    """Print what was proved."""
    colour = "green" if audit == CLEAN else "red"
    console.print(
        f"{compared:,} answers compared with PostgreSQL, all that was sold audited: "
        f"[{colour}]{escape(audit)}[/]"
    )


def _scene(scene: Scene, plan: Plan) -> Table:
    how = (
        f"far: Redis answers {plan.far_ms:g} ms late, {plan.far_batch} purchases a call"
        if scene.name == "far"
        else f"near: nothing is slowed, wait_max_ms {plan.near_wait_ms}"
    )
    table = Table(title=f"{how}; capacity {scene.capacity:,.0f}/s")
    for heading in ("×", "offered", "sent", "sold", "of peak", "per CPU s", "refused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("p50", "p99", "intended", "refused", "Retry-After"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in scene.steps:
        table.add_row(*_row(scene, step))
    table.caption = (
        "All a second, in answers; per CPU s: sold a CPU second of API and Redis. Then ms: p50 and "
        "p99 of the sold, from sending; their p99 from the intended moment; p99 of the refused. "
        "Retry-After: the least and the most told, and the share of the one told most."
    )
    return table


def _row(scene: Scene, step: Step) -> list[str]:
    share = scene.share(step)
    colour = "green" if share >= SHARE_GOAL else "red"
    return [
        f"{step.times:g}",
        f"{step.offered:,.0f}",
        f"{step.sent:,.0f}",
        f"{step.sold:,.0f}",
        f"[{colour}]{share:.2f}[/]",
        f"{step.sold_per_cpu_s:,.0f}",
        f"{step.refused:,.0f}",
        f"{step.p50_ms:.0f}",
        f"{step.p99_ms:.0f}",
        f"{step.intended_p99_ms:.0f}",
        f"{step.refused_p99_ms:.0f}",
        _spread(step.told_to_wait),
    ]


def _spread(told: dict[int, int]) -> str:
    if not told:
        return ""
    most = max(told.values()) / sum(told.values())
    return f"{min(told)}-{max(told)} s, {most:.0%}"


def _costs(result: Overload) -> Table:
    table = Table(title="CPU µs")
    table.add_column("")
    for heading in (*result.purchase_us, "all", f"{OVERLOADED} / purchase"):
        table.add_column(heading, justify="right")
    used = result.purchase_us
    table.add_row("a purchase", *(f"{us:.1f}" for us in used.values()), f"{sum(used.values()):.1f}")
    ratio = result.refusal_us / sum(used.values())
    colour = "green" if ratio < COST_GOAL else "red"
    others = [""] * (len(used) - 1)
    refusal = f"{result.refusal_us:.1f}"
    table.add_row("a refusal", refusal, *others, refusal, f"[{colour}]{ratio:.2f}[/]")
    return table
