"""Checkpoints from torch's optimizers and back: the state to the bit, and the run goes on where it was."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import etude
from etude import rules
from etude.rules._convert import PAIRS

SHAPES = [(4, 3), (5, 2), (3, 3)]
CASES = {
    "torch.Adam": [{}, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}, {"amsgrad": True}],
    "torch.AdamW": [{}, {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.2, "foreach": True}, {"amsgrad": True}],
    "torch.SGD": [{}, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}],
    "torch.Muon": [{}, {"lr": 0.02, "momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
}
EVERY = [(side, knobs) for side, cases in CASES.items() for knobs in cases]
every_case = pytest.mark.parametrize(("side", "knobs"), EVERY)
ours = lambda side, knobs: "amsgrad" if knobs.get("amsgrad") else side.removeprefix("torch.").lower()


def weights(seed=0, dtype=torch.float64):
    seeded = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=seeded, dtype=torch.float64).to(dtype)) for s in SHAPES]


def drive(opt, ps, steps=4, seed=1):
    """Gradients that do not depend on the weights: then the states of two optimizers can be compared to the bit."""
    seeded = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=seeded, dtype=torch.float64).to(p.dtype)
        opt.step()


def their(side, ps, **knobs):
    return getattr(torch.optim, side.removeprefix("torch."))(ps, **knobs)


def stored(state_dict):
    """Through a file that may hold nothing but tensors and numbers."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    """Two state dicts, to the bit and the type."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@every_case
def test_from_torch_the_state_is_theirs_to_the_bit_and_stays_so(side, knobs):
    ps = weights()
    theirs = their(side, ps, **knobs)
    drive(theirs, ps)
    mine = [nn.Parameter(p.detach().clone()) for p in ps]
    taken = etude.optimizer(ours(side, knobs), mine)
    taken.load_state_dict(stored(rules.convert(theirs.state_dict(), from_=side, to=ours(side, knobs))))
    names = PAIRS[side, ours(side, knobs)].state
    for steps, close in ((0, 0.0), (4, 1e-12 if side != "torch.Muon" else 4 * 0.03 * 0.02)):  # torch's Muon: bfloat16
        drive(theirs, ps, steps, seed=2)
        drive(taken, mine, steps, seed=2)
        for p, q in zip(ps, mine):
            assert all(
                torch.equal(theirs.state[p][a].double(), taken.state[q][b].double())
                for a, b in names.items()
                if a in theirs.state[p]
            )
            assert (p - q).abs().max().item() <= close
    for key in set(taken.rules[0].knobs()) & set(theirs.param_groups[0]):
        assert taken.param_groups[0][key] == theirs.param_groups[0][key]


@every_case
def test_to_torch_the_state_is_ours_to_the_bit_and_stays_so(side, knobs):
    ps = weights()
    named = {"adjust" if k == "adjust_lr_fn" else k: v for k, v in knobs.items() if k not in ("foreach", "amsgrad")}
    named |= {"debias": True} if "amsgrad" in knobs else {}
    mine = etude.optimizer(ours(side, knobs), ps, **named)
    drive(mine, ps)
    away = [nn.Parameter(p.detach().clone()) for p in ps]
    theirs = their(side, away)
    theirs.load_state_dict(stored(rules.convert(mine.state_dict(), from_=ours(side, knobs), to=side)))
    names = PAIRS[side, ours(side, knobs)].state
    for steps, close in ((0, 0.0), (4, 1e-12 if side != "torch.Muon" else 4 * 0.03 * 0.02)):
        drive(mine, ps, steps, seed=2)
        drive(theirs, away, steps, seed=2)
        for p, q in zip(ps, away):
            assert all(
                torch.equal(theirs.state[q][a].double(), mine.state[p][b].double())
                for a, b in names.items()
                if b in mine.state[p]
            )
            assert (p - q).abs().max().item() <= close


@every_case
def test_there_and_back_is_the_same_checkpoint(side, knobs):
    ps = weights(dtype=torch.float32)
    theirs = their(side, ps, **knobs)
    theirs.param_groups[0]["initial_lr"] = 0.5  # as a schedule leaves it
    drive(theirs, ps)
    before = copy.deepcopy(theirs.state_dict())
    back = rules.convert(
        rules.convert(theirs.state_dict(), from_=side, to=ours(side, knobs)), from_=ours(side, knobs), to=side
    )
    if side == "torch.Muon":  # None means original
        before["param_groups"][0]["adjust_lr_fn"] = before["param_groups"][0]["adjust_lr_fn"] or "original"
    assert same(back, before)
    assert same(
        rules.convert(back, from_=side, to=ours(side, knobs))["state"],
        rules.convert(before, from_=side, to=ours(side, knobs))["state"],
    )


