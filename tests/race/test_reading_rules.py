"""Rules that read more than the gradient run in a race: the loss, curvature, weights of their own to evaluate."""

import pytest
import torch

from etude import gradients, recipes
from etude.race import Cell
from etude.race._stacks import Unfit
from etude.race.loop import Run, train
from etude.race.population import How, Population
from etude.rules import _engine
from tests.race import tiny


@pytest.mark.parametrize("contender", ["alr_smag", "sophia", "oasis", "schedule_free", "lookahead", "prodigy"])
def test_a_rule_that_reads_more_than_the_gradient_trains(contender):
    outcome = train(tiny.task, Cell(contender, "final", 0.05, 1), steps=24)
    assert outcome.reason == ""
    assert outcome.metric is not None


def test_a_rule_that_reads_curvature_gets_an_estimate_of_it_and_any_other_none():
    assert recipes.parse("sophia").gradient == gradients.hutchinson()
    assert recipes.parse("hutchinson(every=2) + sophia").gradient == gradients.hutchinson(every=2)
    assert recipes.parse("adamw").gradient is None
    assert recipes.parse("dyt").gradient is None


def test_a_rule_that_reads_the_loss_is_told_that_of_the_batch(monkeypatch):
    run, told = Run(tiny.task, Cell("alr_smag", "final", 0.05, 1), steps=24, device="cpu"), []
    tell = _engine.told
    monkeypatch.setattr(_engine, "told", lambda loss, chains: told.append(tell(loss, chains)) or told[-1])
    losses = [run.step().item() for _ in range(3)]
    assert told == losses


def test_a_run_is_measured_at_the_weights_its_rule_says_to_evaluate():
    run = Run(tiny.task, Cell("schedule_free", "final", 0.05, 1), steps=24, device="cpu")
    for _ in range(5):
        run.step()
    trained = run.task.measure(run.model, run.task.valid, "cpu")
    with run.optimizer.averaged():
        averaged = run.task.measure(run.model, run.task.valid, "cpu")
    assert run.measure(run.task.valid) == averaged != trained
    run.step()


@pytest.mark.parametrize("contender", ["schedule_free", "alr_smag", "sophia"])
def test_what_one_program_cannot_hold_is_left_to_the_loop(contender):
    cells = [Cell(contender, "final", 0.05, seed) for seed in (1, 2, 3)]
    with pytest.raises(Unfit):
        Population(tiny.task, cells, How("population", 3), steps=24, device="cpu")


def test_parameter_free_rules_train_in_one_program_as_alone():
    cells = [Cell("prodigy(d0=0.001)", "final", lr, seed) for lr, seed in ((1.0, 1), (0.5, 2), (1.0, 3))]
    population = Population(tiny.task, cells, How("population", 3), steps=24, device="cpu")
    for _ in range(6):
        population.step()
    for i, cell in enumerate(cells):
        run = Run(tiny.task, cell, steps=24, device="cpu")
        for _ in range(6):
            run.step()
        rows = population.stacks.weights()
        for n, p in run.model.named_parameters():
            assert torch.allclose(rows[n][i], p.detach(), atol=1e-5), n


def test_a_gradient_is_bound_to_the_model():
    run = Run(tiny.task, Cell("adamw + sam_on", "final", 0.05, 1), steps=24, device="cpu")
    assert {id(p) for p in run.gradient.on} < {id(p) for p in run.model.parameters()}
    run.step()
