"""Where else a race is written: Weights & Biases, TensorBoard, MLflow. The ledger stays the record."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from etude.race import _text
from etude.race._asked import log_of
from etude.race._errors import RaceError, one_line
from etude.race._model import Cell, Outcome, Result
from etude.race.verdict import value_of

Said = Callable[[str, str], None]


class Logger(Protocol):
    """``cell`` for every finished cell, by its key; ``verdict`` once, at the end."""

    def cell(self, key: str, outcome: Outcome) -> None: ...

    def verdict(self, result: Result) -> None: ...


class Log:
    """A logger that is told every cell once, however often the race is resumed. Where it fails the race goes on.

    What it was told stands in the race's folder, in ``logged-<kind>``: a key per line.
    """

    def __init__(self, spec: str, folder: Path, said: Said) -> None:
        kind, where = log_of(spec)
        self._kind, self._said, self._file = kind, said, folder / f"logged-{kind}"
        self._told = set(self._file.read_text("utf-8").split()) if self._file.exists() else set()
        try:
            self._logger: Logger | None = _OPEN[kind](where, folder)
        except Exception as error:
            raise RaceError(f"cannot log to {spec}: {one_line(error)}") from error

    def cell(self, key: str, outcome: Outcome) -> None:
        """Tell of a finished cell, unless it was told of before."""
        if key in self._told:
            return
        self._told.add(key)
        if self._try(lambda logger: logger.cell(key, outcome)):
            with self._file.open("a", encoding="utf-8") as file:
                file.write(key + "\n")

    def verdict(self, result: Result) -> None:
        """Tell of the verdicts."""
        self._try(lambda logger: logger.verdict(result))

    def _try(self, tell: Callable[[Logger], None]) -> bool:
        if self._logger is None:
            return False
        try:
            tell(self._logger)
        except Exception as error:
            self._said("log", f"{self._kind} is not told any more: {one_line(error)}; the ledger holds every run")
            self._logger = None
        return self._logger is not None


def title(cell: Cell) -> str:
    """``adamw final lr=0.0032 seed=1000``."""
    more = "".join(f" {name}={value:.3g}" for name, value in cell.more)
    return f"{cell.contender} {cell.stage} lr={_text.rate(cell.lr)}{more} seed={cell.seed}"


def settings(cell: Cell) -> dict[str, Any]:
    """What tells a cell from others, by name."""
    plain = {"contender": cell.contender, "stage": cell.stage, "seed": cell.seed, "lr": cell.lr}
    return plain | dict(cell.more)


def points(outcome: Outcome) -> list[tuple[int, dict[str, float]]]:
    """(step, values by name) of the curve; what is not finite is left out."""
    found = []
    for step, spent, loss, metric in outcome.curve:
        values = {"train_loss": loss, "validation": metric, "seconds": spent}
        found.append((step, {name: v for name, v in values.items() if math.isfinite(v)}))
    return found


def ends(outcome: Outcome) -> dict[str, float]:
    """What a run came to; no metric where it failed."""
    value = value_of(outcome)
    known = {
        "metric": value, "seconds": outcome.seconds, "step_seconds": outcome.step_seconds,
        "state_bytes": outcome.state_bytes, "failed": float(value is None),
    }  # fmt: skip
    return {name: float(v) for name, v in known.items() if v is not None}


def verdicts(result: Result) -> list[dict[str, Any]]:
    """A row per contender."""
    return [
        {
            "contender": s.contender, "verdict": s.word, "mean": s.mean, "difference": s.difference,
            "p_holm": s.p_holm, "lr": s.lr,
        }
        for s in result.standings
    ]  # fmt: skip


class _Wandb:
    """A run per cell, one group per race. Offline, unless WANDB_MODE says otherwise; later: ``wandb sync``."""

    def __init__(self, where: str, folder: Path) -> None:
        import wandb

        self._wandb, self._folder = wandb, folder

    def _run(self, key: str, name: str, kind: str, config: dict[str, Any]) -> Any:
        wandb = self._wandb
        still = wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "etude"), group=self._folder.name, dir=str(self._folder),
            mode=os.environ.get("WANDB_MODE", "offline"), id=key[:16], name=name, job_type=kind, config=config,
            settings=still,
        )  # fmt: skip

    def cell(self, key: str, outcome: Outcome) -> None:
        with self._run(key, title(outcome.cell), outcome.cell.stage, settings(outcome.cell)) as run:
            for step, values in points(outcome):
                run.log(values, step=step)
            run.summary.update({**ends(outcome), "reason": outcome.reason})

    def verdict(self, result: Result) -> None:
        rows = verdicts(result)
        table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        with self._run(f"verdict{time.time_ns()}"[-16:], "verdict", "verdict", {"task": result.plan.task}) as run:
            run.log({"verdict": table})
            run.summary.update({row["contender"]: row["verdict"] for row in rows})


class _Tensorboard:
    """A folder of events per cell under DIR, "tensorboard" in the race's folder if not given; the verdict as text."""

    def __init__(self, where: str, folder: Path) -> None:
        import tensorboard.compat.proto.event_pb2 as event
        import tensorboard.compat.proto.summary_pb2 as summary
        import tensorboard.compat.proto.tensor_pb2 as tensor
        import tensorboard.compat.proto.types_pb2 as types
        import tensorboard.summary.writer.event_file_writer as writer

        self._event, self._summary, self._tensor, self._types = event, summary, tensor, types
        self._writer, self._root = writer, Path(where) if where else folder / "tensorboard"

    def _write(self, name: str, steps: list[tuple[int, list[Any]]]) -> None:
        file = self._writer.EventFileWriter(str(self._root / re.sub(r"[^\w.=+-]+", "_", name)))
        for step, values in steps:
            summary = self._summary.Summary(value=values)
            file.add_event(self._event.Event(step=step, wall_time=time.time(), summary=summary))
        file.close()

    def cell(self, key: str, outcome: Outcome) -> None:
        def scalars(values: dict[str, float]) -> list[Any]:
            return [self._summary.Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]

        last = outcome.curve[-1][0] if outcome.curve else 0
        steps = [(step, scalars(values)) for step, values in points(outcome)]
        end = {f"end/{name}": value for name, value in ends(outcome).items()}
        self._write(f"{title(outcome.cell)} {key[:6]}", [*steps, (last, scalars(end))])

    def verdict(self, result: Result) -> None:
        rows = verdicts(result)
        lines = [" | ".join(map(str, row)) for row in ([*rows[0]], ["---"] * len(rows[0]), *(r.values() for r in rows))]
        text = self._tensor.TensorProto(dtype=self._types.DT_STRING, string_val=["\n".join(lines).encode()])
        text.tensor_shape.dim.add(size=1)
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        metadata = self._summary.SummaryMetadata(plugin_data=plugin)
        value = self._summary.Summary.Value(tag="verdict", metadata=metadata, tensor=text)
        self._write("verdict", [(len(result.plan.final_seeds), [value])])


