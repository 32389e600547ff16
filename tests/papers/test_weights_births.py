"""What the papers of LoRA's births say; peft and closed forms as references."""

import copy
import itertools

import pytest
import torch
from torch import nn

from etude import weights

F64 = torch.float64


def model(*widths):
    torch.manual_seed(5)
    pairs = list(itertools.pairwise(widths))
    return nn.Sequential(*(m for i, o in pairs for m in (nn.Linear(i, o, dtype=F64), nn.Tanh())))[:-1]


def born(map, layer=None, **data):
    """A layer with the map just born on it, the weight before, and the map."""
    layer = layer or model(7, 5)[0]
    w = layer.weight.detach().clone()
    weights.put(layer, map, on="weight", **data)
    return layer, w, layer.parametrizations.weight[0]


def left(layer):
    """What stays frozen: W without the product of the trained factors."""
    lora = layer.parametrizations.weight[0]
    return (layer.weight - lora.scale * lora.B @ lora.A).detach()


def peft_linear(layer, inputs=None, **config):
    """A and B, and the frozen weight, as peft makes them on a copy of the layer."""
    peft = pytest.importorskip("peft")
    net = nn.Sequential(copy.deepcopy(layer).float())
    config = peft.LoraConfig(target_modules=["0"], **config)
    theirs = peft.get_peft_model(net, config).base_model.model[0]
    return theirs.lora_A["default"].weight.double(), theirs.lora_B["default"].weight.double(), theirs.base_layer.weight


# -- from the weight alone --------------------------------------------------------------------------------------------


def test_lora_init_gives_the_first_gradient_to_one_factor_only():
    for random, moves, rests in (("A", "B", "A"), ("B", "A", "B")):
        layer, w, lora = born(weights.lora_init(r=3, random=random))
        assert torch.equal(layer.weight, w)
        assert getattr(lora, moves).count_nonzero() == 0 < getattr(lora, rests).count_nonzero()
        layer(torch.randn(4, 7, dtype=F64)).square().sum().backward()
        assert getattr(lora, rests).grad.count_nonzero() == 0 < getattr(lora, moves).grad.count_nonzero()


@pytest.mark.parametrize("random, fan_in", [("A", 400), ("B", 60)])
def test_lora_init_draws_the_random_factor_with_variance_over_its_fan_in(random, fan_in):
    _, _, lora = born(weights.lora_init(r=60, random=random), nn.Linear(400, 300))
    assert getattr(lora, random).var().item() == pytest.approx(1 / (3 * fan_in), rel=0.05)


