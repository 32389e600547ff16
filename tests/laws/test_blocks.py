"""What is true of every block.

One that cannot keep a law says so beside its code, with the reason, in a class attribute: ``_reshapes`` (y has another
shape than x), ``_no_vmap``, ``_no_compile``, ``_no_gradcheck``. The law then demands that it really fails.
"""

import contextlib
import copy
import pickle

import pytest
import torch
from plays.blocks import call, example, make
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from etude import blocks
from etude._method import methods
from etude._roles import roles

BLOCKS = [m for m in methods().values() if m.room == "blocks"]
each = pytest.mark.parametrize("method", BLOCKS, ids=lambda m: m.name)


def cast(inputs, dtype):
    return [t.to(dtype, copy=True) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]


def built(method, dtype=torch.float32):
    block = make(method)
    return block.to(dtype), cast(example(block), dtype)


@contextlib.contextmanager
def kept(block, law):
    """The body, which holds; or fails, where the block declares that it cannot."""
    reason = getattr(block, law, "")
    if not reason:
        yield
        return
    assert len(reason) > 10, f"{law} of {type(block).__name__} must say why"
    try:
        yield
    except Exception:
        return
    pytest.fail(f"{type(block).__name__} declares {law} ({reason}), but it keeps the law")


@each
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_shape_and_dtype_are_kept_and_everything_is_finite(method, dtype):
    block, (x, *rest) = built(method, dtype)
    before, x = x.clone(), x.requires_grad_()
    y, *_ = call(block, x, *rest)
    y.square().sum().backward()
    assert torch.equal(x.detach(), before)
    with kept(block, "_reshapes"):
        assert y.shape == x.shape
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert all(t.isfinite().all() for t in (y, x.grad, *(p.grad for p in block.parameters() if p.requires_grad)))


@each
def test_huge_and_no_examples_are_finite(method):
    block, (x, *rest) = built(method)
    x = (1e4 * x.sign()).requires_grad_()
    y, *_ = call(block.eval(), x, *rest)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and slope.isfinite().all()
    if not rest:
        assert call(block, x[:0])[0].shape == y[:0].shape


@each
@pytest.mark.parametrize("training", [True, False])
def test_constant_and_lonely_inputs_are_finite(method, training):
    block, (x, *rest) = built(method)
    block.train(training)
    for value in (0.0, 0.7):
        flat = torch.full_like(x, value).requires_grad_()
        y, *_ = call(block, flat, *rest)
        (slope,) = torch.autograd.grad(y.square().sum(), flat)
        assert y.isfinite().all() and slope.isfinite().all()
    if not rest:
        with contextlib.suppress(ValueError):  # a batch norm inside has no statistics of one row
            assert call(block, x[:1])[0].isfinite().all()


@each
def test_train_and_eval_agree_where_nothing_is_remembered_or_dropped(method):
    block, inputs = built(method)
    fresh, rest = call(copy.deepcopy(block).train(), *inputs)[0], call(block.eval(), *inputs)[0]
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in block.modules())
    assert torch.equal(fresh, rest) or drops or any(True for _ in block.buffers())


@each
def test_the_device_is_kept(method):
    """Whatever it makes on the way, it makes where x is: on the device that computes nothing, that is an error."""
    block, inputs = built(method)
    y, *_ = call(block.eval().to("meta"), *(t.to("meta") if isinstance(t, torch.Tensor) else t for t in inputs))
    assert y.device.type == "meta"


@each
def test_half_precision_stays_close(method):
    block, inputs = built(method)
    want, *_ = call(block.eval(), *inputs)
    y, *_ = call(block.half(), *cast(inputs, torch.float16))
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)


@each
def test_autocast_stays_close(method):
    block, inputs = built(method)
    block.eval()
    with torch.autocast("cpu", torch.bfloat16):
        inside, *_ = call(block, *inputs)
    torch.testing.assert_close(inside.float(), call(block, *inputs)[0], rtol=0.05, atol=0.05)


@each
def test_state_copies_and_pickles_rebuild_the_same_block(method):
    block, inputs = built(method)
    fresh = make(method)
    fresh.load_state_dict(block.state_dict())
    for twin in (fresh, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(call(twin.eval(), *inputs)[0], call(block.eval(), *inputs)[0])
        assert repr(twin) == repr(block)


@each
def test_every_parameter_has_a_role(method):
    assert "unknown" not in roles(nn.Sequential(make(method))).values()


@each
def test_compiles_whole_to_the_same_values(method):
    block, inputs = built(method)
    block.eval()
    torch._dynamo.reset()
    with kept(block, "_no_compile"):
        got = call(torch.compile(block, fullgraph=True, backend="eager", dynamic=False), *inputs)
        torch.testing.assert_close(got, call(block, *inputs))


@each
def test_its_gradients_are_those_of_its_values(method):
    block, (x, *rest) = built(method, torch.float64)
    block.eval()
    theta = {k: v.detach().requires_grad_() for k, v in block.named_parameters() if v.requires_grad}
    if getattr(block, "_no_gradcheck", ""):
        theta = {}  # gradcheck takes minutes over the report of a large one that fails

    def y(x, *values):
        out = functional_call(block, dict(zip(theta, values, strict=True)), (x, *rest))
        return out[0] if isinstance(out, tuple) else out

    with kept(block, "_no_gradcheck"):
        assert torch.autograd.gradcheck(y, (x.requires_grad_(), *theta.values()), fast_mode=True)


@each
def test_a_population_under_vmap_is_each_member_alone(method):
    block, (x, *rest) = built(method, torch.float64)
    block.eval()
    leaves = {"x": x} | {f"theta.{k}": v.detach() for k, v in block.named_parameters()}
    stacked = {k: torch.stack([v, 0.5 * v]) for k, v in leaves.items()}

    def loss(p):
        theta = {k.removeprefix("theta."): v for k, v in p.items() if k != "x"}
        y = functional_call(block, theta, (p["x"], *rest))
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    # torch has no batching rule for its fused attention on a CPU and warns
    with kept(block, "_no_vmap"), sdpa_kernel(SDPBackend.MATH):
        got = vmap(grad(loss))(stacked)
        for i in range(2):
            alone = grad(loss)({k: v[i] for k, v in stacked.items()})
            for k in leaves:
                torch.testing.assert_close(got[k][i], alone[k])


def test_a_residual_block_hands_further_arguments_to_f():
    block = blocks.pre_ln(8, blocks.attention(8, heads=2))
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, False, True, True]])
    want = x + block.f(block.norm_in(x), context, mask=mask)
    assert torch.equal(block(x, context, mask=mask), want)


