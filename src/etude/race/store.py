"""The ledger: one SQLite file, one writer, one transaction per finished cell. No finished run is ever lost."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from etude.race._errors import InputError, RaceError, one_line
from etude.race._model import Cell, Outcome, canonical

FILE = "ledger.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cells (key TEXT PRIMARY KEY, outcome TEXT NOT NULL, checksum TEXT NOT NULL) WITHOUT ROWID;
"""


class Ledger:
    """The outcomes of one race folder, by cell key; made under one lock and refused under another.

    ``with Ledger(folder, lock) as ledger``: the folder is made if need be. ``facts`` are named values beside the cells
    (the lock, what was asked).
    """

    def __init__(self, folder: Path, lock: Mapping[str, Any]) -> None:
        self.folder, self.lock = folder, dict(lock)
        self._outcomes: dict[str, Outcome] = {}
        self._hear: Callable[[str, Outcome], None] = _unheard
        with self._said():
            folder.mkdir(parents=True, exist_ok=True)
            self._db = _connect(folder / FILE)
        try:
            with self._said():
                self._db.executescript(_TABLES)
                self._check()
        except BaseException:
            self._db.close()
            raise

    def _check(self) -> None:
        if (said := self._db.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise RaceError(_damaged(self.folder, said))
        held = self.fact("lock")
        if held is None:
            self.set_fact("lock", self.lock)
        elif held != json.loads(canonical(self.lock)):
            raise RaceError(f"{self.folder / FILE} was made under another lock: {difference(held, self.lock)}; "
                            "race in another folder, or restore what changed")  # fmt: skip
        for key, text, checksum in self._db.execute("SELECT key, outcome, checksum FROM cells"):
            outcome = decoded(json.loads(text)) if checksum == _checksum(key, text) else None
            if outcome is None or outcome.cell.key(self.lock) != key:
                raise RaceError(_damaged(self.folder, f"the record {key[:12]}… does not match its checksum"))
            self._outcomes[key] = outcome

    def get(self, cell: Cell) -> Outcome | None:
        """What came of a cell, if it has been run."""
        return self._outcomes.get(cell.key(self.lock))

    def put(self, outcome: Outcome) -> None:
        """Record a finished cell, on the disk when this returns."""
        self.put_all([outcome])

    def put_all(self, outcomes: Sequence[Outcome]) -> None:
        """Record cells that finished together: all of them or none."""
        found = {outcome.cell.key(self.lock): outcome for outcome in outcomes}
        rows = [(key, text, _checksum(key, text)) for key, o in found.items() for text in [canonical(asdict(o))]]
        with self._said():
            self._db.execute("BEGIN")
            try:
                self._db.executemany("INSERT INTO cells VALUES (?, ?, ?)", rows)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        self._outcomes |= found
        for key, outcome in found.items():
            self._hear(key, outcome)

    def tell(self, hear: Callable[[str, Outcome], None]) -> None:
        """Let ``hear`` know every outcome by its key: those held, and each that is put from now on."""
        for key, outcome in self._outcomes.items():
            hear(key, outcome)
        self._hear = hear

    def fact(self, name: str) -> Any:
        """A named value beside the cells, or None."""
        return _fact(self._db, self.folder, name)

    def set_fact(self, name: str, value: Any) -> None:
        """Record a named value beside the cells."""
        text = canonical(value)
        with self._said():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (name, text, _checksum(name, text)))

    def __len__(self) -> int:
        return len(self._outcomes)

    def __bool__(self) -> bool:
        return True  # also without a record: a race that was killed before its first run goes on in its folder

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Whatever the disk or SQLite says, said in one line."""
        try:
            yield
        except UnicodeDecodeError as error:  # what SQLite says of a damaged file quotes it
            raise RaceError(_damaged(self.folder, "its tables cannot be read")) from error
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise RaceError(
                    f"another race is running in {self.folder}; wait for it or race in another folder"
                ) from error
            if "malformed" in str(error) or "not a database" in str(error):
                raise RaceError(_damaged(self.folder, str(error))) from error
            raise RaceError(f"cannot write {self.folder / FILE}: {error}; {self._kept()}") from error
        except OSError as error:
            raise RaceError(f"cannot write in {self.folder}: {error.strerror or error}; {self._kept()}") from error

    def _kept(self) -> str:
        return f"the {len(self._outcomes)} finished runs are kept, run the same command to resume"


def _unheard(key: str, outcome: Outcome) -> None: ...


def read_fact(folder: Path, name: str) -> Any:
    """A fact of an existing ledger, without opening it for a race."""
    file = folder / FILE
    if not file.is_file():
        raise InputError(f"no race in {folder}: {FILE} is not there")
    try:
        db = _connect(file)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise RaceError(f"cannot read {file}: {one_line(error)}") from error
    try:
        return _fact(db, folder, name)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise RaceError(f"cannot read {file}: {one_line(error)}") from error
    finally:
        db.close()


def difference(held: Any, now: Any, path: str = "") -> str:
    """Where two locks differ: ``"data: 1f2e… then, 9a0b… now"``."""
    if isinstance(held, Mapping) and isinstance(now, Mapping):
        names = sorted(held.keys() | now.keys())
        found = [
            difference(held.get(n), now.get(n), f"{path}.{n}".strip(".")) for n in names if held.get(n) != now.get(n)
        ]
        return ", ".join(found)
    return f"{path} was {_short(held)}, now {_short(now)}"


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else str(value)


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, timeout=1.0, isolation_level=None)  # autocommit: every statement is a transaction
    db.text_factory = lambda held: held.decode("utf-8", "replace")  # a flipped byte is the checksum's to find
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE")  # one writer; a second race in this folder is refused
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
    except BaseException:
        db.close()
        raise
    return db


def _fact(db: sqlite3.Connection, folder: Path, name: str) -> Any:
    row = db.execute("SELECT value, checksum FROM facts WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    if row[1] != _checksum(name, row[0]):
        raise RaceError(_damaged(folder, f"the fact {name!r} does not match its checksum"))
    return json.loads(row[0])


def _checksum(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def decoded(held: Mapping[str, Any]) -> Outcome:
    """The outcome behind its ``asdict`` after a trip through JSON."""
    return Outcome(**{**held, "cell": Cell.of(held["cell"]), "curve": tuple(tuple(point) for point in held["curve"])})


def _damaged(folder: Path, said: str) -> str:
    return f"{folder / FILE} is damaged: {' '.join(said.split())}; move the folder away and race again"
