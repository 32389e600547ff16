"""The rules of a fair race, each by its number, on races whose right verdict is known."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratic import BOWL, CURVATURE, bowl, looked, with_test
from quadratic import here as here
from test_verdict import AA, BASE, GRID, NOISE, finals, outcome, plan, race, tuning

import etude
from etude.race import InputError, RaceError, Result, _costs, loop, target, verdict
from etude.race import _run as running
from etude.race._barnacles import NO_SIGN
from etude.race._model import Cell
from etude.race._text import notes
from etude.race.inclusion import includes, without_each
from etude.race.looks import LOOKS, decided, ended, looks_of, split, stages
from etude.race.search import Sobol, ranges

STACK = "sgd(momentum=0.9) + sam(rho=1e-06)"


@pytest.fixture(scope="module")
def raced(here, tmp_path_factory):
    """Gradient descent against momentum on an ill-conditioned bowl, taken apart: (result, requests in order)."""
    folder = tmp_path_factory.mktemp("runs")
    result = etude.race(BOWL, ["sgd", STACK], folder=folder, quiet=True, looks=True, barnacles=True)
    return result, [executor.order for executor in here]


def cells(result, contender, stage):
    return [o.cell for o in result.outcomes if (o.cell.contender, o.cell.stage) == (contender, stage)]


# --- R1 to R6 ---------------------------------------------------------------------------------------------------


def test_r1_a_seed_decides_weights_and_batches_and_the_lock_decides_the_rest(raced, here):
    one, two, other = (
        loop.Run(bowl, Cell(c, "final", 0.1, s), steps=9, device="cpu")
        for c, s in (("sgd", 5), ("lion", 5), ("sgd", 6))
    )
    assert torch.equal(one.model.w, two.model.w)
    assert not torch.equal(one.model.w, other.model.w)
    result, _ = raced
    curves = [[p[0] for p in o.curve] for o in result.outcomes if not o.reason]
    assert all(curve == curves[0] for curve in curves), "the same steps, evaluated at the same times"
    with pytest.raises(RaceError, match=r"another lock: steps was 60, now 61"):
        running.resume(result.folder, steps=61, quiet=True)


def test_r2_the_baseline_is_tuned_like_the_others_and_raced_against_itself(raced):
    result, _ = raced
    budgets = {name: len(cells(result, name, "tune")) for name in result.plan.contenders}
    assert result.plan.tune_budget == 13
    assert set(budgets.values()) <= {12, 13}, "a grid of 8 leaves 5 runs, which repeat two rates on two seeds"
    control = cells(result, "sgd", "aa")
    assert [c.seed for c in control] == list(result.plan.aa_seeds)
    assert {c.lr for c in control} == {result.standings[0].lr}
    assert result.aa.word == verdict.SAME
    _, differs = race(a=BASE, aa=BASE + 0.2)
    assert differs.word == verdict.DIFFERENT


def test_r3_the_grid_grows_where_the_best_is_and_stops_within_the_budget(raced):
    """Gradient descent on f is stable below lr = 2 / max h: the best lr lies above the grid's centre, inside it."""
    result, _ = raced
    lrs = sorted({c.lr for c in cells(result, "sgd", "tune")})
    assert set(result.plan.grids["sgd"]) <= set(lrs)
    assert not result.standings[0].at_edge
    assert 0.3 < result.standings[0].lr < 4
    found, _ = race(best=6, bad=BASE + 0.2 + 0.01 * NOISE[3])
    assert found["bad"].word == "under-tuned"


def test_r3_a_best_point_in_the_outer_twentieth_of_a_range_is_under_tuned_too():
    search = Sobol(ranges("sgd", 0.1, {}, ("lr",)), budget=13)
    low, high = search.ranges[0].low, search.ranges[0].high
    assert (low, high) == pytest.approx((0.1 / 10**1.5, 0.1 * 10**1.5), rel=1e-5)
    assert [search.at_edge(lr, []) for lr in (low * 1.3, low * 1.6, 0.1, high / 1.6, high / 1.3)] == [
        True, False, False, False, True,
    ]  # fmt: skip


