"""The commands ``etude report``, ``verify``, ``compare`` and ``export``: what to do with a race's own folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from etude.race import _text
from etude.race._errors import InputError, RaceError
from etude.race._model import Result, Standing
from etude.race._sheet import STYLES
from etude.race.bundle import export, read, written
from etude.race.latex import latex
from etude.race.report import table, to_json, write_html
from etude.race.verify import Again, Compared, Verified, compare, verify

Run = Annotated[Path, typer.Argument(help="A race's own folder, or a report in it.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


def guarded(command: Callable[[], int]) -> int:
    """What a command cannot do is one line on stderr and an exit code."""
    try:
        return command()
    except (InputError, RaceError) as error:
        print(f"etude: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def report_command(
    run: Run,
    html: Annotated[Path | None, typer.Option(help="Write the page there, and nothing in the race's folder.")] = None,
    as_latex: Annotated[
        bool, typer.Option("--latex", help="Print a table and a methods paragraph for a paper.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Judge a finished race again from its ledger, and write its report again."""
    return guarded(lambda: _report(run, html, as_latex, as_json))


def _report(run: Path, html: Path | None, as_latex: bool, as_json: bool) -> int:
    result = read(run)
    if html is not None:
        try:
            write_html(result, html)
        except OSError as error:
            raise RaceError(f"cannot write {html}: {error.strerror}") from error
    elif not (as_latex or as_json):
        written(result)
    if as_latex:
        print(latex(result))
    elif as_json:
        print(json.dumps(to_json(result), indent=1))
    else:
        Console().print(table(result))
        print(f"report: {html or result.report}")
    return 0


def verify_command(
    run: Run,
    cells: Annotated[int, typer.Option(help="How many finished runs to run again.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Draws the same cells again; drawn anew if not given.")] = None,
    task: Annotated[str | None, typer.Option(help="Where the task is now, if not where it was.")] = None,
    as_json: Json = False,
) -> int:
    """Run some finished cells of a race again, here, and compare. Exit code 1 where something does not hold."""
    return guarded(lambda: _verify(verify(run, cells=cells, seed=seed, task=task), as_json))


def _verify(found: Verified, as_json: bool) -> int:
    if as_json:
        rows = [
            {
                "contender": a.stored.cell.contender, "stage": a.stored.cell.stage, "seed": a.stored.cell.seed,
                "lr": a.stored.cell.lr, "stored": a.stored.metric, "now": a.now.metric, "exact": a.exact,
                "noise": a.noise, "holds": a.holds,
            }
            for a in found.cells
        ]  # fmt: skip
        whole = {"holds": found.holds, "changed": found.changed, "follows": found.follows, "cells": rows}
        print(json.dumps(whole, indent=1))
        return int(not found.holds)
    console = Console(highlight=False)
    grid = _grid("contender", "stage", "lr", "seed", "stored", "now", "")
    for a in found.cells:
        cell = a.stored.cell
        style = "green" if a.holds else "bold red"
        row = (cell.contender, cell.stage, _text.rate(cell.lr), str(cell.seed), _value(a.stored.metric))
        grid.add_row(*row, _value(a.now.metric), Text(_said(a), style=style))
    console.print(grid)
    if found.changed:
        console.print(Text(f"another environment: {found.changed}", style="yellow"), soft_wrap=True)
    if found.follows is not None:
        said = "follow from the ledger" if found.follows else "do NOT follow from the ledger"
        console.print(Text(f"the stored verdicts {said}", style="green" if found.follows else "bold red"))
    console.print("verified" if found.holds else Text("NOT verified", style="bold red"))
    return int(not found.holds)


def _value(metric: float | None) -> str:
    return "failed" if metric is None else f"{metric:.7g}"


def _said(a: Again) -> str:
    """What came of a cell that was run again."""
    if a.difference is None:
        return "failed again" if a.holds else f"failed only {'now' if a.now.metric is None else 'then'}"
    if not a.difference:
        return "the same"
    noise = "" if not a.noise else f", {abs(a.difference) / a.noise:.2g} sd of a seed"
    wanted = "; it should be the same" if a.exact else ""
    return f"{_text.number(a.difference, signed=True)}{noise}{wanted}"


def compare_command(
    a: Run,
    b: Run,
    as_json: Json = False,
) -> int:
    """Two finished races side by side: what differs in what was raced, and each contender's verdicts."""
    return guarded(lambda: _compare(compare(a, b), as_json))


def _compare(found: Compared, as_json: bool) -> int:
    if as_json:
        pairs = {p.contender: {"a": p.a and p.a.word, "b": p.b and p.b.word, "said": p.word} for p in found.pairs}
        differences = {name: {"a": a, "b": b} for name, a, b in found.differences}
        print(json.dumps({"differences": differences, "contenders": pairs}, indent=1))
        return 0
    console = Console(highlight=False)
    for name, result in (("A", found.a), ("B", found.b)):
        console.print(f"{name}: {result.report}", soft_wrap=True)
    if not found.differences:
        console.print("raced alike: the locks and the plans are the same")
    for name, a, b in found.differences:
        console.print(Text(f"{name}: A {_cut(a)}, B {_cut(b)}", style="yellow"), soft_wrap=True)
    fold = "\n" if console.width < 110 else " "
    grid = _grid("contender", "A", "", "B", "", "")
    for pair in found.pairs:
        sides = [cell for s, r in ((pair.a, found.a), (pair.b, found.b)) for cell in _side(s, r, fold)]
        style = "bold red" if pair.word.startswith("contra") else "dim"
        grid.add_row(Text(pair.contender), *sides, Text(pair.word, style=style))
    console.print(grid)
    return 0


def _cut(text: str) -> str:
    return f"{text[:12]}…" if len(text) > 40 and " " not in text else text


def _side(standing: Standing | None, result: Result, fold: str) -> tuple[Text, Text]:
    """Number and word; ``fold`` stands between a number and its interval."""
    if standing is None:
        return Text("–"), Text("not raced", style="dim")
    base = result.standings[0]
    own = _text.with_interval(standing.mean, standing.interval)
    shown = own if standing is base else _text.difference(standing, base)
    word = Text(standing.word.replace(" ", fold), style=STYLES.get(standing.word, ""))
    return Text(shown.replace(" [", f"{fold}[")), word


def export_command(
    run: Run,
    to: Annotated[Path, typer.Option(help="runs.csv, runs.parquet; points of curves if its name has 'curves' in it.")],
    stage: Annotated[str | None, typer.Option(help="tune, final or aa alone.")] = None,
) -> int:
    """Write the runs of a finished race, or their curves, as a table."""
    return guarded(lambda: _export(run, to, stage))


def _export(run: Path, to: Path, stage: str | None) -> int:
    print(f"{export(run, to, stage):,} rows in {to}")
    return 0


def _grid(*heads: str) -> Table:
    """Numbers keep their lines; the words beside them, under no heading, may fold."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for head in heads:
        grid.add_column(head, overflow="fold", no_wrap=head not in ("contender", ""))
    return grid
