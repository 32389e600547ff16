import copy
import itertools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from etude import gradients


def layer(p=3, d=2, bias=True):
    torch.manual_seed(0)
    model = nn.Linear(p, d, bias=bias).double()
    x, y = torch.randn(8, p, dtype=torch.float64), torch.randn(8, d, dtype=torch.float64)
    return model, x, lambda: F.mse_loss(model(x), y), y


def factors(value):
    (_, found), *more = value.held["layers"].values()
    assert not more
    return found


def curvature(model, x, y):
    """U and G of one Linear, by torch.func over each example alone."""
    w, b = model.weight.detach(), model.bias.detach()
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    back = torch.func.vmap(torch.func.grad(lambda out, target: F.mse_loss(out, target)))(x @ w.mT + b, y)
    return inputs.mT @ inputs / len(x), back.mT @ back / len(x)


def test_inverse_free_ngd_first_step_is_the_papers():
    """From K = C = I: m_K = ½ (tr G/d · U + λ I − I), K = I − β m_K, C likewise; the loss is a mean over examples."""
    model, x, loss_fn, y = layer()
    U, G = curvature(model, x, y)
    value = gradients.inverse_free_ngd(damping=0.1, lr_cov=0.3).bind(model)
    _, (g, gb) = value(loss_fn, model.parameters())
    K = torch.eye(4) - 0.3 * 0.5 * (G.trace() / 2 * U + 0.1 * torch.eye(4) - torch.eye(4))
    C = torch.eye(2) - 0.3 * 0.5 * (U.trace() / 4 * G + 0.1 * torch.eye(2) - torch.eye(2))
    torch.testing.assert_close(factors(value).K, K.double())
    torch.testing.assert_close(factors(value).C, C.double())
    plain = torch.cat([*(h.view(2, -1) for h in torch.autograd.grad(loss_fn(), list(model.parameters())))], 1)
    torch.testing.assert_close(torch.cat([g, gb[:, None]], 1), C @ C.mT @ plain @ K @ K.mT)


def test_inverse_free_ngd_kfac_like_comes_to_the_inverse_and_the_natural_gradient():
    """The paper's check: with U as it is, K Kᵀ → (U + λ I)⁻¹ without any inverse. Then g is K-FAC's."""
    model, x, loss_fn, y = layer()
    U, G = curvature(model, x, y)
    value = gradients.inverse_free_ngd(damping=0.1, alpha1=0.0, lr_cov=0.3, T=1, kfac_like=True).bind(model)
    for _ in range(400):
        _, (g, _) = value(loss_fn, model.parameters())
    inverse_K, inverse_C = (torch.linalg.inv(H + 0.1 * torch.eye(len(H))) for H in (U, G))
    torch.testing.assert_close(factors(value).K @ factors(value).K.mT, inverse_K)
    torch.testing.assert_close(factors(value).C @ factors(value).C.mT, inverse_C)
    w, b = torch.autograd.grad(loss_fn(), list(model.parameters()))
    torch.testing.assert_close(g, (inverse_C @ torch.cat([w, b[:, None]], 1) @ inverse_K)[:, :-1])


def test_inverse_free_ngd_rests_where_the_product_of_both_factors_is_whitened():
    """Where m_K = 0: tr H_C/d · H_K + λ tr CᵀC/d · KᵀK = I; with momentum too."""
    model, _, loss_fn, _ = layer()
    value = gradients.inverse_free_ngd(damping=0.1, lr_cov=0.1, T=1).bind(model)
    for _ in range(1000):
        value(loss_fn, model.parameters())
    assert all(m.abs().max() < 1e-9 for m in factors(value).m)