@pytest.mark.parametrize(
    "make", [lambda: blocks.attention(8, heads=2, dropout=0.5), lambda: blocks.s4d(8, dropout=0.5)]
)
def test_dropout_acts_in_training_only(make):
    block, x = make(), torch.randn(2, 3, 8)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_bad_input_is_one_clear_line():
    causal, kan, pooling = blocks.attention(8, heads=2, causal=True), blocks.kan(3), blocks.gated_pooling()
    wrong = {
        "attention of width 8 does not divide into 3 heads": lambda: blocks.attention(8, heads=3),
        "qk_norm starts at log₂(length² − length), so length must be at least 2; got 1": lambda: blocks.qk_norm(
            8, length=1
        ),
        "8 heads do not divide into groups for 3 kv_heads": lambda: blocks.grouped_query_attention(8, kv_heads=3),
        "rotary positions turn pairs, but a head has 3 entries": lambda: blocks.rotary_attention(9, 3)(
            torch.randn(1, 2, 9)
        ),
        "norm-aware attention turns pairs for rows and pairs for columns": lambda: blocks.norm_aware_linear_attention(
            6
        ),
        "galerkin attention was made for 0 coordinates a token, got 2": lambda: blocks.galerkin_attention(8)(
            torch.randn(1, 3, 8), torch.rand(1, 3, 2)
        ),
        "deep_norm scales by the depth of the model, so layers must be at least 1; got 0": lambda: blocks.deep_norm(
            8, nn.Tanh(), layers=0
        ),
        "layernorm_scaling counts layers from 1; got layer=0": lambda: blocks.layernorm_scaling(8, nn.Tanh(), layer=0),
        'orthogonal_residual takes products over "feature" or "global", not \'token\'': lambda: (
            blocks.orthogonal_residual(8, nn.Tanh(), over="token")
        ),
        "causal attention makes its own mask": lambda: causal(torch.randn(1, 3, 8), mask=torch.ones(3, 3).bool()),
        "a residual block adds f(x) to x, but f made (2, 4) of (2, 8)": lambda: blocks.post_ln(8, nn.Linear(8, 4))(
            torch.randn(2, 8)
        ),
        "siren divides its weights by w0, so w0=0 must be above 0": lambda: blocks.siren(3, w0=0),
        "hermite needs a degree of at least 1, got 0": lambda: blocks.hermite(0),
        "group_rational: 9 channels do not divide into 8 groups": lambda: blocks.gr_kan(9),
        "group_rational: start='relu' is none of 'identity', 'gelu', 'swish'": lambda: blocks.group_rational(
            8, start="relu"
        ),
        "pooling needs 1 ≤ stride ≤ kernel_size, got stride=3, kernel_size=2": lambda: blocks.mixed_pooling(2, 3),
        "pooling takes images [b, c, h, w], got shape [3, 8, 8]": lambda: pooling(torch.randn(3, 8, 8)),
        "tree_pooling blends two leaves or more, so it needs levels ≥ 2, got 1": lambda: blocks.tree_pooling(levels=1),
        "power_aggregation takes the root of degree p, so p cannot be 0": lambda: blocks.power_aggregation(0),
        "gen_conv takes edges [2, e], rows source and target; got [4, 2]": lambda: blocks.gen_conv(3)(
            torch.randn(5, 3), torch.zeros(4, 2).long()
        ),
        "s4d needs an even n and 0 < dt[0] ≤ dt[1], got n=3 and dt=(0.001, 0.1)": lambda: blocks.s4d(4, n=3),
        "s4d takes sequences [b, t, d], got shape [4, 3]": lambda: blocks.s4d(3)(torch.randn(4, 3)),
        "kan needs grid ≥ 1, k ≥ 1 and a range that rises; got 5, 3 and (1.0, 1.0)": lambda: blocks.kan(
            3, grid_range=(1.0, 1.0)
        ),
        "kan.regrid needs samples [n, d] that differ in each feature, got [4, 3]": lambda: kan.regrid(torch.ones(4, 3)),
        "arithmetic_sparsity found no nau or nmu in the model": lambda: blocks.arithmetic_sparsity(nn.Linear(3, 3), 1),
        "partial_convolution takes a mask [b, 1, h, w], or one as large as x; got x of [1, 3, 8, 8]": lambda: (
            blocks.partial_convolution(3)(torch.randn(1, 3, 8, 8), torch.ones(1, 2, 8, 8))
        ),
    }
    for line, ask in wrong.items():
        with pytest.raises(ValueError) as raised:
            ask()
        assert str(raised.value).startswith(line)
