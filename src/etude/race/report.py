"""What a race found: a table for the terminal, JSON, and one HTML file that needs neither network nor script."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from etude.race import _charts, _text
from etude.race._draw import colour
from etude.race._forest import forest
from etude.race._model import Outcome, Result, Standing
from etude.race.verdict import DIFFERENT, SAME, value_of

STYLES = {
    "baseline": "dim", "better": "bold green", "worse": "red", "equivalent": "blue", "under-tuned": "yellow",
    "failed": "bold red",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One contender as text: the row of both tables. The baseline's cost is absolute, the others' relative to it."""

    contender: str
    metric: str
    against: str
    word: str
    step: str
    state: str
    lr: str
    colour: str


def _line(result: Result, standing: Standing) -> Line:
    base = result.standings[0]
    own = standing is base
    return Line(
        contender=standing.contender,
        metric=_text.with_interval(standing.mean, standing.interval),
        against="" if own else _text.difference(standing, base),
        word=standing.word,
        step=_text.seconds(standing.step_seconds) if own else _text.ratio(standing.step_seconds, base.step_seconds),
        state=_text.size(standing.state_bytes) if own else _text.ratio(standing.state_bytes, base.state_bytes),
        lr=_text.chosen(standing),
        colour=colour(result, standing.contender),
    )


@dataclass(frozen=True)
class Sheet:
    """The standings for a terminal of 80 columns or more, and under them what must be read with the verdict."""

    result: Result

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fold = "\n" if options.max_width < 110 else " "
        wide = max(len(s.contender) for s in self.result.standings)
        tables = (self.rows(fold, width) for width in range(wide, 0, -1))
        free = options.update(max_width=10_000)
        yield next(
            (t for t in tables if console.measure(t, options=free).maximum <= options.max_width), self.rows(fold, 1)
        )
        yield from self.notes()

    def rows(self, fold: str, width: int) -> Table:
        """One row per contender, its name in ``width``; ``fold`` stands between a number and its interval."""
        lines = [_line(self.result, s) for s in self.result.standings]
        base = self.result.plan.baseline
        grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        grid.add_column("contender", overflow="fold")
        metric = self.result.plan.metric
        grid.add_column(f"{metric.replace(' ', fold, len(metric) > 16)}{fold}[95 %]", no_wrap=True)
        grid.add_column(f"against{fold}{base if len(base) < 12 else 'baseline'}", no_wrap=True)
        grid.add_column("verdict", no_wrap=True)
        for name in ("step", "state", "lr"):
            grid.add_column(name, justify="right", no_wrap=True)
        for line in lines:
            metric, against = (cell.replace(" [", f"{fold}[") for cell in (line.metric, line.against))
            word = Text(line.word.replace(" ", fold), style=STYLES.get(line.word, ""))
            grid.add_row(
                Text(_text.folded(line.contender, width)),
                Text(metric),
                Text(against),
                word,
                line.step,
                line.state,
                line.lr,
            )
        return grid

    def notes(self) -> list[Text]:
        """The A/A control, what was visible, what is open, what failed."""
        styles = {"bad": "bold red", "aa": "green" if self.result.aa.word == SAME else "yellow"}
        said = [Text(line, style=styles.get(kind, "dim")) for kind, line in _text.notes(self.result)]
        edge = [Text("* at the edge of the learning rates tried.", style="dim")]
        return said + edge * any("*" in _text.chosen(s) for s in self.result.standings)


def table(result: Result) -> Sheet:
    """The standings, to print on a rich console."""
    return Sheet(result)


def to_json(result: Result) -> dict[str, Any]:
    """The whole result as plain JSON values; what is not finite is None."""
    plain = _plain(asdict(result))
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def write_html(result: Result, path: str | Path) -> None:
    """One self-contained file: figures are inline SVG, the data are embedded as JSON, nothing is loaded."""
    loader = jinja2.PackageLoader("etude.race", ".")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    Path(path).write_text(env.get_template("report.html").render(_page(result)), encoding="utf-8")