def test_r4_three_tuning_seeds_then_fresh_ones_and_fresh_ones_again_for_the_ablation(raced):
    _, orders = raced
    stages_of = [{o["cell"]["stage"]: set() for o in order if o["kind"] == "cell"} for order in orders]
    for order, found in zip(orders, stages_of):
        for request in order:
            if request["kind"] == "cell":
                found[request["cell"]["stage"]].add(request["cell"]["seed"])
    race_, ablation = stages_of
    assert len(race_["tune"]) == 3
    assert len(race_["final"]) >= 6
    assert not race_["tune"] & race_["final"] | race_["final"] & race_["aa"] | race_["tune"] & race_["aa"]
    assert not race_["final"] & ablation["final"], "the stack was picked on the first race's seeds"


def test_r5_the_schedule_ends_at_zero_and_only_divergence_ends_a_run_early():
    run = loop.Run(bowl, Cell("sgd", "tune", 0.1, 0), steps=40, device="cpu")
    rates = [run.optimizer.param_groups[0]["lr"] for _ in run.points()]
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) <= 0.1
    hopeless = loop.train(bowl, Cell("sgd", "tune", 1e-9, 0), steps=40)
    assert (len(hopeless.curve), hopeless.reason) == (10, "")
    exploded = loop.train(bowl, Cell("sgd", "tune", 30.0, 0), steps=40)
    assert len(exploded.curve) < 10
    assert exploded.reason.startswith("diverged at step")


def test_r5_gradient_descent_on_the_bowl_ends_where_algebra_says():
    steps, lr = 40, 1.0
    run = loop.Run(bowl, Cell("sgd", "final", lr, 3), steps=steps, device="cpu")
    w = run.model.w.detach().clone()
    multipliers = []
    for _ in range(steps):
        multipliers.append(run.optimizer.param_groups[0]["lr"])
        run.step()
    for c in multipliers:
        w *= 1 - c * CURVATURE
    found = loop.train(bowl, Cell("sgd", "final", lr, 3), steps=steps).metric
    assert found == pytest.approx(float(0.5 * (CURVATURE * w.square()).sum()), rel=1e-12)


def test_r6_a_run_that_fails_is_an_outcome_and_wins_nothing(raced):
    result, _ = raced
    lost = [o for o in result.outcomes if o.reason]
    assert lost, "the largest learning rates of the grid diverge on the bowl"
    assert all(o.metric is None for o in lost)
    assert not {o.cell.lr for o in lost} & {s.lr for s in result.standings}
    found, _ = race(good=[*(BASE - 0.2)[:9], None])
    assert found["good"].word == "no significant difference"
    assert found["good"].failures


# --- R7 ---------------------------------------------------------------------------------------------------------


def curved(name, slower, ends, best=3):
    """Final runs whose validation loss falls in a straight line from 2 at step 0 to the end at step 10."""
    runs = []
    for s, end in zip(plan().final_seeds, ends):
        points = tuple((k, 0.0, 1.0, 2 + (end - 2) * k / 10) for k in range(1, 11))
        run = outcome(name, "final", GRID[best], s, end)
        runs.append(replace(run, curve=points, step_seconds=0.001 * slower, state_bytes=8 * int(slower)))
    return runs


def test_r7_at_equal_seconds_a_slower_contender_is_read_off_its_curve():
    """Twice as slow and a little better at the end: worse when the baseline has finished. Faster: judged at its end."""
    p = replace(plan("slow", "fast"), flops={"base": 10.0, "slow": 30.0}, joules={"base": 2.0, "slow": 1.0})
    runs = curved("base", 1, BASE) + curved("slow", 2, BASE - 0.2 + 0.01 * NOISE[2])
    runs += curved("fast", 0.5, BASE - 0.2 + 0.01 * NOISE[3])
    (_, slow, fast), _ = verdict.judge(p, runs)
    assert [slow.word, fast.word] == ["better", "better"]
    clocks = {c.name: c for c in slow.clocks}
    half = [2 + (v - 2) * 0.5 for v in slow.values]
    assert clocks["seconds"].word == "worse"
    assert clocks["seconds"].difference == pytest.approx(np.mean(half) - BASE.mean())
    assert clocks["seconds"].ratio == pytest.approx(2)
    assert next(c for c in fast.clocks if c.name == "seconds").word == "better"
    assert [(clocks[n].word, clocks[n].ratio) for n in ("memory", "FLOPs", "energy")] == [
        ("more", 2.0), ("more", 3.0), ("less", 0.5),
    ]  # fmt: skip
    result = Result(p, verdict.judge(p, runs)[0], verdict.judge(p, runs)[1], tuple(runs), {}, None)
    said = [line for kind, line in notes(result) if kind == "clock"]
    assert said == ["At base's training time slow reads: worse (read off its curve after 50 % of its steps)."]


