"""The verdict against scipy, published values and simulation. R-numbers: the rules named in etude.race.verdict."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from etude.race import _statistics as statistics
from etude.race import verdict
from etude.race._model import Cell, Outcome, Plan
from etude.race.search import Grid

GRID = tuple(10 ** (k / 2 - 4) for k in range(7))
TUNE, FINAL, AA = (0, 1, 2), tuple(range(100, 110)), tuple(range(200, 210))
NOISE = np.random.default_rng(7).normal(size=(64, 10))


def outcome(contender, stage, lr, seed, metric, reason=""):
    return Outcome(Cell(contender, stage, lr, seed), metric, reason, (), 1.0, 0.001, 8)


def plan(*contenders, **changes):
    changes = {"final_seeds": FINAL, "aa_seeds": AA, "tune_seeds": TUNE, "minimize": True, **changes}
    return Plan(
        task="toy", metric="loss", steps=10, baseline="base", contenders=("base", *contenders),
        grids=dict.fromkeys(("base", *contenders), GRID), **changes,
    )  # fmt: skip


def tuning(contender, best=3, lrs=GRID):
    """Loss is a parabola in log lr; the best three were repeated."""
    loss = {lr: 1 + (math.log10(lr) - math.log10(GRID[3]) - (best - 3) / 2) ** 2 for lr in lrs}
    top = sorted(loss, key=lambda lr: loss[lr])[:3]
    runs = [outcome(contender, "tune", lr, 0, loss[lr]) for lr in lrs]
    return runs + [outcome(contender, "tune", lr, s, loss[lr]) for lr in top for s in (1, 2)]


def finals(contender, values, best=3, seeds=FINAL, stage="final"):
    """A run per seed; None stands for one that diverged."""
    return [
        outcome(contender, stage, GRID[best], s, v, "" if v is not None else "diverged at step 3: loss is nan")
        for s, v in zip(seeds, values)
    ]


def race(minimize=True, best=3, aa=None, **values):
    """Standings by name, and the A/A control, of a race with these final values; the baseline is 1 + noise."""
    values = {"base": 1 + 0.1 * NOISE[0], **values}
    p = plan(*(c for c in values if c != "base"), minimize=minimize)
    runs = finals("base", 1 + 0.1 * NOISE[1] if aa is None else aa, seeds=AA, stage="aa")
    for contender, finished in values.items():
        at = 3 if contender == "base" else best
        tuned = tuning(contender, at)
        if not minimize:
            tuned = [outcome(contender, "tune", o.cell.lr, o.cell.seed, -o.metric) for o in tuned]
        runs += tuned + finals(contender, finished, at)
    standings, control = verdict.judge(p, runs)
    return {s.contender: s for s in standings}, control


BASE = 1 + 0.1 * NOISE[0]


# --- numbers ------------------------------------------------------------


def test_paired_t_and_its_interval_are_scipys():
    for n in (2, 5, 10):
        x, y = NOISE[2, :n], NOISE[3, :n] + 0.4
        reference = stats.ttest_rel(x, y)
        assert statistics.t_test(x - y) == pytest.approx(reference.pvalue, rel=1e-12)
        assert statistics.t_interval(x - y) == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-12)


def test_welch_is_scipys_and_exact_without_spread():
    x, y = NOISE[4], 3 * NOISE[5, :6] + 1
    assert statistics.welch(x, y)[0] == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue)
    assert statistics.welch(np.ones(3), np.ones(4)) == (1.0, (0.0, 0.0))
    assert statistics.welch(np.ones(3) * 2, np.ones(4)) == (0.0, (1.0, 1.0))


def test_without_spread_the_answer_is_exact():
    assert statistics.t_test(np.zeros(4)) == 1.0
    assert statistics.t_test(np.full(4, 0.1)) == 0.0
    assert statistics.t_interval(np.full(4, 0.1)) == pytest.approx((0.1, 0.1), abs=1e-15)
    assert statistics.bootstrap_t(np.full(6, 0.1)) == pytest.approx((0.1, 0.1), abs=1e-15)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the worked example of R's p.adjust page and Wikipedia
        ([0.5, 0.6, 0.9], [1.0, 1.0, 1.0]),
        ([0.02], [0.02]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([], []),
    ],
)
def test_r8_holm_gives_the_values_worked_out_by_hand(p, adjusted):
    assert statistics.holm(p) == pytest.approx(adjusted)


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_r8_seeds_needed_are_the_published_paired_sample_sizes(effect, n):
    """Two-sided α = .05, 80 % power (G*Power 3.1; Cohen 1988 for dz = .5, .8)."""
    assert statistics.seeds_needed(effect, 0.05) == n
    assert statistics.seeds_needed(-effect, 0.05) == n
    assert statistics.detectable(n, 0.05) <= effect < statistics.detectable(n - 1, 0.05)


def test_r8_power_is_what_simulation_finds():
    d = np.random.default_rng(1).normal(0.9, 1.0, (20_000, 10))
    t = d.mean(1) / (d.std(1, ddof=1) / math.sqrt(10))
    found = (t > stats.t.ppf(0.995, 9)).mean()
    assert statistics.power(10, 0.9, 0.01) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize(
    ("n", "contenders", "rho", "effect"),
    [(3, 1, 0, 4.6), (5, 1, 0, 2.4), (10, 1, 0, 1.4), (10, 1, 0.7, 0.77), (10, 10, 0, 2.1), (20, 10, 0, 1.3)],
)
def test_r8_visible_effect_is_the_measured_table(n, contenders, rho, effect):
    assert verdict.visible_effect(n, contenders, rho) == pytest.approx(effect, rel=0.04)


def test_visible_effect_refuses_what_it_cannot_answer():
    with pytest.raises(ValueError, match="at least 2 final seeds and 1 contender"):
        verdict.visible_effect(1, 3)


def test_an_effect_nobody_can_see_needs_no_number_of_seeds():
    assert statistics.seeds_needed(1e-6, 0.05) is None


@pytest.mark.parametrize("n", [6, 10, 20])
def test_t_intervals_cover_what_they_say(n):
    """20,000 normal samples: 95 % and 90 % within half a point; 2,000 for bootstrap-t, which is close from 6 on."""
    x = np.random.default_rng(n).normal(size=(20_000, n))
    for level in (0.95, 0.90):
        half = stats.t.ppf((1 + level) / 2, n - 1) * x.std(1, ddof=1) / math.sqrt(n)
        low, high = np.transpose([statistics.t_interval(row, level) for row in x[:500]])
        assert np.allclose(high - low, 2 * half[:500])
        assert (abs(x.mean(1)) <= half).mean() == pytest.approx(level, abs=0.02)
    boot = [statistics.bootstrap_t(row, resamples=1_000) for row in x[:2_000]]
    covered = np.mean([low <= 0 <= high for low, high in boot])
    assert covered == pytest.approx(0.95, abs=0.025)


def test_bootstrap_t_is_deterministic_leans_with_the_skew_and_needs_five_values():
    x = np.random.default_rng(3).exponential(size=12)
    low, high = statistics.bootstrap_t(x)
    assert statistics.bootstrap_t(x) == (low, high)
    assert high - x.mean() > x.mean() - low  # a long right tail: the mean may lie far above
    assert statistics.bootstrap_t(x[:4]) is None
    assert statistics.bootstrap_t(np.array([0.0, 0, 0, 0, 1])) is None  # most resamples have no spread: unbounded


# --- words ------------------------------------------------------------


def test_r8_words_better_worse_and_no_significant_difference():
    found, _ = race(good=BASE - 0.2 + 0.01 * NOISE[2], bad=BASE + 0.2 + 0.01 * NOISE[3], unclear=1 + 0.1 * NOISE[4])
    assert [s.word for s in found.values()] == ["baseline", "better", "worse", "no significant difference"]
    assert found["good"].difference == pytest.approx(-0.2, abs=0.01)
    reference = stats.ttest_rel(BASE - 0.2 + 0.01 * NOISE[2], BASE)
    assert found["good"].p == pytest.approx(reference.pvalue)
    assert found["good"].difference_interval == pytest.approx(tuple(reference.confidence_interval(0.95)))


def test_r8_what_is_larger_is_better_where_the_metric_says_so():
    found, _ = race(minimize=False, good=BASE + 0.2 + 0.01 * NOISE[2], bad=BASE - 0.2 + 0.01 * NOISE[3])
    assert [found["good"].word, found["bad"].word] == ["better", "worse"]


def test_r8_holm_decides_over_all_contenders():
    """p ≈ .03 alone is *better*; beside three others that show nothing it is not."""
    lucky = BASE - 0.05 + 0.065 * (NOISE[2] - NOISE[2].mean()) / NOISE[2].std()
    alone, _ = race(lucky=lucky)
    assert 0.01 < alone["lucky"].p < 0.05
    assert alone["lucky"].word == "better"
    among, _ = race(lucky=lucky, a=1 + 0.1 * NOISE[3], b=1 + 0.1 * NOISE[4], c=1 + 0.1 * NOISE[5])
    assert among["lucky"].p == alone["lucky"].p
    assert among["lucky"].p_holm > 0.05
    assert among["lucky"].word == "no significant difference"


def test_r8_equivalent_when_the_90_percent_interval_lies_inside_the_rope():
    """TOST at the edge: half-width scaled to just inside and just outside ± 1 % of the baseline's mean."""
    noise = NOISE[6] - NOISE[6].mean()
    half90 = stats.t.ppf(0.95, 9) * noise.std(ddof=1) / math.sqrt(10)
    rope = 0.01 * BASE.mean()
    for share, word in ((0.99, "equivalent"), (1.01, "no significant difference")):
        found, _ = race(near=BASE + noise * rope / half90 * share)
        assert found["near"].word == word


