"""A race is killed at random moments and resumed; its ledger is then that of a race left in peace, but for clocks."""

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etude.race.store import FILE

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]
TINY = Path(__file__).parent / "tiny.py"
RACE = "from etude.cli import main; main()"


def start(folder, engine="loop", **more):
    """``etude race`` in a process of its own: 2 contenders, 6 seeds, 44 runs."""
    asked = ["race", str(TINY), "adamw", "lion", "--quick", "--steps", "240", "--workers", "1", "--folder", str(folder)]
    asked += ["--engine", engine]
    return subprocess.Popen(
        [sys.executable, "-c", RACE, *asked],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        **more,
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def ledger(folder):
    """Every record without its clocks, by key."""
    [file] = folder.glob(f"*/{FILE}")
    db = sqlite3.connect(file)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rows = {key: json.loads(text) for key, text in db.execute("SELECT key, outcome FROM cells")}
    db.close()
    for row in rows.values():
        row["seconds"] = row["step_seconds"] = 0
        row["curve"] = [[step, 0, *rest] for step, _, *rest in row["curve"]]
    return rows


def written(folder):
    return sum(f.stat().st_size for f in folder.glob(f"*/{FILE}*"))


def wait_for_writing(process, folder, more):
    """Until the ledger has grown by ``more`` bytes."""
    before = written(folder)
    while process.poll() is None and written(folder) < before + more:
        time.sleep(0.01)


def workers(process):
    """The process ids of a race's workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def all_gone(pids, patience=20):
    """Whether all have ended; one that is still importing needs a moment to see that its race is dead."""
    end = time.monotonic() + patience
    while not all(map(gone, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return all(map(gone, pids))


@pytest.fixture(scope="module")
def in_peace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peace")
    code, out, err = finish(start(folder))
    assert code == 0, err
    assert "lion" in out
    return ledger(folder)


def test_a_race_killed_at_random_moments_resumes_to_the_same_ledger(in_peace, tmp_path):
    drawn, kept = random.Random(os.environ.get("ETUDE_KILL_SEED", "7")), {}
    for attempt in range(20):  # the first three while it begins, the others after some more runs, or within one
        process = start(tmp_path)
        if attempt > 2:
            wait_for_writing(process, tmp_path, drawn.randrange(1, 30_000))
        time.sleep(drawn.random() * (0.2 if attempt > 2 else 6))
        children = workers(process)
        process.send_signal(signal.SIGKILL)
        finish(process)
        assert all_gone(children)
        if any(tmp_path.glob(f"*/{FILE}")) and written(tmp_path):
            now = ledger(tmp_path)
            assert kept.items() <= now.items() <= in_peace.items()  # nothing lost, nothing else
            kept = now
    code, _, err = finish(start(tmp_path))
    assert code == 0, err
    assert ledger(tmp_path) == in_peace


def test_ctrl_c_stops_at_once_and_the_same_command_resumes(in_peace, tmp_path):
    process = start(tmp_path)
    wait_for_writing(process, tmp_path, 40_000)
    children = workers(process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "finished runs are kept" in err
    assert "Traceback" not in err
    assert all_gone(children, patience=2)
    assert 0 < len(ledger(tmp_path)) < len(in_peace)
    code, _, err = finish(start(tmp_path))
    assert code == 0
    assert "finished runs in" in err
    assert ledger(tmp_path) == in_peace


def test_a_full_disk_is_one_line_and_the_race_resumes_when_there_is_room(in_peace, tmp_path):
    full = start(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000)))
    code, _, err = finish(full)
    assert code == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("etude: cannot write ")
    kept = ledger(tmp_path)
    assert 0 < len(kept) < len(in_peace)
    code, _, err = finish(start(tmp_path))
    assert code == 0, err
    assert ledger(tmp_path) == in_peace


def test_two_races_in_one_folder_do_not_mix(in_peace, tmp_path):
    first = start(tmp_path)
    wait_for_writing(first, tmp_path, 20_000)
    first.send_signal(signal.SIGSTOP)  # or it might be over before the second asks
    code, _, err = finish(start(tmp_path))
    first.send_signal(signal.SIGCONT)
    assert (code, err.splitlines()[-1][:32]) == (1, "etude: another race is running i")
    assert finish(first)[0] == 0
    assert ledger(tmp_path) == in_peace


def test_a_race_of_populations_killed_resumes_to_the_same_ledger(tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    quiet.mkdir()
    killed.mkdir()
    code, _, err = finish(start(quiet, "population"))
    assert code == 0, err
    for more in (50_000, 10_000):
        process = start(killed, "population")
        wait_for_writing(process, killed, more)
        process.send_signal(signal.SIGKILL)
        finish(process)
    assert 0 < len(ledger(killed)) < len(ledger(quiet))
    code, _, err = finish(start(killed, "population"))
    assert code == 0, err
    assert ledger(killed) == ledger(quiet)
