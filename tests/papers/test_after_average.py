"""Weight averaging (Morales-Brotons et al. 2024) and SWA (Izmailov et al. 2018), by their formulas and by torch."""

import pytest
import torch
from plays.after import net, push
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from etude import after


def test_weight_average_is_the_recursion_in_plain_floats():
    model = torch.nn.Linear(1, 1, bias=False).double()
    w = model.weight.data.fill_(2.0)
    bound = after.weight_average(decay=0.9).bind(model)
    a = 2.0
    for x in (1.0, -3.0, 0.5):
        w.fill_(x)
        bound()
        a = 0.9 * a + 0.1 * x
    assert bound.kept["weight"].item() == pytest.approx(a, abs=1e-15)
    assert w.item() == 0.5


def test_weight_average_is_torchs_averaged_model():
    model = net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(model)  # torch takes the first weights it is given as they are
    ours = after.weight_average(decay=0.8).bind(model)
    for t in range(6):
        push(model, t)
        theirs.update_parameters(model)
        ours()
    with ours.averaged():
        for w, expected in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(w, expected, rtol=0, atol=1e-12)


def test_weight_average_remembers_small_steps_of_bfloat16_weights():
    """1 − decay = 1e-3 is below what bfloat16 can add to 1: an average kept in bfloat16 would stand still."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    bound = after.weight_average(decay=0.999).bind(model)
    model.weight.data.fill_(2.0)
    for _ in range(1000):
        bound()
    assert bound.kept["weight"].item() == pytest.approx(2 - 0.999**1000, abs=1e-3)


def test_swa_is_algorithm_1_of_its_paper():
    """w_swa ← (w_swa · n_models + w) / (n_models + 1) whenever mod(i, c) = 0, from the weights it starts with."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    w = model.weight.data.fill_(5.0)
    bound = after.swa(start=0, cycle=3).bind(model)
    w_swa, c = 5.0, 3
    for i in range(1, 15):
        w.fill_(float(i**2))
        bound()
        if i % c == 0:
            n_models = i / c
            w_swa = (w_swa * n_models + i**2) / (n_models + 1)
        assert bound.kept["weight"].item() == pytest.approx(w_swa, rel=1e-14)


def test_swa_from_a_later_start_is_torchs_equal_average_and_before_it_the_weights_themselves():
    model = net()
    theirs = AveragedModel(model)
    ours = after.swa(start=3).bind(model)
    for t in range(1, 9):
        push(model, t)
        ours()
        if t >= 3:
            theirs.update_parameters(model)
        else:
            assert all(torch.equal(ours.kept[n], w) for n, w in model.named_parameters())
    for n, expected in theirs.module.named_parameters():
        torch.testing.assert_close(ours.kept[n], expected.data, rtol=0, atol=1e-12)


def test_swa_lets_update_bn_refresh_the_statistics_and_puts_them_back():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    data = [torch.randn(8, 3) for _ in range(3)]
    bound = after.swa().bind(model)
    for t, x in enumerate(data):
        model(x)
        push(model, t)
        bound()
    trained = {n: s.clone() for n, s in model.state_dict().items()}
    with bound.averaged() as averaged:
        torch.optim.swa_utils.update_bn(data, averaged)
        assert not torch.equal(model[1].running_mean, trained["1.running_mean"])
    assert all(torch.equal(s, trained[n]) for n, s in model.state_dict().items())