def test_r8_identical_contenders_are_equivalent_with_p_1_and_a_constant_shift_is_certain():
    found, _ = race(same=BASE, shifted=np.round(BASE, 2) + 8)
    assert (found["same"].word, found["same"].p, found["same"].difference) == ("equivalent", 1.0, 0.0)
    p = plan("twin")
    runs = finals("base", [1.0] * 10) + finals("twin", [1.5] * 10)
    (_, twin), _ = verdict.judge(p, runs)
    assert (twin.word, twin.p, twin.difference_interval, twin.visible, twin.rho) == (
        "worse",
        0.0,
        (0.5, 0.5),
        0.0,
        None,
    )


def test_r3_at_the_edge_a_loser_is_under_tuned_and_a_winner_is_better():
    found, _ = race(best=6, bad=BASE + 0.2 + 0.01 * NOISE[3], good=BASE - 0.2 + 0.01 * NOISE[3])
    assert found["bad"].at_edge
    assert [found["bad"].word, found["good"].word] == ["under-tuned", "better"]


def test_r6_failed_runs_are_outcomes_and_a_contender_with_one_cannot_win():
    good = list(BASE - 0.2 + 0.01 * NOISE[2])
    found, _ = race(good=[*good[:9], None], near=[*BASE[:9], None])
    assert found["good"].word == found["near"].word == "no significant difference"
    assert found["good"].p < 0.001
    assert found["good"].failures == ("final seed 109: diverged at step 3: loss is nan",)
    assert found["good"].values[-1] is None
    assert found["good"].mean == pytest.approx(np.mean(good[:9]))
    assert found["good"].more is None  # more seeds would not mend it


