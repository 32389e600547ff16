"""The engine's own promises: roles and routes, bfloat16, checkpoints between libraries, bad input in one clear line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import etude
from etude import rules
from etude._roles import roles
from tests.peers import timm


class Small(nn.Module):
    """An embedding tied to the head, an attention, a norm, a convolution and a bare parameter."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.zeros(5, 8))
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x) + self.position
        h = self.conv(h.mT).mT
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Forgetful(rules.Part):
    gain: float = 2.0


def test_a_part_of_your_own_with_real_annotations_has_live_numbers():
    space: dict = {}
    exec(  # a file without `from __future__ import annotations`
        "from dataclasses import dataclass\nfrom etude import rules\n"
        "@dataclass(frozen=True)\nclass Cube(rules.Part):\n    gain: float = 2.0\n"
        "    def __call__(self, u, g, w, s, c):\n        return u**3 * c.gain\n",
        {**space, "__name__": __name__},
        space,
    )
    p = nn.Parameter(torch.ones(2))
    opt = rules.optimizer([p], rules.chain(space["Cube"](), rules.Scale(0.1)))
    p.grad = torch.full((2,), 2.0)
    opt.step()
    assert p.tolist() == pytest.approx([1 - 0.1 * 16] * 2)
    opt.param_groups[0]["gain"] = 0.0
    opt.step()
    assert p.tolist() == pytest.approx([1 - 0.1 * 16] * 2)


def test_a_part_that_changes_the_shape_is_refused():
    class Total(rules.Part):
        def __call__(self, u, g, w, s, c):
            return u.sum()

    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"Total\(\) made an update of shape \(\) for weights of shape \(2,\)"):
        rules.optimizer([p], rules.chain(Total(), rules.Scale(0.1))).step()


def test_roles_come_from_types_and_use():
    found = roles(Small(tied=False), {"position": "embedding"})
    assert found["embed.weight"] == found["position"] == "embedding"
    assert found["conv.weight"] == "conv"
    assert found["blocks.0.self_attn.in_proj_weight"] == found["blocks.1.linear2.weight"] == "hidden"
    assert found["blocks.0.self_attn.in_proj_bias"] == found["conv.bias"] == "bias"
    assert found["norm.weight"] == found["blocks.0.norm1.bias"] == "norm"
    assert found["head.weight"] == "head"


def test_a_tied_head_is_an_embedding_and_counts_once():
    found = roles(Small())
    assert found["embed.weight"] == "embedding"
    assert "head.weight" not in found
    opt = rules.optimizer(
        Small(), rules.route(matrices=rules.muon(), rest=rules.adamw()), roles={"position": "embedding"}
    )
    held = [id(p) for g in opt.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(Small().parameters()))


def test_a_head_under_a_map_is_still_the_head():
    for name in ("0", "2"):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        nn.utils.parametrizations.weight_norm(model.get_submodule(name))
        found = roles(model)
        assert found["2.weight" if name == "0" else "2.parametrizations.weight.original1"] == "head"
        assert sorted(found.values()) == ["bias", "bias", "head", "hidden", "vector"]


def test_the_head_by_use_when_it_is_defined_first():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(4, 2)
            self.first = nn.Linear(3, 4)

        def forward(self, x):
            return self.out(self.first(x))

    assert roles(Backwards())["first.weight"] == "head"  # by definition order: wrong, and explain() shows it
    assert roles(Backwards(), inputs=torch.zeros(1, 3)) == {
        "out.weight": "head", "out.bias": "bias", "first.weight": "hidden", "first.bias": "bias",
    }  # fmt: skip


def test_a_route_sends_matrices_to_muon_and_the_rest_to_adamw_at_one_lr():
    opt = etude.optimizer("muon", Small(), lr=3e-4, roles={"position": "embedding"})
    table = {row.name: row for row in opt.explain().rows}
    assert table["blocks.0.linear1.weight"].rule == table["conv.weight"].rule == "muon"
    assert table["embed.weight"].rule == table["norm.weight"].rule == table["position"].rule == "adamw"
    assert {row.lr for row in table.values()} == {3e-4}
    assert "embed.weight" in str(opt.explain())
    assert "bytes of state" in str(opt.explain())


