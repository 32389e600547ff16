"""What the papers say of maps that fix the scale or the centre of a weight; torch and timm as references."""

import itertools
import math
import statistics

import pytest
import torch
from peers import timm
from torch import nn
from torch.nn.utils import parametrizations

from etude import weights

F64 = torch.float64
LAYERS = {
    "linear": lambda: nn.Linear(6, 4, dtype=F64),
    "conv": lambda: nn.Conv2d(4, 6, (1, 3), groups=2, dilation=2, dtype=F64),
    "embedding": lambda: nn.Embedding(5, 3, dtype=F64),
}


def twins(layer):
    """Two layers of the same random weight."""
    torch.manual_seed(1)
    one = LAYERS[layer]()
    torch.manual_seed(1)
    return one, LAYERS[layer]()


def chain(module):
    return module.parametrizations.weight


@pytest.mark.parametrize("layer", LAYERS)
def test_weight_norm_equals_torch_forward_and_gradients(layer):
    ours, theirs = twins(layer)
    weights.put(ours, weights.weight_norm(), on="weight")
    parametrizations.weight_norm(theirs)
    scale = torch.rand_like(chain(ours).original0) + 0.5
    for module in (ours, theirs):
        with torch.no_grad():
            chain(module).original0.mul_(scale)
        (module.weight * torch.arange(module.weight.numel(), dtype=F64).view_as(module.weight)).sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)
    for g in ("original0", "original1"):
        torch.testing.assert_close(getattr(chain(ours), g).grad, getattr(chain(theirs), g).grad, rtol=1e-10, atol=1e-10)


def test_weight_norm_reads_a_checkpoint_of_torch():
    ours, theirs = nn.Linear(6, 4), parametrizations.weight_norm(nn.Linear(6, 4))
    weights.put(ours, weights.weight_norm(), on="weight")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_weight_norm_has_the_gradients_of_equation_3():
    layer = nn.Linear(3, 1, bias=False, dtype=F64)
    weights.put(layer, weights.weight_norm(), on="weight")
    g, v = chain(layer).original0, chain(layer).original1
    with torch.no_grad():
        g.fill_(1.7)
        v.copy_(torch.tensor([[1.0, -2.0, 2.0]], dtype=F64))
    dw = [0.3, -0.5, 2.0]
    (layer.weight * torch.tensor(dw, dtype=F64)).sum().backward()
    row, norm = v.tolist()[0], 3.0
    dg = sum(d * a for d, a in zip(dw, row)) / norm
    dv = [1.7 / norm * d - 1.7 * dg / norm**2 * a for d, a in zip(dw, row)]
    assert g.grad.item() == pytest.approx(dg, abs=1e-12)
    assert v.grad.tolist()[0] == pytest.approx(dv, abs=1e-12)


def test_weight_norm_never_shortens_v_under_gradient_descent():
    layer, x = nn.Linear(6, 4, dtype=F64), torch.randn(20, 6, dtype=F64)
    y = torch.randn(20, 4, dtype=F64)
    weights.put(layer, weights.weight_norm(), on="weight")
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    lengths = []
    for _ in range(5):
        opt.zero_grad()
        (layer(x) - y).square().mean().backward()
        v = chain(layer).original1
        assert (v * v.grad).sum(1).abs().max() < 1e-12
        lengths.append(v.detach().norm(dim=1))
        opt.step()
    assert all((after > before).all() for before, after in itertools.pairwise(lengths))


def test_weight_norm_gives_each_output_unit_one_length():
    """In a transposed convolution the output units lie on axis 1."""
    layer = nn.ConvTranspose2d(3, 5, 2)
    weights.put(layer, weights.weight_norm(), on="conv")
    assert chain(layer).original0.shape == (1, 5, 1, 1)


def test_weight_norm_refuses_a_unit_without_direction():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight[1])
    with pytest.raises(ValueError, match=r"^0\.weight: an output unit has only zeros"):
        weights.put(model, weights.weight_norm(), on="0")


