"""What the paper of Kolmogorov-Arnold networks says."""

import math

import pytest
import scipy.interpolate
import torch
import torch.nn.functional as F

from etude import blocks, rules
from etude.blocks.spline import basis

D = torch.float64


def layer(d=3, out=2, **knobs):
    made = blocks.kan(d, out, **knobs).double()
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made


@pytest.mark.parametrize("k", [1, 2, 3])
def test_kan_has_the_b_splines_of_scipy(k):
    made = layer(2, grid=4, k=k)
    x = torch.rand(40, 2, dtype=D) * 3 - 1.5
    got = basis(x, made.knots, k)
    for i in range(2):
        knots = made.knots[i].numpy()
        for m in range(4 + k):
            c = [0.0] * (4 + k)
            c[m] = 1.0
            want = scipy.interpolate.BSpline.basis_element(knots[m : m + k + 2], extrapolate=False)(x[:, i].numpy())
            torch.testing.assert_close(got[:, i, m], torch.tensor(want).nan_to_num(0.0))


def test_kan_splines_are_a_partition_of_unity_on_the_grid_and_fade_beyond_it():
    knots = blocks.kan(1, grid=5).double().knots
    assert knots.shape == (1, 12)
    inside, outside = torch.linspace(-1, 1, 33, dtype=D)[:-1, None], torch.tensor([[-2.3], [2.3]], dtype=D)
    torch.testing.assert_close(basis(inside, knots, 3).sum(-1), torch.ones(32, 1, dtype=D), rtol=1e-6, atol=1e-6)
    assert (basis(outside, knots, 3) == 0).all()


def test_kan_is_the_papers_sum_over_edges_in_plain_loops():
    made, x = layer(3, 2), torch.rand(5, 3, dtype=D) * 2 - 1
    for n in range(5):
        for j in range(2):
            want = 0.0
            for i in range(3):
                spline = scipy.interpolate.BSpline(made.knots[i].numpy(), made.c[j, i].detach().numpy(), 3)
                v = x[n, i].item()
                want += made.base[j, i].item() * v / (1 + math.exp(-v)) + made.scale[j, i].item() * float(spline(v))
            assert made(x)[n, j].item() == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(made.edges(x).sum(-1), made(x))


def test_kan_counts_its_parameters_and_starts_near_its_silu():
    made = blocks.kan(16, 10, grid=5, k=3)
    assert sum(p.numel() for p in made.parameters()) == 16 * 10 * (5 + 3 + 2)
    assert made.scale.flatten().tolist() == pytest.approx([1 / 4] * 160)
    assert made.base.abs().max() <= 1 / 4
    at = torch.linspace(-1, 1, 6)[:, None].expand(-1, 16)
    noise = made._splines(at)
    assert noise.abs().max() <= 0.5 * 0.5 / 5 + 1e-5
    assert noise.std().item() == pytest.approx(0.5 / 5 / math.sqrt(12), rel=0.1)
    x = torch.rand(100, 16) * 2 - 1
    assert (made(x) - F.silu(x) @ made.base.T).std() < 0.2 * made(x).std()


def test_kan_refined_to_a_grid_that_holds_the_old_one_is_the_same_function():
    made = layer(2, 2, grid=4, k=3)
    x = torch.stack([torch.linspace(-1, 1, 400, dtype=D)] * 2, 1)
    want = made(x[:-1])
    made.regrid(x, grid=8, eps=1.0)
    assert made.c.shape == (2, 2, 11)
    torch.testing.assert_close(made(x[:-1]), want, rtol=1e-7, atol=1e-7)


def test_kan_regrids_to_the_quantiles_of_its_inputs():
    made, x = layer(2, 1, grid=4), torch.rand(4000, 2, dtype=D).pow(3) * torch.tensor([1.0, 5.0])
    parameter = made.c
    made.regrid(x, eps=0.0)
    inner = made.knots[:, 3:-3]
    shares = torch.stack([(x[:, i, None] <= inner[i] + 1e-9).double().mean(0) for i in range(2)])
    torch.testing.assert_close(shares, torch.tensor([[0, 0.25, 0.5, 0.75, 1]] * 2, dtype=D), rtol=0, atol=2e-3)
    assert made.c is parameter
    made.regrid(x, eps=1.0)
    torch.testing.assert_close(made.knots.diff(), made.knots.diff().mean(1, keepdim=True).expand(-1, 10))


def test_kan_refuses_to_refine_under_an_optimizer():
    made = blocks.kan(2)
    optimizer = rules.optimizer(made, rules.adamw())
    with pytest.raises(ValueError, match=r"kan\.regrid takes a parameter out of the model"):
        made.regrid(torch.randn(50, 2), grid=9)
    made.regrid(torch.randn(50, 2))
    assert optimizer


def test_kan_of_one_layer_fits_a_sum_of_univariate_functions():
    torch.manual_seed(0)
    made = blocks.kan(2, 1, grid=8).double()
    x = torch.rand(400, 2, dtype=D) * 2 - 1
    y = (torch.sin(math.pi * x[:, :1]) + x[:, 1:] ** 2).detach()
    optimizer = torch.optim.LBFGS(made.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(made(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert F.mse_loss(made(x), y) < 1e-5


def test_kan_penalty_is_the_sum_and_the_entropy_of_its_edges():
    made = blocks.kan(2, 2).double()
    x = torch.rand(50, 2, dtype=D)
    for p in made.parameters():
        torch.nn.init.zeros_(p)
    made.base.data = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=D)
    alone = F.silu(x).mean(0)
    torch.testing.assert_close(made.complexity(x), 2 * alone[0])  # one edge: no entropy
    made.base.data = (1 / alone).expand(2, 2).clone()
    torch.testing.assert_close(made.complexity(x), torch.tensor(4 + math.log(4), dtype=D))