def test_r6_a_loser_with_a_failed_run_has_still_lost_but_not_against_a_failing_baseline():
    bad = list(BASE + 0.2 + 0.01 * NOISE[2])
    found, _ = race(bad=[*bad[:9], None])
    assert found["bad"].word == "worse"
    found, _ = race(base=[None, *BASE[1:]], bad=bad, good=[b - 0.4 for b in bad])
    assert [found["bad"].word, found["good"].word] == ["no significant difference", "better"]


def test_r6_failed_when_most_runs_failed_or_fewer_than_two_finished():
    half, most, one = [*BASE[:5], *[None] * 5], [*BASE[:4], *[None] * 6], [1.0, *[None] * 9]
    found, _ = race(half=half, most=most, one=one, nothing=[None] * 10)
    assert [found[c].word for c in ("half", "most", "one", "nothing")] == ["no significant difference"] + ["failed"] * 3
    assert found["nothing"].mean is None
    assert found["nothing"].difference is None
    assert len(found["nothing"].failures) == 10


def test_r6_a_metric_that_is_not_finite_is_a_failure_and_so_is_a_run_that_is_missing():
    values = list(BASE - 0.2 + 0.01 * NOISE[2])
    p = plan("a", "b")
    runs = finals("base", BASE) + finals("a", [math.nan, *values[1:]]) + finals("b", values[1:], seeds=FINAL[1:])
    (_, a, b), _ = verdict.judge(p, runs)
    assert a.failures == ("final seed 100: the metric is nan",)
    assert b.failures == ("final seed 100: not run",)
    assert a.word == b.word == "no significant difference"
    assert a.difference == b.difference