@pytest.mark.parametrize("steps", [1, 2])
def test_spectral_norm_is_algorithm_1_of_its_paper(steps):
    layer = nn.Linear(3, 2, bias=False, dtype=F64)
    weights.put(layer, weights.spectral_norm(n_power_iterations=steps), on="weight")
    with torch.no_grad():
        chain(layer)[0].u.copy_(torch.tensor([0.6, -0.8]))  # far from where it converges
    w, u = chain(layer).original.tolist(), chain(layer)[0].u.tolist()

    def unit(a):
        return [x / math.hypot(*a) for x in a]

    for _ in range(3):
        for _ in range(steps):
            v = unit([w[0][j] * u[0] + w[1][j] * u[1] for j in range(3)])
            wv = [sum(a * b for a, b in zip(row, v)) for row in w]
            u = unit(wv)
        sigma = sum(a * b for a, b in zip(u, wv))
        for row, ours in zip(w, layer.weight.tolist()):
            assert ours == pytest.approx([a / sigma for a in row], abs=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_spectral_norm_equals_torch_forward_and_gradients(layer):
    ours, theirs = twins(layer)
    weights.put(ours, weights.spectral_norm(), on="weight")
    parametrizations.spectral_norm(theirs)
    with torch.no_grad():  # torch steps u before v: equal where neither steps, from the same pair
        chain(theirs)[0]._u.copy_(chain(ours)[0].u)
        chain(theirs)[0]._v.copy_(chain(ours)[0].v)
    for module in (ours, theirs):
        (module.eval().weight * torch.arange(module.weight.numel(), dtype=F64).view_as(module.weight)).sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chain(ours).original.grad, chain(theirs).original.grad, rtol=1e-10, atol=1e-10)


def test_spectral_norm_has_the_gradient_of_equation_12():
    """(G − λ u vᵀ) / σ with λ = ⟨G, W⟩: u and v are constants."""
    layer = nn.Linear(5, 4, bias=False, dtype=F64).eval()
    weights.put(layer, weights.spectral_norm(), on="weight")
    g = torch.randn(4, 5, dtype=F64)
    (layer.weight * g).sum().backward()
    sn, w = chain(layer)[0], layer.weight.detach()
    sigma = chain(layer).original.detach()[0, 0] / w[0, 0]
    expected = (g - (g * w).sum() * torch.outer(sn.u, sn.v)) / sigma
    torch.testing.assert_close(chain(layer).original.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layer, axis", [(nn.Linear(7, 5), 0), (nn.Conv2d(3, 5, 3), 0), (nn.ConvTranspose2d(3, 5, (1, 2)), 1)]
)
def test_spectral_norm_makes_the_largest_singular_value_one(layer, axis):
    layer = layer.double()
    trained = layer.weight.detach().clone()
    weights.put(layer, weights.spectral_norm(), on="weight")
    for _ in range(200):
        w = layer.weight
    top = torch.linalg.matrix_norm(w.movedim(axis, 0).flatten(1), 2)
    assert top.item() == pytest.approx(1, abs=1e-3)
    ratio = trained / w
    assert (ratio.max() - ratio.min()).abs() < 1e-9, "only a scale"


def test_spectral_norm_makes_a_layer_1_lipschitz():
    layer = nn.Linear(8, 8, dtype=F64)
    weights.put(layer, weights.spectral_norm(n_power_iterations=50), on="weight")
    x, y = torch.randn(2, 100, 8, dtype=F64)
    assert ((layer(x) - layer(y)).norm(dim=1) <= (1 + 1e-6) * (x - y).norm(dim=1)).all()


def test_spectral_norm_survives_two_forward_passes_before_one_backward():
    layer = nn.Linear(4, 3)
    weights.put(layer, weights.spectral_norm(), on="weight")
    x = torch.randn(2, 4)
    still = layer.eval()(x)
    (layer.train()(x) - layer(-x) + still).sum().backward()
    assert chain(layer).original.grad.isfinite().all()


