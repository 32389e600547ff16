"""What the LoRA paper says; peft as reference."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from etude import weights

F64 = torch.float64


def adapted(layer, r=3, alpha=12.0):
    """The layer with a LoRA that is no longer at birth, and the LoRA."""
    weights.put(layer, weights.lora(r=r, alpha=alpha), on="weight")
    lora = layer.parametrizations.weight[0]
    nn.init.normal_(lora.B)
    return layer, lora


def test_lora_adds_alpha_over_r_times_b_a():
    base = nn.Linear(4, 3, dtype=F64)
    w0 = base.weight.tolist()
    layer, lora = adapted(base, r=2, alpha=5.0)
    a, b = lora.A.tolist(), lora.B.tolist()
    for i in range(3):
        for j in range(4):
            delta = sum(b[i][k] * a[k][j] for k in range(2))
            assert layer.weight[i, j].item() == pytest.approx(w0[i][j] + 5.0 / 2 * delta, abs=1e-12)


def test_lora_has_rank_r():
    layer, _ = adapted(nn.Conv2d(5, 9, 3, dtype=F64), r=3)
    change = layer.weight - layer.parametrizations.weight.original
    assert torch.linalg.matrix_rank(change.flatten(1)) == 3


def test_lora_is_born_with_b_zero_and_a_as_in_the_authors_code():
    layer = nn.Linear(400, 50)
    w0 = layer.weight.detach().clone()
    weights.put(layer, weights.lora(r=20), on="weight")
    lora = layer.parametrizations.weight[0]
    assert torch.equal(layer.weight, w0)
    assert torch.equal(lora.B, torch.zeros(50, 20))
    bound = 1 / math.sqrt(400)  # kaiming_uniform_(a=√5)
    assert 0.99 * bound < lora.A.abs().max() <= bound
    assert lora.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_lora_at_birth_gives_gradient_to_b_only():
    layer = nn.Linear(5, 4)
    weights.put(layer, weights.lora(r=2), on="weight")
    layer(torch.randn(3, 5)).square().sum().backward()
    lora = layer.parametrizations.weight[0]
    assert lora.A.grad.abs().max() == 0 < lora.B.grad.abs().min()
    assert layer.parametrizations.weight.original.grad is None


@pytest.mark.parametrize(
    "layer, x, route",
    [
        (lambda: nn.Linear(7, 5), torch.randn(2, 3, 7), "apply"),
        (lambda: nn.Linear(7, 5), torch.randn(2, 3, 7), "weight"),
        (lambda: nn.Conv2d(4, 6, (1, 3), stride=2, padding=1), torch.randn(2, 4, 6, 8), "auto"),
        (lambda: nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9), "auto"),
    ],
    ids=["linear by apply", "linear by weight", "conv2d", "conv1d"],
)
def test_lora_equals_peft(layer, x, route):
    peft = pytest.importorskip("peft")
    base, x = layer(), x.clone().requires_grad_()
    ours = nn.Sequential(copy.deepcopy(base))
    weights.put(ours, weights.lora(r=3, alpha=7.0), on="0", route=route)
    config = peft.LoraConfig(r=3, lora_alpha=7.0, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    module, lora = theirs.base_model.model[0], ours[0].parametrizations.weight[0]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    with torch.no_grad():
        nn.init.normal_(lora.B)
        a.copy_(lora.A.view_as(a))
        b.copy_(lora.B.view_as(b))
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    one = torch.autograd.grad(y.pow(3).mean(), [lora.A, lora.B, x])
    two = torch.autograd.grad(z.pow(3).mean(), [a, b, x])
    for g, h in zip(one, two):
        torch.testing.assert_close(g, h.view_as(g), rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(weights.merge(ours)[0].weight, merged, rtol=1e-5, atol=1e-5)


def test_lora_of_a_grouped_and_dilated_kernel_is_the_convolution_with_the_changed_kernel():
    x = torch.randn(2, 4, 9, 9, dtype=F64)
    base = nn.Conv2d(4, 6, (1, 3), groups=2, dilation=2, padding_mode="reflect", padding=(0, 2), dtype=F64)
    plain = copy.deepcopy(base)
    layer, lora = adapted(base, r=2, alpha=3.0)
    with torch.no_grad():
        plain.weight += 1.5 * (lora.B @ lora.A).view(6, 2, 1, 3)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "knobs, line",
    [
        ({"r": 0}, "lora: r=0 must be at least 1, and a whole number"),
        ({"r": 2.5}, "lora: r=2.5 must be at least 1, and a whole number"),
        ({"alpha": None}, "lora: alpha=None must be a finite number"),
        ({"alpha": math.nan}, "lora: alpha=nan must be a finite number"),
    ],
)
def test_lora_refuses_a_rank_or_an_alpha_that_is_none(knobs, line):
    with pytest.raises(ValueError) as raised:
        weights.lora(**knobs)
    assert str(raised.value) == line


def test_lora_on_the_conv1d_of_gpt2_equals_peft():
    peft = pytest.importorskip("peft")
    base, x = Conv1D(5, 7).double(), torch.randn(2, 3, 7, dtype=F64)
    config = peft.LoraConfig(r=3, lora_alpha=7.0, target_modules=["0"], lora_dropout=0.0, fan_in_fan_out=True)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).double()
    ours, lora = adapted(base, r=3, alpha=7.0)
    module = theirs.base_model.model[0]
    with torch.no_grad():
        module.lora_A["default"].weight.copy_(lora.A)
        module.lora_B["default"].weight.copy_(lora.B)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(weights.merge(ours).weight, theirs.merge_and_unload()[0].weight)


def test_lora_is_merged_alone_while_another_stays():
    layer, x = nn.Linear(5, 4, dtype=F64), torch.randn(3, 5, dtype=F64)
    for name in ("under", "over"):
        weights.put(layer, weights.lora(r=2), on="weight", name=name)
        nn.init.normal_(layer.parametrizations.weight[-1].B)
    y = layer(x)
    weights.merge(layer, "over")
    assert [m.name for m in layer.parametrizations.weight] == ["under"]
    torch.testing.assert_close(layer(x), y)
