"""The ledger: what is put in comes out, under its own lock, unharmed or not at all."""

import os
import random
import sqlite3

import pytest

from etude.race import Cell, InputError, Outcome, RaceError
from etude.race.store import FILE, Ledger, difference, read_fact

LOCK = {"task": "tiny", "data": "d" * 64, "steps": 24}


def outcome(seed=0, **more):
    given = {
        "cell": Cell("adamw", "final", 1e-3, seed), "metric": 0.1 + seed, "reason": "", "seconds": 0.3,
        "step_seconds": 0.01, "curve": ((12, 0.1, 0.5, 0.25), (24, 0.2, 0.1 + 0.2, 0.1)), "state_bytes": 80,
    }  # fmt: skip
    return Outcome(**{**given, **more})


def filled(folder, n=20):
    with Ledger(folder, LOCK) as ledger:
        for seed in range(n):
            ledger.put(outcome(seed))
    return folder / FILE


def held(folder, n=20):
    with Ledger(folder, LOCK) as ledger:
        return [ledger.get(outcome(seed).cell) for seed in range(n)]


def test_what_is_put_in_comes_out_to_the_last_bit(tmp_path):
    odd = outcome(1, metric=None, reason="raised ValueError: Größe", curve=((3, 0.1, float("inf"), 1e-300),))
    with Ledger(tmp_path / "deep" / "runs", LOCK) as ledger:
        ledger.put(outcome())
        ledger.put(odd)
    with Ledger(tmp_path / "deep" / "runs", LOCK) as ledger:
        assert (ledger.get(outcome().cell), ledger.get(odd.cell), len(ledger)) == (outcome(), odd, 2)
        assert ledger.get(Cell("lion", "final", 1e-3, 0)) is None


@pytest.mark.parametrize("field, other", [("contender", "lion"), ("stage", "tune"), ("lr", 1.1e-3), ("seed", 1)])
def test_a_cell_key_depends_on_all_of_the_cell_and_of_the_lock(field, other):
    cell = outcome().cell
    assert cell.key(LOCK) == Cell(**vars(cell)).key(dict(reversed(LOCK.items())))
    assert Cell(**{**vars(cell), field: other}).key(LOCK) != cell.key(LOCK)
    assert all(cell.key({**LOCK, name: "other"}) != cell.key(LOCK) for name in LOCK)


def test_a_cell_is_recorded_once(tmp_path):
    with Ledger(tmp_path, LOCK) as ledger:
        ledger.put(outcome())
        with pytest.raises(RaceError):
            ledger.put(outcome(metric=9.0))
    assert held(tmp_path, 1) == [outcome()]


def test_a_ledger_of_another_lock_is_refused_and_the_difference_named(tmp_path):
    filled(tmp_path, 2)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(
        RaceError, match=r"another lock: data was dddddddddddd…, now eeeeeeeeeeee…, steps was 24, now 48"
    ):
        Ledger(tmp_path, {**LOCK, "data": "e" * 64, "steps": 48})
    assert (tmp_path / FILE).read_bytes() == before
    assert held(tmp_path, 2) == [outcome(0), outcome(1)]


def test_a_lock_difference_names_what_one_side_lacks():
    assert difference({"a": 1}, {"a": 1, "b": {"c": 2}}) == "b was None, now {'c': 2}"


def test_a_second_race_in_the_same_folder_is_refused(tmp_path):
    with Ledger(tmp_path, LOCK), pytest.raises(RaceError, match="another race is running"):
        Ledger(tmp_path, LOCK)


def test_facts_are_kept_beside_the_cells(tmp_path):
    with Ledger(tmp_path, LOCK) as ledger:
        ledger.set_fact("asked", {"seeds": 10})
        ledger.set_fact("asked", {"seeds": 20})
    assert read_fact(tmp_path, "asked") == {"seeds": 20}
    assert read_fact(tmp_path, "nothing") is None
    with pytest.raises(InputError, match="no race in"):
        read_fact(tmp_path / "elsewhere", "asked")


def test_a_flipped_byte_in_a_record_is_found(tmp_path):
    file = filled(tmp_path, 3)
    text = file.read_bytes()
    at = text.index(b'"metric":1.1') + len(b'"metric":')
    file.write_bytes(text[:at] + b"7" + text[at + 1 :])
    with pytest.raises(RaceError, match=r"damaged: the record .* does not match its checksum"):
        Ledger(tmp_path, LOCK)


def test_no_flipped_byte_anywhere_ever_changes_a_result(tmp_path):
    file = filled(tmp_path)
    whole, drawn, said = file.read_bytes(), random.Random(0), []
    for _ in range(150):
        at = drawn.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << drawn.randrange(8)]) + whole[at + 1 :])
        for beside in ("-wal", "-shm"):
            file.with_name(FILE + beside).unlink(missing_ok=True)
        try:
            read = held(tmp_path)
        except RaceError as error:
            said.append(str(error))
        else:  # in a part of the file that holds nothing
            assert read == [outcome(seed) for seed in range(20)]
    assert len(said) > 30
    assert not any("\n" in line or "another race" in line for line in said)


def test_a_flipped_byte_in_the_tables_own_text_is_one_line(tmp_path):
    """SQLite quotes the byte, which is then no text; and what it has opened is closed again."""
    file = filled(tmp_path, 1)
    whole = file.read_bytes()
    at = whole.index(b"NULL", whole.index(b"CREATE TABLE cells"))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
    for read in (lambda: held(tmp_path, 1), lambda: read_fact(tmp_path, "lock")):
        with pytest.raises(RaceError, match=r"damaged|cannot read") as caught:
            read()
        assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    assert held(tmp_path, 1) == [outcome()]


def test_a_ledger_that_cannot_be_opened_holds_no_lock_on_its_file(tmp_path):
    file = filled(tmp_path, 1)
    whole = file.read_bytes()
    file.write_bytes(whole[:19] + b"\x7f" + whole[20:])  # a version of the format that there is not
    with pytest.raises(RaceError) as caught:
        Ledger(tmp_path, LOCK)
    file.write_bytes(whole)
    assert held(tmp_path, 1) == [outcome()]
    del caught


def test_a_ledger_without_a_record_is_still_a_ledger(tmp_path):
    """``ledger or Ledger(…)`` opened it twice, and the race then stood in its own way."""
    with Ledger(tmp_path, LOCK) as ledger:
        assert ledger
        assert len(ledger) == 0


def test_a_truncated_ledger_is_refused(tmp_path):
    file = filled(tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(RaceError, match="damaged"):
        Ledger(tmp_path, LOCK)


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / FILE).write_text("not a database, whatever its name says " * 40)
    with pytest.raises(RaceError, match="damaged: file is not a database"):
        Ledger(tmp_path, LOCK)


def test_a_full_disk_is_one_clear_line_and_the_ledger_stays_whole(tmp_path):
    with Ledger(tmp_path, LOCK) as ledger:
        ledger._db.execute("PRAGMA max_page_count=12")
        with pytest.raises(
            RaceError, match=r"cannot write .*: database or disk is full; the \d+ finished runs are kept"
        ):
            for seed in range(500):
                ledger.put(outcome(seed))
        kept = len(ledger)
    assert 0 < kept < 500
    assert held(tmp_path, kept) == [outcome(seed) for seed in range(kept)]
    assert sqlite3.connect(tmp_path / FILE).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):  # root may write anywhere, but not below a file
        (tmp_path / "file").touch()
        closed = tmp_path / "file"
    with pytest.raises(RaceError, match=r"cannot write in .*(closed|file)") as caught:
        Ledger(closed / "runs", LOCK)
    assert "\n" not in str(caught.value)