def test_weight_standardization_equals_timm():
    ours = nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=F64)
    theirs = timm("layers.std_conv").StdConv2d(4, 6, 3, groups=2, bias=True, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    weights.put(ours, weights.weight_standardization(), on="conv")
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    for module in (ours, theirs):
        module(x).pow(3).sum().backward()
    torch.testing.assert_close(chain(ours).original.grad, theirs.weight.grad, rtol=1e-9, atol=1e-9)


def test_weight_standardization_is_the_authors_code_with_their_variance():
    layer = nn.Conv1d(2, 3, 3, dtype=F64)
    rows = layer.weight.flatten(1).tolist()
    weights.put(layer, weights.weight_standardization(eps=1e-5, correction=1), on="conv")
    for row, ours in zip(rows, layer.weight.flatten(1).tolist()):
        std = math.sqrt(statistics.variance(row) + 1e-5)
        assert ours == pytest.approx([(a - statistics.mean(row)) / std for a in row], abs=1e-12)


@pytest.mark.parametrize(
    "layer, axis", [(nn.Conv2d(3, 4, 3), 0), (nn.Linear(9, 4), 0), (nn.ConvTranspose1d(4, 3, 5), 1)]
)
def test_weight_standardization_centres_and_scales_each_output_unit(layer, axis):
    layer = layer.double()
    weights.put(layer, weights.weight_standardization(eps=0.0), on="weight")
    w = layer.weight.movedim(axis, 0).flatten(1)
    assert w.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(w.var(1, correction=0), torch.ones(len(w), dtype=F64))


def test_weight_standardization_does_not_see_scale_and_shift_of_a_filter():
    one, other = twins("conv")
    with torch.no_grad():
        other.weight.mul_(3.0).add_(torch.arange(6, dtype=F64).view(-1, 1, 1, 1))
    for layer in (one, other):
        weights.put(layer, weights.weight_standardization(eps=0.0), on="conv")
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-10, atol=1e-10)


def test_weight_standardization_gradient_of_a_filter_has_mean_zero_and_no_radial_part():
    layer = nn.Conv2d(3, 4, 3, dtype=F64)
    weights.put(layer, weights.weight_standardization(eps=0.0), on="conv")
    layer(torch.randn(2, 3, 6, 6, dtype=F64)).pow(3).sum().backward()
    g = chain(layer).original.grad.flatten(1)
    assert g.abs().max() > 1
    assert g.mean(1).abs().max() < 1e-10
    assert (g * layer.weight.flatten(1)).sum(1).abs().max() < 1e-9


def test_weight_standardization_refuses_a_fan_in_of_one():
    with pytest.raises(ValueError, match="fan-in of 2 or more"):
        weights.put(nn.Conv2d(4, 4, 1, groups=4), weights.weight_standardization(), on="conv")


def test_weight_norm_init_gives_each_layer_mean_0_and_variance_1_on_the_batch():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.Flatten(), nn.Linear(5 * 49, 6)
    ).double()
    weights.put(model, weights.weight_norm(), on="*")
    x, seen = torch.randn(30, 3, 8, 8, dtype=F64), []
    assert weights.weight_norm_init(model, x) is model
    for i in (0, 2, 4):
        model[i].register_forward_hook(lambda m, args, y: seen.append(y))
    model(x)
    for y in seen:
        axes = [i for i in range(y.ndim) if i != 1]
        torch.testing.assert_close(y.mean(axes), torch.zeros(y.shape[1], dtype=F64), rtol=0, atol=1e-12)
        torch.testing.assert_close(y.var(axes, correction=0), torch.ones(y.shape[1], dtype=F64))


def test_weight_norm_init_is_equation_5_and_leaves_v():
    layer = nn.Linear(2, 1, dtype=F64)
    weights.put(layer, weights.weight_norm(), on="weight")
    with torch.no_grad():
        chain(layer).original0.fill_(5.0)
        chain(layer).original1.copy_(torch.tensor([[3.0, -4.0]], dtype=F64))
        layer.bias.fill_(7.0)
    x = [[1.0, 2.0], [0.5, -1.0], [-2.0, 0.0]]
    t = [(3 * a - 4 * b) / 5 for a, b in x]
    weights.weight_norm_init(layer, torch.tensor(x, dtype=F64))
    assert chain(layer).original0.item() == pytest.approx(1 / statistics.pstdev(t))
    assert layer.bias.item() == pytest.approx(-statistics.mean(t) / statistics.pstdev(t))
    assert chain(layer).original1.tolist() == [[3.0, -4.0]]


def test_weight_norm_init_refuses_what_it_cannot_set():
    with pytest.raises(ValueError, match="found no linear or convolutional layer that carries weight_norm"):
        weights.weight_norm_init(nn.Linear(2, 2), torch.ones(3, 2))
    model = weights.put(nn.Sequential(nn.Linear(2, 2)), weights.weight_norm(), on="*")
    with pytest.raises(ValueError, match=r"^0: a channel makes the same of all of this batch"):
        weights.weight_norm_init(model, torch.ones(3, 2))
    model.unused = nn.Sequential()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r"^0: not called by the model"):
        weights.weight_norm_init(model, torch.randn(3, 2))