@pytest.mark.parametrize("alpha", [2.0, 5.0])
def test_pissa_trains_the_truncated_svd_and_freezes_the_rest(alpha):
    layer, w, lora = born(weights.pissa(r=2, alpha=alpha))
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(lora.scale * lora.B @ lora.A, (u[:, :2] * s[:2]) @ v[:2])
    torch.testing.assert_close(left(layer), (u[:, 2:] * s[2:]) @ v[2:])
    torch.testing.assert_close(lora.B.norm(dim=0), lora.A.norm(dim=1), msg="S is shared evenly")
    torch.testing.assert_close(layer.weight, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method, init", [(weights.pissa, "pissa"), (weights.olora, "olora")])
def test_pissa_and_olora_equal_peft(method, init):
    layer, _, lora = born(method(r=3, alpha=6.0))
    a, b, frozen = peft_linear(model(7, 5)[0], r=3, lora_alpha=6, init_lora_weights=init)
    torch.testing.assert_close(lora.A * (lora.A * a).sum(1, keepdim=True).sign(), a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora.B @ lora.A, b @ a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left(layer).float(), frozen, rtol=1e-5, atol=1e-5)


def test_pissa_by_subspace_iterations_nears_the_full_svd():
    w = (
        torch.diag(torch.tensor([9.0, 5.0, 1.0, 0.5, 0.1], dtype=F64))
        @ torch.linalg.qr(torch.randn(7, 5, dtype=F64))[0].T
    )
    layer = nn.Linear(7, 5, dtype=F64)
    layer.weight.data = w
    full, fast = (born(weights.pissa(r=2, niter=n), copy.deepcopy(layer))[2] for n in (0, 8))
    torch.testing.assert_close(fast.B @ fast.A, full.B @ full.A, rtol=1e-6, atol=1e-6)


def test_pissa_leaves_the_base_its_bits():
    layer, w, lora = born(weights.pissa(r=2))
    nn.init.normal_(lora.B)
    assert torch.equal(layer.parametrizations.weight.original, w)
    weights.disable(layer)
    assert torch.equal(layer.weight, w)
    weights.enable(layer)
    assert torch.equal(weights.unmerge(weights.merge(layer)).parametrizations.weight.original, w)


def test_milora_trains_the_least_singular_part():
    layer, w, lora = born(weights.milora(r=2, alpha=3.0))
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(lora.scale * lora.B @ lora.A, (u[:, -2:] * s[-2:]) @ v[-2:])
    assert torch.linalg.matrix_norm(left(layer), 2).item() == pytest.approx(s[0].item())


def test_olora_starts_b_orthonormal_and_a_upper_triangular():
    _, w, lora = born(weights.olora(r=3, alpha=3.0))
    torch.testing.assert_close(lora.B.T @ lora.B, torch.eye(3, dtype=F64))
    assert lora.A.tril(-1).count_nonzero() == 0
    torch.testing.assert_close(lora.B @ lora.A, lora.B @ lora.B.T @ w)


def test_orthogonal_adaptation_of_several_concepts_does_not_disturb_any():
    """Disjoint bins: B_iᵀ B_j = 0, and on inputs in the span of concept i the sum answers as i alone."""
    base = model(12, 5)[0]
    alone, bins = [], []
    both = copy.deepcopy(base)
    for concept in (0, 2):
        layer = weights.put(copy.deepcopy(base), weights.orthogonal_adaptation(r=3, concept=concept), on="weight")
        lora = layer.parametrizations.weight[0]
        assert torch.equal(layer.weight, base.weight)
        nn.init.normal_(lora.B)
        weights.put(both, weights.orthogonal_adaptation(r=3, concept=concept), on="weight", name=str(concept))
        with torch.no_grad():
            both.parametrizations.weight[-1].B.copy_(lora.B)
        alone.append(layer)
        bins.append(lora.A)
    torch.testing.assert_close(bins[0] @ bins[0].T, torch.eye(3, dtype=F64))
    torch.testing.assert_close(bins[0] @ bins[1].T, torch.zeros(3, 3, dtype=F64))
    weights.merge(both)
    for layer, axes in zip(alone, bins):
        x = torch.randn(4, 3, dtype=F64) @ axes
        torch.testing.assert_close(both(x), layer(x))


def test_orthogonal_adaptation_trains_the_output_side_alone():
    _, _, lora = born(weights.orthogonal_adaptation(r=3))
    assert [p.shape for p in lora.parameters()] == [(5, 3)]
    with pytest.raises(ValueError, match="7 inputs have room for 2 concepts of rank 3; concept=2 is beyond"):
        born(weights.orthogonal_adaptation(r=3, concept=2))


# -- from data --------------------------------------------------------------------------------------------------------


def batches(n=4, rows=(3, 9), width=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.2, width, dtype=F64)
    return [torch.randn(*rows, width, generator=draw, dtype=F64) * spread + 0.5 for _ in range(n)]


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_equals_peft(mode):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.corda import preprocess_corda

    data = [x[:1] for x in batches()]
    theirs = nn.Sequential(*model(7, 5, 6)).float()
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
    )  # fmt: skip
    preprocess_corda(theirs, config, run_model=lambda: [theirs(x.float()) for x in data])
    theirs = peft.get_peft_model(theirs, config).base_model.model
    ours = model(7, 5, 6)
    weights.put(ours, weights.corda(r=2, alpha=3.0, mode=mode), on=["0", "2"], batches=data)
    for i in (0, 2):
        a, b = theirs[i].lora_A["default"].weight, theirs[i].lora_B["default"].weight
        lora = ours[i].parametrizations.weight[0]
        torch.testing.assert_close((lora.B @ lora.A).float(), b @ a, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(left(ours[i]).float(), theirs[i].base_layer.weight, rtol=2e-3, atol=2e-4)


def test_corda_takes_each_sample_of_a_batch_by_itself():
    whole = batches(n=3)
    single = [x[i : i + 1] for x in whole for i in range(len(x))]
    one, other = (born(weights.corda(r=2), batches=data)[2] for data in (whole, single))
    torch.testing.assert_close(one.B @ one.A, other.B @ other.A)


@pytest.mark.parametrize("mode, parent", [("ipm", weights.pissa), ("kpm", weights.milora)])
def test_corda_without_a_context_is_pissa_or_milora(mode, parent):
    """C = I: inputs that are the axes."""
    layer, w, lora = born(weights.corda(r=2, mode=mode), batches=[torch.eye(7, dtype=F64)])
    _, _, plain = born(parent(r=2))
    torch.testing.assert_close(lora.B @ lora.A, plain.B @ plain.A)
    torch.testing.assert_close(layer.weight, w)


def test_corda_takes_out_what_matters_least_to_the_context():
    """Eckart and Young: no other removal of rank r changes W C as little."""
    data = batches(n=1, rows=(1, 40))
    _, w, lora = born(weights.corda(r=2, mode="kpm"), batches=data)
    x = data[0][0] / data[0].max()
    c = x.T @ x
    c = c + 0.01 * c.diagonal().mean() * torch.eye(7, dtype=F64)
    removed = (lora.scale * lora.B @ lora.A @ c).norm()
    assert removed.item() == pytest.approx(torch.linalg.svdvals(w @ c)[-2:].norm().item(), rel=1e-6)


def test_eva_spans_the_leading_eigenspace_of_the_centred_inputs():
    """Ranks aside: one layer, as many components as it keeps, so the truncation of the incremental PCA costs nothing."""
    data = batches(n=3)
    layer, w, lora = born(weights.eva(r=3, rho=7 / 3, tau=2.0), batches=data)
    x = torch.cat([b.flatten(0, 1) for b in data])
    _, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))
    top = vectors[:, -3:]
    assert torch.equal(layer.weight, w)
    torch.testing.assert_close(lora.A @ lora.A.T, torch.eye(3, dtype=F64))
    torch.testing.assert_close(lora.A.T @ lora.A, top @ top.T)