def _page(result: Result) -> dict[str, Any]:
    """What the template fills in."""
    standings = result.standings
    return {
        "plan": result.plan,
        "base": standings[0],
        "aa": result.aa,
        "trusted": {SAME: "yes", DIFFERENT: "no"}.get(result.aa.word, "unknown"),
        "headline": [(_slug(word), said) for word, said in _text.headline(result)],
        "notes": _text.notes(result),
        "lines": [_line(result, s) for s in standings],
        "slug": _slug,
        "forest": Markup(forest(result, wide=True)),
        "forest_narrow": Markup(forest(result, wide=False)),
        "panels": [(s, Markup(_charts.sensitivity(result, s))) for s in standings if s.tuned],
        "curves": [
            (f"{what}, {by}", Markup(_charts.curves(result, across, up, unit)))
            for what, up in ((_text.watched(result.plan), _charts.METRIC), ("train loss", _charts.LOSS))
            for by, across, unit in (("by step", _charts.STEP, "step"), ("by second", _charts.SECONDS, "seconds"))
        ],
        "control": Markup(_charts.control(result)),
        "costs": [_cost(result, s) for s in standings],
        "cards": [_card(result, s) for s in standings],
        "total": _text.seconds(sum(o.seconds for o in result.outcomes)),
        "runs": len(result.outcomes),
        "failures": [(s.contender, s.failures) for s in standings if s.failures],
        "lock": json.dumps(_plain(result.lock), indent=2, ensure_ascii=False),
        "data": Markup(json.dumps(to_json(result), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
        "watched": _text.watched(result.plan),
        "chosen": _text.chosen,
    }


def _slug(word: str) -> str:
    return word if word in STYLES else "neutral"


def _cost(result: Result, standing: Standing) -> dict[str, str]:
    """What a contender costs, and when it reaches the baseline's median final validation metric (R12)."""
    base = result.standings[0]
    runs = _charts.finals(result, standing)
    reached, usual = _reach(result, standing), _reach(result, base)
    steps, clock = _middle(reached, 0), _middle(reached, 1)

    def against(value: float | None, other: float | None) -> str:
        return "" if standing is base or value is None else _text.ratio(value, other)

    return {
        "contender": standing.contender,
        "step": _text.seconds(standing.step_seconds),
        "step_ratio": against(standing.step_seconds, base.step_seconds),
        "state": _text.size(standing.state_bytes),
        "state_ratio": against(standing.state_bytes, base.state_bytes),
        "run": _text.seconds(standing.seconds),
        "reached": f"{sum(r is not None for r in reached)} of {len(runs)}",
        "steps": "–" if steps is None else f"{steps:,.0f}",
        "steps_ratio": against(steps, _middle(usual, 0)),
        "clock": _text.seconds(clock),
        "clock_ratio": against(clock, _middle(usual, 1)),
    }


def _reach(result: Result, standing: Standing) -> list[tuple[float, float] | None]:
    """(step, seconds) at which each final run first stood where the tuned baseline's curves end, in median, or None.

    Curves are taken on validation data, and so is the target, wherever the verdict is.
    """
    ends = [
        run.curve[-1][3]
        for run in _charts.finals(result, result.standings[0])
        if value_of(run) is not None and run.curve
    ]
    if not ends:
        return [None for _ in standing.values]
    sign = 1 if result.plan.minimize else -1
    target = float(np.median(ends))
    runs = _charts.finals(result, standing)
    return [
        next(((float(p[0]), p[1]) for p in run.curve if sign * p[3] <= sign * target), None) for run in runs
    ]  # fmt: skip


def _middle(reached: Sequence[tuple[float, float] | None], which: int) -> float | None:
    """The median over runs, those that never arrive counted as infinitely late."""
    if not reached:
        return None
    middle = statistics.median_low([math.inf if r is None else r[which] for r in reached])
    return middle if math.isfinite(middle) else None


def _card(result: Result, standing: Standing) -> dict[str, Any]:
    """The fairness card: what the contender was given, what came of it, and the numbers behind the word."""
    own = [o for o in result.outcomes if o.cell.contender == standing.contender]
    tuning = [o for o in own if o.cell.stage == "tune"]
    finals = _charts.finals(result, standing)
    base = result.standings[0]
    edge = ("at the edge" if standing.at_edge else "inside") if standing.tuned else "not tuned"
    lr = _text.chosen(standing).rstrip("*")
    facts = [("learning rate", lr if lr == "–" else f"{lr}, {edge}"), ("rates tried", str(len(standing.tuned) or 1))]
    facts += _spent("tuning", tuning, result.plan.tune_seeds) + _spent("final", finals, result.plan.final_seeds)
    if standing is not base:
        facts += _numbers(standing, base)
    return {"line": _line(result, standing), "facts": facts, "failures": standing.failures}


def _numbers(standing: Standing, base: Standing) -> list[tuple[str, str]]:
    """What decides the word, beyond what the table shows."""
    factor, unit = _text.scale(base)
    boot = standing.bootstrap_interval
    ends = None if boot is None else _text.with_interval(0.0, (factor * boot[0], factor * boot[1]), signed=True)
    visible = None if standing.visible is None else factor * standing.visible
    return [
        ("p", _text.chance(standing.p)),
        ("p by Holm", _text.chance(standing.p_holm)),
        ("bootstrap-t", "–" if ends is None else ends.partition(" ")[2] + unit),
        ("visible from", "–" if visible is None else _text.number(visible, visible) + unit),
        ("ρ across seeds", "–" if standing.rho is None else _text.number(standing.rho, 0.1, signed=True)),
    ]


def _spent(stage: str, runs: Sequence[Outcome], seeds: Sequence[int]) -> list[tuple[str, str]]:
    """``13 runs, 2 failed`` · ``41 s`` · ``0–2``."""
    failed = sum(value_of(o) is None for o in runs)
    used = sorted(set(seeds))
    row = used == list(range(used[0], used[-1] + 1)) if used else False
    return [
        (stage, f"{len(runs)} runs, {failed or 'none'} failed"),
        ("on seeds", f"{used[0]}–{used[-1]}" if row else ", ".join(map(str, used))),
        ("in", _text.seconds(sum(o.seconds for o in runs))),
    ]
