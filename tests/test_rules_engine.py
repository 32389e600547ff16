"""The engine's own promises: roles and routes, bfloat16, checkpoints between libraries, bad input in one clear line."""

from __future__ import annotations

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
        a, rules.route(matrices=rules.muon(), rest=rules.sgd(lr=0.1)), roles={"position": "embedding"}
    )
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
    with pytest.raises(ValueError, match=r"position \(5, 8\).*roles=\{'position': 'embedding'\}"):
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
        (lambda: rules.adam(lr=-1.0), r"lr=-1.0\): lr must be in"),
        (lambda: rules.adam(betas=(1.0, 0.9)), r"beta=1.0\): beta must be in \[0, 1.0\)"),
        (lambda: rules.sgd(nesterov=True), "needs a momentum"),
        (lambda: etude.optimizer("adamv", nn.Linear(3, 2)), "adamw"),
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
    state = opt.state_dict()
    for entry in state["state"].values():
        entry.setdefault("step", torch.tensor(4))  # SGD and Lion keep no count
    taken.load_state_dict(state)
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
