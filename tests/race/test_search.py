"""Searching fairly: as many trials for every contender, the same whatever the order in which runs finish."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from quadratic import BOWL, bowl
from quadratic import here as here

import etude
from etude import recipes
from etude.race import Cell, InputError
from etude.race import _run as running
from etude.race._asked import Asked
from etude.race._cli import race_command
from etude.race._model import Outcome, Range
from etude.race.loop import train
from etude.race.search import TRIALS, Optuna, Sobol, ranges, tried_once

NO_COMMAND = SimpleNamespace(obj=None)

TUNE = (0, 1, 2)
KNOBS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "nesterov": False}


def play(search, loss, order=lambda jobs: jobs):
    """One run at a time out of each answer, which is also a resume after every run."""
    runs = []
    while jobs := search.ask(runs):
        (lr, more), i = order(jobs)[0]
        value = loss(lr, dict(more), TUNE[i])
        reason = "" if value is not None else "diverged"
        runs.append(Outcome(Cell("a", "tune", lr, TUNE[i], more), value, reason, (), 1.0, 0.001, 8))
    return runs


def valley(lr, more, seed):
    """Best at lr = 0.3, weight decay = 0.003; fails beyond lr = 1."""
    if lr > 1:
        return None
    far = math.log10(lr / 0.3) ** 2 + math.log10(more.get("weight_decay", 0.003) / 0.003) ** 2
    return far + 0.01 * random.Random(f"{lr}{more}{seed}").random()


def searches(budget=22, tune=("lr", "weight_decay")):
    found = ranges("sgd", 0.1, KNOBS, tune)
    return [kind(found, seed=0, budget=budget, seeds=TUNE) for kind in (Sobol, Optuna)]


@pytest.mark.parametrize("search", searches(), ids=lambda s: type(s).__name__)
def test_r2_every_trial_of_the_budget_is_run_and_the_best_three_are_repeated(search):
    runs = play(search, valley)
    assert len(runs) == 22
    points = {(o.cell.lr, o.cell.more) for o in runs}
    assert len(points) == tried_once(22, 3) == 16
    assert (0.1, (("weight_decay", 0.001),)) in points, "the declared point is one of them"
    chosen = search.choose(runs)
    mine = [o for o in runs if (o.cell.lr, o.cell.more) == (chosen.lr, chosen.more)]
    assert len(mine) == 3
    assert valley(chosen.lr, dict(chosen.more), 0) < 0.4
    assert len(chosen.tuned) == 16
    assert [lr for lr, _ in chosen.tuned] == sorted(lr for lr, _ in chosen.tuned)


@pytest.mark.parametrize("search", searches(), ids=lambda s: type(s).__name__)
def test_r4_the_search_does_not_depend_on_the_order_in_which_runs_finish(search):
    def cells(order):
        return {(o.cell, o.metric) for o in play(search, valley, order)}

    first = cells(lambda jobs: jobs)
    assert first == cells(lambda jobs: jobs[::-1])
    assert first == cells(lambda jobs: random.Random(1).sample(jobs, len(jobs)))


def test_optuna_learns_from_what_it_is_told_and_sobol_does_not():
    sobol, optuna = searches(38)

    def there(search, loss):
        return [(o.cell.lr, o.cell.more) for o in play(search, loss) if o.cell.seed == 0]

    def other(lr, more, seed):
        return abs(math.log10(lr / 0.01))

    assert there(sobol, valley) == there(sobol, other)
    assert there(optuna, valley)[:4] == there(optuna, other)[:4]
    assert there(optuna, valley) != there(optuna, other)


def test_a_seed_decides_the_points_and_every_contender_gets_the_same_places():
    found = ranges("sgd", 0.1, KNOBS, ("lr", "weight_decay"))
    far = ranges("sgd", 100 * 0.1, KNOBS, ("lr", "weight_decay"))
    one, two = (Sobol(r, seed=4).explore({})[0] for r in (found, far))
    places = [[round(r[0].place(lr), 4) for lr, _ in points] for r, points in ((found, one), (far, two))]
    assert places[0] == places[1]
    assert one != Sobol(found, seed=5).explore({})[0]
    assert all(r.low <= v <= r.high for lr, more in one for r, v in zip(found, (lr, *dict(more).values())))


def test_ranges_are_centred_on_what_is_declared():
    lr, decay = ranges("c", 1e-3, KNOBS, ("lr", "weight_decay"))
    assert (lr.low, lr.start, lr.high) == pytest.approx((1e-3 / 10**1.5, 1e-3, 1e-3 * 10**1.5), rel=1e-5)
    assert (decay.low, decay.start, decay.high) == pytest.approx((1e-3 / 10**1.5, 1e-3, 1e-3 * 10**1.5), rel=1e-5)
    _, one, two = ranges("c", 1e-3, KNOBS, ("lr", "betas"))
    assert (one.knob, one.low, one.start, one.high) == ("betas[0]", 0.5, 0.9, pytest.approx(0.99))
    assert (two.knob, two.low, two.high) == ("betas[1]", pytest.approx(0.99), pytest.approx(0.9999))
    assert two.at(two.place(0.999)) == pytest.approx(0.999)
    assert two.at(0.0) == pytest.approx(0.99)
    assert ranges("c", 1e-3, {**KNOBS, "weight_decay": 0.5}, ("weight_decay",))[1].high == 1.0
    assert ranges("c", 1e-3, {"lr": 1e-3}, ("lr", "betas")) == (lr,)
    assert isinstance(lr, Range)


def test_an_entry_of_a_knob_is_tuned_by_its_place():
    recipe = recipes.parse("adamw + dyt").with_knobs(**{"betas[0]": 0.8, "betas[1]": 0.95, "weight_decay": 0.2})
    assert str(recipe) == "adamw(betas=(0.8, 0.95), weight_decay=0.2) + dyt"
    assert str(recipes.parse("lion(betas=(0.5, 0.6))").with_knobs(**{"betas[1]": 0.7})) == "lion(betas=(0.5, 0.7))"
    with pytest.raises(ValueError, match="no knob 'momentum\\[0\\]'"):
        recipes.parse("sgd").with_knobs(**{"momentum[0]": 0.7})


def test_trials_follow_the_number_of_values():
    def searched(**given):
        return Asked("digits", ("adamw", "lion"), **given).searched

    assert searched() == ("grid", TRIALS[0])
    assert searched(tune=("lr", "weight_decay")) == ("sobol", 22)
    assert searched(tune=("weight_decay",)) == ("sobol", 22)
    assert searched(tune=("lr", "betas", "eps")) == ("sobol", 38)
    assert searched(search="optuna", trials=30) == ("optuna", 30)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tune": ("lr", "weight_decay"), "search": "grid"}, "search='grid' tunes lr alone"),
        ({"search": "annealing"}, "it is one of grid, sobol, optuna"),
        ({"trials": 8}, "needs at least 9 tuning runs"),
        ({"trials": 9, "search": "sobol"}, "needs at least 10 tuning runs"),
        ({"trials": 9.5}, "not a whole number"),
        ({"tune": ("lr", "wieght_decay")}, "no contender has a knob 'wieght_decay' to tune; nearest: weight_decay"),
        ({"tune": ("lr", "nesterov")}, "nesterov=False is no real number"),
        ({"tune": ("lr", "momentum")}, "momentum=0.0 centres no range"),
        ({"skip": -1}, "skip=-1"),
        ({"skip": 995}, "a race has 1000 final seeds"),
    ],
)
def test_a_search_that_cannot_be_had_is_refused_at_once(tmp_path, asked, said):
    with pytest.raises(InputError, match=said) as caught:
        etude.race(BOWL, ["sgd", "lion"], folder=tmp_path / "runs", quiet=True, **asked)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("search", ["sobol", "optuna"])
def test_a_race_tunes_two_values_and_resumes_in_the_middle_of_its_search(here, tmp_path, search):
    """Interrupted after twelve runs, in the middle of a round, and with the other order of finishing."""
    asked = {"tune": ("lr", "weight_decay"), "search": search, "seeds": 6, "quiet": True, "trials": 14}
    whole = etude.race(BOWL, ["sgd", "signum"], folder=tmp_path / "whole", **asked)
    here_class = type(here[-1])
    stopped, real = [], here_class.results

    def results(self):
        for pair in real(self):
            stopped.append(1)
            if len(stopped) == 12:
                raise KeyboardInterrupt
            yield pair

    here_class.results, here_class.last = results, True
    try:
        with pytest.raises(KeyboardInterrupt):
            etude.race(BOWL, ["sgd", "signum"], folder=tmp_path / "part", **asked)
    finally:
        here_class.results = real
    try:
        again = etude.race(BOWL, ["sgd", "signum"], folder=tmp_path / "part", **asked)
    finally:
        here_class.last = False
    assert {(o.cell, o.metric) for o in again.outcomes} == {(o.cell, o.metric) for o in whole.outcomes}
    assert [(s.lr, s.beside, s.word) for s in again.standings] == [(s.lr, s.beside, s.word) for s in whole.standings]
    for s in again.standings:
        ((knob, value),) = s.beside
        assert knob == "weight_decay"
        assert 0 < value <= 1
        tuned = [o.cell for o in again.outcomes if o.cell.stage == "tune" and o.cell.contender == s.contender]
        assert len(tuned) == 14
        final = [o.cell for o in again.outcomes if o.cell.stage == "final" and o.cell.contender == s.contender]
        assert {(c.lr, c.more) for c in final} == {(s.lr, s.beside)}
    assert [v for v in again.aa.values if v is not None], "the control is at the chosen point too"


def test_what_is_tuned_beside_lr_reaches_the_optimizer():
    plain = train(bowl, Cell("sgd(momentum=0.9)", "final", 0.1, 0), steps=30)
    tuned = train(bowl, Cell("sgd(momentum=0.9)", "final", 0.1, 0, (("momentum", 0.5),)), steps=30)
    other = train(bowl, Cell("sgd(momentum=0.5)", "final", 0.1, 0), steps=30)
    assert tuned.metric == other.metric != plain.metric


def test_the_command_takes_a_list_of_knobs(here, tmp_path, capsys):
    given = {"tune": "lr, weight_decay", "trials": 10, "quick": True, "folder": tmp_path}
    assert race_command(NO_COMMAND, BOWL, ["sgd", "signum"], **given) == 0
    said = capsys.readouterr().err
    assert "lr 0.0032 … 0.1 … 3.2, weight_decay 3.2e-05 … 0.001 … 0.032 by sobol" in said
    assert "up to 10 tuning" in said
    folder = next(Path(tmp_path).iterdir())
    assert running.read_fact(folder, "asked")["tune"] == ["lr", "weight_decay"]