def test_a_routed_step_equals_two_optimizers():
    a, b = Small(tied=False).double(), Small(tied=False).double()
    b.load_state_dict(a.state_dict())
    routed = rules.optimizer(
        a, rules.route(matrices=rules.muon(), rest=rules.sgd(lr=0.1)), roles={"position": "embedding"},
        split={"*.in_proj_weight": 1},
    )  # fmt: skip
    matrices = {n for n, r in roles(b, {"position": "embedding"}).items() if r in ("hidden", "conv")}
    by_hand = [
        rules.optimizer([p for n, p in b.named_parameters() if n in matrices], rules.muon()),
        torch.optim.SGD([p for n, p in b.named_parameters() if n not in matrices], 0.1),
    ]
    for m in (a, b):
        m(torch.arange(5)[None]).square().sum().backward()
    routed.step()
    for opt in by_hand:
        opt.step()
    assert all((p - q).abs().max() <= 1e-12 for p, q in zip(a.parameters(), b.parameters()))


def test_an_ambiguous_parameter_is_an_error_and_roles_says_what_it_is():
    with pytest.raises(
        ValueError, match=r"no rule for position \(5, 8\) \(unknown\).*roles=\{'position': 'embedding'\}"
    ):
        rules.optimizer(Small(), rules.muon())
    with pytest.raises(ValueError, match="no parameter matches 'positoin'"):
        rules.optimizer(Small(), rules.muon(), roles={"positoin": "embedding"})
    with pytest.raises(ValueError, match="no role 'embeddings'"):
        rules.optimizer(Small(), rules.muon(), roles={"position": "embeddings"})
    rules.optimizer(Small(), rules.adamw())  # one rule for all needs no roles


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: rules.optimizer([nn.Parameter(torch.ones(3))], rules.muon()), "muon is for real matrices and 0.0 has shape"),
        (lambda: rules.optimizer(nn.Linear(3, 2), rules.muon()), "muon serves 'matrices' and this model has no such"),
        (lambda: rules.optimizer(nn.Linear(3, 2), "adamw"), "expected a rule such as adamw"),
        (lambda: rules.optimizer([], rules.adam()), "no parameters were given"),
        (lambda: rules.optimizer(nn.ReLU(), rules.adam()), "no trainable parameters"),
        (lambda: rules.optimizer([nn.Parameter(torch.ones(3))], rules.adam(), engine="fast"), "'fast' is none of eager"),
        (lambda: rules.optimizer(nn.Linear(3, 2), rules.route(heads=rules.adam())), "no arm 'heads'"),
        (lambda: rules.optimizer([{"params": [nn.Parameter(torch.ones(3))], "weight_decya": 0.1}], rules.adamw()), "no knob weight_decya"),
        (lambda: rules.adam(lr=-1.0), r"lr=-1.0\): lr must be a number in"),
        (lambda: rules.adam(lr="1e-3"), r"lr='1e-3'\): lr must be a number in"),
        (lambda: rules.adam(lr=None), r"lr=None\): lr must be a number in"),
        (lambda: rules.adam(betas=(1.0, 0.9)), r"beta=1.0\): beta must be a number in \[0, 1.0\)"),
        (lambda: rules.adam(betas=0.9), r"betas=0.9: expected two numbers"),
        (lambda: rules.muon(adjust="origin"), "adjust='origin'.*is one of 'match_rms_adamw', 'original'"),
        (lambda: rules.optimizer(nn.Linear(3, 2), nn.Linear(3, 2)), "got a Linear$"),
        (lambda: rules.optimizer(Small(), rules.muon(adjust="original")), "a learning rate in units of its own"),
        (lambda: rules.chain(rules.adamw(), rules.Cautious()), r"unpack it: chain\(\*adamw\(\), …\)"),
        (lambda: rules.chain(Forgetful()), r"Forgetful has fields and needs @dataclass"),
        (lambda: rules.sgd(nesterov=True), "needs a momentum"),
        (lambda: etude.optimizer("adamv", nn.Linear(3, 2)), "nearest: adam,"),
        (lambda: rules.chain(rules.Sign), "is no part"),
        (lambda: rules.adam(weight_decay=0.1), "unexpected keyword"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_line(make, line):
    with pytest.raises((ValueError, TypeError), match=line) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(5, 3, sparse=True)
    opt = rules.optimizer(model, rules.adam())
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="weight has a sparse gradient"):
        opt.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rounding", "survives"), [("kahan", True), ("stochastic", True), ("nearest", False)])