def test_r6_failing_contenders_do_not_ease_holm_for_the_others():
    lucky = BASE - 0.05 + 0.065 * (NOISE[2] - NOISE[2].mean()) / NOISE[2].std()
    found, _ = race(lucky=lucky, dead=[None] * 10)
    assert found["lucky"].p_holm == pytest.approx(2 * found["lucky"].p)


def test_r6_against_a_failed_baseline_nothing_is_decided():
    found, control = race(base=[None] * 10, good=BASE)
    assert [found["base"].word, found["good"].word] == ["failed", "no significant difference"]
    assert control.word == verdict.UNCHECKED


def test_r9_repeats_of_a_seed_count_as_one():
    values = BASE - 0.05 + 0.1 * NOISE[2]
    p = plan("a")
    once = finals("base", BASE) + finals("a", values)
    often = once + finals("a", values) * 3 + finals("base", BASE) * 2
    assert verdict.judge(p, once) == verdict.judge(p, often)
    twice = once + finals("a", [values[0] + 0.2], seeds=FINAL[:1])
    assert verdict.judge(p, twice)[0][1].values[0] == pytest.approx(values[0] + 0.1)
    failed = once + finals("a", [None], seeds=FINAL[:1])
    assert verdict.judge(p, failed)[0][1].values[0] is None


def test_the_order_of_outcomes_does_not_matter():
    p = plan("a", "b", "c")
    runs = tuning("base") + tuning("a", 6) + tuning("b") + finals("base", BASE) + finals("a", BASE + NOISE[1], 6)
    runs += finals("b", [*NOISE[2][:9], None]) + finals("b", NOISE[8][:3]) + finals("c", NOISE[4])
    runs += finals("base", NOISE[5], seeds=AA, stage="aa")
    first = verdict.judge(p, runs)
    for _ in range(5):
        random.Random(0).shuffle(runs)
        assert verdict.judge(p, runs) == first
    assert [s.contender for s in first[0]] == ["base", "a", "b", "c"]


