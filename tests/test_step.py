"""The step of ``etude.step`` trains, and each of its lines does what its room does."""

import inspect

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from etude import after, gradients, losses, penalties, probes, risks, rules, schedules
from etude import step as module
from etude.step import step

X, Y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
X = X.float() / 16


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))


def batches(steps, size=64):
    torch.manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(1500, (size,))
        yield X[rows], Y[rows]


def test_it_learns_the_digits_with_every_room_at_work():
    model, steps = mlp(), 150
    opt = rules.optimizer(model, rules.adamw(lr=3e-3))
    schedule = schedules.attach(opt, schedules.warmup(15) >> schedules.linear_decay(steps - 15))
    average = after.weight_average(decay=0.9).bind(model)
    probe = probes.layer_rotation().bind(model)
    rooms = {"penalty": penalties.norm_loss, "schedule": schedule, "after": average, "probe": probe}
    loss, risk, gradient = losses.cross_entropy, risks.mean(), gradients.sam(rho=0.02)
    told = [step(model, batch, loss, risk, gradient, opt, **rooms) for batch in batches(steps)]
    values, read = [value.item() for value, _ in told], told[-1][1]
    assert sum(values[-10:]) < 0.25 * sum(values[:10])
    assert set(read) == {"0.weight", "3.weight"}
    assert all(x > 0.01 for x in read.values())
    assert opt.param_groups[0]["lr"] == 0.0
    with torch.no_grad(), average.averaged():
        assert (model(X[1500:]).argmax(-1) == Y[1500:]).float().mean() > 0.85


def test_without_the_optional_rooms_it_is_the_plain_loop_of_torch():
    ours, theirs = mlp(), mlp()
    opt, reference = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs))
    for x, y in batches(5):
        value, read = step(ours, (x, y), losses.cross_entropy, risks.mean(), gradients.plain(), opt)
        reference.zero_grad()
        expected = nn.functional.cross_entropy(theirs(x), y)
        expected.backward()
        reference.step()
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        assert not value.requires_grad
        assert read == {}
    for w, w_torch in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(w, w_torch, rtol=0, atol=1e-6)


@pytest.mark.parametrize("room", ["loss", "risk", "penalty", "gradient", "schedule", "after", "probe"])
def test_every_room_takes_part(room):
    """Another value of one room gives another model, or another number, after two steps."""

    def run(changed):
        model = mlp()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        loss, risk, gradient, rest = losses.cross_entropy, risks.mean(), gradients.plain(), {}
        if changed == "loss":
            loss = losses.squentropy
        elif changed == "risk":
            risk = lambda each: each.square().mean()
        elif changed == "gradient":
            gradient = gradients.sam(rho=0.5)
        elif changed == "penalty":
            rest = {"penalty": lambda m: penalties.norm_loss(m, factor=1.0)}
        elif changed == "schedule":
            rest = {"schedule": schedules.attach(opt, schedules.linear_decay(2))}
        elif changed == "after":
            rest = {"after": after.normalize_and_project().bind(model)}
        elif changed == "probe":
            rest = {"probe": probes.update_ratio().bind(model)}
        for batch in batches(2):
            value, read = step(model, batch, loss, risk, gradient, opt, **rest)
        return torch.cat(
            [w.detach().flatten() for w in model.parameters()] + [value.view(1), torch.tensor([*read.values()])]
        )

    plain, changed = run(None), run(room)
    assert plain.shape != changed.shape or not torch.equal(plain, changed)


def test_a_third_part_of_the_batch_tells_the_risk_who_is_who():
    model, risk = mlp(), risks.group_dro([1000, 797], step_size=1.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    group = (Y[:64] > 4).long()
    value, _ = step(model, (X[:64], Y[:64], group), losses.cross_entropy, risk, gradients.plain(), opt)
    by_hand = risks.group_dro([1000, 797], step_size=1.0)
    assert value == by_hand(losses.cross_entropy(model(X[:64]), Y[:64]), group)
    assert torch.equal(risk.q, by_hand.q)


@pytest.mark.parametrize(
    "room, value, name",
    [
        ("risk", risks.mean, "mean"),
        ("after", after.weight_average(), "weight_average"),
        ("after", after.weight_average, "weight_average"),
        ("probe", probes.update_ratio(), "update_ratio"),
        ("probe", probes.update_ratio, "update_ratio"),
        ("schedule", schedules.warmup(3), "warmup"),
        ("schedule", schedules.warmup, "warmup"),
    ],
)
def test_what_is_not_called_or_not_bound_is_refused_before_anything_moves(room, value, name):
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [w.clone() for w in model.parameters()]
    rooms = {"loss": losses.cross_entropy, "risk": risks.mean(), "gradient": gradients.plain(), "optimizer": opt}
    with pytest.raises(TypeError, match=f"step got {name} before it is at work: call it, then bind it or attach it"):
        step(model, (X, Y), **{**rooms, room: value})
    assert all(map(torch.equal, model.parameters(), before))


def test_it_fits_on_one_screen():
    assert len(inspect.getsource(module).splitlines()) <= 60
