"""What several processes do together in test_rules_sharded.py. Each case is a function of (rank, world, folder)."""

from __future__ import annotations

import contextlib
import copy
import datetime
import faulthandler
import pickle
import traceback

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from etude import rules
from etude._method import methods
from etude.rules._averaged import averages
from tests.parts import CHAINS

VALUES = {name: m.fn for (room, name), m in methods().items() if room == "rules"} | CHAINS
BY_HAND = {
    "clipped": lambda: rules.chain(rules.ClipNorm(0.5), rules.Ema(0.9), rules.Rms(0.99), rules.Scale(1e-2)),
    "clipped late": lambda: rules.chain(rules.Ema(0.9), rules.ClipNorm(0.5), rules.TrustRatio(), rules.Scale(1e-2)),
    "cautious by hand": lambda: rules.chain(rules.Ema(0.9), rules.Cautious(), rules.Decay(0.1), rules.Scale(1e-2)),
    "twice whole": lambda: rules.chain(
        rules.Ema(0.9), rules.Polar(), rules.TrustRatio(), rules.Rms(0.9), rules.Cautious(), rules.Scale(1e-2)
    ),
}
VALUES |= BY_HAND


def model(dtype=torch.float64):
    """Rows that two or three processes share unevenly, and a layer of one row, of which the others have none."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 1), nn.Linear(1, 7), nn.Linear(7, 5),
              nn.Linear(5, 4)]  # fmt: skip
    return nn.Sequential(*layers).to(dtype)


def sharded(whole, mesh=None):
    shards = copy.deepcopy(whole)
    for layer in shards:
        fully_shard(layer, mesh=mesh)
    return fully_shard(shards, mesh=mesh)


def reads(opt, what):
    return any(what in part.reads for rule in opt.rules for part in rule.parts)


def give(m, seed):
    """One gradient for whole and sharded models alike."""
    seeded = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        g = torch.randn(p.shape, generator=seeded, dtype=torch.float64).to(p.dtype)
        h = g * g + 0.1
        if hasattr(p, "placements"):
            g, h = (distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) for x in (g, h))
        p.grad, p.hessian = g, h


def advance(opt, m, steps, seed=0):
    for step in range(steps):
        give(m, seed + step)
        opt.step(lambda: 0.7) if reads(opt, "loss") else opt.step()


def full(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def far(a, b):
    return max(((full(p) - full(q)).abs().max() / full(q).abs().max()).item() for p, q in zip(a, b))


def same(a, b, tolerance=1e-12):
    found = far(a.parameters(), b.parameters())
    assert found <= tolerance, f"{found} apart"


def every_rule(name):
    def case(rank, world, folder):
        whole = model()
        shards = sharded(whole)
        one, two = rules.optimizer(shards, VALUES[name]()), rules.optimizer(whole, VALUES[name]())
        told = rules.memory(VALUES[name](), shards)
        for m, opt in ((shards, one), (whole, two)):
            advance(opt, m, 4)
        same(shards, whole)
        kept = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for s in one.state.values()
            for x in (getattr(v, "_local_tensor", v) for v in s.values())
            if x.numel()
        }
        assert told == sum(r.state_bytes for r in one.explain().rows)
        assert told == sum(kept.values()), (told, sum(kept.values()))

    return case


def compiled(rank, world, folder):
    for name in ("adamw", "lamb"):
        whole = model()
        shards = sharded(whole)
        one, two = rules.optimizer(shards, VALUES[name](), engine="compiled"), rules.optimizer(whole, VALUES[name]())
        for m, opt in ((shards, one), (whole, two)):
            advance(opt, m, 3)
        same(shards, whole)


def reference(rank, world, folder):
    for name in ("adamw", "lamb", "travelled"):
        whole = model()
        shards = sharded(whole)
        one, two = rules.optimizer(shards, VALUES[name](), engine="reference"), rules.optimizer(whole, VALUES[name]())
        for m, opt in ((shards, one), (whole, two)):
            advance(opt, m, 3)
        same(shards, whole)


def short_floats(rank, world, folder):
    """What is drawn depends on the place in the whole tensor, so shards round as the whole does."""
    for rounding in ("stochastic", "kahan"):
        whole = model(torch.bfloat16)
        shards = sharded(whole)
        opts = [rules.optimizer(m, rules.adamw(lr=1e-3), rounding=rounding) for m in (shards, whole)]
        for m, opt in zip((shards, whole), opts):
            advance(opt, m, 4)
        assert all(torch.equal(full(p), q.detach()) for p, q in zip(shards.parameters(), whole.parameters()))


def other_axis(rank, world, folder):
    """Sharded along another axis than the first, as tensor parallelism does."""
    whole = model()
    mesh, shards = init_device_mesh("cpu", (world,)), copy.deepcopy(whole)
    for layer in shards:
        for n, p in list(layer.named_parameters()):
            cut = distribute_tensor(p.detach(), mesh, [Shard(p.ndim - 1)], src_data_rank=None)
            setattr(layer, n, nn.Parameter(cut))
    rule = rules.route(matrices=VALUES["twice whole"](), rest=rules.lamb())
    for m in (shards, whole):
        advance(rules.optimizer(m, rule), m, 4)
    same(shards, whole)


def replicated_and_sharded(rank, world, folder):
    """Hybrid sharding: sums run over shards, never over replicas."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard"))
    for name in ("muon", "clipped late", "travelled", "along"):
        whole = model()
        shards = sharded(whole, mesh)
        for m in (shards, whole):
            advance(rules.optimizer(m, VALUES[name]()), m, 4)
        same(shards, whole)


