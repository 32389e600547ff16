"""What is true of every update rule, by enumeration: the three executables agree, stacks are made of strangers, …"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from etude import rules
from etude._method import methods
from etude.rules import _kernel
from etude.rules._engine import state_bytes

NAMES = [name for room, name in methods() if room == "rules"]
SHAPES = [(4, 3), (4, 3), (3, 5), (2, 3, 2), (70, 3000), (1, 1)]
BY_HAND = {
    "clipped": lambda: rules.chain(
        rules.ClipNorm(0.5), rules.Ema(0.9, debias=True), rules.Rms(0.99), rules.Scale(1e-2)
    ),
    "cautious": lambda: rules.chain(rules.Ema(0.9), rules.Cautious(), rules.Decay(0.1), rules.Scale(1e-2)),
    "clipped late": lambda: rules.chain(rules.Ema(0.9), rules.ClipNorm(0.5), rules.TrustRatio(), rules.Scale(1e-2)),
}
RULES = {name: methods()["rules", name].fn for name in NAMES} | BY_HAND
every_rule = pytest.mark.parametrize("name", RULES)


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    seeded = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=seeded, dtype=torch.float64).to(dtype)) for s in shapes]


def drive(opt, ps, steps=6, seed=1, skip=lambda step, i: False):
    seeded = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for i, p in enumerate(ps):
            real = 0.1 * p.detach() + torch.randn(p.shape, generator=seeded, dtype=torch.float64).to(p.dtype)
            p.grad = None if skip(step, i) else real
        opt.step()
    return [p.detach().clone() for p in ps]


def far(a, b):
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b))


@every_rule
def test_reference_and_eager_agree_in_float64(name):
    a, b = parameters(), parameters()
    eager = drive(rules.optimizer(a, RULES[name]()), a)
    plain = drive(rules.optimizer(b, RULES[name](), engine="reference"), b)
    assert far(eager, plain) <= 1e-12


@every_rule
def test_reference_and_eager_agree_in_float32(name):
    """Within 40 units in the last place after six steps; a bfloat16 iteration inside is within its own rounding."""
    a, b = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    eager = drive(rules.optimizer(a, RULES[name]()), a)
    plain = drive(rules.optimizer(b, RULES[name](), engine="reference"), b)
    coarse = any(isinstance(part, rules.Polar) for part in RULES[name]().parts)
    assert far(eager, plain) <= (2e-3 if coarse else 40 * torch.finfo(torch.float32).eps)


@pytest.mark.long
@every_rule
def test_compiled_and_eager_agree_in_float64_and_a_schedule_builds_nothing_new(name):
    few = [(4, 3), (4, 3), (70, 3000)]
    a, b = parameters(few), parameters(few)
    one, two = rules.optimizer(a, RULES[name]()), rules.optimizer(b, RULES[name](), engine="compiled")
    assert far(drive(one, a, 2), drive(two, b, 2)) <= 1e-12
    built = sum(map(len, _kernel._BUILT.values()))
    for opt in (one, two):
        opt.param_groups[0]["lr"] *= 0.37
    assert far(drive(one, a, 3, seed=5), drive(two, b, 3, seed=5)) <= 1e-12
    assert not all(bucket.plain for bucket in two._buckets)
    assert sum(map(len, _kernel._BUILT.values())) == built, "a schedule built a kernel again"


@pytest.mark.long
def test_compiled_without_a_compiler_says_so_in_one_line_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(_kernel, "_BUILT", {})
    monkeypatch.setattr(_kernel, "_CHOSEN", {})
    monkeypatch.setenv("CXX", "no-such-compiler")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        a, b = parameters(), parameters()
        end = drive(rules.optimizer(a, rules.signum(), engine="compiled"), a)
    assert far(end, drive(rules.optimizer(b, rules.signum()), b)) == 0
    said = [r.getMessage() for r in caplog.records if r.name == "etude"]
    assert len(said) == 1
    assert said[0].endswith("eager goes on")
    assert "\n" not in said[0]


@every_rule
def test_a_rule_on_a_stack_equals_the_rule_on_each_member_alone(name):
    """Three models of one shape as one population, against each model by itself."""
    together = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double() for _ in range(3)]
    alone = copy.deepcopy(together)
    sizes = [1.0, 30.0, 0.01]  # a sum over the stack instead of over the model would show

    def train(opts, models):
        seeded = torch.Generator().manual_seed(3)
        for _ in range(4):
            for size, m in zip(sizes, models):
                for p in m.parameters():
                    p.grad = size * torch.randn(p.shape, generator=seeded, dtype=torch.float64)
            for opt in opts:
                opt.step()
        return [p.detach() for m in models for p in m.parameters()]

    rule = RULES[name]()
    stacked = train([rules.optimizer(together, rule)], together)
    single = train([rules.optimizer(m, rule) for m in alone], alone)
    assert far(stacked, single) <= 1e-12


@every_rule
def test_a_parameter_without_a_gradient_waits_and_keeps_its_own_count(name):
    """Members that miss steps move exactly as if they had been alone all along."""
    shapes = [(4, 3)] * 4
    skip = lambda step, i: (step + i) % 3 == 0 and i < 3
    together = parameters(shapes)
    end = drive(rules.optimizer(together, RULES[name]()), together, 7, skip=skip)
    alone = parameters(shapes)
    if any(part.width == "model" for part in RULES[name]().parts):
        opt = rules.optimizer(alone, RULES[name](), engine="reference")
        assert far(end, drive(opt, alone, 7, skip=skip)) <= 1e-12
        return
    opts = [rules.optimizer([p], RULES[name]()) for p in alone]

    class Each:
        def step(self):
            for opt in opts:
                opt.step()

    assert far(end, drive(Each(), alone, 7, skip=skip)) <= 1e-12


@every_rule
def test_resume_is_bit_for_bit_through_torch_save_weights_only(name):
    whole = parameters(dtype=torch.float32)
    opt = rules.optimizer(whole, RULES[name]())
    drive(opt, whole, 3)
    stored = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "ps": [p.detach().clone() for p in whole]}, stored)
    end = drive(opt, whole, 3, seed=9)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    again = [nn.Parameter(x) for x in loaded["ps"]]
    resumed = rules.optimizer(again, RULES[name]())
    resumed.load_state_dict(loaded["opt"])
    assert all(torch.equal(x, y) for x, y in zip(end, drive(resumed, again, 3, seed=9)))


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@every_rule
def test_resume_is_bit_for_bit_with_bfloat16_weights_and_keeps_the_states_types(name, rounding):
    whole = parameters(dtype=torch.bfloat16)
    opt = rules.optimizer(whole, RULES[name](), rounding=rounding)
    drive(opt, whole, 3)
    saved = copy.deepcopy((opt.state_dict(), [p.detach() for p in whole]))
    end = drive(opt, whole, 3, seed=9)
    again = [nn.Parameter(x.clone()) for x in saved[1]]
    resumed = rules.optimizer(again, RULES[name](), rounding=rounding)
    resumed.load_state_dict(saved[0])
    assert all(torch.equal(x, y) for x, y in zip(end, drive(resumed, again, 3, seed=9)))
    types = [{k: v.dtype for k, v in s.items()} for s in resumed.state.values()]
    assert types == [{k: v.dtype for k, v in s.items()} for s in opt.state.values()]
    assert all(v.dtype == torch.float32 for s in opt.state.values() for k, v in s.items() if k.startswith("exp"))


@every_rule
def test_deepcopy_and_pickle_then_step(name):
    ps = parameters()
    opt = rules.optimizer(ps, RULES[name]())
    drive(opt, ps, 2)
    for copied, theirs in (copy.deepcopy((opt, ps)), pickle.loads(pickle.dumps((opt, ps)))):
        mine = copy.deepcopy((opt, ps))
        assert all(torch.equal(a, b) for a, b in zip(drive(copied, theirs, 2, seed=4), drive(*mine, 2, seed=4)))


@every_rule
def test_gradients_are_untouched_and_lr_0_is_the_identity(name):
    ps = parameters()
    opt = rules.optimizer(ps, RULES[name]())
    opt.param_groups[0]["lr"] = 0.0
    before, grads = [p.detach().clone() for p in ps], [torch.randn_like(p) for p in ps]
    for p, g in zip(ps, grads):
        p.grad = g.clone()
    for _ in range(3):
        opt.step()
    assert all(torch.equal(p.detach(), b) for p, b in zip(ps, before))
    assert all(torch.equal(p.grad, g) for p, g in zip(ps, grads))


@every_rule
def test_zero_gradients_first_stay_finite(name):
    ps = parameters(dtype=torch.float32)
    opt = rules.optimizer(ps, RULES[name]())
    for p in ps:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(p.isfinite().all() for p in drive(opt, ps, 2))


@every_rule
def test_a_strided_parameter_moves_like_a_contiguous_one(name):
    seeded = torch.Generator().manual_seed(0)
    x = [torch.randn(s, generator=seeded, dtype=torch.float64) for s in ((5, 3), (400, 900))]
    plain = [nn.Parameter(v.clone()) for v in x]
    strided = [nn.Parameter(v.T.contiguous().T) for v in x]
    assert not strided[0].is_contiguous()
    end = drive(rules.optimizer(strided, RULES[name]()), strided)
    assert far(end, drive(rules.optimizer(plain, RULES[name]()), plain)) <= 1e-12


@every_rule
def test_maximize_is_the_step_on_the_negated_gradient(name):
    a, b = parameters(), parameters()
    one, two = rules.optimizer(a, RULES[name](), maximize=True), rules.optimizer(b, RULES[name]())
    for p, q in zip(a, b):
        p.grad = torch.randn_like(p)
        q.grad = -p.grad
    one.step()
    two.step()
    assert all(torch.equal(p.detach(), q.detach()) for p, q in zip(a, b))


@every_rule
def test_every_knob_in_the_group_is_live(name):
    """Turning a knob in ``param_groups`` is the same as having made the rule with it."""
    for knob, value in RULES[name]().knobs().items():
        if isinstance(value, (bool, str)):
            continue
        turned = (
            tuple(v * 0.9 for v in value)
            if isinstance(value, tuple)
            else value + 1
            if isinstance(value, int)
            else value * 0.9
        )
        if knob == "momentum" and not value:
            turned = 0.5
        a, b = parameters(), parameters()
        late = rules.optimizer(a, RULES[name]())
        late.param_groups[0][knob] = turned
        early = rules.optimizer(b, RULES[name]().remake({**RULES[name]().knobs(), knob: turned}))
        assert all(torch.equal(x, y) for x, y in zip(drive(late, a), drive(early, b))), knob


@every_rule
def test_memory_tells_the_bytes_before_they_are_allocated(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(30, 40), nn.LayerNorm(40), nn.Linear(40, 40), nn.Linear(40, 300)).to(dtype)
        told = rules.memory(RULES[name](), model)
        opt = rules.optimizer(model, RULES[name]())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
        storages = {
            v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for s in opt.state.values() for v in s.values()
        }
        assert (
            told
            == sum(storages.values())
            == state_bytes(opt._buckets)
            == sum(r.state_bytes for r in opt.explain().rows)
        )


@every_rule
def test_resident_weights_move_as_gathered_ones_and_survive_a_move(name):
    a, b = parameters(), parameters()
    one, two = rules.optimizer(a, RULES[name](), resident=True), rules.optimizer(b, RULES[name]())
    assert all(torch.equal(x, y) for x, y in zip(drive(one, a, 2), drive(two, b, 2)))
    for p in a:
        p.data = p.data.clone()
    assert all(torch.equal(x, y) for x, y in zip(drive(one, a, 2, seed=3), drive(two, b, 2, seed=3)))


@every_rule
def test_prints_as_the_recipe_it_is(name):
    assert str(RULES[name]()).startswith(("Decay(", "Ema(", "Interpolate(", "ClipNorm("))
    assert " → Scale(lr=" in str(RULES[name]())