def test_a_hundred_small_updates_of_a_short_weight_move_it_as_in_float32(dtype, rounding, survives):
    p = nn.Parameter(torch.ones(4000, dtype=dtype))
    opt = rules.optimizer([p], rules.sgd(lr=1e-4), rounding=rounding)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        opt.step()
    moved = 1 - p.detach().double().mean().item()
    assert (abs(moved - 0.01) < 5e-4 + torch.finfo(dtype).eps / 2) == survives, moved


def test_stochastic_rounding_is_unbiased_and_the_same_whatever_the_layout():
    from etude.rules._rounding import stochastic

    x = torch.full((200_000,), 1 + 1 / 512)  # a quarter of the way between two bfloat16 numbers
    drawn = stochastic(x, "w", 3, torch.bfloat16).double()
    assert drawn.mean().item() == pytest.approx(1 + 1 / 512, abs=4 * 2**-7 * 0.43 / 200_000**0.5)
    assert set(drawn.unique().tolist()) == {1.0, 1 + 2**-7}
    assert torch.equal(stochastic(x, "w", 3, torch.bfloat16), stochastic(x, "w", 3, torch.bfloat16))
    assert not torch.equal(stochastic(x, "w", 4, torch.bfloat16), stochastic(x, "w", 3, torch.bfloat16))
    assert not torch.equal(stochastic(x, "v", 3, torch.bfloat16), stochastic(x, "w", 3, torch.bfloat16))
    names = ["a", "b", "c"]

    def play(groups):
        seeded = torch.Generator().manual_seed(0)
        ps = {n: nn.Parameter(torch.randn(50, 3, generator=seeded).bfloat16()) for n in names}
        opts = [rules.optimizer([(n, ps[n]) for n in g], rules.adamw(lr=1e-3), rounding="stochastic") for g in groups]
        for p in ps.values():
            p.grad = torch.randn(50, 3, generator=seeded).bfloat16()
        for opt in opts:
            opt.step()
        return [p.detach() for p in ps.values()]

    assert all(torch.equal(a, b) for a, b in zip(play([names]), play([["a"], ["b", "c"]])))


def test_names_decide_on_load_when_both_sides_have_them():
    a = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)})
    b = nn.ModuleDict({"y": a["y"], "x": a["x"]})  # the same parameters in another order
    one = rules.optimizer(a, rules.adam())
    for i, p in enumerate(a.parameters()):
        p.grad = torch.full_like(p, 1.0 + i)
    one.step()
    two = rules.optimizer(b, rules.adam())
    two.load_state_dict(one.state_dict())
    assert all(torch.equal(one.state[p]["exp_avg"], two.state[p]["exp_avg"]) for p in a.parameters())
    other = rules.optimizer(nn.ModuleDict({"z": nn.Linear(2, 2), "y": nn.Linear(2, 2)}), rules.adam())
    with pytest.raises(ValueError, match=r"only one of checkpoint and optimizer has x.bias, x.weight, z.bias"):
        other.load_state_dict(one.state_dict())


