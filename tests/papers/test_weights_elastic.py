"""What the papers of the adapters with a moving rank say; peft as reference."""

import pytest
import torch
from adapters import against_peft, count, on
from torch import nn

from etude import weights

peft = pytest.importorskip("peft")
F64 = torch.float64


class Beside(nn.Sequential):
    """Its layers side by side, so that none can learn what another should."""

    def forward(self, x):
        return torch.cat([layer(x) for layer in self], -1)


def layers(n):
    return Beside(*(nn.Linear(6, 6, dtype=F64) for _ in range(n)))


def model(map, n=2):
    torch.manual_seed(0)
    return weights.freeze(weights.put(layers(n), map, on="*"))


def maps(net):
    return [m for m in net.modules() if isinstance(m, weights.Adapter)]


def teach(net, target, steps, budget, lr=0.02):
    """Adam on a linear teacher, with an allocation step after each backward."""
    opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    if hasattr(budget, "optimizer"):
        budget.optimizer = opt
    x = torch.randn(64, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        opt.zero_grad()
        loss = (net(x) - target(x)).square().mean()
        loss.backward()
        opt.step()
        budget.step()
    return loss.item()


def test_adalora_equals_peft():
    config = peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, lora_alpha=7, target_modules=["0"])
    theta = {"A": "lora_A", "E": "lora_E", "B": "lora_B"}
    against_peft(weights.adalora(r=3, alpha=7.0), config, theta)


def test_adalora_starts_from_gaussians_of_deviation_one_fiftieth_and_no_singular_value():
    layer, map, w = on(nn.Linear(300, 200), weights.adalora(r=12))
    assert torch.equal(layer.weight, w)
    assert map.A.std().item() == pytest.approx(0.02, rel=0.05)
    assert map.B.std().item() == pytest.approx(0.02, rel=0.05)
    assert count(map) == 12 * (300 + 200 + 1)


@pytest.mark.parametrize("warmup, every", [((0, 0), 1), ((2, 3), 2)])
def test_adalora_prunes_as_peft_does(warmup, every):
    """The same gradients, step by step: the same triplets live."""
    net = model(weights.adalora(r=4, alpha=4.0))
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=12, tinit=warmup[0], tfinal=warmup[1], deltaT=every, lora_alpha=4,
        target_modules=["0", "1"],
    )  # fmt: skip
    theirs = peft.get_peft_model(layers(2), config).double()
    ours, their = maps(net), [m for m in theirs.modules() if hasattr(m, "lora_E")]
    allocator = theirs.base_model.rankallocator
    budget = weights.RankBudget(net, 12, target_r=2, warmup=warmup, every=every)
    pairs = [(m.get_parameter(k), getattr(t, f"lora_{k}")["default"]) for m, t in zip(ours, their) for k in "AEB"]
    with torch.no_grad():
        for p, q in pairs:
            p.normal_()
            q.copy_(p)
    kept = None
    for step in range(1, 13):
        for p, q in pairs:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            with torch.no_grad():
                p.add_(0.1 * p.grad)
                q.copy_(p)
        budget.step()
        if step < 12 - warmup[1]:
            if step > warmup[0] or warmup[0] == 0:
                allocator.update_and_allocate(theirs, step)
            else:
                allocator.update_ipt(theirs)
        elif step == 12 - warmup[1]:
            _, kept = allocator.update_and_allocate(theirs, step, force_mask=True)
        else:
            allocator.mask_using_rank_pattern(theirs, kept)
        for m, t in zip(ours, their):
            torch.testing.assert_close(m.E, t.lora_E["default"])
    assert sum(int((m.E != 0).sum()) for m in ours) == 4


