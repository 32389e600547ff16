"""What goes wrong in a race, row by row: it is said in one line, or is an outcome, and what was finished is kept.

NaN at step k · a loss of the wrong shape · a factory that is not deterministic · two contenders that are the same · data
smaller than a batch · no write permission · a full disk · a clock jumping back · two processes on one store · a flipped
byte · a torn write · kill -9. Out of memory and dead workers, jobs and nodes: test_executors; more of kill -9: test_kill.
"""

import ast
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from test_kill import RACE, finish, ledger, start, wait_for_writing
from test_store import LOCK, filled, held, outcome
from tiny import make

import etude
from etude.race import Cell, InputError, RaceError
from etude.race import _run as running
from etude.race.loop import train
from etude.race.store import FILE, Ledger

HERE = Path(__file__).parent
TINY, FAULTY = HERE / "tiny.py", HERE / "faulty.py"
RACE_ROOM = Path(etude.__file__).parent / "race"
QUICK = {"seeds": 6, "quiet": True, "workers": 1}
NOBODY = 65534


class Child:
    """``does()`` in a process of its own; ``said()`` waits for what it returned or raised, as text."""

    def __init__(self, does):
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        try:
            text = str(does())
        except (RaceError, InputError) as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException:
            text = traceback.format_exc()
        try:
            os.write(write, text.encode())
        finally:
            os._exit(0)

    def said(self):
        with os.fdopen(self.pipe, "rb") as pipe:
            text = pipe.read().decode()
        os.waitpid(self.pid, 0)
        return text


# What a task does wrong


@pytest.mark.parametrize("step, seen", [(1, 3), (4, 5), (11, 12), (23, 24), (24, 24)])
def test_r5_nan_at_a_step_ends_the_run_at_the_next_evaluation_and_is_its_outcome(step, seen):
    def nan(net, out):
        return out * float("nan") if net.calls == step and net.training else out

    found = train(lambda seed: make(seed, nan), Cell("adamw", "final", 0.01, 0), steps=24)
    assert (found.metric, found.reason) == (None, f"diverged at step {seen}: loss is nan")
    assert len(found.curve) == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24].index(seen) + 1


@pytest.mark.parametrize(
    "task, contenders, said",
    [
        ("wide_loss", ["adamw", "lion"], r"does not run on this task: .*the loss has shape \[8, 3\] on a batch of 8"),
        ("random_weights", ["adamw", "lion"], "the same seed gives other weights"),
        ("few", ["adamw", "lion"], "train holds 5 examples, fewer than one batch of 8"),
        ("make", ["lion", "adam", "adamw(weight_decay=0.0)"], "are the same on this model"),
    ],
)
def test_a_task_or_contenders_that_cannot_be_judged_are_refused_in_one_line_and_nothing_is_written(
    tmp_path, task, contenders, said
):
    file = TINY if task == "make" else FAULTY
    with pytest.raises(InputError, match=said) as caught:
        etude.race(f"{file}:{task}", contenders, folder=tmp_path / "runs", **QUICK)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# What the disk does wrong


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_no_write_permission_is_one_line(tmp_path):
    """Root may write anywhere, so somebody else tries: to make a folder, and to go on in one that may only be read."""
    closed = Path(tempfile.mkdtemp())
    try:
        filled(closed, 2)
        closed.chmod(0o755)

        def go_on(folder):
            os.setuid(NOBODY)
            with Ledger(folder, LOCK) as opened:
                opened.put(outcome(3))

        new, old = (Child(lambda: go_on(folder)).said() for folder in (closed / "runs", closed))
        assert new == f"RaceError: cannot write in {closed}/runs: Permission denied; the 0 finished runs are kept, " + (
            "run the same command to resume"
        )
        assert old.startswith(f"RaceError: cannot write {closed / FILE}: ")
        assert "\n" not in old
        assert held(closed, 4) == [outcome(0), outcome(1), None, None]
    finally:
        for file in closed.iterdir():
            file.unlink()
        closed.rmdir()


def test_a_full_disk_is_one_line_and_every_record_before_it_is_kept(tmp_path):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))
        with Ledger(tmp_path, LOCK) as opened:
            for seed in range(500):
                done.append(seed)
                opened.put(outcome(seed))

    done = []
    said = Child(fill).said()
    assert said.startswith(f"RaceError: cannot write {tmp_path / FILE}: ")
    assert said.endswith("finished runs are kept, run the same command to resume")
    assert "\n" not in said
    kept = int(said.split("; the ")[1].split()[0])
    assert kept > 5
    assert held(tmp_path, kept + 1) == [*map(outcome, range(kept)), None]


@pytest.mark.long
def test_a_disk_that_is_full_when_the_report_is_due_is_one_line_and_the_next_call_writes_it(tmp_path):
    raced = etude.race(str(TINY), ["adamw", "lion"], folder=tmp_path, **QUICK)
    raced.report.unlink()

    def again():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        running.resume(raced.folder, quiet=True)

    said = Child(again).said()
    assert said.startswith(f"RaceError: cannot write the report in {raced.folder}: File too large; the ledger holds")
    assert running.resume(raced.folder, quiet=True).standings == raced.standings
    assert raced.report.is_file()