def test_r2_the_control_tells_when_the_baseline_differs_from_itself():
    _, control = race(a=BASE)
    assert (control.contender, control.word) == ("base", verdict.SAME)
    assert control.p == pytest.approx(stats.ttest_ind(1 + 0.1 * NOISE[1], BASE, equal_var=False).pvalue)
    _, control = race(a=BASE, aa=BASE + 0.2)
    assert control.word == verdict.DIFFERENT
    p05 = BASE + np.ptp(BASE) * 0.35  # significant at .05, not at .005
    _, control = race(a=BASE, aa=p05)
    assert 0.005 < control.p < 0.05
    assert control.word == verdict.SAME
    _, control = race(a=BASE, aa=[None] * 9 + [1.0])
    assert control.word == verdict.UNCHECKED
    elsewhere = finals("base", NOISE[1], best=5, seeds=AA, stage="aa")  # at another lr it is another method
    _, control = verdict.judge(plan("a"), tuning("base") + finals("base", BASE) + elsewhere)
    assert control.word == verdict.UNCHECKED


def test_rho_visible_and_more_are_those_of_the_pairs():
    values = 0.8 * BASE + 0.2 + 0.06 * NOISE[2]
    found, _ = race(a=values)
    a, d = found["a"], values - BASE
    assert a.word == "no significant difference"
    assert a.rho == pytest.approx(stats.pearsonr(values, BASE).statistic)
    assert a.visible == pytest.approx(statistics.detectable(10, 0.05) * d.std(ddof=1))
    needed = 10 + a.more
    effect = abs(d.mean()) / d.std(ddof=1)
    assert statistics.power(needed, effect, 0.05) >= 0.8 > statistics.power(needed - 1, effect, 0.05)


def test_r8_two_identical_contenders_are_told_apart_in_at_most_5_percent_of_races(monkeypatch):
    """1,000 races of a baseline and two contenders that are the same: 67 = 50 + 2.5 sd of a binomial."""
    monkeypatch.setattr(verdict, "bootstrap_t", lambda d: None)  # it decides nothing, and takes most of the time
    rng, p, wrong = np.random.default_rng(11), plan("a", "b"), 0
    for _ in range(1_000):
        x = rng.normal(1, 0.1, (3, 10))
        runs = [o for c, row in zip(p.contenders, x) for o in finals(c, row.tolist())]
        wrong += any(s.word in ("better", "worse") for s in verdict.judge(p, runs)[0])
    assert 20 <= wrong <= 67


def test_r8_a_visible_difference_is_seen_in_80_percent_of_races(monkeypatch):
    monkeypatch.setattr(verdict, "bootstrap_t", lambda d: None)
    rng, p, seen = np.random.default_rng(12), plan("a", "b", "c"), 0
    effect = verdict.visible_effect(10, 3)
    for _ in range(400):
        x = rng.normal(1, 0.1, (4, 10))
        x[1] -= effect * 0.1
        runs = [o for c, row in zip(p.contenders, x) for o in finals(c, row.tolist())]
        seen += verdict.judge(p, runs)[0][1].word == "better"
    assert 0.75 <= seen / 400 <= 0.88


# --- tuning ------------------------------------------------------------


def tune(loss, grid=GRID, order=lambda jobs: jobs, minimize=True, budget=13):
    """Play the search: run one trial at a time out of each answer, which is also a resume after every run."""
    finished = []
    search = Grid(tuple(grid), budget=budget, seeds=TUNE, minimize=minimize)
    while jobs := search.ask(finished):
        (lr, _), index = order(jobs)[0]
        value = loss(lr, TUNE[index])
        finished.append(outcome("a", "tune", lr, TUNE[index], value, "" if value is not None else "diverged"))
    return finished


def choose(runs):
    chosen = Grid(GRID).choose(runs)
    return chosen.lr, chosen.at_edge, chosen.tuned


def parabola(best, noise=0.0):
    def loss(lr, seed):
        return (math.log10(lr) - best) ** 2 + noise * random.Random(f"{lr}{seed}").gauss(0, 1)

    return loss


def test_r4_tuning_is_seven_lrs_once_and_the_best_three_on_two_more_seeds():
    runs = tune(parabola(-2.4))
    assert len(runs) == 13
    assert sorted(o.cell.lr for o in runs if o.cell.seed == 0) == sorted(GRID)
    repeated = {o.cell.lr for o in runs if o.cell.seed > 0}
    assert repeated == {GRID[2], GRID[3], GRID[4]}
    lr, at_edge, tuned = choose(runs)
    assert (lr, at_edge, len(tuned)) == (GRID[3], False, 7)


