import pytest
import torch
from pytorch_optimizer.optimizer.utils.gradient import unit_norm
from torch import nn
from transformers.pytorch_utils import Conv1D

from etude import penalties


def test_norm_loss_sums_squared_distances_of_units_from_norm_one():
    w = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.5]], dtype=torch.float64)  # norms 5, 1, ½
    assert penalties.norm_loss({"w": w}, factor=0.1).item() == pytest.approx(0.1 * (16 + 0 + 0.25), abs=1e-14)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 3, 2), (4, 3, 2, 2, 2)])
def test_norm_loss_vanishes_where_every_unit_has_norm_one(shape):
    w = nn.functional.normalize(torch.randn(shape, dtype=torch.float64).flatten(1), dim=1).reshape(shape)
    w.requires_grad_()
    value = penalties.norm_loss({"w": w}, factor=3.0)
    assert value.item() == pytest.approx(0, abs=1e-28)
    assert torch.autograd.grad(value, w)[0].abs().max() < 1e-14


def test_norm_loss_gradient_is_the_closed_form_of_the_paper():
    """∇ = 2 λ (1 − 1/‖w‖) w for each unit."""
    w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(penalties.norm_loss({"w": w}, factor=0.3), w)
    for row, g in zip(w.tolist(), grad.tolist()):
        size = sum(v * v for v in row) ** 0.5
        assert g == pytest.approx([2 * 0.3 * (1 - 1 / size) * v for v in row], abs=1e-14)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 3, 2), (4, 3, 2, 2, 2)])
def test_norm_loss_descent_is_the_step_of_ranger21(shape):
    """pytorch_optimizer writes w ← w (1 − lr 2 λ (1 − 1/(‖w‖ + eps))) with its own unit norm."""
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(penalties.norm_loss({"w": w}, factor=1e-2), w)
    theirs = w * (1 - 0.1 * 2 * 1e-2 * (1 - 1 / (unit_norm(w) + 1e-8)))
    torch.testing.assert_close(w - 0.1 * grad, theirs, rtol=0, atol=1e-9)


def test_norm_loss_descent_alone_ends_on_the_oblique_manifold():
    w = (3 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    opt = torch.optim.SGD([w], lr=0.1)
    start = nn.functional.normalize(w.detach(), dim=1)
    for _ in range(200):
        opt.zero_grad()
        penalties.norm_loss({"w": w}, factor=1.0).backward()
        opt.step()
    torch.testing.assert_close(w.detach(), start, rtol=0, atol=1e-12)  # norm 1, and no unit has turned


def test_norm_loss_leaves_vectors_out():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    matrices = {n: p for n, p in model.named_parameters() if n in ("0.weight", "3.weight")}
    value = penalties.norm_loss(model)
    assert torch.equal(value, penalties.norm_loss(matrices))
    value.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == list(matrices)


def test_norm_loss_takes_the_columns_of_hugging_faces_conv1d_for_units():
    conv1d = Conv1D(3, 4)
    linear = nn.Linear(4, 3)
    linear.load_state_dict({"weight": conv1d.weight.T, "bias": conv1d.bias})
    both = nn.ModuleDict({"a": linear, "b": conv1d})
    torch.testing.assert_close(penalties.norm_loss(conv1d), penalties.norm_loss(linear))
    torch.testing.assert_close(penalties.norm_loss(both), 2 * penalties.norm_loss(linear))
    torch.nn.utils.parametrizations.spectral_norm(conv1d)
    torch.testing.assert_close(penalties.norm_loss(conv1d), penalties.norm_loss(linear))


def test_norm_loss_of_a_wrong_argument_is_one_clear_line():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="takes a module, or a mapping of names to weights; got a generator"):
        penalties.norm_loss(model.parameters())
    for factor in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"factor={factor} must be at least 0"):
            penalties.norm_loss(model, factor=factor)


def test_norm_loss_has_no_pull_at_zero():
    """The direction is undefined there; the reference's 1 − 1/eps times 0 is 0 as well."""
    w = torch.zeros(3, 4, requires_grad=True)
    value = penalties.norm_loss({"w": w}, factor=1.0)
    assert value.item() == 3
    assert torch.equal(torch.autograd.grad(value, w)[0], torch.zeros(3, 4))