def test_every_byte_of_a_record_that_is_flipped_is_found(tmp_path):
    """Of the key, the outcome, the checksum and the lock: at places drawn anew in each record."""
    file = filled(tmp_path, 3)
    whole, drawn = file.read_bytes(), random.Random(5)
    db = sqlite3.connect(file)
    texts = [
        t for table in ("cells", "facts") for row in db.execute(f"SELECT * FROM {table}") for t in row if t != "lock"
    ]
    db.close()
    assert len(texts) == 3 * 3 + 2
    for text in texts:
        begin = whole.index(text.encode())
        for at in [begin, begin + len(text) - 1, *(begin + drawn.randrange(len(text)) for _ in range(4))]:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << drawn.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(RaceError, match=r"damaged|another lock") as caught:
                held(tmp_path, 3)
            assert "\n" not in str(caught.value)


def test_a_torn_write_loses_at_most_what_was_being_written(tmp_path):
    """The write-ahead log of a race that was cut off, cut at any length: the records before it are there, in order."""
    (tmp_path / "cut").mkdir()
    with Ledger(tmp_path / "whole", LOCK) as opened:
        for seed in range(12):
            opened.put(outcome(seed))
        main, log = ((tmp_path / "whole" / name).read_bytes() for name in (FILE, f"{FILE}-wal"))
    assert len(log) > 12 * 4096
    drawn, kept = random.Random(3), []
    for at in [*sorted(drawn.randrange(len(log)) for _ in range(25)), len(log)]:
        for old in (tmp_path / "cut").iterdir():
            old.unlink()
        (tmp_path / "cut" / FILE).write_bytes(main)
        (tmp_path / "cut" / f"{FILE}-wal").write_bytes(log[:at])
        found = held(tmp_path / "cut", 12)
        count = len(found) - found.count(None)
        assert found == [*map(outcome, range(count)), *[None] * (12 - count)]
        kept.append(count)
    assert kept == sorted(kept)
    assert kept[-1] == 12
    assert len(set(kept)) > 5


# Two at once


def test_of_many_races_that_begin_at_once_in_one_folder_one_runs(tmp_path):
    begin = time.monotonic() + 0.3

    def race(seed):
        time.sleep(max(0.0, begin - time.monotonic()))
        with Ledger(tmp_path / "runs", LOCK) as opened:
            opened.put(outcome(seed))
            time.sleep(2.5)
        return "ran"

    said = [child.said() for child in [Child(lambda: race(seed)) for seed in range(6)]]
    assert sorted(line[:40] for line in said) == ["RaceError: another race is running in /t"[:40]] * 5 + ["ran"]
    found = held(tmp_path / "runs", 6)
    assert [seed for seed, o in enumerate(found) if o] == [said.index("ran")]


def test_a_second_process_is_refused_while_the_first_goes_on(tmp_path):
    with Ledger(tmp_path, LOCK) as first:
        first.put(outcome(0))

        def second():
            with Ledger(tmp_path, LOCK) as opened:
                opened.put(outcome(7))

        said = Child(second).said()
        first.put(outcome(1))
    assert said == f"RaceError: another race is running in {tmp_path}; wait for it or race in another folder"
    assert held(tmp_path, 8) == [outcome(0), outcome(1), *[None] * 6]


# The clock


def test_a_clock_jumping_back_is_read_nowhere_where_a_race_is_timed():
    """Only loggers, which stamp what they send elsewhere, may read the clock on the wall."""
    wall = {"time", "time_ns", "localtime", "gmtime", "ctime", "now", "utcnow", "today"}
    read = [
        f"{file.name}:{node.lineno}"
        for file in RACE_ROOM.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if file.name != "loggers.py" and isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in ("time", "datetime", "date") and node.attr in wall
    ]
    assert read == []


BACK = "import itertools, time\nback = itertools.count()\ntime.time = lambda: 1.7e9 - 3600 * next(back)\n"
"""A clock on the wall that jumps back an hour whenever it is read, in every process of a race."""


@pytest.mark.long
def test_a_clock_jumping_back_changes_nothing_but_clocks(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BACK)
    path = f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}"
    for name, env in (("peace", os.environ), ("back", {**os.environ, "PYTHONPATH": path})):
        (tmp_path / name).mkdir()
        code, _, err = finish(start(tmp_path / name, env=env))
        assert code == 0, err
    assert ledger(tmp_path / "back") == ledger(tmp_path / "peace")
    db = sqlite3.connect(next((tmp_path / "back").glob(f"*/{FILE}")))
    for (text,) in db.execute("SELECT outcome FROM cells"):
        seconds = [point[1] for point in json.loads(text)["curve"]]
        assert 0 <= seconds[0]
        assert seconds == sorted(seconds)
    db.close()


# kill -9


@pytest.mark.long
def test_the_race_of_digits_killed_twice_and_continued_has_the_ledger_of_an_uninterrupted_one(tmp_path):
    asked = ["race", "digits", "adamw", "muon", "adamw + dyt", "--quick", "--steps", "40", "--folder"]

    def etude_race(*words):
        return subprocess.Popen(
            [sys.executable, "-c", RACE, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, err = finish(etude_race(*asked, whole))
    assert code == 0, err
    process = etude_race(*asked, cut)
    wait_for_writing(process, cut, 40_000)
    process.send_signal(signal.SIGKILL)
    finish(process)
    first = ledger(cut)
    [folder] = cut.iterdir()
    process = etude_race("race", "--continue", folder)
    wait_for_writing(process, cut, 80_000)
    process.send_signal(signal.SIGKILL)
    finish(process)
    second = ledger(cut)
    assert 0 < len(first) < len(second) < len(ledger(whole))
    assert first.items() <= second.items()
    code, out, err = finish(etude_race("race", "--continue", folder))
    assert code == 0, err
    assert "adamw + dyt" in out
    assert ledger(cut) == ledger(whole)