def trained(m, opt, world, rank, steps=3, whole=False):
    for step in range(steps):
        x = torch.randn(world, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        batches = x if whole else x[rank : rank + 1]
        opt.zero_grad()
        (sum(m(b).square().mean() for b in batches) / len(batches)).backward()
        opt.step()


def trains_under_fsdp(rank, world, folder):
    whole = model()
    shards = sharded(whole)
    for m in (shards, whole):
        opt = rules.optimizer(m, rules.muon())
        trained(m, opt, world, rank, whole=m is whole)
    same(shards, whole)


def trains_under_ddp(rank, world, folder):
    for name in ("adamw", "lamb", "muon", "clipped", "travelled"):
        whole = model()
        mine = copy.deepcopy(whole)
        parallel = nn.parallel.DistributedDataParallel(mine)
        trained(parallel, rules.optimizer(mine, VALUES[name]()), world, rank)
        trained(whole, rules.optimizer(whole, VALUES[name]()), world, rank, whole=True)
        same(mine, whole)


RESUMED = ("adamw", "muon", "along", "split", "travelled", "halved", "sania", "sophia", "alr_hb")


def saves(rank, world, folder):
    for name in RESUMED:
        shards = sharded(model())
        opt = rules.optimizer(shards, VALUES[name]())
        advance(opt, shards, 3)
        state = {"model": get_model_state_dict(shards), "opt": get_optimizer_state_dict(shards, opt)}
        dcp.save(state, checkpoint_id=f"{folder}/{name}")


def resumes(rank, world, folder):
    for name in RESUMED:
        whole = model()
        shards = sharded(whole)
        with torch.no_grad():
            for p in shards.parameters():
                p.zero_()
        opt = rules.optimizer(shards, VALUES[name]())
        state = {"model": get_model_state_dict(shards), "opt": get_optimizer_state_dict(shards, opt)}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(shards, state["model"])
        set_optimizer_state_dict(shards, opt, state["opt"])
        again = rules.optimizer(whole, VALUES[name]())
        advance(again, whole, 3)
        same(shards, whole)
        for m, o in ((shards, opt), (whole, again)):
            advance(o, m, 3, seed=50)
        same(shards, whole)


def takes_a_checkpoint_of_one_process(rank, world, folder):
    for name in ("adamw", "muon", "along", "travelled"):
        whole = model()
        one = rules.optimizer(whole, VALUES[name]())
        advance(one, whole, 3)
        shards = sharded(whole)
        opt = rules.optimizer(shards, VALUES[name]())
        opt.load_state_dict(one.state_dict())
        for m, o in ((shards, opt), (whole, one)):
            advance(o, m, 2, seed=50)
        same(shards, whole)


def gives_a_checkpoint_of_one_process(rank, world, folder):
    for name in ("adamw", "muon", "travelled"):
        whole = model()
        shards = sharded(whole)
        opt = rules.optimizer(shards, VALUES[name]())
        advance(opt, shards, 3)
        options = StateDictOptions(full_state_dict=True)
        told = get_optimizer_state_dict(shards, opt, options=options)
        weights = get_model_state_dict(shards, options=options)
        whole.load_state_dict({k: full(v) for k, v in weights.items()})
        one = rules.optimizer(whole, VALUES[name]())
        set_optimizer_state_dict(whole, one, told)
        for m, o in ((shards, opt), (whole, one)):
            advance(o, m, 2, seed=50)
        same(shards, whole)


def matrices_have_owners(rank, world, folder):
    shards = sharded(model())
    opt = rules.optimizer(shards, VALUES["along"]())
    advance(opt, shards, 1)
    rows = {r.name: r for r in opt.explain().rows}
    sizes = {n: p.numel() for n, p in shards.named_parameters()}
    load = [sum(sizes[n] for n, r in rows.items() if r.owner == k) for k in range(world)]
    assert max(load) - min(load) <= max(sizes.values())
    for name, p in shards.named_parameters():
        mine, here = rows[name].owner == rank, p.to_local().numel()
        assert rows[name].sent == 8 * (sizes[name] - here if mine else here)  # u to the owner, or back from it
        assert ("rows" in opt.state[p]) == mine
    shown = str(opt.explain())
    assert "owner" in shown
    assert f"{sum(r.sent for r in rows.values()):,} bytes sent a step" in shown
    counted = []
    real = dist.all_to_all_single

    def counting(out, flat, there, here, group):
        counted.append(8 * (flat.numel() - here[rank]))
        return real(out, flat, there, here, group=group)

    dist.all_to_all_single = counting
    advance(opt, shards, 1)
    dist.all_to_all_single = real
    assert sum(counted) == sum(r.sent for r in rows.values())
    assert len(counted) == 2, "all matrices in one exchange each way"


def owners_stay_when_layers_thaw_and_groups_come(rank, world, folder):
    whole = model()
    shards = sharded(whole)
    opts = []
    for m in (shards, whole):
        m[2].requires_grad_(False)
        opt = rules.optimizer([(n, p) for n, p in m.named_parameters() if n != "0.weight"], VALUES["split"]())
        m[2].weight.grad = None
        advance_but(opt, m, 2)
        m[2].requires_grad_(True)
        opt.add_param_group({"params": [m[0].weight]})
        advance(opt, m, 2, seed=9)
        opts.append(opt)
    same(shards, whole)


def advance_but(opt, m, steps):
    for step in range(steps):
        give(m, step)
        for p in m[2].parameters():
            p.grad = None
        opt.step()


def fused_projections(rank, world, folder):
    """Weights that hold several matrices, by rows and by columns, go to their owner whole and are split there."""
    for name in ("muon", "halved"):
        whole = model()
        shards = sharded(whole)
        both = {"2.weight": 7, "5.weight": 5}
        opts = [
            rules.optimizer(m, rules.route(matrices=VALUES[name](), rest=rules.adamw()), split=both)
            for m in (shards, whole)
        ]
        for opt in opts:
            for g in opt.param_groups:
                g["split"] = [[1, 7] if at == [0, 5] else at for at in g.get("split", [None] * len(g["params"]))]
        for m, opt in zip((shards, whole), opts):
            advance(opt, m, 4)
        same(shards, whole)


def weights_to_evaluate(rank, world, folder):
    averaging = [name for name, make in VALUES.items() if isinstance(make(), rules.Chain) and averages(make())]
    assert averaging
    for name in averaging:
        whole = model()
        shards = sharded(whole)
        opts = [rules.optimizer(m, VALUES[name]()) for m in (shards, whole)]
        for m, opt in zip((shards, whole), opts):
            advance(opt, m, 3)
            opt.eval()
        same(shards, whole)
        for m, opt in zip((shards, whole), opts):
            opt.train()
            advance(opt, m, 2)
        same(shards, whole)


def refusals(rank, world, folder):
    with contextlib.suppress(ValueError):
        rules.optimizer([sharded(model()), sharded(model())], rules.adamw())
        raise AssertionError("a sharded population was taken")


CASES = {f"rule {name}": every_rule(name) for name in VALUES} | {
    f.__name__: f
    for f in (
        compiled, reference, short_floats, other_axis, trains_under_fsdp, trains_under_ddp, saves, resumes,
        takes_a_checkpoint_of_one_process, gives_a_checkpoint_of_one_process, matrices_have_owners,
        owners_stay_when_layers_thaw_and_groups_come, fused_projections, weights_to_evaluate,
        refusals,
    )
}  # fmt: skip
ELSEWHERE = {f.__name__: f for f in (resumes, replicated_and_sharded)}
"""Cases that another number of processes plays."""


def play(rank, world, folder, names):
    """All cases in one go: to start the processes costs more than any of them."""
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    cases = {**CASES, **ELSEWHERE}
    told = dict.fromkeys(names, "not played: a case before it failed, and left the processes out of step")
    for name in names:
        torch.manual_seed(0)
        try:
            cases[name](rank, world, folder)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
            break
    with open(f"{folder}/told-{world}-{rank}", "wb") as file:
        pickle.dump(told, file)
    if all(not error for error in told.values()):
        dist.destroy_process_group()
