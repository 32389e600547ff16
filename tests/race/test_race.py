"""Whole races, small ones: plan, tuning, finals, verdict, report; what fails is an outcome; the same call resumes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import etude
from etude.race import Cell, InputError, RaceError, Result
from etude.race import _run as running
from etude.race._cli import race_command
from etude.race.loop import train
from etude.race.pool import Pool, Worker, cell_request, cores, outcome_of
from etude.race.report import to_json
from etude.race.store import FILE, Ledger
from etude.race.tasks import find_task

TINY = Path(__file__).parent / "tiny.py"
NO_COMMAND = SimpleNamespace(obj=None)
QUICK = {"seeds": 6, "quiet": True}


def timeless(outcomes):
    """Outcomes without their clocks."""
    still = [
        replace(o, seconds=0.0, step_seconds=0.0, curve=tuple((p[0], 0.0, *p[2:]) for p in o.curve)) for o in outcomes
    ]
    return sorted(still, key=lambda o: (o.cell.contender, o.cell.stage, o.cell.lr, o.cell.seed))


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """One race, shared by the tests that look at it."""
    folder = tmp_path_factory.mktemp("runs")
    return etude.race(str(TINY), ["adamw", "sgd(momentum=0.9)"], folder=folder, workers=1, **QUICK)


@pytest.fixture
def no_worker(monkeypatch):
    """No process may be started."""
    monkeypatch.setattr(Worker, "_start", lambda self: pytest.fail("a worker was started"))


def test_a_race_has_the_runs_of_its_plan_and_a_verdict_for_each(raced):
    assert isinstance(raced, Result)
    assert [s.contender for s in raced.standings] == ["adamw", "sgd(momentum=0.9)"]
    assert raced.standings[0].word == "baseline"
    for s in raced.standings:
        mine = [o.cell for o in raced.outcomes if o.cell.contender == s.contender]
        assert len([c for c in mine if c.stage == "tune"]) <= 13
        assert [c.seed for c in mine if c.stage == "final"] == list(raced.plan.final_seeds)
        assert {c.lr for c in mine if c.stage == "final"} == {s.lr}
    assert [o.cell.seed for o in raced.outcomes if o.cell.stage == "aa"] == list(raced.plan.aa_seeds)
    assert all(o.reason or math.isfinite(o.metric) for o in raced.outcomes)


def test_every_contender_is_tuned_with_the_same_budget_and_seeds(raced):
    tuned = [o.cell for o in raced.outcomes if o.cell.stage == "tune"]
    assert {c.seed for c in tuned} == set(raced.plan.tune_seeds)
    for name in raced.plan.contenders:
        tried = {c.lr for c in tuned if c.contender == name and c.seed == raced.plan.tune_seeds[0]}
        assert set(raced.plan.grids[name]) <= tried
    assert not {c.seed for c in tuned} & {*raced.plan.final_seeds, *raced.plan.aa_seeds}


def test_the_report_and_the_result_lie_beside_the_ledger(raced):
    assert raced.folder.name.startswith("tiny-")
    assert {p.name for p in raced.folder.iterdir()} == {FILE, "report.html", "result.json"}
    assert raced.report == raced.folder / "report.html"
    assert "sgd(momentum=0.9)" in (raced.folder / "report.html").read_text(encoding="utf-8")
    json.loads((raced.folder / "result.json").read_text(encoding="utf-8"))


def test_the_lock_holds_what_decides_a_result(raced):
    assert {"task", "source", "data", "model", "metric", "steps", "seed", "device", "etude", "torch"} <= set(raced.lock)
    assert raced.lock["metric"] == raced.plan.metric == "validation loss"


def test_the_same_call_again_runs_nothing(raced, no_worker):
    folder = raced.folder.parent
    again = etude.race(str(TINY), ["adamw", "sgd(momentum=0.9)"], folder=folder, **QUICK)
    assert again.outcomes == raced.outcomes
    assert again.standings == raced.standings
    assert running.resume(raced.folder, quiet=True).standings == raced.standings


def test_the_order_in_which_runs_finish_does_not_matter(raced, tmp_path):
    if cores() < 2:
        pytest.skip("needs two cores")
    two = etude.race(str(TINY), ["adamw", "sgd(momentum=0.9)"], folder=tmp_path, workers=2, **QUICK)
    assert timeless(two.outcomes) == timeless(raced.outcomes)
    assert [(s.word, s.lr, s.values) for s in two.standings] == [(s.word, s.lr, s.values) for s in raced.standings]


def test_another_set_of_contenders_has_its_own_report_and_its_own_looks(raced):
    before = raced.report.read_text(encoding="utf-8")
    asked = {"folder": raced.folder, "seeds": 7, "workers": 1, "quiet": True}
    other = etude.race(str(TINY), ["adamw", "sgd(momentum=0.5)"], **asked)
    assert other.looks == ()
    assert other.folder == raced.folder
    assert re.fullmatch(r"report-\w{8}\.html", other.report.name)
    assert "sgd(momentum=0.5)" in other.report.read_text(encoding="utf-8")
    assert raced.report.read_text(encoding="utf-8") == before
    assert (raced.folder / other.report.name.replace("report", "result")).with_suffix(".json").is_file()
    again = etude.race(str(TINY), ["adamw", "sgd(momentum=0.9)"], **{**asked, "seeds": 6})
    assert (again.looks, again.report) == ((), raced.report)


def test_more_seeds_extend_a_race_and_say_that_it_was_judged_before(raced, capsys):
    more = running.resume(raced.folder, seeds=8, workers=1, quiet=True)
    assert (more.looks, more.report) == ((6,), raced.report)
    running.show(more)
    assert "Judged before at 6 seeds: p-values are of a single look." in " ".join(capsys.readouterr().out.split())
    assert "Judged before at 6 seeds" in more.report.read_text(encoding="utf-8")
    assert to_json(more)["looks"] == [6]
    kept = [
        o
        for o in more.outcomes
        if o.cell.seed in {*raced.plan.tune_seeds, *raced.plan.final_seeds, *raced.plan.aa_seeds}
    ]
    assert kept == list(raced.outcomes)
    assert all(s.values[:6] == old.values for s, old in zip(more.standings, raced.standings))


def test_a_changed_task_is_refused_in_the_old_folder(tmp_path, no_worker):
    mine = tmp_path / "mine.py"
    mine.write_text(TINY.read_text(encoding="utf-8"))
    with Ledger(tmp_path / "old", {"task": "mine", "source": "another"}):
        pass
    with pytest.raises(RaceError, match=r"another lock: .*source was another, now "):
        etude.race(str(mine), ["adamw", "lion"], folder=tmp_path / "old", **QUICK)


def test_a_plan_is_said_before_the_first_run(raced, capsys):
    with pytest.raises(ZeroDivisionError):
        running.Course, kept = None, running.Course
        try:
            running.Course = lambda *_: 1 / 0
            running.resume(raced.folder)
        finally:
            running.Course = kept
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"plan tiny: 2 contenders × \(up to 13 tuning \+ \d+ final\) \+ \d+ A/A = up to \d+ runs · 24 steps each", said
    )
    assert re.search(r"about \d\d:\d\d on \d+ worker", said)
    assert re.search(r"sees differences ≥ \d+(\.\d+)? sd of a seed \(80 % power\)", said)
    assert "adamw lr 3.2e-05 … 0.001 … 0.032" in said


def test_contenders_that_raise_or_diverge_are_recorded_with_their_reason_and_the_race_goes_on(tmp_path):
    exploding = "sgd(weight_decay=1e+30)"
    contenders = ["adamw", "adamw + dyt", exploding]
    result = etude.race(f"{TINY}:late_fault", contenders, folder=tmp_path, workers=1, **QUICK)
    assert [s.word for s in result.standings] == ["baseline", "failed", "failed"]
    assert [len(s.failures) for s in result.standings] == [0, 6, 6]
    raised, exploded = ([o for o in result.outcomes if o.cell.contender == c] for c in ("adamw + dyt", exploding))
    assert {o.reason for o in raised} == {"raised RuntimeError: no LayerNorm here"}
    assert all(re.fullmatch(r"diverged at step 3: loss is (nan|inf)", o.reason) for o in exploded)
    assert all(o.metric is None and o.step_seconds > 0 for o in [*raised, *exploded])


def test_what_acts_late_in_the_schedule_is_no_no_op(tmp_path):
    contenders = ["adamw", "adamw + swa(start=22)"]  # a probe's 20 steps do not see it
    result = etude.race(str(TINY), contenders, folder=tmp_path, workers=1, **QUICK)
    assert result.standings[1].values != result.standings[0].values


def test_a_worker_that_cannot_be_started_ends_the_race_in_one_line(tmp_path, monkeypatch):
    def no_process(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(Worker, "_start", no_process)
    with pytest.raises(RaceError, match=r"a worker cannot be started or heard: .*temporarily unavailable"):
        etude.race(str(TINY), ["adamw", "lion"], folder=tmp_path, **QUICK)


def test_a_killed_worker_is_one_failed_cell_and_what_a_task_prints_is_no_answer():
    dies, lives = Cell("adamw", "final", 0.01, 13), Cell("adamw", "final", 0.01, 1)
    with Pool(f"{TINY}:killed", steps=24, device="cpu", workers=1) as pool:
        for cell in (dies, lives):
            pool.submit(cell_request(cell))
        dead, alive = (outcome_of(*pair) for pair in pool.results())
    assert (dead.cell, dead.metric, dead.reason) == (dies, None, "its process was killed twice (signal 9)")
    assert timeless([alive]) == timeless([train(find_task(str(TINY)).factory, lives, steps=24)])


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"contenders": ["adamw", "adamw(eps=1e-8)"]}, "stands twice"),
        ({"contenders": ["adamw", "lionn"]}, "no method 'lionn'"),
        ({"seeds": 5}, "6 to 1000 final seeds"),
        ({"steps": 0}, "at least one step"),
        ({"steps": "a"}, "steps='a': this is not a whole number"),
        ({"seeds": 6.0}, "seeds=6.0: this is not a whole number"),
        ({"contenders": "adamw"}, "contenders are a list"),
        ({"contenders": ["adamw", "lion(lr=0)"]}, "cannot centre a grid"),
        ({"task": 5}, "this is 5"),
        ({"workers": 4096}, "this machine gives"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"seed": -1}, "0 or more"),
        ({"task": "digts"}, "no task 'digts'.*digits"),
    ],
)
def test_bad_input_is_refused_at_once_and_nothing_is_written(tmp_path, no_worker, asked, said):
    given = {"task": str(TINY), "contenders": ["adamw", "lion"], "folder": tmp_path / "runs", "quiet": True, **asked}
    with pytest.raises(InputError, match=said) as caught:
        etude.race(**given)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_no_op_and_a_task_that_cannot_train_are_refused_and_nothing_is_written(tmp_path):
    for task, contenders, said in [
        ("task", ["sgd", "sgd(nesterov=False, weight_decay=0.0)"], "stands twice"),
        ("task", ["adamw", "adamw + swa(start=1000)"], "no-op on this model"),
        ("broken_loss", ["adamw", "lion"], "the baseline adamw does not run on this task: raised RuntimeError"),
    ]:
        with pytest.raises(InputError, match=said):
            etude.race(f"{TINY}:{task}", contenders, folder=tmp_path / "runs", workers=1, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_wrong_in_one_line_and_returns_2(tmp_path, capsys):
    assert race_command(NO_COMMAND, "digts", ["adamw", "lion"], folder=tmp_path / "runs") == 2
    assert race_command(NO_COMMAND, None, None, folder=tmp_path / "runs") == 2
    assert race_command(NO_COMMAND, str(TINY), ["adamw", "lion"], quick=True, seeds=7, folder=tmp_path / "runs") == 2
    assert race_command(NO_COMMAND, continue_=tmp_path / "nowhere") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("etude: ") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_table_or_json(raced, capsys, no_worker):
    assert race_command(NO_COMMAND, continue_=raced.folder) == 0
    said = capsys.readouterr().out
    assert "no difference, as it should be" in " ".join(said.split())
    folder = raced.folder
    assert said.splitlines()[-1] == (f"report: {folder}/report.html   resume or extend: etude race --continue {folder}")
    assert race_command(NO_COMMAND, continue_=raced.folder, as_json=True) == 0
    assert "standings" in json.loads(capsys.readouterr().out)
