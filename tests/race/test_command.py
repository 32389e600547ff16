"""Commands as what is raced on: their runs are processes, what goes wrong is an outcome, nothing outlives the race."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import etude
from etude.cli import main
from etude.race import Cell, InputError, command
from etude.race.command import Command
from etude.race.store import FILE
from etude.race.subject import find

TRAIN = Path(__file__).parent / "train.py"
WORDS = [sys.executable, str(TRAIN), "--optim", "{rule}", "--lr", "{lr}", "--seed", "{seed}"]


def run(*more, rule="adamw", lr=0.01, seed=3, cwd=None, **given):
    return Command.of(command([*WORDS, *more], cwd=cwd, **given)).train(
        Cell(rule, "tune", lr, seed), steps=0, device="cpu"
    )


def test_the_metric_and_the_curve_come_from_the_lines_of_json():
    out = run()
    assert out.reason == ""
    assert [(p[0], round(p[2] - p[3], 6)) for p in out.curve] == [(10, 1.0), (20, 1.0)]
    assert out.curve[-1][3] == out.metric
    assert out.curve[0][1] <= out.curve[1][1] <= out.seconds
    assert (out.step_seconds, out.state_bytes) == (None, None)


def test_a_metric_within_another_is_named_with_a_dot():
    assert run(metric="eval.loss").metric == -run().metric


@pytest.mark.parametrize("name", ["out-{seed}.txt", "out-{seed}.json"])
def test_the_metric_can_be_read_from_a_file(tmp_path, name):
    out = run("--out", name, cwd=tmp_path, metric_file=name)
    assert out.metric == run().metric
    assert (tmp_path / name.format(seed=3)).is_file()


def test_a_file_of_an_earlier_run_is_not_this_runs_metric(tmp_path):
    (tmp_path / "old.json").write_text('{"val_loss": 1}')
    assert "it wrote no" in run(cwd=tmp_path, metric_file="old.json").reason


@pytest.mark.parametrize(
    "more, given, reason",
    [
        (["--fault", "exit"], {}, "exit 1: ValueError: no such optimizer"),
        (["--fault", "silent"], {}, "no 'val_loss' in a line of JSON on stdout"),
        ([], {"metric": "val_los"}, "no 'val_los' in a line of JSON on stdout; nearest: val_loss, loss, eval"),
        (["--nonsense"], {}, "exit 2: train.py: error: unrecognized arguments: --nonsense"),
    ],
)
def test_what_goes_wrong_is_an_outcome_with_its_reason(more, given, reason):
    out = run(*more, **given)
    assert (out.metric, out.reason) == (None, reason)


def test_a_program_that_is_not_there():
    out = Command.of(command("no-such-program --seed {seed}")).train(Cell("", "final", 0.0, 0), steps=0, device="cpu")
    assert out.reason == "exit 127: no-such-program: No such file or directory"


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(pid, patience=10):
    end = time.monotonic() + patience
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_a_run_that_hangs_is_timed_out_with_all_its_processes(tmp_path):
    out = run("--fault", "hang", "--out", str(tmp_path / "pid"), timeout=1.5)
    assert out.reason == "timed out after 1.5 s"
    assert 1.5 <= out.seconds < 10
    assert ended(int((tmp_path / "pid").read_text()))


def test_nothing_outlives_a_race_killed_by_the_system(tmp_path):
    words = [*WORDS, "--fault", "hang", "--out", str(tmp_path / "pid")]
    program = "from etude.cli import main; main()"
    race = subprocess.Popen([sys.executable, "-c", program, "race", "adamw", "muon", "--", *words], cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.1)
    race.send_signal(signal.SIGKILL)
    race.wait()
    assert ended(int((tmp_path / "pid").read_text()))


def test_a_contender_fills_the_places_of_the_command():
    subject = find(command([*WORDS, "--momentum", "{momentum}"]))
    assert subject.entry("muon  momentum=0.25") == ("muon momentum=0.25", 0.001)
    assert subject.entry("foo momentum=0 lr=0.5") == ("foo momentum=0", 0.5)
    plain = subject.train(Cell("adamw momentum=0", "tune", 0.01, 3), steps=0, device="cpu")
    more = subject.train(Cell("adamw momentum=0.25", "tune", 0.01, 3), steps=0, device="cpu")
    assert plain.metric - more.metric == pytest.approx(0.25)


@pytest.mark.parametrize(
    "words, contender, said",
    [
        (["x", "{rule}", "{seed}", "{momentum}"], "muon", r"has \{momentum\}; say it .*'muon momentum=…'"),
        (["x", "{rule}", "{seed}"], "muon wd=1", r"gives wd, but the command has no \{wd\}"),
        (["x", "{seed}"], "muon", r"names 'muon', but the command has no \{rule\}"),
        (["x", "{rule}", "{lr}", "{seed}"], "foo", r"no learning rate to start from; give one with --lr"),
        (["x", "{rule}", "{lr}", "{seed}"], "foo lr=-1", r"has lr=-1; give one"),
        (["x", "{rule}", "{seed}"], "muon 'x", r"No closing quotation"),
    ],
)
def test_a_contender_that_does_not_fit_is_refused(words, contender, said):
    with pytest.raises(InputError, match=said):
        find(command(words)).entry(contender)


def test_braces_that_are_not_places_stay(tmp_path):
    words = [sys.executable, "-c", "import json; print('{\"val_loss\": %s}' % json.loads('[{seed}]')[0])"]
    assert Command.of(command(words)).train(Cell("", "final", 0.0, 7), steps=0, device="cpu").metric == 7


def test_a_command_without_a_seed_is_refused():
    with pytest.raises(InputError, match=r"the command has no \{seed\}"):
        find(command("python x.py {lr}")).open(0)


def test_the_lock_holds_the_command_and_the_files_it_names(tmp_path):
    (tmp_path / "t.py").write_text("1")
    one = find(command("python t.py {seed}", cwd=tmp_path))
    first = one.open(0).lock
    (tmp_path / "t.py").write_text("2")
    assert first["command"] == ["python", "t.py", "{seed}"]
    assert first["files"].keys() == {"t.py"}
    assert one.open(0).lock["files"] != first["files"]
    assert one.name == "t"


def test_a_race_of_commands_finds_the_better_one_and_resumes_without_a_run(tmp_path, monkeypatch):
    asked = {"seeds": 6, "workers": 2 if len(os.sched_getaffinity(0)) > 1 else 1, "folder": tmp_path, "quiet": True}
    result = etude.race(command(WORDS, lr=0.01), ["adamw", "muon", "slow"], **asked)
    assert [s.word for s in result.standings] == ["baseline", "better", "worse"]
    assert {s.lr for s in result.standings} == {0.01}  # the best of the grid by the script's own formula
    assert len([o for o in result.outcomes if o.cell.stage == "tune" and o.cell.contender == "muon"]) <= 13
    assert result.standings[1].difference == pytest.approx(-0.5)
    monkeypatch.setattr(Command, "train", lambda *a, **k: pytest.fail("a run was repeated"))
    assert etude.race(command(WORDS, lr=0.01), ["adamw", "muon", "slow"], **asked).standings == result.standings


def test_without_a_place_for_lr_nothing_is_tuned(tmp_path):
    words = [sys.executable, str(TRAIN), "--optim", "{rule}", "--seed", "{seed}"]
    result = etude.race(command(words), ["adamw", "twin"], seeds=6, folder=tmp_path, quiet=True)
    assert {o.cell.stage for o in result.outcomes} == {"final", "aa"}
    assert [s.tuned for s in result.standings] == [(), ()]
    notes = " ".join(text.plain for text in etude.race.table(result).notes())
    assert "twin: the very numbers of adamw on every seed; did it take effect?" in notes


def cli(*args, cwd):
    done = subprocess.run(
        [sys.executable, "-c", f"from {main.__module__} import main; main()", *map(str, args)],
        cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_baseline_that_does_not_run_stops_the_race_before_anything_is_written(tmp_path):
    code, _, err = cli("race", "adamw", "muon", "--quick", "--", *WORDS, "--fault", "exit", cwd=tmp_path)
    assert code == 2, err
    assert err.strip().splitlines()[-1] == (
        "etude: the baseline adamw does not run: exit 1: ValueError: no such optimizer"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (["race", "adamw", "muon", "--steps", "5", "--", *WORDS], "the steps of a command are its own"),
        (["race", "digits", "adamw", "muon", "--metric", "x"], "--metric is of a command"),
        (["race", "adamw", "muon", "--"], "a command has at least one word"),
    ],
)
def test_bad_input_is_one_line(tmp_path, args, said):
    code, out, err = cli(*args, cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_torchrun_commands_race_and_continue(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(
        "import json, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor([float(sys.argv[1]) + dist.get_rank()])\n"
        "dist.all_reduce(x)\n"
        "gain = 5.0 if sys.argv[2] == 'muon' else 0.0\n"
        "if dist.get_rank() == 0: print(json.dumps({'val_loss': x.item() - gain + float(sys.argv[1]) ** 2 % 7}))\n"
        "dist.destroy_process_group()\n"
    )
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "ddp.py",
        "{seed}",
        "{rule}",
    ]
    code, out, err = cli("race", "adamw", "muon", "--quick", "--json", "--", *words, cwd=tmp_path)
    assert code == 0, err
    assert '"word": "better"' in out
    [folder] = (tmp_path / "runs").glob("*")
    assert (folder / FILE).is_file()
    code, again, err = cli("race", "--continue", folder, "--json", cwd=tmp_path)
    assert code == 0, err
    assert json.loads(again)["standings"] == json.loads(out)["standings"]