def test_adalora_has_a_budget_that_falls_as_a_cube():
    budget = weights.RankBudget(model(weights.adalora(r=5)), 20, target_r=1, warmup=(5, 5))
    seen = {}
    for t in (0, 5, 10, 15, 20):
        budget.t = t
        seen[t] = budget.budget
    assert seen == {0: 10, 5: 10, 10: 2 + 8 // 8, 15: 2, 20: 2}


def test_adalora_keeps_the_ranks_where_the_teacher_needs_them():
    net, target = model(weights.adalora(r=4, alpha=8.0)), layers(2)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer, mine in zip(target, net):
            layer.weight.copy_(mine.parametrizations.weight.original)
            layer.bias.copy_(mine.bias)
        target[1].weight.add_(3 * torch.randn(6, 3, dtype=F64) @ torch.randn(3, 6, dtype=F64))
    teach(net, target, 150, weights.RankBudget(net, 150, target_r=2, warmup=(20, 30)))
    alive = [int((m.E != 0).sum()) for m in maps(net)]
    assert sum(alive) == 4
    assert alive == [0, 4]


def test_adalora_needs_gradients_and_a_budget_it_can_reach():
    net = model(weights.adalora(r=2))
    with pytest.raises(ValueError, match="has no gradient: call step"):
        weights.RankBudget(net, 10, target_r=1).step()
    with pytest.raises(ValueError, match="target_r=3 in the mean is more than the adapters have: 4"):
        weights.RankBudget(net, 10, target_r=3)


def test_elalora_is_the_map_of_adalora():
    layer, map, w = on(nn.Linear(7, 5), weights.elalora(r=3, alpha=6.0))
    nn.init.normal_(map.E)
    change = 6.0 / (3 + 1e-5) * map.B @ map.E.flatten().diag() @ map.A
    torch.testing.assert_close(layer.weight, w + change)


def test_elalora_moves_ranks_to_the_adapter_the_teacher_needs_and_keeps_their_sum():
    net, target = model(weights.elalora(r=3), 3), layers(3)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer, mine in zip(target, net):
            layer.weight.copy_(mine.parametrizations.weight.original)
            layer.bias.copy_(mine.bias)
        target[2].weight.add_(3 * torch.randn(6, 6, dtype=F64))
    teach(net, target, 60, weights.RankMigration(net, 60, k=2, b=1, warmup=(10, 10), every=10))
    ranks = [len(m.E) for m in maps(net)]
    assert sum(ranks) == 9
    assert ranks[2] == max(ranks) > 3


def scored(net, values):
    """A migration whose scores are these: of E alone."""
    moving = weights.RankMigration(net, 10, k=2, b=1)
    for mean, doubt, row in zip(moving.seen.mean, moving.seen.doubt, values, strict=True):
        mean["E"].copy_(torch.tensor(row, dtype=F64)[:, None])
        doubt["E"].fill_(1.0)
    return moving


def test_elalora_grows_where_even_the_weak_triplets_matter():
    """The pool holds the two weakest of each; the strongest of all (9) is in no pool and says nothing."""
    net = model(weights.elalora(r=3))
    first, second = maps(net)
    moving = scored(net, [[9.0, 0.1, 0.2], [0.5, 0.6, 0.7]])
    for m in (first, second):
        nn.init.normal_(m.E)
    kept, x = first.E[[0, 2]].clone(), torch.randn(4, 6, dtype=F64)
    w = second.forward(net[1].parametrizations.weight.original)
    moving._move()
    assert (len(first.E), len(second.E)) == (2, 4)
    assert torch.equal(first.E, kept)
    assert second.E[-1].item() == 1e-13
    torch.testing.assert_close(net[1].weight, w, rtol=0, atol=1e-11)  # expanding changes nothing
    assert net(x).isfinite().all()
    new = second.A[-1]
    assert new.norm().item() == pytest.approx(1.0)
    assert (second.A[:-1] @ new).abs().max() < 1e-12
    assert (second.B[:, :-1].mT @ second.B[:, -1]).abs().max() < 1e-12
    assert moving.seen.mean[1]["E"].flatten().tolist() == [0.5, 0.6, 0.7, 0.0]


def test_elalora_keeps_the_optimizer_up_and_its_files_hold_the_ranks(tmp_path):
    net = model(weights.elalora(r=3))
    moving = scored(net, [[9.0, 0.1, 0.2], [0.5, 0.6, 0.7]])
    moving.optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
    moving._move()
    held = {id(p) for g in moving.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}
    for m in maps(net):
        nn.init.normal_(m.E)
    bare = model(weights.elalora(r=3))
    weights.remove(bare)
    loaded = weights.load(bare, weights.save(net, tmp_path))
    x = torch.randn(4, 6, dtype=F64)
    assert torch.equal(loaded(x), net(x))
    assert [len(m.E) for m in maps(loaded)] == [2, 4]


def test_elalora_leaves_every_adapter_a_rank():
    net = model(weights.elalora(r=1))
    moving = weights.RankMigration(net, 10)
    moving._move()
    assert [len(m.E) for m in maps(net)] == [1, 1]