def test_a_checkpoint_of_another_rule_is_refused():
    model = nn.Linear(2, 2)
    opt = rules.optimizer(model, rules.adam())
    with pytest.raises(ValueError, match="the checkpoint is of lion, this optimizer plays adam"):
        opt.load_state_dict(rules.optimizer(model, rules.lion()).state_dict())


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (rules.adamw(lr=0.01), lambda ps: torch.optim.AdamW(ps, lr=0.01)),
        (rules.sgd(lr=0.01, momentum=0.9), lambda ps: torch.optim.SGD(ps, 0.01, 0.9)),
        (rules.lion(lr=0.01), lambda ps: timm("optim.lion").Lion(ps, 0.01)),
    ],
)
def test_a_checkpoint_of_torch_or_timm_goes_on_here(rule, theirs):
    ps = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    opt = theirs(ps)

    def drive(opt, ps):
        seeded = torch.Generator().manual_seed(0)
        for _ in range(4):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=seeded, dtype=torch.float64)
            opt.step()

    drive(opt, ps)
    mine = [nn.Parameter(p.detach().clone()) for p in ps]
    taken = rules.optimizer(mine, rule)
    taken.load_state_dict(opt.state_dict())
    drive(opt, ps)
    drive(taken, mine)
    assert max((p - q).abs().max().item() for p, q in zip(ps, mine)) <= 1e-12


def test_complex_parameters_move_as_torch_moves_them():
    x = torch.randn(3, 4, dtype=torch.complex128)
    a, b = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    one, two = rules.optimizer([a], rules.adamw(lr=0.1)), torch.optim.AdamW([b], lr=0.1)
    for _ in range(5):
        a.grad = b.grad = torch.randn_like(x)
        one.step()
        two.step()
    assert (a - b).abs().max() <= 1e-12
    with pytest.raises(ValueError, match="is complex"):
        rules.optimizer([a], rules.muon())


def test_empty_and_scalar_parameters():
    empty, scalar = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(1.0))
    opt = rules.optimizer([empty, scalar], rules.lamb(lr=0.1))
    empty.grad, scalar.grad = torch.zeros(0, 3), torch.tensor(2.0)
    opt.step()
    assert scalar.item() == pytest.approx(0.9, abs=1e-6)


def test_schedulers_closures_and_late_groups_work_as_with_torch():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = rules.optimizer([p], rules.sgd(lr=1.0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 1.0, total_steps=10, cycle_momentum=False)

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 2.0
    schedule.step()
    opt.add_param_group({"params": [q], "lr": 0.5})
    q.grad = torch.ones(2)
    opt.step()
    assert q.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="no knob beta"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "beta": 0.5})


def test_clip_norm_is_torchs_clip_grad_norm_before_the_rule():
    a = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((3, 4), (400, 500), (5,))]
    b = [nn.Parameter(p.detach().clone()) for p in a]
    one = rules.optimizer(
        a, rules.chain(rules.ClipNorm(0.3), rules.Ema(0.9, debias=True), rules.Rms(0.999), rules.Scale(0.1))
    )
    two = torch.optim.Adam(b, lr=0.1)
    for _ in range(4):
        for p, q in zip(a, b):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_(b, 0.3)
        one.step()
        two.step()
    assert max((p - q).abs().max().item() for p, q in zip(a, b)) <= 1e-12


def test_cautious_is_timms_caution():
    a = [nn.Parameter(torch.randn(6, 7, dtype=torch.float64)) for _ in range(2)]
    b = [nn.Parameter(p.detach().clone()) for p in a]
    rule = rules.chain(
        rules.Interpolate(0.9, 0.99), rules.Sign(), rules.Cautious(), rules.Decay(0.1), rules.Scale(0.01)
    )
    one = rules.optimizer(a, rule)
    two = timm("optim.lion").Lion(b, 0.01, weight_decay=0.1, caution=True)
    for _ in range(6):
        for p, q in zip(a, b):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    assert max((p - q).abs().max().item() for p, q in zip(a, b)) <= 1e-12


