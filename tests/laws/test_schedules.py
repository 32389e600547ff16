"""What is true of every schedule."""

import copy
import io
import pickle

import pytest
import torch
from plays import schedules as plays
from torch.optim.lr_scheduler import LRScheduler

from etude import schedules
from etude._method import methods

METHODS = [m for (room, _), m in methods().items() if room == "schedules"]
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def sgd(lr=0.5):
    return torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=lr)


@every
def test_a_multiplier_lies_between_0_and_1_and_is_a_float(method):
    value = plays.make(method)
    for t in range(50):
        assert isinstance(value(t), float)
        assert 0 <= value(t) <= 1


@every
def test_it_stays_at_its_last_value_once_finished(method):
    value = plays.make(method)
    if value.length < float("inf"):
        assert {value(value.length + t) for t in range(5)} == {value(value.length)}


@every
def test_then_starts_counting_where_the_first_ends(method):
    value = plays.make(method)
    joined = schedules.warmup(4) >> value
    assert [joined(t) for t in range(4)] == [schedules.warmup(4)(t) for t in range(4)]
    assert [joined(4 + t) for t in range(30)] == [value(t) for t in range(30)]
    assert joined.length == 4 + value.length
    three = (schedules.warmup(4) >> schedules.linear_decay(3)) >> value
    assert [three(7 + t) for t in range(30)] == [value(t) for t in range(30)]


@every
def test_it_prints_how_it_was_made(method):
    value = plays.make(method)
    assert repr(value).startswith(f"{method.name}(steps=6")
    assert eval(repr(value), vars(schedules)) == value
    assert repr(schedules.warmup(4) >> value) == f"{schedules.warmup(4)} >> {value}"


@every
def test_copies_and_pickles_are_equal(method):
    joined = schedules.warmup(4) >> plays.make(method)
    assert copy.deepcopy(joined) == joined == pickle.loads(pickle.dumps(joined))
    assert repr(pickle.loads(pickle.dumps(joined))) == repr(joined)


@every
def test_attached_it_is_a_torch_scheduler_whose_state_resumes(method):
    value = schedules.warmup(3) >> plays.make(method)
    opt, twin = sgd(), sgd()
    whole, first = schedules.attach(opt, value), schedules.attach(twin, value)
    assert isinstance(whole, LRScheduler)
    for scheduler in (whole, first):
        for _ in range(5):
            scheduler.optimizer.step()
            scheduler.step()
    saved = io.BytesIO()
    torch.save((twin.state_dict(), first.state_dict()), saved)
    saved.seek(0)
    opt_state, state = torch.load(saved, weights_only=True)
    later = sgd()
    resumed = schedules.attach(later, value)
    later.load_state_dict(opt_state)
    resumed.load_state_dict(state)
    for t in range(5, 20):
        assert opt.param_groups[0]["lr"] == later.param_groups[0]["lr"] == 0.5 * value(t)
        for scheduler in (whole, resumed):
            scheduler.optimizer.step()
            scheduler.step()


def test_every_group_keeps_its_own_rate_and_any_optimizer_and_function_will_do():
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)
    opt = torch.optim.AdamW([{"params": [a], "lr": 1.0}, {"params": [b], "lr": torch.tensor(0.1)}])
    schedule = schedules.attach(opt, lambda t: 1 / (t + 1))
    opt.step()
    schedule.step()
    assert [float(g["lr"]) for g in opt.param_groups] == pytest.approx([0.5, 0.05])


def test_nothing_follows_what_never_ends():
    with pytest.raises(ValueError, match=r"cosine_restarts\(steps=5, t_mult=1, end=0.0\) never ends.*put it last"):
        schedules.cosine_restarts(5) >> schedules.linear_decay(5)
    with pytest.raises(ValueError, match="never ends"):
        (schedules.warmup(2) >> schedules.cosine_restarts(5)) >> schedules.linear_decay(5)


@every
@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_a_length_that_is_none_is_refused(method, steps):
    with pytest.raises(ValueError, match=f"whole number of steps ≥ 1, got {steps}"):
        method.fn(steps)


def test_other_bad_input():
    with pytest.raises(ValueError, match="whole t_mult ≥ 1, got 0"):
        schedules.cosine_restarts(5, t_mult=0)
    with pytest.raises(TypeError, match="attach needs a schedule"):
        schedules.attach(sgd(), 0.5)
    with pytest.raises(TypeError):
        schedules.warmup(3) >> 0.5
    with pytest.raises(TypeError, match=r"attach got warmup itself; call it, e\.g\. schedules\.warmup\(100\)"):
        schedules.attach(sgd(), schedules.warmup)
    with pytest.raises(TypeError, match="optimizer first, then the schedule, got Line first"):
        schedules.attach(schedules.warmup(3), sgd())
    opt = sgd()
    del opt.param_groups[0]["lr"]
    with pytest.raises(
        ValueError, match=r"moves lr, which this optimizer's groups lack; end its chain with rules\.Scale"
    ):
        schedules.attach(opt, schedules.warmup(3))


@pytest.mark.parametrize("wrong", [float("nan"), -1.0, float("inf"), "x"])
def test_a_multiplier_that_is_no_finite_number_from_0_is_refused(wrong):
    with pytest.raises(ValueError, match=f"start is a multiplier of lr, .*got {wrong!r}"):
        schedules.warmup(10, start=wrong)
    for method in (schedules.linear_decay, schedules.cosine_restarts):
        with pytest.raises(ValueError, match=f"end is a multiplier of lr, .*got {wrong!r}"):
            method(10, end=wrong)
