"""What the papers of the norms say, mostly against torch's own layers."""

import math

import pytest
import torch
from torch import nn

from etude import norms

D = torch.float64
torch.manual_seed(0)
X = torch.randn(6, 4, 8, dtype=D) * 3 + 1
IMAGES = torch.randn(4, 8, 5, 3, dtype=D) * torch.arange(1, 9, dtype=D).view(8, 1, 1) + 2


def same_affine(*layers):
    """One weight and bias for all layers."""
    rng = torch.Generator().manual_seed(1)
    values = {k: torch.randn(8, generator=rng, dtype=D) for k in ("weight", "bias")}
    for layer in layers:
        for name, p in layer.double().named_parameters():
            p.data.copy_(values[name])
    return layers


def passes_alike(a, b, x):
    """Outputs, input gradients and parameter gradients agree."""
    pulled = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    out = []
    for layer in (a, b):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        grads = torch.autograd.grad(y, [leaf, *layer.parameters()], pulled)
        out.append((y, *grads))
    for one, two in zip(*out, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_layer_norm_is_torchs():
    passes_alike(*same_affine(norms.layer_norm(8), nn.LayerNorm(8)), X)
    passes_alike(*same_affine(norms.layer_norm(8, eps=0.3), nn.LayerNorm(8, eps=0.3)), X[0, 0])


def test_layer_norm_ignores_shift_and_scale_of_a_token():
    norm = norms.layer_norm(8, eps=0.0).double()
    torch.testing.assert_close(norm(3 * X - 7), norm(X))


def test_rms_norm_is_torchs():
    passes_alike(*same_affine(norms.rms_norm(8), nn.RMSNorm(8, eps=1e-5)), X)
    passes_alike(*same_affine(norms.rms_norm(8, eps=0.3), nn.RMSNorm(8, eps=0.3)), X[0])


def test_rms_norm_by_hand_for_one_token():
    x = [1.0, -2.0, 3.0]
    rms = math.sqrt((1 + 4 + 9) / 3 + 1e-5)
    y = norms.rms_norm(3).double()(torch.tensor(x, dtype=D))
    assert y.tolist() == pytest.approx([v / rms for v in x], abs=1e-14)


def test_rms_norm_ignores_scale_and_equals_layer_norm_on_centred_tokens():
    norm = norms.rms_norm(8, eps=0.0).double()
    torch.testing.assert_close(norm(5 * X), norm(X))
    assert not torch.allclose(norm(X + 1), norm(X))
    centred = X - X.mean(-1, keepdim=True)
    torch.testing.assert_close(norms.rms_norm(8).double()(centred), norms.layer_norm(8).double()(X))


def test_rms_norm_gradients_by_hand_survive_gradcheck_twice():
    norm = norms.rms_norm(8).double()
    x, w = X[:2, 0].clone().requires_grad_(), torch.randn(8, dtype=D, requires_grad=True)

    def call(x, w):
        return torch.func.functional_call(norm, {"weight": w}, (x,))

    assert torch.autograd.gradcheck(call, (x, w))
    assert torch.autograd.gradgradcheck(call, (x, w))


@pytest.mark.parametrize(
    "x, peer", [(X[:, 0], nn.BatchNorm1d), (X.transpose(1, 2), nn.BatchNorm1d), (IMAGES, nn.BatchNorm2d)]
)
def test_batch_norm_is_torchs_in_training_and_eval_with_running_statistics(x, peer):
    ours, theirs = same_affine(norms.batch_norm(8, momentum=0.3), peer(8, momentum=0.3))
    for i in range(3):
        passes_alike(ours, theirs, x * (i + 1))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for one, two in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    passes_alike(ours.eval(), theirs.eval(), x)


def test_batch_norm_ignores_the_scale_of_the_weight_before_it():
    norm, linear = norms.batch_norm(8, eps=1e-14).double(), nn.Linear(8, 8, bias=False, dtype=D)
    before = norm(linear(X[:, 0]))
    linear.weight.data.mul_(10)
    torch.testing.assert_close(norm(linear(X[:, 0])), before)


def test_batch_norm_folds_into_the_linear_before_it_in_eval():
    (norm,) = same_affine(norms.batch_norm(8))
    linear = nn.Linear(8, 8, dtype=D)
    norm(linear(X[:, 0]))
    scale = norm.eval().weight / (norm.running_var + norm.eps).sqrt()
    folded = nn.functional.linear(
        X[:, 1], linear.weight * scale[:, None], (linear.bias - norm.running_mean) * scale + norm.bias
    )
    torch.testing.assert_close(norm(linear(X[:, 1])), folded)


def test_batch_norm_refuses_a_batch_of_one_value():
    with pytest.raises(ValueError, match="more than 1 value"):
        norms.batch_norm(8)(torch.randn(1, 8))


def test_instance_norm_is_torchs_and_group_norm_with_a_group_per_channel():
    ours = norms.instance_norm(8)
    passes_alike(*same_affine(ours, nn.InstanceNorm2d(8, affine=True)), IMAGES)
    passes_alike(*same_affine(ours, nn.GroupNorm(8, 8)), IMAGES)
    passes_alike(*same_affine(ours, nn.InstanceNorm1d(8, affine=True)), IMAGES.flatten(2))


def test_instance_norm_ignores_the_contrast_and_the_company_of_an_image():
    norm = norms.instance_norm(8, eps=0.0).double()
    torch.testing.assert_close(norm(4 * IMAGES + 1), norm(IMAGES))
    torch.testing.assert_close(norm(IMAGES[:1]), norm(IMAGES)[:1])


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_is_torchs(groups):
    passes_alike(*same_affine(norms.group_norm(8, groups=groups), nn.GroupNorm(groups, 8)), IMAGES)
    passes_alike(*same_affine(norms.group_norm(8, groups=groups), nn.GroupNorm(groups, 8)), X[:, 0])


def test_group_norm_of_one_group_ignores_an_affine_change_of_a_whole_image():
    norm = norms.group_norm(8, groups=1, eps=0.0).double()
    torch.testing.assert_close(norm(4 * IMAGES + 1), norm(IMAGES))
    assert norms.group_norm(64).sizes == {"g": 32}  # the paper's number of groups


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="12 features do not divide into 32 groups"):
        norms.group_norm(12)