def test_a_new_structure_mid_run_keeps_the_state_that_remains():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = rules.optimizer([p], rules.sgd(lr=0.1, momentum=0.9))
    p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0]["momentum"] = 0.0
    opt.step()
    assert p.tolist() == pytest.approx([0.8] * 3)
    assert "momentum_buffer" not in opt.state[p]


def trained(opt, ps, steps=3, seed=0):
    seeded = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in ps:
            g = torch.randn(p.shape, generator=seeded, dtype=torch.float64).to(p.dtype)
            p.grad = g if p.requires_grad else None
        opt.step()


def some(*shapes, dtype=torch.float64):
    seeded = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(s, generator=seeded, dtype=torch.float64).to(dtype)) for s in shapes]


def test_edits_of_the_state_count_as_with_torch():
    a, b = some((3, 4), (2,)), some((3, 4), (2,))
    one, two = rules.optimizer(a, rules.adam(lr=0.1)), torch.optim.Adam(b, lr=0.1)
    for opt, ps in ((one, a), (two, b)):
        trained(opt, ps)
        opt.state[ps[0]]["exp_avg"] = torch.ones_like(opt.state[ps[0]]["exp_avg"])  # replaced
        opt.state[ps[1]]["exp_avg_sq"].mul_(2)  # edited in place
        trained(opt, ps, seed=1)
        opt.state.clear()
        trained(opt, ps, seed=2)
    assert max((p - q).abs().max() for p, q in zip(a, b)) <= 1e-12
    assert len(one.state_dict()["state"]) == 2


def test_a_model_that_changes_type_mid_run_is_planned_anew():
    model = nn.Linear(64, 4, bias=False)
    opt = rules.optimizer(model, rules.sgd(lr=1e-4))
    trained(opt, [model.weight], 1)
    model.bfloat16()
    nn.init.ones_(model.weight)
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
    assert 1 - model.weight.float().mean().item() == pytest.approx(0.01, abs=4.5e-3)
    assert "compensation" in opt.state[model.weight]
    model.double()
    trained(opt, [model.weight], 1)
    assert "compensation" not in opt.state[model.weight]


def test_frozen_parameters_weigh_nothing_until_they_are_thawed():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)).double()
    model[0].requires_grad_(False)
    for opt in (rules.optimizer(model, rules.adam()), rules.optimizer(model.parameters(), rules.adam())):
        model[0].requires_grad_(False)
        before = model[0].weight.detach().clone()
        trained(opt, list(model.parameters()))
        assert model[0].weight not in opt.state
        assert {r.rule for r in opt.explain().rows} == {"adam", "frozen"}
        model[0].requires_grad_(True)
        trained(opt, list(model.parameters()))
        assert not torch.equal(model[0].weight, before)
        assert opt.state[model[0].weight]["step"] == 3


def test_one_cycle_resumes_from_a_checkpoint():
    def make():
        (p,) = some((3,))
        return p, rules.optimizer([p], rules.adamw(lr=0.1))

    p, opt = make()
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=20)
    for step in range(4):
        trained(opt, [p], 1, step)
        schedule.step()
    q, resumed = make()
    resumed.load_state_dict(opt.state_dict())
    again = torch.optim.lr_scheduler.OneCycleLR(resumed, 0.5, total_steps=20, last_epoch=3)
    for step in range(4, 8):
        trained(opt, [p], 1, step)
        trained(resumed, [q], 1, step)
        schedule.step()
        again.step()
    assert resumed.param_groups[0]["betas"] == opt.param_groups[0]["betas"] != (0.9, 0.999)


def test_roles_by_use_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[2].eval()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    assert roles(model, inputs=torch.randn(5, 3, generator=torch.Generator()))["3.weight"] == "head"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]


def test_a_single_block_has_no_head_and_an_adaptive_softmax_is_one():
    assert "head" not in roles(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)).values()
    assert "head" not in roles(nn.TransformerEncoderLayer(8, 2, 16)).values()
    model = nn.Sequential(nn.Linear(4, 8), nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10]))
    found = roles(model)
    assert found["0.weight"] == "hidden"
    assert {r for n, r in found.items() if n.startswith("1.") and n.endswith("weight")} == {"head"}