def test_inverse_free_ngd_goes_on_where_a_cholesky_factor_fails():
    """In float32, with an input that stands there twice and hardly any damping."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    x = torch.randn(64, 3).repeat(1, 2) * 30
    U = x.mT @ x / 64
    assert torch.linalg.cholesky_ex(U + 1e-7 * torch.eye(6)).info > 0
    value = gradients.inverse_free_ngd(damping=1e-7, alpha1=0.0, lr_cov=1e-3, T=1, kfac_like=True).bind(model)
    for _ in range(300):
        _, (g,) = value(lambda: model(x).square().mean(), model.parameters())
        assert g.isfinite().all()
    start = torch.linalg.cond(U[:3, :3])
    assert torch.linalg.cond((factors(value).K.mT @ U @ factors(value).K)[:3, :3]) < start


def test_inverse_free_ngd_is_ahead_of_momentum_on_digits():
    """The claim, on a softmax of handwritten digits after 100 steps, each at the best of eight rates: under half."""
    x, y = (torch.tensor(v) for v in load_digits(return_X_y=True))
    x = x.float() / 16

    def run(gradient, lr):
        torch.manual_seed(0)
        model, batches = nn.Linear(64, 10), torch.Generator().manual_seed(1)
        value, opt = gradient.bind(model), torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        for _ in range(100):
            i = torch.randint(len(x), (256,), generator=batches)
            gradients.backward(value, lambda i=i: F.cross_entropy(model(x[i]), y[i]), model.parameters())
            opt.step()
        loss = F.cross_entropy(model(x), y)
        return loss.item() if loss.isfinite() else torch.inf

    rates = [10 ** (1 - k / 2) for k in range(8)]
    plain = min(run(gradients.plain(), lr) for lr in rates)
    ours = min(run(gradients.inverse_free_ngd(T=1, lr_cov=0.05), lr) for lr in rates)
    assert ours < 0.5 * plain


def test_inverse_free_ngd_multiplies_by_the_factors_in_their_order():
    """C Cᵀ ∇ K Kᵀ where neither factor is symmetric, as they become when the batches differ."""
    model, *_ = layer()
    value = gradients.inverse_free_ngd(lr_cov=0.3, T=1).bind(model)
    for seed in range(6):
        x, y = (torch.randn(8, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for n in (3, 2))
        _, (g, _) = value(lambda x=x, y=y: F.mse_loss(model(x), y), model.parameters())
    K, C = factors(value).K, factors(value).C
    assert min((f - f.mT).abs().max() for f in (K, C)) > 1e-3
    w, b = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close(g, (C @ C.mT @ torch.cat([w, b[:, None]], 1) @ K @ K.mT)[:, :-1])


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, (2, 0), 2)])
def test_inverse_free_ngd_takes_a_convolution_for_a_linear_layer_on_its_patches(stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, (3, 2), stride, padding, dilation).double()
    x = torch.randn(4, 2, 7, 6, dtype=torch.float64)
    flat = nn.Linear(12, 3).double()
    with torch.no_grad():
        flat.weight.copy_(conv.weight.flatten(1))
        flat.bias.copy_(conv.bias)
    patches = F.unfold(x, (3, 2), dilation, padding, stride).mT
    found = []
    for m, at in ((conv, x), (flat, patches)):
        value = gradients.inverse_free_ngd(T=1).bind(m)
        for _ in range(3):
            _, (w, b) = value(lambda m=m, at=at: m(at).square().sum() / len(x), m.parameters())
        found.append((w.flatten(1), b))
    torch.testing.assert_close(*found)


def test_inverse_free_ngd_knows_what_the_loss_is_a_mean_of():
    """A loss over n times as many terms that is no mean has n times the gradient: C is the same when it is told."""
    model, x, _, y = layer()
    x, y = x.view(4, 2, 3), y.view(4, 2, 2)
    total = lambda: (model(x) - y).square().sum()
    curved = []
    for average, terms in (("sum", 1), ("batch", 4), ("batch+sequence", 8)):
        value = gradients.inverse_free_ngd(loss_average=average).bind(model)
        value(lambda terms=terms: total() / terms, model.parameters())
        curved.append(torch.eye(2) - factors(value).C)
    start = 0.5 * 0.01 * (1 - 1e-3) * torch.eye(2, dtype=torch.float64)
    sizes = [(c + start).norm() for c in curved]  # the data's own part
    assert sizes[0] == pytest.approx(4 * sizes[1].item()) == pytest.approx(8 * sizes[2].item())


def test_inverse_free_ngd_in_between_reuses_the_factors_and_a_compiled_model_is_seen():
    model, x, loss_fn, y = layer()
    compiled = torch.compile(model, backend="aot_eager")
    values = [gradients.inverse_free_ngd(T=2).bind(model) for _ in range(2)]
    for step in range(3):
        before = copy.deepcopy(values[0].held)
        (_, ours), (_, theirs) = (
            value(fn, model.parameters()) for value, fn in zip(values, (loss_fn, lambda: F.mse_loss(compiled(x), y)))
        )
        torch.testing.assert_close(ours, theirs)
        if step == 1:
            assert torch.equal(before["layers"][0][1].K, factors(values[0]).K)


def test_inverse_free_ngd_leaves_what_it_does_not_serve():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 3)
    )
    ids = torch.randint(5, (6, 7))
    loss_fn = lambda: model(ids).square().mean()
    value = gradients.inverse_free_ngd(lr_cov=0.5).bind(model)
    _, grads = value(loss_fn, model.parameters())
    plain = torch.autograd.grad(loss_fn(), list(model.parameters()))
    kept = {n for (n, _), a, b in zip(model.named_parameters(), grads, plain) if torch.allclose(a, b, rtol=1e-4)}
    served = {f"{m}.{w}" for m, w in itertools.product(("1.linear1", "1.linear2", "2"), ("weight", "bias"))}
    assert kept == {n for n, _ in model.named_parameters()} - served


def test_inverse_free_ngd_pools_the_uses_of_a_shared_layer():
    """A layer that is used twice on halves of the batch is that layer used once on the whole."""
    model, x, _, _ = layer()
    found = []
    for parts in ([x], [x[:4], x[4:]]):
        value = gradients.inverse_free_ngd(loss_average="sum").bind(model)
        found.append(value(lambda parts=parts: sum(model(p).square().sum() for p in parts), model.parameters())[1])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("knobs", "line"),
    [({"T": 0}, "T is a number"), ({"lr_cov": -1.0}, "lr_cov"), ({"alpha1": 1.0}, "momentum"),
     ({"loss_average": "mean"}, "batch, batch\\+sequence, sum")],
)  # fmt: skip
def test_inverse_free_ngd_refuses_bad_input(knobs, line):
    with pytest.raises(ValueError, match=line):
        gradients.inverse_free_ngd(**knobs)


def test_inverse_free_ngd_refuses_to_guess_its_layers():
    model, _, loss_fn, _ = layer()
    with pytest.raises(ValueError, match="does not know the layers yet"):
        gradients.inverse_free_ngd()(loss_fn, model.parameters())
    with pytest.raises(ValueError, match="no Linear or Conv2d"):
        gradients.inverse_free_ngd().bind(nn.LayerNorm(3))
    value = gradients.inverse_free_ngd().bind(copy.deepcopy(model))
    with pytest.raises(ValueError, match="called none of the 1 layers"):
        value(loss_fn, model.parameters())