def test_partial_rms_norm_looks_at_the_first_share_of_the_features():
    norm = norms.partial_rms_norm(8, p=0.3, eps=0.0).double()  # ⌈2.4⌉ = 3 features
    x = torch.randn(4, 8, dtype=torch.float64)
    for got, row in zip(norm(x).tolist(), x.tolist(), strict=True):
        root = (sum(v * v for v in row[:3]) / 3) ** 0.5
        assert got == pytest.approx([v / root for v in row], rel=1e-12)
    assert torch.equal(norm(x[:, :3].repeat(1, 3)[:, :8])[:, 3:6], norm(x[:, :3].repeat(1, 3)[:, :8])[:, :3])
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        norms.partial_rms_norm(8, p=0)


def test_scale_norm_gives_every_token_the_length_g_which_starts_at_root_d():
    norm = norms.scale_norm(16).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    assert [p.numel() for p in norm.parameters()] == [1]
    torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((5,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(norm(1e3 * x), norm(x))
    torch.testing.assert_close(norm(x), torch.nn.RMSNorm(16, eps=0.0, elementwise_affine=False)(x))


def test_scale_norm_clamps_the_length_at_eps_and_adds_nothing():
    norm = norms.scale_norm(4, eps=0.5).double()
    x = torch.tensor([[0.1, 0, 0, 0], [0.6, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(norm(x)[:, 0], torch.tensor([2 * 0.1 / 0.5, 2.0], dtype=torch.float64))


def test_crms_norm_is_rms_norm_of_the_token_that_its_last_entry_completes_to_mean_zero():
    short = torch.randn(3, 7, dtype=torch.float64)
    whole = torch.cat([short, -short.sum(-1, keepdim=True)], -1)
    want = torch.nn.functional.layer_norm(whole, (8,), eps=1e-5)
    torch.testing.assert_close(norms.crms_norm(7).double()(short), want[:, :7], rtol=1e-12, atol=1e-14)
    assert not list(norms.crms_norm(7).parameters())
