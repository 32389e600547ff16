"""The command ``etude race``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from etude.race._asked import FLOOR
from etude.race._errors import InputError, RaceError
from etude.race._run import ask, resume, run, show
from etude.race.report import to_json


def race_command(
    task: Annotated[
        str | None,
        typer.Argument(
            help="A built-in task (digits, bytes, …), path/to/my_task.py[:factory], or with --data a model.",
            show_default=False,
        ),
    ] = None,
    contenders: Annotated[
        list[str] | None, typer.Argument(help='Recipes, baseline first: adamw muon "adamw + dyt".', show_default=False)
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The baseline, when it is not the first contender.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Final seeds of each contender; 10 if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{FLOOR} final seeds, the fewest that can decide.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of a run; the task's own if not given.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes, one thread each; as many as cores if not given.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the race gets its folder.")] = Path("runs"),
    continue_: Annotated[
        Path | None,
        typer.Option("--continue", help="A race's own folder: go on as it was asked, but for what is given."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cpu if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed, another race; 0 if not given.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, loop or population; auto if not given.")] = None,
    on: Annotated[str | None, typer.Option(help="Where the runs are trained; here if not given.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A CSV, Parquet or npz file, or hf:name; the task is then a model.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column of --data that is predicted.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights from which every run starts, or a branch point of etude branch.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Race contenders on a task: which of them helps, at an equal tuning budget, on fresh paired seeds."""
    options: dict[str, Any] = {
        "baseline": baseline, "seeds": FLOOR if quick else seeds, "steps": steps, "workers": workers,
        "device": device, "seed": seed, "engine": engine, "on": on,
        "data": data, "target": target, "checkpoint": checkpoint,
    }  # fmt: skip
    try:
        if quick and seeds is not None:
            raise InputError("--quick and --seeds both say how many seeds; give one")
        if continue_ is not None:
            result = resume(continue_, task=task, contenders=contenders or None, **options)
        elif task is None or not contenders:
            raise InputError('name a task and its contenders: etude race digits adamw muon "adamw + dyt"')
        else:
            result = run(ask(task, contenders, **options), folder=folder)
    except (InputError, RaceError) as error:
        print(f"etude: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if as_json:
        print(json.dumps(to_json(result), indent=1))
    else:
        show(result)
    return 0
