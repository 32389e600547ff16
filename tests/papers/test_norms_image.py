"""What the papers of EvoNorm and of the phase-preserving norms say: against timm, and by Fourier transforms."""

import math

import pytest
import torch
from torch import nn

from etude import norms
from tests.peers import timm

D = torch.float64
torch.manual_seed(0)
IMAGES = torch.randn(4, 6, 5, 4, dtype=D) * torch.arange(1, 7, dtype=D).view(6, 1, 1) + 0.3


def drawn(norm):
    rng = torch.Generator().manual_seed(9)
    for p in norm.double().parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=D)
    return norm


def alike(ours, theirs, x):
    """Outputs, input gradients and parameter gradients by name."""
    seen = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        grads = torch.autograd.grad(y, [leaf, *(p for _, p in sorted(layer.named_parameters()))], x.sin())
        seen.append((y, *grads))
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=2e-5)  # timm takes its statistics in float32


def test_evonorm_b0_is_timms_in_training_and_eval():
    ours, theirs = (
        drawn(norms.evonorm_b0(6, momentum=0.3)),
        timm("layers.evo_norm").EvoNorm2dB0(6, momentum=0.3).double(),
    )
    theirs.load_state_dict(ours.state_dict())
    for i in (1, 2, 3):
        alike(ours, theirs, IMAGES * i + i)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)
        assert not ours.running_var.requires_grad
    alike(ours.eval(), theirs.eval(), IMAGES)
    defaults = timm("layers.evo_norm").EvoNorm2dB0(6)
    assert (norms.evonorm_b0(6).eps, norms.evonorm_b0(6).momentum) == (defaults.eps, defaults.momentum)


def test_evonorm_b0_by_hand_for_one_channel():
    x = torch.tensor([[[1.0, 3.0]], [[-2.0, 0.0]]], dtype=D)  # images of two places
    var, own, v = 3.25, 1.0, -0.5
    norm = norms.evonorm_b0(1).double()
    norm.v.data.fill_(v)
    want = [max(math.sqrt(var + 1e-3), v * a + math.sqrt(own + 1e-3)) for a in (1.0, 3.0, -2.0, 0.0)]
    torch.testing.assert_close(norm(x).flatten(), x.flatten() / torch.tensor(want, dtype=D))
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9 + 0.1 * var * 4 / 3], dtype=D))


def test_evonorm_b0_in_eval_takes_the_batchs_variance_from_memory_and_the_instances_from_x():
    norm = drawn(norms.evonorm_b0(6))
    norm(IMAGES)
    norm.eval()
    torch.testing.assert_close(norm(IMAGES)[:1], norm(IMAGES[:1]))
    with pytest.raises(ValueError, match="needs more than one value per channel in training"):
        norms.evonorm_b0(6)(torch.randn(1, 6, 1, 1))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_evonorm_s0_is_timms(groups):
    ours, theirs = drawn(norms.evonorm_s0(6, groups)), timm("layers.evo_norm").EvoNorm2dS0(6, groups).double()
    theirs.load_state_dict(ours.state_dict())
    alike(ours, theirs, IMAGES)
    assert (norms.evonorm_s0(64).groups, norms.evonorm_s0(64).eps) == (32, timm("layers.evo_norm").EvoNorm2dS0(64).eps)


def test_evonorm_s0_looks_at_one_image_and_tends_to_a_rectified_group_norm_without_centring():
    norm = drawn(norms.evonorm_s0(6, 2))
    torch.testing.assert_close(norm(IMAGES)[1:2], norm(IMAGES[1:2]))
    plain = norms.evonorm_s0(6, 2).double()
    var = IMAGES.view(4, 2, -1).var(2, correction=0).repeat_interleave(3, 1)[..., None, None]
    torch.testing.assert_close(plain(1e6 * IMAGES), IMAGES.relu() / var.sqrt())
    with pytest.raises(ValueError, match="6 features do not divide into 4 groups"):
        norms.evonorm_s0(6, 4)


def composed(phase_of, amplitude_of):
    """F⁻¹(|F(amplitude_of)| e^{i ∠F(phase_of)}) by the full transform."""
    phase, amplitude = torch.fft.fft2(phase_of).angle(), torch.fft.fft2(amplitude_of).abs()
    y = torch.fft.ifft2(amplitude * torch.complex(phase.cos(), phase.sin()))
    assert y.imag.abs().max() < 1e-10
    return y.real


def batch_normed(norm, x):
    """Before the affine, with the statistics that norm had before its own forward."""
    args = norm.running_mean.clone(), norm.running_var.clone(), None, None
    return nn.functional.batch_norm(x, *args, norm.training, norm.momentum, norm.eps)