def test_an_arm_named_by_its_role_comes_before_matrices():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = rules.optimizer(model, rules.route(matrices=rules.muon(), conv=rules.lion(), rest=rules.adamw()))
    table = {r.name: r.rule for r in opt.explain().rows}
    assert (table["0.weight"], table["2.weight"], table["3.weight"]) == ("lion", "muon", "adamw")


def test_a_late_group_of_a_route_must_name_its_rule():
    opt = rules.optimizer(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), rules.muon())
    late = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="rule=None: this optimizer plays muon, adamw; say which"):
        opt.add_param_group({"params": [late]})
    with pytest.raises(ValueError, match="rule='lion'"):
        opt.add_param_group({"params": [late], "rule": "lion"})
    opt.add_param_group({"params": [late], "rule": "muon"})
    late.grad = torch.randn(4, 4)
    opt.step()
    assert set(opt.state[late]) == {"step", "exp_avg"}
    with pytest.raises(ValueError, match="is for real matrices"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(4))], "rule": "muon"})
    assert len(opt.param_groups) == 3


def test_lr_0_is_the_identity_for_short_weights_too():
    (p,) = some((30, 1000), dtype=torch.bfloat16)
    opt = rules.optimizer([p], rules.adamw(lr=1e-2))
    trained(opt, [p], 20)
    opt.param_groups[0]["lr"] = 0.0
    before = p.detach().clone()
    trained(opt, [p], 3)
    assert torch.equal(p, before)


def test_uncoupled_decay_follows_an_lr_set_by_hand():
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = rules.optimizer([p], rules.adamw(lr=0.1, weight_decay=0.5, uncoupled=True))
    opt.param_groups[0]["lr"] = 0.01
    p.grad = torch.zeros_like(p)
    opt.step()
    assert p.item() == pytest.approx(0.95)


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_each_model_of_a_population_may_have_knobs_of_its_own(name, engine):
    def models():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double() for _ in range(3)]

    def rule(**knobs):
        made = getattr(rules, name)(**knobs)
        return rules.route(matrices=made, rest=rules.adamw(**knobs)) if name == "muon" else made

    lr, decay = torch.tensor([[1e-3, 3e-2, 1e-1], [0.0, 0.1, 0.5]], dtype=torch.float64)
    together, alone = models(), models()
    opt = rules.optimizer(together, rule(lr=lr, weight_decay=decay), engine=engine)
    trained(opt, [p for m in together for p in m.parameters()])
    for i, model in enumerate(alone):
        opt = rules.optimizer(model, rule(lr=float(lr[i]), weight_decay=float(decay[i])))
        seeded = torch.Generator().manual_seed(0)
        for _ in range(3):
            for j, m in enumerate(alone):
                for p in m.parameters():
                    g = torch.randn(p.shape, generator=seeded, dtype=torch.float64)
                    p.grad = g if j == i else None
            opt.step()
    for a, b in zip(together, alone):
        assert max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters())) <= 1e-12


def test_a_population_checks_its_knobs_and_shares_no_parameter():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"lr of shape \(3,\): a knob is one number, or one for each of 2 models"):
        rules.optimizer([a, b], rules.sgd(lr=torch.ones(3)))
    b.weight = a.weight
    with pytest.raises(ValueError, match=r"1.weight is also a parameter of model 0"):
        rules.optimizer([a, b], rules.sgd())


def test_clip_norm_over_models_of_two_types():
    models = [nn.Linear(3, 2), nn.Linear(3, 2).double()]
    opt = rules.optimizer(models, rules.chain(rules.ClipNorm(0.1), rules.Scale(1.0)))
    before = [p.detach().clone() for m in models for p in m.parameters()]
    ps = [p for m in models for p in m.parameters()]
    trained(opt, ps, 1)
    for i in (0, 2):
        moved = sum((p - b).square().sum().item() for p, b in zip(ps[i : i + 2], before[i : i + 2])) ** 0.5
        assert moved == pytest.approx(0.1, rel=1e-3)


