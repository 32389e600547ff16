"""The pass over the data from which a map is born: what it sees, what it leaves, what it refuses."""

import copy

import pytest
import torch
from torch import nn

from etude import weights
from etude.weights._birth import _rows

F64 = torch.float64


@pytest.mark.parametrize(
    "conv, x",
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
        (nn.Conv2d(4, 6, (1, 3), groups=2, dilation=2, padding=(0, 2), padding_mode="reflect"), (2, 4, 6, 7)),
        (nn.Conv3d(2, 4, 2, padding="same"), (1, 2, 4, 4, 4)),
    ],
)  # fmt: skip
def test_the_pass_sees_the_rows_that_a_kernel_multiplies(conv, x):
    conv, x = conv.double(), torch.randn(x, dtype=F64)
    rows = _rows(conv, x).unflatten(1, (conv.groups, -1))  # [b, groups, places, in · k]
    y = torch.einsum("bgpi,goi->bgop", rows, conv.weight.flatten(1).unflatten(0, (conv.groups, -1)))
    y = y.flatten(1, 2) + conv.bias[:, None]
    torch.testing.assert_close(y, conv(x).flatten(2))


def test_the_pass_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2)).double().train()
    net[1].eval()
    data = list(torch.randn(2, 9, 7, dtype=F64))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    weights.put(net, weights.lora_sb(r=2, lr=0.1), on="0", batches=data, loss=lambda m, x: m(x).sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net] == [True, False, True, True]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k in before)
    assert not net[0].parametrizations.weight.original.requires_grad
    assert net[3].weight.requires_grad
    weights.put(net, weights.corda(r=2), on="3", batches=data)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    "net, on, map, data, line",
    [
        (nn.Linear(7, 5), "weight", weights.eva(), {}, r"eva\(.*is born from data: give weights.put batches="),
        (nn.Linear(7, 5), "weight", weights.lora(), {"batches": []}, r"lora\(.* is not born from data"),
        (nn.Linear(7, 5), "weight", weights.eva(), {"batches": []}, "no batch of batches= shows this weight any data"),
        (nn.Embedding(7, 5), "weight", weights.corda(), {"batches": [0]}, "weight's is a Embedding"),
        (nn.Linear(7, 5), "weight", weights.lora_sb(), {"batches": [0]}, "give loss=, a function of .model, batch."),
        (nn.Linear(7, 5), "weight", weights.corda(), {"batches": [torch.zeros(2, 7)]}, "are all zero, or not finite"),
    ],
)  # fmt: skip
def test_a_birth_without_its_data_is_refused_and_changes_nothing(net, on, map, data, line):
    with pytest.raises(ValueError, match=line) as raised:
        weights.put(net, map, on=on, **data)
    assert "\n" not in str(raised.value)
    assert not hasattr(net, "parametrizations")