@pytest.mark.parametrize("training", [True, False])
def test_pcnorm_is_the_amplitude_of_batch_norm_at_the_phase_of_x(training):
    norm = drawn(norms.pcnorm(6))
    norm.running_mean += 0.4
    for i in (1, 2):
        x = IMAGES * i
        x[1:] += 3.0
        inside = batch_normed(norm.train(training), x)
        w, b = norm.weight.view(6, 1, 1), norm.bias.view(6, 1, 1)
        y = norm(x)
        torch.testing.assert_close(y, composed(x, inside) * w + b)
        assert not torch.allclose(y, inside * w + b)  # the phase of frequency 0 did change
    untouched = drawn(norms.pcnorm(6))
    twin = drawn(nn.BatchNorm2d(6))
    untouched(x)
    twin(x)
    for one, two in zip(untouched.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_pcnorm_gradients_are_those_through_the_transforms():
    norm = drawn(norms.pcnorm(6))
    ours, theirs = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    want = composed(theirs, batch_normed(norm, theirs)) * norm.weight.view(6, 1, 1) + norm.bias.view(6, 1, 1)
    got = norm(ours)
    for one, two in zip(
        torch.autograd.grad(got, [ours, norm.weight, norm.bias], IMAGES.sin()),
        torch.autograd.grad(want, [theirs, norm.weight, norm.bias], IMAGES.sin()),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_pcnorm_differs_from_batch_norm_by_a_constant_for_each_channel_of_each_image():
    shift = norms.pcnorm(6).double()(IMAGES) - norms.batch_norm(6).double()(IMAGES)
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift))
    assert (shift.abs() > 1e-6).any()
    assert (shift.abs() < 1e-12).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("w", [(0.0, 0.0), (0.7, -0.2), (-2.0, 3.0)])
def test_ccnorm_takes_the_phase_of_x_less_a_part_of_the_mean(training, w):
    norm = drawn(norms.ccnorm(6, T=0.8)).train(training)
    norm.w.data = torch.tensor(w, dtype=D)
    norm.running_mean += 0.5
    inside = batch_normed(norm, IMAGES)
    lam = math.exp(w[0] / 0.8) / (math.exp(w[0] / 0.8) + math.exp(w[1] / 0.8))
    mean = IMAGES.mean((0, 2, 3), keepdim=True) if training else norm.running_mean.view(6, 1, 1)
    want = composed(IMAGES - lam * mean, inside) * norm.weight.view(6, 1, 1) + norm.bias.view(6, 1, 1)
    torch.testing.assert_close(norm(IMAGES), want)


def test_ccnorm_is_batch_norm_at_lambda_one_and_pcnorm_at_zero_and_starts_between_them():
    images = IMAGES + torch.arange(4, dtype=D).view(4, 1, 1, 1)
    norm = norms.ccnorm(6).double()
    assert norm.w.tolist() == [0.0, 0.0]
    assert norm.T == 1e-6
    between = norm(images)
    for w, twin in (([1.0, 0.0], norms.batch_norm(6)), ([0.0, 1.0], norms.pcnorm(6))):
        norm.w.data = torch.tensor(w, dtype=D)
        torch.testing.assert_close(norm(images), twin.double()(images))
        assert not torch.allclose(between, norm(images))


def test_ccnorm_passes_no_gradient_to_its_w_and_neither_do_the_transforms():
    norm = norms.ccnorm(6, T=0.5).double()
    lam = torch.softmax(norm.w / 0.5, 0)[0]
    inside = batch_normed(norm, IMAGES)
    by_transforms = composed(IMAGES - lam * IMAGES.mean((0, 2, 3), keepdim=True), inside)
    for y in (norm(IMAGES), by_transforms):
        (gradient,) = torch.autograd.grad(y, norm.w, IMAGES.sin())
        torch.testing.assert_close(gradient, torch.zeros(2, dtype=D), rtol=0, atol=1e-12)


def test_scnorm_mixes_the_amplitudes_of_instance_norm_and_of_x_at_the_phase_of_x():
    norm = drawn(norms.scnorm(6))
    a = torch.softmax(norm.h / 0.1, 0)[0]
    inside = nn.functional.instance_norm(IMAGES)
    phase = torch.fft.fft2(IMAGES).angle()
    amplitude = a * torch.fft.fft2(inside).abs() + (1 - a) * torch.fft.fft2(IMAGES).abs()
    want = torch.fft.ifft2(amplitude * torch.exp(1j * phase)).real
    torch.testing.assert_close(norm(IMAGES), want * norm.weight.view(6, 1, 1) + norm.bias.view(6, 1, 1))


def test_scnorm_starts_half_way_and_ends_as_instance_norm_or_as_the_identity():
    norm = norms.scnorm(6).double()
    inside = nn.functional.instance_norm(IMAGES)
    torch.testing.assert_close(norm(IMAGES), (inside + IMAGES) / 2)
    for h, want in (([9.0, 0.0], inside), ([0.0, 9.0], IMAGES)):
        norm.h.data = torch.tensor(h, dtype=D)
        torch.testing.assert_close(norm(IMAGES), want)