def test_state_has_the_names_of_torch_whatever_the_order_of_the_parts():
    (p,) = some((3,))
    opt = rules.optimizer([p], rules.chain(rules.Rms(), rules.Ema(), rules.Ema(0.5), rules.Scale()))
    trained(opt, [p], 1)
    assert set(opt.state[p]) == {"step", "exp_avg_sq", "exp_avg", "exp_avg_2"}
    assert set(opt.param_groups[0]) >= {"beta", "beta_2", "beta_3", "eps", "lr"}


def test_a_kahan_checkpoint_goes_on_with_other_rounding_and_other_types():
    ps = some((4, 4), dtype=torch.bfloat16)
    opt = rules.optimizer(ps, rules.adam())
    trained(opt, ps)
    for dtype, rounding in ((torch.bfloat16, "nearest"), (torch.float32, "kahan")):
        fresh = some((4, 4), dtype=dtype)
        taken = rules.optimizer(fresh, rules.adam(), rounding=rounding)
        taken.load_state_dict(opt.state_dict())
        assert set(taken.state[fresh[0]]) == {"step", "exp_avg", "exp_avg_sq"}
        trained(taken, fresh)


def test_a_load_that_fails_changes_nothing_and_hooks_see_the_state():
    ps = some((2, 2))
    opt = rules.optimizer(ps, rules.adam())
    trained(opt, ps)
    broken = opt.state_dict()
    broken["state"] = {0: {"exp_avg": torch.zeros(2, 2, dtype=torch.float64)}}
    kept = opt.state[ps[0]]["exp_avg"].clone()
    with pytest.raises(ValueError, match=r"0.0: the checkpoint holds exp_avg; adam keeps exp_avg, exp_avg_sq, step"):
        opt.load_state_dict(broken)
    assert torch.equal(opt.state[ps[0]]["exp_avg"], kept)
    seen = []
    opt.register_load_state_dict_pre_hook(lambda _, sd: seen.append(len(sd["state"])))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    opt.load_state_dict(opt.state_dict())
    assert seen == [1, 1]


def test_memory_refuses_what_the_optimizer_would_refuse():
    with pytest.raises(TypeError, match="roundng"):
        rules.memory(rules.adam(), nn.Linear(2, 2), roundng="kahan")
    assert rules.memory(rules.adam(), [nn.Linear(2, 2), nn.Linear(2, 2)]) == 2 * (6 * 4 * 2 + 2 * 8)


@dataclass(frozen=True)
class Centred(rules.Part):
    """u less its mean along the longer axis: a branch, settled when the kernel is traced."""

    width: ClassVar = "matrix"

    def __call__(self, u, g, w, s, c):
        return u - u.mean(2 if u.shape[2] >= u.shape[1] else 1, keepdim=True)


@pytest.mark.parametrize("parts", [[Centred()], [rules.Standardize(), rules.Resize(1.0)]], ids=["branch", "root"])
def test_a_kernel_made_for_one_shape_is_not_played_on_another(parts):
    for shape in ((4, 3), (4, 3), (16, 12), (12, 16), (5, 1), (1, 5)):
        moved = []
        for engine in ("compiled", "eager"):
            p = nn.Parameter(torch.zeros(shape))
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
            rules.optimizer([p], rules.chain(*parts, rules.Scale(1.0)), engine=engine).step()
            moved.append(p.detach())
        torch.testing.assert_close(*moved)


def test_a_kernel_made_for_matrices_is_not_played_on_vectors():
    moved = []
    for engine in ("compiled", "eager"):
        draw = torch.Generator().manual_seed(3)
        ps = [nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (4,), (5, 3, 2), (5,), (4, 6))]
        opt = rules.optimizer(ps, rules.adahessian(), engine=engine)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=draw)
            p.hessian = p.grad.square()
        opt.step()
        moved.append([p.detach() for p in ps])
    torch.testing.assert_close(*moved)


