"""The command ``etude verdict``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from etude.race._errors import InputError, RaceError
from etude.race.finished import verdict
from etude.race.report import table, to_json, write_html


def verdict_command(
    runs: Annotated[Path, typer.Argument(help="CSV, JSONL, JSON or Parquet: a row per finished run.")],
    metric: Annotated[str, typer.Option(help="The column that is judged.")],
    by: Annotated[str, typer.Option(help="The column that tells the contenders apart.")],
    pair: Annotated[str | None, typer.Option(help="The column of the seed; without it runs are independent.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The baseline, when it is not the first of the table.")] = None,
    maximize: Annotated[bool, typer.Option("--maximize", help="More is better.")] = False,
    rope: Annotated[float, typer.Option(help="Half-width of equivalent, as a share of the baseline's mean.")] = 0.01,
    html: Annotated[Path | None, typer.Option(help="Write the report there too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """The verdict of a race on runs that etude did not train."""
    try:
        result = verdict(runs, metric, by, pair, baseline=baseline, maximize=maximize, rope=rope)
        if html is not None:
            try:
                write_html(result, html)
            except OSError as error:
                raise RaceError(f"cannot write {html}: {error.strerror}") from error
    except (InputError, RaceError) as error:
        print(f"etude: {error}", file=sys.stderr)
        return error.exit_code
    if as_json:
        print(json.dumps(to_json(result), indent=1))
    else:
        Console().print(table(result))
    return 0