def badly_scaled(layer, axis):
    """Its rows differ in size by up to 10⁶."""
    with torch.no_grad():
        rows = layer.weight.movedim(axis, 0)
        rows.mul_(torch.logspace(-3, 3, len(rows), dtype=F64).view(-1, *[1] * (rows.ndim - 1)))
    return layer


@pytest.mark.parametrize(
    "layer, axis", [(nn.Linear(9, 6), 0), (nn.Conv2d(2, 6, 3), 0), (nn.ConvTranspose2d(6, 4, (1, 3)), 1)]
)
def test_weight_conditioning_equilibrates_rows_and_lowers_the_condition_number(layer, axis):
    layer = badly_scaled(layer.double(), axis)
    before = torch.linalg.cond(layer.weight.detach().movedim(axis, 0).flatten(1))
    weights.put(layer, weights.weight_conditioning(), on="weight")
    rows = layer.weight.detach().movedim(axis, 0).flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows), dtype=F64))
    assert torch.linalg.cond(rows) < 1e-3 * before


def test_weight_conditioning_is_within_root_of_rows_of_the_best_diagonal_matrix():
    """Van der Sluis, for matrices that a known diagonal matrix conditions perfectly."""
    for seed in range(20):
        torch.manual_seed(seed)
        layer = nn.Linear(5, 5, dtype=F64)
        with torch.no_grad():
            layer.weight.copy_(
                torch.randn(5, dtype=F64).exp()[:, None] * nn.init.orthogonal_(torch.empty_like(layer.weight))
            )
        weights.put(layer, weights.weight_conditioning(), on="weight")
        assert torch.linalg.cond(layer.weight) <= 5**0.5


def test_weight_conditioning_does_not_feel_the_size_of_a_row():
    layer, x = nn.Linear(4, 3, dtype=F64), torch.randn(5, 4, dtype=F64)
    weights.put(layer, weights.weight_conditioning(), on="weight")
    layer(x).pow(3).sum().backward()
    v = chain(layer).original
    assert v.grad.abs().max() > 0.1
    assert (v * v.grad).sum(1).abs().max() < 1e-12
    before = layer(x)
    with torch.no_grad():
        v.mul_(torch.tensor([[0.1], [3.0], [50.0]]))
    torch.testing.assert_close(layer(x), before)


def test_weight_conditioning_equals_weight_norm_of_length_one():
    ours, theirs = twins("conv")
    weights.put(ours, weights.weight_conditioning(), on="conv")
    weights.put(theirs, weights.weight_norm(), on="conv")
    nn.init.ones_(chain(theirs).original0)
    for layer in (ours, theirs):
        layer.weight.pow(3).sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(chain(ours).original.grad, chain(theirs).original1.grad)


def test_weight_conditioning_refuses_a_row_of_zeros():
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight[1])
    with pytest.raises(ValueError, match="weight_conditioning finds no direction"):
        weights.put(layer, weights.weight_conditioning(), on="weight")


def test_sigma_reparam_is_one_step_of_power_iteration_at_each_use():
    """The authors' order: v = W u, then u = Wᵀ v, and σ = vᵀ W u; in eval the step is taken and not kept."""
    layer = nn.Linear(3, 2, bias=False, dtype=F64)
    weights.put(layer, weights.sigma_reparam(start="one"), on="weight")
    with torch.no_grad():
        chain(layer)[0].u.copy_(torch.tensor([0.6, -0.8, 0.0]))
        chain(layer).original0.fill_(1.7)
    w, u = chain(layer).original1.tolist(), chain(layer)[0].u.tolist()

    def unit(a):
        return [x / math.hypot(*a) for x in a]

    for training in (True, True, False, False):
        v = unit([sum(a * b for a, b in zip(row, u)) for row in w])
        new = unit([w[0][j] * v[0] + w[1][j] * v[1] for j in range(3)])
        sigma = sum(v[i] * w[i][j] * new[j] for i in range(2) for j in range(3))
        u = new if training else u
        for row, ours in zip(w, layer.train(training).weight.tolist()):
            assert ours == pytest.approx([1.7 * a / sigma for a in row], abs=1e-12)
    assert chain(layer)[0].u.tolist() == pytest.approx(u)


