"""What the paper of DeeperGCN says of aggregation, message norm, convolution and residual."""

import math

import pytest
import torch
from torch import nn

from etude import blocks

D = torch.float64
TARGET = torch.tensor([0, 2, 0, 2, 2, 1])  # nobody talks to node 3
M = torch.rand(6, 5, dtype=D, generator=torch.Generator().manual_seed(0)) * 3 + 0.05


def each_node(f):
    """f of the list of messages of each node and channel, 0 where there are none."""
    lists = [[[M[e, c].item() for e in range(6) if TARGET[e] == i] for c in range(5)] for i in range(4)]
    return torch.tensor([[f(ms) if ms else 0.0 for ms in row] for row in lists], dtype=D)


def softmaxed(t):
    return lambda ms: sum(m * math.exp(t * m) for m in ms) / sum(math.exp(t * m) for m in ms)


def test_softmax_aggregation_is_the_papers_formula_in_plain_floats():
    for t in (0.7, -1.3):
        torch.testing.assert_close(
            blocks.softmax_aggregation(t).double()(M, TARGET, 4), each_node(softmaxed(t)), rtol=1e-6, atol=1e-6
        )


def test_softmax_aggregation_runs_from_mean_to_maximum():
    torch.testing.assert_close(blocks.softmax_aggregation(0.0)(M, TARGET, 4), each_node(lambda ms: sum(ms) / len(ms)))
    torch.testing.assert_close(blocks.softmax_aggregation(1e4)(M, TARGET, 4), each_node(max))


def test_softmax_aggregation_times_the_degree_runs_from_mean_to_sum():
    mean, total = (each_node(lambda ms: sum(ms) / len(ms)), each_node(sum))
    torch.testing.assert_close(blocks.softmax_aggregation(0.0, y=-50.0)(M, TARGET, 4), mean)
    torch.testing.assert_close(blocks.softmax_aggregation(0.0, y=50.0)(M, TARGET, 4), total)
    want = each_node(lambda ms: math.sqrt(len(ms)) * softmaxed(1.0)(ms))
    torch.testing.assert_close(blocks.softmax_aggregation(y=0.0)(M, TARGET, 4), want)


@pytest.mark.parametrize("make", [blocks.softmax_aggregation, blocks.power_aggregation])
def test_softmax_aggregation_and_the_power_learn_when_told_to(make):
    assert [n for n, _ in make(learn=True, y=0.0).named_parameters()] == ["scale", "y"]
    assert list(make(y=0.0).parameters()) == []
    learns = make(learn=True, y=0.3).double()
    assert torch.autograd.gradcheck(lambda s, y, m: torch.func.functional_call(learns, {"scale": s, "y": y}, (m, TARGET, 4)), (
        torch.tensor(1.4, dtype=D, requires_grad=True), torch.tensor(0.2, dtype=D, requires_grad=True), M.clone().requires_grad_(),
    ))  # fmt: skip


def test_power_aggregation_is_the_power_mean_in_plain_floats():
    for p in (0.5, 2.0, 3.0, -1.5):
        want = each_node(lambda ms, p=p: (sum(m**p for m in ms) / len(ms)) ** (1 / p))
        torch.testing.assert_close(blocks.power_aggregation(p)(M, TARGET, 4), want)


def test_power_aggregation_runs_from_mean_to_maximum():
    torch.testing.assert_close(blocks.power_aggregation(1.0)(M, TARGET, 4), each_node(lambda ms: sum(ms) / len(ms)))
    torch.testing.assert_close(blocks.power_aggregation(1e5)(M, TARGET, 4), each_node(max), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(blocks.power_aggregation(1e5)(40 * M, TARGET, 4), 40 * each_node(max), rtol=1e-4, atol=0)


def test_power_aggregation_times_the_degree_is_a_sum():
    torch.testing.assert_close(blocks.power_aggregation(y=50.0)(M, TARGET, 4), each_node(sum))


def test_msg_norm_gives_the_message_the_length_of_the_node():
    norm, x, m = blocks.msg_norm(s=0.5).double(), torch.randn(7, 5, dtype=D), torch.randn(7, 5, dtype=D)
    y = norm(x, m)
    torch.testing.assert_close(y.norm(dim=1), 0.5 * x.norm(dim=1))
    torch.testing.assert_close(nn.functional.cosine_similarity(y, m), torch.ones(7, dtype=D))
    torch.testing.assert_close(norm(x, 30 * m), y)
    torch.testing.assert_close(norm(3 * x, m), 3 * y)
    assert (norm(x, 0 * m) == 0).all()
    assert [n for n, _ in norm.named_parameters()] == ["s"]


@pytest.mark.parametrize("normed", [False, True])
def test_gen_conv_is_the_papers_layer_in_plain_loops(normed):
    conv = blocks.gen_conv(5, 3, message_norm=blocks.msg_norm(0.7) if normed else None, norm=nn.LayerNorm).double()
    x, edges, features = torch.randn(4, 5, dtype=D), torch.stack([torch.tensor([1, 0, 3, 3, 1, 2]), TARGET]), M - 1
    rows = []
    for i in range(4):
        heard = [(x[s] + f).relu() + 1e-7 for s, t, f in zip(*edges.tolist(), features) if t == i]
        m = torch.zeros(5, dtype=D)
        if heard:
            stack = torch.stack(heard)
            m = (stack.softmax(0) * stack).sum(0)
        if normed:
            m = conv.message_norm.s * x[i].norm() * m / m.norm().clamp(min=1e-12)
        rows.append(x[i] + m)
    torch.testing.assert_close(conv(x, edges, features), conv.mlp(torch.stack(rows)))


def test_gen_conv_has_a_hidden_layer_twice_as_wide_and_without_edge_features_hears_the_neighbours_alone():
    conv, x, edges = blocks.gen_conv(5).eval(), torch.randn(4, 5), torch.stack([TARGET.flip(0), TARGET])
    assert [m.weight.shape for m in conv.mlp if isinstance(m, nn.Linear)] == [(10, 5), (5, 10)]
    assert torch.equal(conv(x, edges), conv(x, edges, torch.zeros(6, 5)))


def test_gen_conv_does_not_see_the_order_of_nodes_and_edges():
    conv, x = blocks.gen_conv(5).double(), torch.randn(4, 5, dtype=D)
    edges, order = torch.stack([torch.tensor([1, 0, 3, 3, 1, 2]), TARGET]), torch.tensor([2, 0, 3, 1])
    where = order.argsort()
    torch.testing.assert_close(conv(x[order], where[edges.flip(1)]), conv(x, edges)[order])


def test_res_plus_is_norm_then_relu_then_the_convolution_then_the_sum():
    block = blocks.res_plus(5, blocks.gen_conv(5)).double()
    x, edges = torch.randn(4, 5, dtype=D), torch.stack([TARGET.flip(0), TARGET])
    norm = nn.BatchNorm1d(5).double()
    torch.testing.assert_close(block(x, edges, M), x + block.f(norm(x).relu(), edges, M))


def test_res_plus_carries_gradients_through_a_hundred_layers():
    x, edges = torch.randn(12, 8), torch.randint(12, (2, 40))
    h = leaf = x.requires_grad_()
    stack = nn.ModuleList(blocks.res_plus(8, blocks.gen_conv(8, message_norm=blocks.msg_norm())) for _ in range(100))
    for block in stack:
        h = block(h, edges)
    h.square().mean().backward()
    grads = [leaf.grad, *(p.grad for p in stack[0].parameters())]
    assert all(g.isfinite().all() for g in grads)
    assert leaf.grad.abs().mean() > 1e-4