@pytest.mark.parametrize("whiten", [False, True])
def test_eva_equals_peft(whiten):
    peft = pytest.importorskip("peft")
    data = 3 * [batches(n=1, rows=(40,))[0]]  # one batch again and again: both end at the second
    net = nn.Sequential(*model(7, 5, 6)).float()
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["0", "2"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.9, whiten=whiten),
    )  # fmt: skip
    theirs = peft.get_peft_model(net, config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(
        theirs, [x.float() for x in data], forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    ours = model(7, 5, 6)
    weights.put(ours, weights.eva(r=2, alpha=4.0, rho=2.0, tau=0.9, whiten=whiten), on=["0", "2"], batches=data)
    for i in (0, 2):
        module, lora = theirs.base_model.model[i], ours[i].parametrizations.weight[0]
        a = module.lora_A["default"].weight
        assert lora.r == len(a)
        assert lora.scale == module.scaling["default"]
        torch.testing.assert_close(
            lora.A.float(), a * (a * lora.A).sum(1, keepdim=True).sign().float(), rtol=1e-3, atol=1e-3
        )


def test_eva_shares_the_ranks_out_and_leaves_layers_alone():
    """The sum of ranks is the budget; a layer whose variance is spread thin goes without."""
    net = nn.ModuleDict({"narrow": nn.Linear(6, 4, dtype=F64), "wide": nn.Linear(6, 4, dtype=F64)})
    draw = torch.Generator().manual_seed(0)
    flat = torch.randn(200, 6, generator=draw, dtype=F64)
    steep = flat * torch.tensor([9.0, 8.0, 1e-3, 1e-3, 1e-3, 1e-3], dtype=F64)
    run = lambda m, x: (m["narrow"](x[0]), m["wide"](x[1]))
    weights.put(net, weights.eva(r=1), on=["narrow", "wide"], batches=[(steep, flat)], loss=run)
    assert net["narrow"].parametrizations.weight[0].r == 2
    assert not hasattr(net["wide"], "parametrizations")


def test_eva_ends_the_pass_when_its_components_stand_still():
    """Successive components at a cosine of tau; the batches after that are not drawn."""
    drawn = []

    def stream():
        for x in batches(n=20, rows=(1, 400)):
            drawn.append(1)
            yield x

    born(weights.eva(r=2, tau=0.9), batches=stream())
    assert 2 <= len(drawn) < 8


def test_lora_sb_starts_as_the_best_low_rank_part_of_the_first_step():
    """Eckart and Young: the error is that of the singular values left out."""
    data = batches(n=3, rows=(9,))
    lr, loss = 0.01, lambda m, x: m(x).pow(3).mean()
    layer, w, core = born(weights.lora_sb(r=2, lr=lr), batches=data, loss=loss)
    plain = model(7, 5)[0]
    sum(loss(plain, x) for x in data).backward()
    step = -lr * plain.weight.grad.sign()
    change = layer.weight - w
    rest = torch.linalg.svdvals(step)[2:].norm()
    assert (change - step).norm().item() == pytest.approx(rest.item(), rel=1e-9)
    torch.testing.assert_close(core.B.T @ core.B, torch.eye(2, dtype=F64))
    torch.testing.assert_close(core.A @ core.A.T, torch.eye(2, dtype=F64))
    assert [tuple(p.shape) for p in core.parameters()] == [(2, 2)]


def test_lora_sb_moves_by_the_projected_gradient():
    """B g_R A = B Bᵀ g Aᵀ A, with g the gradient of the whole weight."""
    data = batches(n=1, rows=(9,))
    layer, _, core = born(weights.lora_sb(r=2, lr=0.01), batches=data, loss=lambda m, x: m(x).pow(3).mean())
    plain = nn.Linear(7, 5, dtype=F64)
    plain.weight.data, plain.bias.data = layer.weight.detach().clone(), layer.bias.detach().clone()
    for m in (layer, plain):
        m(data[0]).square().sum().backward()
    g = plain.weight.grad
    torch.testing.assert_close(core.B @ core.R.grad @ core.A, core.B @ core.B.T @ g @ core.A.T @ core.A)