def test_r7_a_run_without_a_curve_has_no_verdict_by_seconds():
    found, _ = race(a=BASE - 0.2)
    assert [c.name for c in found["a"].clocks] == ["memory"]


def test_r7_the_stages_are_interleaved_and_steps_cost_operations(raced):
    result, orders = raced
    finals_ = [o["cell"]["contender"] for o in orders[0] if o["kind"] == "cell" and o["cell"]["stage"] == "final"]
    assert finals_[:4] == ["sgd", STACK] * 2
    layer = torch.nn.Linear(3, 5)
    assert _costs.step_flops(lambda: layer(torch.randn(7, 3))) == 2 * 7 * 3 * 5
    assert result.plan.flops == {}, "the bowl multiplies no matrices"


def test_r7_energy_is_read_where_the_kernel_tells_it_and_absent_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(_costs, "LEAST", 0.0)
    assert _costs.Energy(powercap=tmp_path).spent(1) is None
    for name, top in (("intel-rapl:0", 262_143_000_000), ("intel-rapl:0:0", 1), ("intel-rapl:1", 50_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("40000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text(f"{top}\n")
    meter = _costs.Energy(powercap=tmp_path)
    meter.start()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("70000000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("10000000\n")  # beyond its 50 J it began again
    assert meter.spent(10) == pytest.approx((30 + 20) / 10)
    monkeypatch.setattr(_costs, "LEAST", 3600.0)
    assert meter.spent(10) is None


# --- R8 to R11 --------------------------------------------------------------------------------------------------


def test_r8_the_looks_split_alpha_and_are_set_before_the_race():
    assert LOOKS == (6, 10, 16, 30)
    assert (looks_of(30), looks_of(12), looks_of(6)) == ((6, 10, 16, 30), (6, 10, 12), (6,))
    for seeds in (6, 8, 12, 30):
        shares = split(looks_of(seeds), 0.05)
        assert math.fsum(shares) == pytest.approx(0.05)
        assert shares == sorted(shares)
    now = stages(replace(plan("a"), looks=(6, 10)))
    assert [(len(s.final_seeds), len(s.aa_seeds)) for s in now] == [(6, 6), (10, 10)]
    assert [s.alpha for s in now] == pytest.approx([0.05 / 3, 0.1 / 3])


def test_r8_a_race_ends_at_the_first_look_that_decides_every_contender(raced, here):
    result, _ = raced
    assert result.plan.looks == (6, 10, 16, 30)
    assert len(result.plan.final_seeds) == 6
    assert result.plan.alpha == pytest.approx(0.005)
    assert len(cells(result, "sgd", "final")) == 6, "no seed is trained beyond the look that ended the race"
    assert result.looks == ()
    again = running.resume(result.folder, quiet=True)
    assert (again.standings, again.outcomes) == (result.standings, result.outcomes)


def test_r8_an_open_question_goes_on_to_the_next_look():
    p = replace(plan("clear", "open"), looks=(6, 10))
    clear, unclear = BASE - 0.3 + 0.01 * NOISE[2], BASE + 0.1 * NOISE[4]
    runs = finals("base", BASE) + finals("clear", clear) + finals("open", unclear)
    assert [decided(stage, runs) for stage in stages(p)] == [False, False]
    assert len(ended(p, runs).final_seeds) == 10
    alone = replace(plan("clear"), looks=(6, 10))
    assert len(ended(alone, [o for o in runs if o.cell.contender != "open"]).final_seeds) == 6


def test_r9_repeats_of_a_seed_do_not_make_more_pairs():
    values = BASE - 0.05 + 0.1 * NOISE[2]
    p = replace(plan("a"), final_seeds=plan().final_seeds[:6], aa_seeds=AA[:6])
    six = finals("base", BASE[:6]) + finals("a", values[:6])
    assert verdict.judge(p, six * 5) == verdict.judge(p, six)


def test_r10_a_contender_that_changes_nothing_is_refused_before_anything_is_written(here, tmp_path):
    with pytest.raises(InputError, match="no-op on this model"):
        etude.race(BOWL, ["sgd", "sgd + sam(rho=0.0)"], folder=tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("contender", "baseline", "does"),
    [
        ("lion", "signum", True),  # its off pair
        ("adamw", "adam", True),
        ("adam", "adamw", False),
        ("sgd + sam", "sgd", True),  # sam(rho=0) is plain
        ("lion + sam", "signum", True),
        ("adamw + dyt", "adamw", False),  # dyt has no neutral setting
        ("adamw + dyt", "adam + dyt", True),
        ("adamw", "adamw", False),
        ("muon", "adamw", False),
        ("python train.py", "adamw", False),
    ],
)
def test_r11_what_can_be_turned_into_what(contender, baseline, does):
    assert includes(contender, baseline) is does


def test_r11_a_contender_that_contains_the_baseline_and_loses_is_said_to_be_tuned_too_little():
    def said(contender, shift):
        p = replace(plan(), baseline="signum", contenders=("signum", contender), grids={})
        p = replace(p, grids=dict.fromkeys(p.contenders, GRID))
        runs = tuning("signum") + finals("signum", BASE) + tuning(contender) + finals(contender, BASE + shift)
        standings, aa = verdict.judge(p, runs + finals("signum", NOISE[1], seeds=AA, stage="aa"))
        return [line for _, line in notes(Result(p, standings, aa, tuple(runs), {}, None)) if "insufficient" in line]

    loses = 0.2 + 0.01 * NOISE[3]
    assert said("lion", loses) == ["lion can be turned into signum, so it need not lose: tuning probably insufficient."]
    assert said("lion", -loses) == []
    assert said("adamw", loses) == []


# --- R12 --------------------------------------------------------------------------------------------------------


def timed(name, **contenders):
    """A result in which the base reaches its end, 1.0, at its last step, and others at the given share of its time."""
    p = replace(plan(*contenders), task=name)
    runs = curved("base", 1, [1.0] * 10)
    for contender, share in contenders.items():
        slower = 1.0
        if share is None:
            runs += [replace(o, reason="diverged", metric=None, curve=o.curve[:2]) for o in curved(contender, 1, BASE)]
            continue
        end = 2 - 1 / share if share <= 1 else 1.0
        slower = max(1.0, share)
        runs += curved(contender, slower, [end] * 10)
    standings, aa = verdict.judge(p, runs)
    return Result(p, standings, aa, tuple(runs), {"data": name}, None)


def test_r12_time_to_target_is_the_baselines_median_end_and_is_censored_at_one_and_a_half_times_its_time():
    result = timed("one", fast=0.5, slow=1.4, late=1.6, dead=None)
    times = target.times_to_target(result)
    assert times["base"] == pytest.approx([0.01] * 10)
    assert times["fast"] == pytest.approx([0.005] * 10)
    assert times["slow"] == pytest.approx([0.014] * 10)
    assert times["late"] == (math.inf,) * 10
    assert times["dead"] == (math.inf,) * 10 or not times["dead"]


def test_r12_a_profile_over_three_tasks_in_closed_form():
    results = [
        timed("one", a=0.5, b=None), timed("two", a=1.2, b=0.8), timed("three", a=1.0, b=1.4),
    ]  # fmt: skip
    profile = {name: dict(line) for name, line in target.profile(results, taus=[1.0, 1.25, 1.5, 2.0]).items()}
    assert list(profile["base"].values()) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])
    assert list(profile["a"].values()) == pytest.approx([2 / 3, 2 / 3, 1, 1])
    assert list(profile["b"].values()) == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    score = target.score(results)
    assert score["a"] == pytest.approx(((4 - 1) + (4 - 1.5) + (4 - 1)) / 9)
    assert score["b"] == pytest.approx((0 + 3 + (4 - 1.4)) / 9)
    line = target.profile(results)["a"]
    area = sum(share for _, share in line[:-1]) / (len(line) - 1)
    assert score["a"] == pytest.approx(area, abs=0.02)


def test_r12_a_miss_counts_as_never_and_a_task_that_nobody_solves_counts_for_nobody():
    """The bugs read elsewhere: a miss that is filtered out, a minimum over the keys instead of the times."""
    dead = [timed(name, a=None) for name in ("one", "two", "three")]
    dead = [replace(r, outcomes=tuple(o for o in r.outcomes if o.cell.contender != "base")) for r in dead]
    assert {share for line in target.profile(dead).values() for _, share in line} == {0.0}
    assert set(target.score(dead).values()) == {0.0}


def test_r12_a_profile_wants_three_different_tasks_and_contenders_in_common():
    one, two = timed("one", a=0.5), timed("two", a=0.5)
    with pytest.raises(InputError, match="3 or more different tasks; these are 2"):
        target.profile([one, two])
    with pytest.raises(InputError, match="these are 2"):
        target.profile([one, two, two])
    with pytest.raises(InputError, match="at least two contenders"):
        target.profile([one, two, timed("three", b=0.5)])


# --- R13, R14 ---------------------------------------------------------------------------------------------------


def test_r13_the_test_data_are_looked_at_once_and_without_any_it_is_said(raced):
    tune, final = (loop.train(with_test, Cell("sgd", stage, 0.1, 0), steps=20) for stage in ("tune", "final"))
    assert tune.metric == tune.curve[-1][3]
    looked.clear()
    loop.train(with_test, Cell("sgd", "tune", 0.1, 0), steps=20)
    assert looked == []
    loop.train(with_test, Cell("sgd", "final", 0.1, 0), steps=20)
    assert looked == [1]
    assert final.metric == pytest.approx(final.curve[-1][3])
    result, _ = raced
    assert "shared" in [kind for kind, _ in notes(result)]
    given = replace(result, plan=replace(result.plan, metric="test loss"))
    assert "shared" not in [kind for kind, _ in notes(given)]


def test_r14_a_winning_stack_is_taken_apart_and_each_piece_must_pay_its_way(raced):
    """Momentum wins on an ill-conditioned bowl; a perturbation of 1e-6 changes nothing that matters."""
    result, _ = raced
    assert [s.word for s in result.standings] == ["baseline", "better"]
    assert [(p.piece, p.without, p.word) for p in result.pieces] == [
        ("sgd(momentum=0.9)", "sgd + sam(rho=1e-06)", "pays"),
        ("sam(rho=1e-06)", "sgd(momentum=0.9)", NO_SIGN),
    ]
    said = [line for kind, line in notes(result) if kind == "piece"]
    assert said[0] == "sgd(momentum=0.9): pays (the stack against sgd + sam(rho=1e-06))."
    held = json.loads((result.folder / "result.json").read_text(encoding="utf-8"))
    assert [p["word"] for p in held["pieces"]] == ["pays", NO_SIGN]
    reports = sorted(p.name for p in result.folder.glob("report*.html"))
    assert len(reports) == 2
    assert re.fullmatch(r"report-\w{8}\.html", reports[0])


def test_r14_the_ablation_leaves_the_folder_to_its_own_race(raced, here):
    result, _ = raced
    before = len(here)
    again = running.resume(result.folder, quiet=True)
    assert all(request["kind"] != "cell" for executor in here[before:] for request in executor.order)
    assert again.pieces == result.pieces
    assert [s.contender for s in again.standings] == ["sgd", STACK]


def test_r14_pieces_of_a_stack():
    assert without_each("muon + dyt", "adamw") == [("muon", "adamw + dyt"), ("dyt", "muon")]
    assert without_each("adamw + dyt + sam", "adamw") == [("sam", "adamw + dyt"), ("dyt", "adamw + sam")]
    assert without_each("adamw + dyt", "adamw") == []
    assert without_each("a command", "adamw") == []