class _Mlflow:
    """A run per cell in one experiment per race; in a SQLite file in the race's folder if no URI is given."""

    def __init__(self, where: str, folder: Path) -> None:
        import mlflow

        uri = where or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.sqlite').resolve()}"
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient(uri)
        held = self._client.get_experiment_by_name(folder.name)
        self._experiment = held.experiment_id if held else self._client.create_experiment(folder.name)

    def cell(self, key: str, outcome: Outcome) -> None:
        entity, now = self._entities, int(1000 * time.time())
        tags = {"etude.key": key, "etude.reason": outcome.reason}
        run = self._client.create_run(self._experiment, run_name=title(outcome.cell), tags=tags).info.run_id
        metrics = [entity.Metric(n, v, now, step) for step, values in points(outcome) for n, v in values.items()]
        last = outcome.curve[-1][0] if outcome.curve else 0
        metrics += [entity.Metric(f"end.{name}", value, now, last) for name, value in ends(outcome).items()]
        params = [entity.Param(name, str(value)) for name, value in settings(outcome.cell).items()]
        self._client.log_batch(run, metrics=metrics, params=params)
        self._client.set_terminated(run, "FINISHED" if value_of(outcome) is not None else "FAILED")

    def verdict(self, result: Result) -> None:
        tags = {f"etude.verdict.{i}": f"{s.contender}: {s.word}" for i, s in enumerate(result.standings)}
        run = self._client.create_run(self._experiment, run_name="verdict", tags=tags).info.run_id
        known = {f"difference.{i}": s.difference for i, s in enumerate(result.standings) if s.difference is not None}
        for name, value in known.items():
            self._client.log_metric(run, name, value)
        self._client.set_terminated(run)


_OPEN: dict[str, Callable[[str, Path], Logger]] = {"wandb": _Wandb, "tensorboard": _Tensorboard, "mlflow": _Mlflow}