def test_two_optimizers_of_torch_become_one_route_and_two_again():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)).double()

    a, b = model(), model()
    hidden = [p for n, p in a.named_parameters() if n in ("0.weight", "2.weight")]
    rest = [p for n, p in a.named_parameters() if n not in ("0.weight", "2.weight")]
    two = [torch.optim.Muon(hidden, 1e-3, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, 1e-3)]
    for opt, ps in zip(two, (hidden, rest)):
        drive(opt, ps)
    b.load_state_dict(a.state_dict())
    one = etude.optimizer("muon", b)
    pair = {"from_": ["torch.Muon", "torch.AdamW"], "to": ["muon", "adamw"]}
    one.load_state_dict(rules.convert([opt.state_dict() for opt in two], **pair))
    of = dict(b.named_parameters())
    for n, p in a.named_parameters():
        opt, key = (two[0], "momentum_buffer") if any(p is q for q in hidden) else (two[1], "exp_avg")
        assert torch.equal(one.state[of[n]]["exp_avg"], opt.state[p][key])
    assert one.state[of["3.weight"]]["step"] == 4
    back = rules.convert(one.state_dict(), from_=pair["to"], to=pair["from_"])
    for opt, again in zip(two, back):
        assert same(again["state"], opt.state_dict()["state"])
        opt.load_state_dict(again)
    with pytest.raises(ValueError, match="has groups of adamw too: name an optimizer of torch for each rule"):
        rules.convert(one.state_dict(), from_="muon", to="torch.Muon")
    with pytest.raises(ValueError, match="2 optimizers of torch need a list of 2 checkpoints"):
        rules.convert([two[0].state_dict()], **pair)


def test_groups_and_names_come_along():
    layers = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)})
    theirs = torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in layers.named_parameters() if n.endswith("weight")], "lr": 0.5},
            {"params": [(n, p) for n, p in layers.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
        ]
    )
    drive_names = list(layers.parameters())
    for i, p in enumerate(drive_names):
        p.grad = torch.full_like(p, 1.0 + i)
    theirs.step()
    groups = [{"params": list(reversed(g["params"])), "param_names": None} for g in theirs.param_groups]
    named = {id(p): n for n, p in layers.named_parameters()}
    mine = rules.optimizer([{"params": [(named[id(p)], p) for p in g["params"]]} for g in groups], rules.adamw())
    mine.load_state_dict(rules.convert(theirs.state_dict(), from_="torch.AdamW", to="adamw"))
    assert [g["lr"] for g in mine.param_groups] == [0.5, 1e-3]
    assert [g["weight_decay"] for g in mine.param_groups] == [0.01, 0.0]
    assert all(torch.equal(mine.state[p]["exp_avg"], theirs.state[p]["exp_avg"]) for p in layers.parameters())


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: rules.convert(their("torch.AdamW", weights(), amsgrad=True).state_dict(), from_="torch.AdamW", to="adamw"), "group 0 of torch.AdamW has amsgrad=True; adamw knows no other than False"),
        (lambda: rules.convert(their("torch.AdamW", weights()).state_dict(), from_="torch.AdamW", to="amsgrad"), "has amsgrad=False; amsgrad knows no other than True"),
        (lambda: rules.convert(etude.optimizer("amsgrad", weights()).state_dict(), from_="amsgrad", to="torch.AdamW"), "has debias=False"),
        (lambda: rules.convert(their("torch.Adam", weights(), weight_decay=0.1).state_dict(), from_="torch.Adam", to="adam"), "has weight_decay=0.1; adam knows no other"),
        (lambda: rules.convert(their("torch.SGD", weights(), momentum=0.9, dampening=0.1).state_dict(), from_="torch.SGD", to="sgd"), "has dampening=0.1"),
        (lambda: rules.convert(their("torch.SGD", weights(), maximize=True).state_dict(), from_="torch.SGD", to="sgd"), "has maximize=True"),
        (lambda: rules.convert(their("torch.Muon", weights(), eps=1e-3).state_dict(), from_="torch.Muon", to="muon"), "has eps=0.001"),
        (lambda: rules.convert(etude.optimizer("adamw", weights(), uncoupled=True).state_dict(), from_="adamw", to="torch.AdamW"), "has uncoupled=True"),
        (lambda: rules.convert({}, from_="torch.AdamW", to="lion"), "torch.AdamW goes to adamw or amsgrad"),
        (lambda: rules.convert({}, from_="torch.Adamw", to="adamw"), "from_ is one of torch.Adam, torch.AdamW, "),
        (lambda: rules.convert([{}], from_="adamw", to="torch.AdamW"), "it takes one checkpoint, got a list"),
        (lambda: rules.convert(etude.optimizer("adam", weights()).state_dict(), from_="adamw", to="torch.AdamW"), "has groups of adam too"),
        (lambda: rules.convert({"state": {0: {"max_exp_avg_sq": 1}}, "param_groups": []}, from_="torch.Adam", to="adam"), "parameter 0 holds max_exp_avg_sq, which adam has no place for"),
    ],
)  # fmt: skip
def test_what_the_other_side_has_no_place_for_is_an_error(make, line):
    with pytest.raises(ValueError, match=line) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_rounding_lost_is_never_dropped_in_silence():
    ps = weights(dtype=torch.bfloat16)
    opt = rules.optimizer(ps, rules.adamw())
    drive(opt, ps)
    with pytest.raises(ValueError, match="compensation holds what rounding lost"):
        rules.convert(opt.state_dict(), from_="adamw", to="torch.AdamW")
    checkpoint = copy.deepcopy(opt.state_dict())
    for entry in checkpoint["state"].values():
        del entry["compensation"]
    theirs = torch.optim.AdamW(ps)
    theirs.load_state_dict(rules.convert(checkpoint, from_="adamw", to="torch.AdamW"))
    assert theirs.state[ps[0]]["step"] == 4
    population = rules.optimizer([nn.Linear(2, 2), nn.Linear(2, 2)], rules.adamw(lr=torch.tensor([0.1, 0.2])))
    with pytest.raises(ValueError, match="lr has a value for each of several models"):
        rules.convert(population.state_dict(), from_="adamw", to="torch.AdamW")
