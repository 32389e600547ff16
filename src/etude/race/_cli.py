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
from etude.race.command import command
from etude.race.executors import PLACES, on_ray
from etude.race.report import to_json


def race_command(
    ctx: typer.Context,
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
    on: Annotated[str | None, typer.Option(help=f"Where the runs are trained: {PLACES}.")] = None,
    ray: Annotated[str | None, typer.Option(help="On Ray: auto or a cluster's address; as --on ray:ADDRESS.")] = None,
    metric: Annotated[str | None, typer.Option(help="Of a command: its metric; val_loss if not given.")] = None,
    metric_file: Annotated[str | None, typer.Option(help="Of a command: the file it writes its metric to.")] = None,
    maximize: Annotated[bool, typer.Option("--maximize", help="Of a command: more is better.")] = False,
    lr: Annotated[float | None, typer.Option(help="Of a command: where the grid of rates is centred.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Of a command: seconds after which a run is given up.")] = None,
    tune: Annotated[str | None, typer.Option(help="What is tuned: lr, or e.g. lr,weight_decay,betas.")] = None,
    search: Annotated[
        str | None, typer.Option(help="grid (lr alone), sobol or optuna; grid or sobol if not given.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Tuning runs of each contender; 13 for lr alone.")] = None,
    looks: Annotated[
        bool | None, typer.Option("--looks", help="Judge at 6, 10, 16, 30 seeds; end where all are decided.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Trials and seeds to fit: 20m, 90s, 1h30m.")] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="The same, in hours of one device.")] = None,
    shorten: Annotated[bool | None, typer.Option("--shorten", help="Let the budget take steps away too.")] = None,
    barnacles: Annotated[
        bool | None, typer.Option("--barnacles", help="Race the winning stack without each of its pieces.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A CSV, Parquet or npz file, or hf:name; the task is then a model.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column of --data that is predicted.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights from which every run starts, or a branch point of etude branch.")
    ] = None,
    log: Annotated[str | None, typer.Option(help="Log every run too: wandb, tensorboard:DIR or mlflow[:URI].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Race contenders on a task: which of them helps, at an equal tuning budget, on fresh paired seeds.

    Or race any command, its runs as processes: etude race adamw muon -- python train.py --optim {rule} --lr {lr}
    --seed {seed}. It prints its metric as JSON, {"val_loss": 1.23}, on the last such line.
    """
    options: dict[str, Any] = {
        "baseline": baseline, "seeds": FLOOR if quick else seeds, "steps": steps, "workers": workers,
        "device": device, "seed": seed, "engine": engine, "on": on,
        "tune": tuple(part.strip() for part in tune.split(",")) if tune else None, "search": search, "trials": trials,
        "looks": looks, "budget": budget, "gpu_hours": gpu_hours, "shorten": shorten, "barnacles": barnacles,
        "data": data, "target": target, "checkpoint": checkpoint,
        "log": log,
    }  # fmt: skip
    of_command = _given({
        "metric": metric, "metric_file": metric_file, "maximize": maximize or None, "lr": lr, "timeout": timeout,
    })  # fmt: skip
    try:
        if ctx.obj is not None:
            contenders, task = [*([task] if task else []), *(contenders or [])], command(ctx.obj, **of_command)
        elif of_command:
            option = next(iter(of_command)).replace("_", "-")
            raise InputError(f"--{option} is of a command: etude race adamw muon -- python train.py …")
        if quick and seeds is not None:
            raise InputError("--quick and --seeds both say how many seeds; give one")
        if ray is not None:
            if on is not None:
                raise InputError("--on and --ray both say where the runs are trained; give one")
            options["on"] = on_ray(ray)
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


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}
