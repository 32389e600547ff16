"""Layer rotation (Carbonnelle & De Vleeschouwer 2018) and the ratio of updates to weights (CS231n)."""

import math

import pytest
import torch
from plays.after import net, push
from torch import nn
from torch.nn.functional import cosine_similarity

from etude import probes


def test_layer_rotation_is_0_at_the_start_1_at_right_angles_and_2_for_the_opposite():
    model = nn.Linear(2, 1, bias=False).double()
    w = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    rotation = probes.layer_rotation().bind(model)
    assert rotation() == {"weight": 0.0}
    w.copy_(torch.tensor([[-8.0, 6.0]]))
    assert rotation()["weight"] == pytest.approx(1.0, abs=1e-7)
    w.copy_(torch.tensor([[-0.3, -0.4]]))
    assert rotation()["weight"] == pytest.approx(2.0, abs=1e-7)


def test_layer_rotation_is_the_cosine_distance_of_the_whole_kernel_from_its_start():
    model = net()
    start = {n: w.detach().clone() for n, w in model.named_parameters()}
    rotation = probes.layer_rotation().bind(model)
    for t in range(5):
        push(model, t)
        read = rotation()
    assert set(read) == {"0.weight", "3.weight", "6.weight"}
    for n, number in read.items():
        cosine = cosine_similarity(model.get_parameter(n).flatten(), start[n].flatten(), dim=0)
        assert number == pytest.approx(1 - cosine.item(), abs=1e-6)


def test_layer_rotation_does_not_see_the_length_of_a_weight():
    model = net()
    rotation = probes.layer_rotation().bind(model)
    push(model, 0)
    before = rotation()
    with torch.no_grad():
        for w in model.parameters():
            w *= 3.7
    assert rotation() == pytest.approx(before, rel=1e-6)


def test_layer_rotation_sees_small_angles_in_float32():
    """1 − cos of 1e-4 rad is 5e-9, less than float32 can take from 1."""
    model = nn.Linear(2, 1, bias=False)
    w = model.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    rotation = probes.layer_rotation().bind(model)
    w.copy_(torch.tensor([[math.cos(1e-4), math.sin(1e-4)]]))
    assert rotation()["weight"] == pytest.approx(5e-9, rel=1e-3)


def test_layer_rotation_of_a_kernel_that_starts_at_zero_is_not_a_number():
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    rotation = probes.layer_rotation().bind(model)
    nn.init.ones_(model.weight)
    assert math.isnan(rotation()["weight"])


def test_update_ratio_is_the_example_of_its_source():
    """param_scale = ‖W‖ before the step, update = −lr dW, ratio = ‖update‖ / param_scale, for each W by itself."""
    model = net()
    ratio = probes.update_ratio().bind(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        expected = {}
        for n in ("0.weight", "3.weight", "6.weight"):
            entries, slopes = (v.flatten().tolist() for v in (model.get_parameter(n), model.get_parameter(n).grad))
            param_scale = math.sqrt(sum(v * v for v in entries))
            update_scale = math.sqrt(sum((0.05 * v) ** 2 for v in slopes))
            expected[n] = update_scale / param_scale
        opt.step()
        assert ratio() == pytest.approx(expected, rel=1e-6)


def test_update_ratio_of_a_step_that_changed_nothing_is_0():
    model = net()
    ratio = probes.update_ratio().bind(model)
    assert set(ratio().values()) == {0.0}