@pytest.mark.parametrize(
    ("best", "lowest", "highest"), [(-0.9, -4, 0.0), (0.4, -4, 0.0), (-4.6, -5, -1), (-5.4, -5, -1)]
)
def test_r3_at_the_edge_the_grid_grows_within_the_same_budget(best, lowest, highest):
    runs = tune(parabola(best))
    assert len(runs) <= 13
    lrs = sorted({o.cell.lr for o in runs})
    assert math.log10(lrs[0]) == pytest.approx(lowest, abs=1e-3)
    assert math.log10(lrs[-1]) == pytest.approx(highest, abs=1e-3)
    lr, at_edge, _ = choose(runs)
    assert sum(o.cell.lr == lr for o in runs) == 3
    assert at_edge == (best < -5 or best > 0)


def test_r3_when_every_run_fails_the_grid_grows_downwards_and_nothing_is_repeated():
    runs = tune(lambda lr, seed: None)
    assert len(runs) == 9
    lr, at_edge, tuned = choose(runs)
    assert lr == min(o.cell.lr for o in runs) < GRID[0]
    assert at_edge
    assert all(mean is None for _, mean in tuned)


def test_r3_divergence_above_the_best_is_no_edge():
    runs = tune(lambda lr, seed: -lr if lr < 0.02 else None)
    lr, at_edge, _ = choose(runs)
    assert (lr, at_edge) == (GRID[4], False)


def test_r6_an_lr_that_sometimes_fails_comes_after_all_that_never_do():
    runs = tune(lambda lr, seed: None if lr == GRID[3] and seed == 2 else parabola(-2.5)(lr, seed))
    assert choose(runs)[0] == GRID[2]


def test_r4_a_lucky_single_run_is_not_chosen_over_lrs_with_three_seeds():
    runs = [*tuning("a"), outcome("a", "tune", 0.5, 0, -9.0)]
    assert choose(runs)[0] == GRID[3]


@pytest.mark.parametrize("minimize", [True, False])
def test_the_search_does_not_depend_on_the_order_in_which_runs_finish(minimize):
    def loss(lr, seed):
        return parabola(-2.4, noise=0.3)(lr, seed) * (1 if minimize else -1)

    def cells(order):
        return {(o.cell, o.metric) for o in tune(loss, order=order, minimize=minimize)}

    first = cells(lambda jobs: jobs)
    assert first == cells(lambda jobs: jobs[::-1])
    for k in range(3):
        assert first == cells(lambda jobs: random.Random(k).sample(jobs, len(jobs)))


@pytest.mark.parametrize("budget", [9, 11, 13, 17])
def test_r4_the_budget_is_never_exceeded_and_the_choice_always_has_three_seeds(budget):
    for best in np.arange(-6, 1.5, 0.25):
        runs = tune(parabola(best, noise=0.2), budget=budget)
        assert len(runs) <= budget
        assert sum(o.cell.lr == choose(runs)[0] for o in runs) == 3


def test_a_budget_too_small_is_refused_and_a_single_lr_needs_no_tuning():
    with pytest.raises(ValueError, match="8 tuning runs cannot try 7 learning rates"):
        Grid(GRID, budget=8).ask([])
    assert Grid((0.1,)).ask([]) == []
    assert (Grid((0.1,)).choose([]).lr, Grid((0.1,)).choose([]).at_edge) == (0.1, False)
    (_, fixed), _ = verdict.judge(plan("a"), finals("base", BASE) + finals("a", BASE, best=5))
    assert (fixed.lr, fixed.at_edge, fixed.tuned, fixed.word) == (GRID[5], False, (), "equivalent")


def test_choosing_from_nothing_is_an_error():
    with pytest.raises(ValueError, match="no tuning run has finished"):
        choose([])
