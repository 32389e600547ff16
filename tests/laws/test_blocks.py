"""What is true of every block."""

import copy

import pytest
import torch
from plays.blocks import make
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from etude import blocks
from etude._method import methods

BLOCKS = [m for m in methods().values() if m.room == "blocks"]
each = pytest.mark.parametrize("method", BLOCKS, ids=lambda m: m.name)
X = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(0))


@each
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_shape_and_dtype_are_kept_and_everything_is_finite(method, dtype):
    block, x = make(method).to(dtype), X.to(dtype, copy=True).requires_grad_()
    y = block(x)
    y.square().sum().backward()
    assert (y.shape, y.dtype, x.grad.dtype) == (x.shape, dtype, dtype)
    assert all(t.isfinite().all() for t in (y, x.grad, *(p.grad for p in block.parameters())))


@each
def test_autocast_stays_close(method):
    block = make(method)
    with torch.autocast("cpu", torch.bfloat16):
        inside = block(X)
    torch.testing.assert_close(inside.float(), block(X), rtol=0.05, atol=0.05)


@each
def test_state_and_copies_rebuild_the_same_block(method):
    block, fresh = make(method), make(method)
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(fresh(X), block(X))
    assert torch.equal(copy.deepcopy(block)(X), block(X))


@each
def test_compiles_whole_to_the_same_values(method):
    block = make(method)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(X), block(X))


@each
def test_a_population_under_vmap_is_each_member_alone(method):
    block = make(method).double()
    params = {k: v.detach() for k, v in block.named_parameters()}
    stacked = {k: torch.stack([v, 0.5 * v]) for k, v in params.items()}

    def loss(p):
        return functional_call(block, p, (X.double(),)).square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # torch has no batching rule for its fused attention on a CPU and warns
        got = vmap(grad(loss))(stacked)
    for i in range(2):
        alone = grad(loss)({k: v[i] for k, v in stacked.items()})
        for k in params:
            torch.testing.assert_close(got[k][i], alone[k])


def test_a_residual_block_hands_further_arguments_to_f():
    block = blocks.pre_ln(8, blocks.attention(8, heads=2))
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, False, True, True]])
    want = x + block.f(block.norm_in(x), context, mask=mask)
    assert torch.equal(block(x, context, mask=mask), want)


def test_dropout_acts_in_training_only():
    block, x = blocks.attention(8, heads=2, dropout=0.5), torch.randn(2, 3, 8)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_bad_input_is_one_clear_line():
    causal = blocks.attention(8, heads=2, causal=True)
    wrong = {
        "attention of width 8 does not divide into 3 heads": lambda: blocks.attention(8, heads=3),
        "qk_norm starts at log₂(length² − length), so length must be at least 2; got 1": lambda: blocks.qk_norm(
            8, length=1
        ),
        "causal attention makes its own mask": lambda: causal(torch.randn(1, 3, 8), mask=torch.ones(3, 3).bool()),
        "a residual block adds f(x) to x, but f made (2, 4) of (2, 8)": lambda: blocks.post_ln(8, nn.Linear(8, 4))(
            torch.randn(2, 8)
        ),
    }
    for line, call in wrong.items():
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value).startswith(line)
