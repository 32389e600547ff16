"""What is true of every probe."""

import copy
import io
import math

import pytest
import torch
from plays import probes as plays
from plays.after import net, push
from torch import nn

from etude import weights
from etude._method import methods

METHODS = [m for (room, _), m in methods().items() if room == "probes"]
every = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_number_per_weight_by_name_and_nothing_touched(method, dtype):
    model = net(dtype)
    bound = plays.make(method).bind(model)
    push(model, 0)
    before = {n: s.clone() for n, s in model.state_dict().items()}
    read = bound()
    assert set(read) <= {n for n, _ in model.named_parameters()}
    assert all(isinstance(x, float) and 0 < x < float("inf") for x in read.values())
    assert all(torch.equal(s, before[n]) for n, s in model.state_dict().items())
    assert all(w.grad is None for w in model.parameters())


@every
def test_resumed_from_a_file_it_reads_the_same(method):
    model = net()
    whole = plays.make(method).bind(model)
    push(model, 0)
    whole()
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    saved.seek(0)
    resumed = plays.make(method).bind(model)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    push(model, 1)
    assert whole() == resumed()


@every
def test_it_copies_and_prints(method):
    value = plays.make(method)
    assert copy.deepcopy(value) == value
    assert repr(value).startswith(f"{method.name}(")
    assert repr(value.bind(net())) == f"{value} on Sequential"


@every
def test_weights_that_changed_since_it_was_bound_are_an_error(method):
    for change in (lambda m: weights.put(m, weights.lora(r=2)), lambda m: m.__setitem__(0, nn.Linear(4, 7))):
        model = net()
        bound = plays.make(method).bind(model)
        change(model)
        with pytest.raises(ValueError, match=r"weights changed since .* was bound to the model; bind it again"):
            bound()


@every
def test_a_weight_that_is_zero_when_bound_raises_nothing(method):
    model = weights.put(net(), weights.lora(r=2))
    read = plays.make(method).bind(model)()
    assert {n for n, x in read.items() if not math.isfinite(x)} == {n for n in read if n.endswith(".B")}


@every
def test_a_model_without_kernels_is_an_error_and_so_is_another_models_state(method):
    with pytest.raises(ValueError, match="found nothing to read: LayerNorm has no weight of two or more axes"):
        plays.make(method).bind(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"belongs to another model: .*3\.weight"):
        plays.make(method).bind(nn.Sequential(nn.Linear(4, 6))).load_state_dict(
            plays.make(method).bind(net()).state_dict()
        )