def test_a_kernel_is_built_where_the_compilers_fusion_of_outer_loops_trips(caplog):
    moved = []
    for engine in ("compiled", "eager"):
        ps = some((6, 4), (6, 4))
        opt = rules.optimizer(ps, rules.lars(weight_decay=0.1), engine=engine)
        trained(opt, ps)
        moved.append([p.detach() for p in ps])
    torch.testing.assert_close(*moved)
    assert not [r for r in caplog.records if r.name == "etude" and r.levelname == "WARNING"]


@dataclass(frozen=True)
class LateNumber(rules.Part):
    """2 u from the third step on, by a number that was not there before."""

    def clock(self, t):
        return {"factor": 2.0} if t > 2 else {}

    def __call__(self, u, g, w, s, c):
        return u * c.factor if "factor" in vars(c) else u.clone()


@pytest.mark.parametrize("part", [LateNumber(), rules.Fall(), rules.Ema(0.9, debias=True)], ids=str)
def test_a_kernel_kept_from_the_last_step_still_sees_what_changed_since(part, monkeypatch):
    monkeypatch.setattr("etude.rules._bucket.SMALL", 1)
    moved = []
    for engine in ("compiled", "eager"):
        draw = torch.Generator().manual_seed(3)
        p = nn.Parameter(torch.ones(6, 6))
        opt = rules.optimizer([p], rules.chain(part, rules.Scale(0.1)), engine=engine)
        opt.step()
        for t in range(16):
            p.grad = None
            if t == 5:
                p.data = p.data.clone()
            if t == 7:
                p.data = p.data.t()
            if t == 8:
                p.data = p.data.contiguous()
            if t in (10, 12):
                p.data = p.data.view((4, 9) if t == 10 else (6, 6))
            if t == 13:
                opt.param_groups[0]["lr"] = 0.3
                opt.state[p]["step"].add_(5)
            opt.maximize = t > 14
            if t != 4:
                p.grad = torch.randn(p.shape, generator=draw)
            if t == 3:
                p.grad = p.grad.t()
            before = p._version
            opt.step()
            assert (p._version > before) == (p.grad is not None)
        moved.append(p.detach())
    torch.testing.assert_close(*moved)


def test_a_kernel_is_kept_from_the_last_step_for_large_tensors_alone(monkeypatch):
    kept = []
    monkeypatch.setattr("etude.rules._kernel.Ready.play", lambda self, g, floats: kept.append(g.shape))
    ps = some((200, 200), (4,), (3, 2))
    opt = rules.optimizer(ps, rules.adam(), engine="compiled")
    trained(opt, ps, steps=3)
    assert kept == [(200, 200)] * 2


def test_a_first_step_at_lr_0_that_tells_nothing_allocates_where_a_rule_must_be_told_something():
    """As torch.distributed.checkpoint makes an optimizer allocate; any other step is one, or says what it needs."""
    for rule, told, counted in (("adamw", False, 1), ("sania", False, 0), ("sophia", False, 0), ("sophia", True, 1)):
        ps = some((3, 3))
        ps[0].grad = torch.zeros_like(ps[0])
        if told:
            ps[0].hessian = torch.ones_like(ps[0])
        opt = etude.optimizer(rule, ps, lr=0.0)
        opt.step()
        assert opt.state[ps[0]]["step"] == counted
        assert "exp_avg_sq" in opt.state[ps[0]] or "exp_avg" in opt.state[ps[0]]
    for rule, line in (("sania", "reads the loss: step"), ("sophia", "reads an estimate of the Hessian")):
        for lr in (0.0, 0.1):  # the second step at 0, the first at another rate
            ps = some((3, 3))
            ps[0].grad = torch.ones_like(ps[0])
            opt = etude.optimizer(rule, ps, lr=lr)
            if not lr:
                opt.step()
            with pytest.raises(ValueError, match=line):
                opt.step()
