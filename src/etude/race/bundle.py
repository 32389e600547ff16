"""A race's own folder, after the race: judged again from its ledger, written again, exported as a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from etude.race._course import Course
from etude.race._errors import InputError, RaceError
from etude.race._model import Piece, Plan, Result
from etude.race._rebuilt import rebuilt
from etude.race.looks import ended
from etude.race.progress import Voice
from etude.race.report import to_json, write_html
from etude.race.store import FILE, Ledger, read_fact
from etude.race.verdict import judge

Row = dict[str, Any]
CURVE = ("step", "seconds", "train_loss", "validation")


def keep(ledger: Ledger, mark: str, plan: Plan, looks: Sequence[int]) -> None:
    """Record what was judged, so that it can be judged again. ``mark``: what tells its report from others'."""
    plans = {**(ledger.fact("plans") or {}), mark: {"plan": asdict(plan), "looks": list(looks)}}
    ledger.set_fact("plans", plans)


def read(run: str | Path) -> Result:
    """The result of a finished race, judged again from its ledger.

    ``run``: a race's folder, or one of the reports in it where it holds several.
    """
    folder, mark = place(run)
    with Ledger(folder, read_fact(folder, "lock")) as ledger:
        held = (ledger.fact("plans") or {}).get(mark)
        if held is None:
            there = sorted(f"report{name}.html" for name in ledger.fact("plans") or {})
            among = f"; there is {', '.join(there)}" if there else f"; finish it by: etude race --continue {folder}"
            raise InputError(f"no verdict report{mark}.html in {folder}{among}")
        plan = rebuilt(Plan, held["plan"])
        with Voice(quiet=True) as voice:
            outcomes = Course(plan, ledger, _Nobody(folder), voice).run()
        lock, plan = ledger.lock, ended(plan, outcomes)
    standings, aa = judge(plan, outcomes)
    report = folder / f"report{mark}.html"
    found = Result(plan, standings, aa, outcomes, lock, folder, tuple(held["looks"]), report)
    return replace(found, pieces=_pieces(found))


def _pieces(result: Result) -> tuple[Piece, ...]:
    """What the pieces of a winning stack were found to be worth, in a race of its own (R14)."""
    try:
        held = json.loads(result_file(result).read_text(encoding="utf-8")).get("pieces") or []
    except (OSError, ValueError):
        return ()
    return tuple(rebuilt(Piece, piece) for piece in held)


def place(run: str | Path) -> tuple[Path, str]:
    """The folder, and the mark of the verdict in it: ``"-1f2e3d4c"`` of ``report-1f2e3d4c.html``, else ``""``."""
    path = Path(run)
    named = path.name.startswith(("report", "result")) and not path.is_dir()
    folder, mark = (path.parent, path.stem[len("report") :]) if named else (path, "")
    if not (folder / FILE).is_file():
        raise InputError(f"no race in {folder}: {FILE} is not there")
    return folder, mark


class _Nobody:
    """An executor that trains nothing: all that a verdict needs must be in the ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def submit(self, request: dict[str, Any]) -> None:
        raise InputError(f"the race in {self.folder} lacks runs; finish it by: etude race --continue {self.folder}")

    def results(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> _Nobody:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def written(result: Result) -> Result:
    """The result with its report and its JSON on the disk."""
    assert result.report is not None
    try:
        held = json.dumps(to_json(result), indent=1, sort_keys=True) + "\n"
        result_file(result).write_text(held, encoding="utf-8")
        write_html(result, result.report)
    except OSError as error:
        where = f"cannot write the report in {result.folder}: {error.strerror}"
        raise RaceError(f"{where}; the ledger holds every run") from error
    return result


def result_file(result: Result) -> Path:
    """The JSON beside the report."""
    assert result.report is not None
    return result.report.with_name(result.report.name.replace("report", "result", 1)).with_suffix(".json")


def export(run: str | Path, to: str | Path, stage: str | None = None) -> int:
    """Write a row per run, or a row per point of a curve where the file's name has "curves" in it; how many.

    ``to``: .csv or .parquet. ``stage``: tune, final or aa alone. The final runs are what `verdict` reads:
    ``--metric metric --by contender --pair seed``.
    """
    to = Path(to)
    if to.suffix not in (".csv", ".parquet"):
        raise InputError(f"{to}: a table is written to a .csv or .parquet file")
    if stage not in (None, "tune", "final", "aa"):
        raise InputError(f"stage={stage!r}: it is one of tune, final, aa")
    result = read(run)
    found = [o for o in result.outcomes if stage in (None, o.cell.stage)]
    rows = [row for o in found for row in (_points(o) if "curves" in to.stem else [_run(o)])]
    if not rows:
        raise InputError(f"{run} holds no {'points of curves' if 'curves' in to.stem else 'runs'} to export")
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        (_parquet if to.suffix == ".parquet" else _csv)(to, names, rows)
    except OSError as error:
        raise RaceError(f"cannot write {to}: {error.strerror or error}") from error
    return len(rows)


def _cell(outcome: Any) -> Row:
    cell = outcome.cell
    return {"contender": cell.contender, "stage": cell.stage, "seed": cell.seed, "lr": cell.lr, **dict(cell.more)}


def _run(o: Any) -> Row:
    return _cell(o) | {
        "metric": o.metric, "reason": o.reason, "seconds": o.seconds, "step_seconds": o.step_seconds,
        "state_bytes": o.state_bytes,
    }  # fmt: skip


def _points(o: Any) -> list[Row]:
    return [_cell(o) | dict(zip(CURVE, point)) for point in o.curve]


def _csv(to: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    with to.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def _parquet(to: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise InputError('writing Parquet needs pyarrow; install it with: pip install "etude[parquet]"') from error
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), to)
