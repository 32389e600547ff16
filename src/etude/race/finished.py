"""The verdict on runs that etude did not train: any table with a row per finished run."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etude._words import nearest
from etude.race._errors import InputError, one_line
from etude.race._model import Cell, Outcome, Plan, Result
from etude.race.verdict import judge

Row = Mapping[str, Any]
FAILED = ("", "nan", "none", "null", "inf", "-inf", "infinity", "-infinity")
FIXED = 0.0
"""The learning rate of a run that etude has not tuned."""


def read_runs(path: str | Path) -> list[Row]:
    """The rows of a CSV, JSONL (.jsonl, .ndjson), JSON or Parquet file; nested values become ``config.lr``."""
    path = Path(path)
    try:
        rows: list[Row] = [_flat(row) for row in _rows(path)]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path} is not a table: {one_line(error)}") from error
    if not rows:
        raise InputError(f"{path} holds no run")
    return rows


def _rows(path: Path) -> Iterator[Any]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ModuleNotFoundError as error:
            raise InputError('reading Parquet needs pyarrow; install it with: pip install "etude[parquet]"') from error
        yield from parquet.read_table(path).to_pylist()
    elif kind in (".jsonl", ".ndjson", ".json"):
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            sample = file.read(65_536)
            file.seek(0)
            dialect = csv.Sniffer().sniff(sample.partition("\n")[0], ",;\t|") if sample.strip() else csv.excel
            yield from csv.DictReader(file, dialect=dialect)


def _flat(row: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(f"a run is an object with names and values, this is {str(row)[:60]!r}")
    out: dict[str, Any] = {}
    for name, value in row.items():
        key = f"{prefix}{name}"
        out |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return out


def column(rows: list[Row], asked: str) -> str:
    """The column of that name, or the only one that ends in it: ``val_loss`` finds ``summary.val_loss``."""
    names = list(dict.fromkeys(name for row in rows for name in row if name is not None))
    if asked in names:
        return asked
    ending = [name for name in names if name.rpartition(".")[2] == asked]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise InputError(f"{asked!r} could be {' or '.join(ending)}; give the whole name")
    raise InputError(f"no column {asked!r}; nearest: {nearest(asked, names)}; there are {', '.join(names)}")


def verdict(
    path: str | Path,
    metric: str,
    by: str,
    pair: str | None = None,
    *,
    baseline: str | None = None,
    maximize: bool = False,
    rope: float = 0.01,
) -> Result:
    """The verdict of a race on the runs of a table: ``by`` tells the contenders apart, ``pair`` the seeds.

    A run whose metric is empty or not finite has failed. Repeats of a contender and a seed count as one. Contenders are
    compared on the values of ``pair`` that all of them have; without ``pair`` they are independent samples. The
    first contender is the baseline unless another is named. Nothing is known of how the runs were tuned, and there is
    no A/A control.
    """
    rows = read_runs(path)
    by, metric = column(rows, by), column(rows, metric)
    pair = column(rows, pair) if pair is not None else None
    runs: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        runs[_said(row.get(by))][_said(row.get(pair)) if pair else str(i)].append(row)
    names = _ordered(list(runs), by, baseline)
    seeds = _shared(runs, by, pair) if pair else [str(i) for i in range(max(map(len, runs.values())))]
    if not pair:  # the k-th run of each; which is which does not matter to an unpaired test
        runs = defaultdict(lambda: defaultdict(list), {
            name: defaultdict(list, zip(seeds, found.values())) for name, found in runs.items()
        })  # fmt: skip
    outcomes = tuple(
        Outcome(Cell(name, "final", FIXED, i), *_value(row.get(metric), path), (), _seconds(row), None, None)
        for name in names
        for i, seed in enumerate(seeds)
        for row in runs[name].get(seed, ())
    )
    plan = Plan(
        task=Path(path).stem, metric=metric, minimize=not maximize, steps=0, baseline=names[0], contenders=tuple(names),
        grids=dict.fromkeys(names, (FIXED,)), final_seeds=tuple(range(len(seeds))), rope=rope, paired=bool(pair),
    )  # fmt: skip
    standings, aa = judge(plan, outcomes)
    lock = {"table": str(path), "by": by, "metric": metric, "pair": pair, "pairs": seeds if pair else None}
    return Result(plan, standings, aa, outcomes, lock, None)


def _ordered(names: list[str], by: str, baseline: str | None) -> list[str]:
    if baseline is not None and baseline not in names:
        raise InputError(f"no run has {by}={baseline!r}; nearest: {nearest(baseline, names)}")
    if len(names) < 2:
        raise InputError(f"a verdict needs two contenders; every run has {by}={names[0]!r}")
    return sorted(names, key=lambda name: name != (baseline or names[0]))


def _shared(runs: Mapping[str, Mapping[str, Any]], by: str, pair: str) -> list[str]:
    """The values of ``pair`` that every contender has a row for, in the order of the table."""
    first, *rest = runs.values()
    shared = [seed for seed in first if all(seed in other for other in rest)]
    if len(shared) < 2:
        raise InputError(
            f"only {len(shared)} value(s) of {pair!r} are there for every {by}; without --pair they are compared as "
            "independent runs"
        )
    return shared


def _said(value: Any) -> str:
    """A cell as text; 0 and 0.0 are one seed."""
    text = "" if value is None else str(value).strip()
    try:
        return f"{float(text):g}" if text and float(text) == int(float(text)) else text
    except (ValueError, OverflowError):
        return text


def _value(held: Any, path: str | Path) -> tuple[float | None, str]:
    if held is None or str(held).strip().lower() in FAILED:
        return None, "no finite metric in the table"
    try:
        value = float(held)
    except ValueError as error:
        raise InputError(f"{path}: the metric {held!r} is not a number") from error
    return (value, "") if math.isfinite(value) else (None, "no finite metric in the table")


def _seconds(row: Row) -> float:
    """W&B's own column of a run's seconds, where it is there."""
    name = next((n for n in row if n is not None and n.rpartition(".")[2] in ("_runtime", "Runtime", "seconds")), None)
    try:
        return float(row[name]) if name else 0.0
    except (TypeError, ValueError):
        return 0.0