@pytest.mark.parametrize(
    "axis, layer", [(0, nn.Linear(7, 5)), (0, nn.Conv2d(3, 5, 3)), (1, nn.ConvTranspose1d(4, 6, 3))]
)
def test_sigma_reparam_sets_the_largest_singular_value_to_gamma(axis, layer):
    layer = layer.double()
    w = layer.weight.detach().movedim(axis, 0).flatten(1)
    weights.put(layer, weights.sigma_reparam(), on="weight")
    gamma = chain(layer).original0
    assert gamma.numel() == 1
    assert gamma.item() == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=1e-12), "exact from the start"
    torch.testing.assert_close(layer.weight.movedim(axis, 0).flatten(1), w)
    nn.init.constant_(gamma, 0.3)
    with torch.no_grad():
        chain(layer).original1.add_(0.1 * torch.randn_like(layer.weight))
    for _ in range(300):
        w = layer.weight
    assert torch.linalg.matrix_norm(w.movedim(axis, 0).flatten(1), 2).item() == pytest.approx(0.3, rel=1e-6)


def test_sigma_reparam_from_one_equals_torchs_spectral_norm_and_its_gradient():
    ours, theirs = twins("linear")
    weights.put(ours, weights.sigma_reparam(start="one"), on="weight")
    parametrizations.spectral_norm(theirs, n_power_iterations=200)
    for layer in (ours, theirs):
        for _ in range(3):
            w = layer.weight
        w.pow(3).sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chain(ours).original1.grad, chain(theirs).original.grad, rtol=1e-6, atol=1e-8)


def test_sigma_reparam_does_not_feel_the_size_of_the_weight():
    layer, x = nn.Linear(4, 3, dtype=F64), torch.randn(5, 4, dtype=F64)
    weights.put(layer, weights.sigma_reparam(), on="weight")
    layer(x).pow(3).sum().backward()
    v = chain(layer).original1
    assert v.grad.abs().max() > 1e-3
    assert (v * v.grad).sum().abs() < 1e-12, "the gradient is orthogonal to the weight"
    before = layer(x)
    with torch.no_grad():
        v.mul_(7.0)
    torch.testing.assert_close(layer(x), before)


def test_sigma_reparam_refuses_a_weight_of_zeros():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="sigma_reparam cannot divide by its norm"):
        weights.put(layer, weights.sigma_reparam(), on="weight")


@pytest.mark.parametrize("gamma", [1.0, 1.7129])
def test_scaled_weight_standardization_equals_timm(gamma):
    ours = nn.Conv2d(4, 6, 3, padding=1, groups=2, dtype=F64)
    theirs = timm("layers.std_conv").ScaledStdConv2d(4, 6, 3, groups=2, gamma=gamma, dtype=F64)
    theirs.load_state_dict(ours.state_dict() | {"gain": theirs.gain})
    weights.put(ours, weights.scaled_weight_standardization(gamma), on="conv")
    gain = torch.rand(6, 1, 1, 1, dtype=F64) + 0.5
    with torch.no_grad():
        chain(ours).original0.copy_(gain)
        theirs.gain.copy_(gain)
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    for module in (ours, theirs):
        module(x).pow(3).sum().backward()
    torch.testing.assert_close(chain(ours).original0.grad, theirs.gain.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(chain(ours).original1.grad, theirs.weight.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "axis, layer", [(0, nn.Linear(9, 5)), (0, nn.Conv1d(3, 5, 3)), (1, nn.ConvTranspose2d(4, 6, 2))]
)
def test_scaled_weight_standardization_gives_each_filter_mean_0_and_variance_1_by_fan_in(axis, layer):
    layer = layer.double()
    weights.put(layer, weights.scaled_weight_standardization(gamma=2.0, eps=0.0), on="weight")
    rows = layer.weight.movedim(axis, 0).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows), dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(rows.var(1, correction=0), torch.full((len(rows),), 4 / rows.shape[1], dtype=F64))


def test_scaled_weight_standardization_carries_a_signal_through_fifty_relu_layers_without_a_mean():
    """He's initialisation keeps the second moment too, but the channels' means grow to a large part of it."""

    def through(put):
        torch.manual_seed(0)
        x = torch.randn(512, 128, dtype=F64)
        for _ in range(50):
            layer = nn.Linear(128, 128, bias=False, dtype=F64)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            x = (put(layer) if put else layer)(x.relu()).detach()
        return x.var(0).mean().item(), x.mean(0).square().mean().item()

    gamma = math.sqrt(2 / (1 - 1 / math.pi))
    var, mean = through(lambda m: weights.put(m, weights.scaled_weight_standardization(gamma), on="weight"))
    he_var, he_mean = through(None)
    assert 0.5 < var < 2
    assert mean < 0.1 * var
    assert he_mean > 5 * he_var
