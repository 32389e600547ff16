"""What a race found, for the terminal; a contender's row as text, for the page too."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from etude.race import _text
from etude.race._draw import colour
from etude.race._model import Result, Standing
from etude.race.verdict import SAME

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


def line(result: Result, standing: Standing) -> Line:
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
        lines = [line(self.result, s) for s in self.result.standings]
        base = self.result.plan.baseline
        grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        grid.add_column("contender", overflow="fold")
        metric = self.result.plan.metric
        grid.add_column(f"{metric.replace(' ', fold, len(metric) > 16)}{fold}[95 %]", no_wrap=True)
        grid.add_column(f"against{fold}{base if len(base) < 12 else 'baseline'}", no_wrap=True)
        grid.add_column("verdict", no_wrap=True)
        known = [n for n in ("step", "state", "lr") if any(getattr(each, n) not in ("", "–") for each in lines)]
        for name in known:
            grid.add_column(name, justify="right", no_wrap=True)
        for each in lines:
            cells = [Text(cell.replace(" [", f"{fold}[")) for cell in (each.metric, each.against)]
            word = Text(each.word.replace(" ", fold), style=STYLES.get(each.word, ""))
            who = Text(_text.folded(each.contender, width))
            grid.add_row(who, *cells, word, *(getattr(each, n) for n in known))
        return grid

    def notes(self) -> list[Text]:
        """The A/A control, what was visible, what is open, what failed."""
        styles = {"bad": "bold red", "aa": "green" if self.result.aa.word == SAME else "yellow"}
        said = [Text(line, style=styles.get(kind, "dim")) for kind, line in _text.notes(self.result)]
        edge = [Text("* at the edge of the learning rates tried.", style="dim")]
        return said + edge * any("*" in _text.chosen(s) for s in self.result.standings)
