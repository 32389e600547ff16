"""What is true of every norm, of the pattern language, and of swap.

A norm that cannot keep a law says so beside its code, with the reason: a class attribute ``_no_vmap``, ``_no_compile``,
``_no_second_derivative`` or ``_no_gradcheck``. The law then demands that it really fails.
"""

import contextlib
import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
import transformers
from plays import norms as plays
from plays.norms import call, conditions, layer, make
from torch import nn
from torch.func import functional_call, grad, vmap

from etude import norms, rules
from etude._method import methods
from etude._roles import roles

NORMS = [m for m in methods().values() if m.room == "norms" and "model" not in inspect.signature(m.fn).parameters]
each = pytest.mark.parametrize("method", NORMS, ids=lambda m: m.name)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def built(method):
    torch.manual_seed(3)
    norm = layer(make(method))
    for p in norm.parameters():
        if p.ndim < 2:
            nn.init.normal_(p, 1.0, 0.3)
        else:
            nn.init.normal_(p, 0.0, p[0].numel() ** -0.5)
    return norm


def example(norm, scale=1.0, batch=3):
    return (scale * plays.example(norm, torch.Generator().manual_seed(4), batch) + scale).float()


class Call(nn.Module):
    """x → norm(x, the condition of the table)."""

    def __init__(self, norm, x):
        super().__init__()
        self.norm, self.rest = norm, conditions(norm, x)

    def forward(self, x):
        return self.norm(x, *self.rest)


@contextlib.contextmanager
def kept(norm, law):
    """The body, which holds; or fails, where the norm declares that it cannot."""
    reason = getattr(norm, law, "")
    if not reason:
        yield
        return
    assert len(reason) > 10, f"{law} of {type(norm).__name__} must say why"
    try:
        yield
    except Exception:
        return
    pytest.fail(f"{type(norm).__name__} declares {law} ({reason}), but it keeps the law")


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_and_dtype_are_kept_and_x_is_not_touched(method, dtype):
    norm = built(method)
    reference = call(norm, example(norm))
    low = copy.deepcopy(built(method)).to(dtype)
    x = example(norm).to(dtype)
    before, leaf = x.clone(), x.requires_grad_()
    y = call(low, leaf)
    y.sum().backward()
    assert (y.shape, y.dtype, leaf.grad.dtype) == (x.shape, dtype, dtype)
    assert torch.equal(x.detach(), before)
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.05)


@each
def test_low_precision_input_meets_float32_weights_and_autocast(method):
    norm = built(method)
    x = example(norm).bfloat16().requires_grad_()
    y = call(norm, x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.grad.dtype for p in norm.parameters() if p.requires_grad} <= {torch.float32}
    inside, outside = copy.deepcopy(norm), copy.deepcopy(norm)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(inside, example(norm))
    torch.testing.assert_close(got.float(), call(outside, example(norm)), rtol=0.02, atol=0.02)


@each
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_finite_forward_and_backward_from_zero_to_huge(method, scale):
    norm = built(method)
    x = example(norm, scale).requires_grad_()
    y = call(norm, x)
    y.square().sum().backward()
    assert all(t.isfinite().all() for t in (y, x.grad, *(p.grad for p in norm.parameters() if p.requires_grad)))


@each
@pytest.mark.parametrize("training", [True, False])
def test_constant_huge_half_empty_and_lonely_inputs(method, training):
    """Constant, half at ±1e4, whose square half cannot hold, one example: finite. No example. A place: or refused."""
    norm = built(method).train(training)
    x = example(norm)
    assert call(norm, torch.full_like(x, 7.0)).isfinite().all()
    assert call(copy.deepcopy(norm), (1e4 * x.sign()).half()).isfinite().all()
    assert call(norm, x[:0]).shape == x[:0].shape
    assert call(norm, x[:1]).isfinite().all()
    place = x[:1]
    for axis in range(1, x.ndim):
        place = place if axis == norm.axis % x.ndim else place[(slice(None),) * axis + (slice(1),)]
    with contextlib.suppress(ValueError):  # statistics of one number are none
        assert call(norm, place).isfinite().all()


@each
def test_train_and_eval_agree_where_nothing_is_remembered(method):
    norm = built(method)
    x = example(norm)
    fresh, rest = call(copy.deepcopy(norm).train(), x), call(norm.eval(), x)
    assert torch.equal(fresh, rest) or any(True for _ in norm.buffers())


@each
def test_the_device_is_kept(method):
    """Whatever it makes on the way, it makes where x is: on the device that computes nothing, that is an error."""
    norm = built(method).eval()
    x = example(norm)
    rest = (tuple(t.to("meta") for t in c) if isinstance(c, tuple) else c.to("meta") for c in conditions(norm, x))
    y = norm.to("meta")(x.to("meta"), *rest)
    assert (y.device.type, y.shape) == ("meta", x.shape)


WITH_MOMENTUM = [m for m in NORMS if "momentum" in m.knobs and hasattr(make(m), "running_var")]


@pytest.mark.parametrize("method", WITH_MOMENTUM, ids=lambda m: m.name)
def test_running_statistics_are_those_of_two_passes(method):
    """With all the weight on this batch, far from 0 beside its spread: the mean, and the variance about that mean."""
    norm = make(method, momentum=1.0)
    x = 30 + torch.randn(64, norm.features, 3, 5)
    norm.train()(x)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_var.double(), exact.var(1), rtol=1e-4, atol=0)
    if hasattr(norm, "running_mean"):
        torch.testing.assert_close(norm.running_mean.double(), exact.mean(1), rtol=1e-6, atol=0)


@each
def test_state_copies_and_pickles_rebuild_the_same_norm(method):
    norm = built(method)
    call(norm, example(norm))
    fresh = layer(make(method))
    fresh.load_state_dict(norm.state_dict())
    twins = (fresh, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)))
    want = call(norm.eval(), example(norm))
    for twin in twins:
        assert torch.equal(call(twin.eval(), example(norm)), want)
        assert repr(twin) == repr(norm)


@each
def test_every_parameter_has_the_role_of_a_norm(method):
    """Its own, that is; a convolution inside keeps its role."""
    norm = layer(make(method))
    found = roles(nn.Sequential(norm))
    assert {found[f"0.{name}"] for name, _ in norm.named_parameters(recurse=False)} <= {"norm"}
    assert "unknown" not in found.values()


@each
def test_compiles_whole_to_the_same_values_and_gradients(method):
    norm = built(method)
    with kept(norm, "_no_compile"):
        seen = []
        rest = conditions(norm, example(norm))
        compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager", dynamic=False)
        for route in (norm, compiled):
            x = example(norm).requires_grad_()
            y = route(x, *rest)
            leaves = [x, *(p for p in route.parameters() if p.requires_grad)]
            seen.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for one, two in zip(*seen, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


@each
def test_a_population_under_vmap_is_each_member_alone(method):
    norm = built(method).double().eval()
    x = example(norm).double()
    params = {k: v.detach() for k, v in norm.named_parameters()}
    x_and_params = {"x": x, **params}
    stacked = {k: torch.stack([v, 2 * v, -v]) for k, v in x_and_params.items()}

    called = Call(norm, x)

    def loss(p):
        theta = {f"norm.{k}": v for k, v in p.items() if k != "x"}
        return functional_call(called, theta, (p["x"],)).square().sum()

    with kept(norm, "_no_vmap"):
        both = {"vmap(grad)": vmap(grad(loss))(stacked), "grad(vmap)": grad(lambda p: vmap(loss)(p).sum())(stacked)}
        for got in both.values():
            for i in range(3):
                alone = grad(loss)({k: v[i] for k, v in stacked.items()})
                for k in x_and_params:
                    torch.testing.assert_close(got[k][i], alone[k])
        last = list(x_and_params)[-1]  # only one of them differs
        vmap(grad(lambda v: loss(x_and_params | {last: v})))(stacked[last])


@each
def test_by_hand_backward_agrees_with_the_one_that_can_be_differentiated(method):
    norm = built(method).double().eval()
    x = example(norm).double().requires_grad_()
    pulled = example(norm).double().sin()

    def grads(create_graph):
        twin = copy.deepcopy(norm)
        leaves = [x, *(p for p in twin.parameters() if p.requires_grad)]
        some = {"allow_unused": True, "materialize_grads": True}  # a parameter may act in training only
        return torch.autograd.grad(call(twin, x), leaves, pulled, create_graph=create_graph, **some)

    with kept(norm, "_no_second_derivative"):
        for one, two in zip(grads(False), grads(True), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@each
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(method, training):
    norm = built(method).double().train(training)
    x = example(norm, batch=2).double().requires_grad_()
    named = {f"norm.{k}": v.detach().requires_grad_() for k, v in norm.named_parameters() if v.requires_grad}

    def y(x, *theta):  # on a copy: what the norm remembers starts anew at each evaluation
        return functional_call(
            Call(copy.deepcopy(norm), example(norm, batch=2).double()), dict(zip(named, theta, strict=True)), (x,)
        )

    with kept(norm, "_no_gradcheck"):
        assert torch.autograd.gradcheck(y, (x, *named.values()), fast_mode=True)


def pattern_norms():
    for method in NORMS:
        if isinstance(make(method), norms.Norm):
            yield pytest.param(built(method), id=method.name)
    for knobs in ({"center": False}, {"modulation": "none"}, {"modulation": "scale"}, {"center": False, "eps": 0.1}):
        for pattern in ("... d -> ...", "b c ... -> b c", "b c ... -> c"):
            yield pytest.param(norms.Norm(pattern, 6, **knobs), id=f"{pattern} {knobs}")


@pytest.mark.parametrize("norm", list(pattern_norms()))
def test_fused_kernels_equal_the_pattern_written_out(norm):
    written = copy.deepcopy(norm).double()
    fused = copy.deepcopy(written)
    pulled = example(norm).double().sin()
    for training in (True, True, False):
        seen = []
        for module, route in ((fused.train(training), fused), (written.train(training), written.by_pattern)):
            x = example(norm).double().requires_grad_()
            y = route(x)
            seen.append((y, *torch.autograd.grad(y, [x, *module.parameters()], pulled)))
            seen[-1] += tuple(b for n, b in module.named_buffers() if n.startswith("running"))
        for one, two in zip(*seen, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def test_a_pattern_says_which_axes_share_statistics():
    x = torch.randn(2, 12, 5, 3)
    over = {
        "b c h w -> b c": (2, 3), "b c h w -> c": (0, 2, 3), "b c h w -> b h w": (1,), "b h w d -> b": (1, 2, 3),
        "b ... d -> b ...": (3,), "b ... d -> b": (1, 2, 3), "b c ... -> b ...": (1,), "... d ->": (0, 1, 2, 3),
    }  # fmt: skip
    for pattern, axes in over.items():
        d = x.shape[1] if " c " in pattern else x.shape[-1]
        mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
        torch.testing.assert_close(norms.Norm(pattern, d)(x), (x - mean) / (var + 1e-5).sqrt())
    grouped = nn.functional.group_norm(x, 4)
    torch.testing.assert_close(norms.Norm("b (g c) h w -> b g", 12, g=4)(x), grouped)
    torch.testing.assert_close(norms.Norm("b (g c) ... -> b g", 12, c=3)(x), grouped)


def test_a_wrong_input_or_pattern_is_one_clear_line():
    x = torch.randn(3, 6, 4, 5)
    wrong = {
        'Norm("b t d -> b t") names 3 axes but x has shape (3, 6, 4, 5)': lambda: norms.Norm("b t d -> b t", 5)(x),
        'Norm("b c ... -> c") names at least 2 axes but x has shape (6,)': lambda: norms.batch_norm(6)(x[0, :, 0, 0]),
        'Norm("... d -> ...") has 6 features on axis -1 but x has shape (3, 6, 4, 5)': lambda: norms.rms_norm(6)(x),
        "DyT has 6 features on axis -1 but x has shape (3, 6, 4, 5)": lambda: norms.dyt(6)(x),
        'Norm pattern "b t d" must read like "b t d -> b t"': lambda: norms.Norm("b t d", 5),
        'Norm pattern "b b d -> b" must read like': lambda: norms.Norm("b b d -> b", 5),
        'Norm pattern "b d -> z" keeps z': lambda: norms.Norm("b d -> z", 5),
        'Norm("b t e -> b"): exactly one axis': lambda: norms.Norm("b t e -> b", 5),
        'Norm("b (g c) -> b g"): give a size to all but one of (g c)': lambda: norms.Norm("b (g c) -> b g", 6),
        'Norm("b d -> b") got a size for momentun': lambda: norms.Norm("b d -> b", 6, momentun=1),
        'Norm("b d -> b"): running averages need': lambda: norms.Norm("b d -> b", 6, momentum=0.1),
        'Norm("b c -> b c") leaves no axis to average over': lambda: norms.Norm("b c -> b c", 6)(x[:, :, 0, 0]),
        'Norm("b d -> b"): modulation must be "scale and shift"': lambda: norms.Norm("b d -> b", 6, modulation="all"),
    }
    for line, build in wrong.items():
        with pytest.raises((ValueError, TypeError)) as raised:
            build()
        assert str(raised.value).startswith(line)


def batch_normed():
    """A convolutional model with two batch norms, one of torch and one of etude, that have learned something."""
    torch.manual_seed(6)
    blocks = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), norms.batch_norm(6), nn.Flatten()]
    model = nn.Sequential(*blocks, nn.Linear(54, 2))
    for _ in range(3):
        model(torch.randn(8, 3, 5, 5))
    return model.eval()


SOURCES = [m for m in NORMS if isinstance(make(m), norms.Source)]


@pytest.mark.parametrize("method", SOURCES, ids=lambda m: m.name)
def test_restore_gives_the_model_back_that_was_calibrated(method):
    model, x = batch_normed(), torch.randn(4, 3, 5, 5)
    want, layers, state = model(x), [*model], {k: v.clone() for k, v in model.state_dict().items()}
    assert norms.calibrate(model, make(method)) == ["1", "4"]
    assert all(type(m).__name__ == "Calibrated" and not m.training for m in (model[1], model[4]))
    model(x + 1)
    assert norms.restore(model) == ["1", "4"]
    assert [*model] == layers
    assert torch.equal(model(x), want)
    norms.calibrate(model, make(method))
    norms.restore(model.train())
    assert model[1].training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", SOURCES, ids=lambda m: m.name)
def test_a_calibrated_model_saves_loads_copies_and_keeps_its_roles(method):
    model, x = batch_normed(), torch.randn(4, 3, 5, 5)
    norms.calibrate(model, make(method))
    twin = batch_normed()
    norms.calibrate(twin, make(method))
    twin.load_state_dict(model.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    want = model(x)
    assert torch.equal(twin(x), want)
    assert torch.equal(copied(x), want)
    assert {role for name, role in roles(model).items() if name[0] in "14"} == {"norm"}


def test_calibrate_by_name_shares_what_is_shared_and_a_no_op_is_an_error():
    model = batch_normed()
    assert norms.calibrate(model, norms.alpha_bn(), where="4") == ["4"]
    assert norms.restore(model) == ["4"]
    bn = nn.BatchNorm2d(6)
    shared = nn.Sequential(bn, nn.ReLU(), bn)
    assert norms.calibrate(shared, norms.alpha_bn()) == ["0", "2"]
    assert shared[0] is shared[2]

    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    done = batch_normed()
    norms.calibrate(done, norms.tent())
    plain = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    a = norms.alpha_bn()
    wrong = {
        "calibrate looked for batch norms and found none; the model holds LayerNorm, Linear": lambda: (plain, a),
        'calibrate looked for batch norms named "head" and found none': lambda: (batch_normed(), a, "head"),
        "1, 4 already calibrated: restore(model) first": lambda: (done, a),
        "0 is a BatchNormAct, a batch norm with a forward of its own": lambda: (nn.Sequential(BatchNormAct(2)), a),
        "0 keeps no running statistics": lambda: (nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), a),
        "calibrate looks inside a model, but the model is itself a BatchNorm1d": lambda: (nn.BatchNorm1d(2), a),
        "calibrate takes a source of statistics": lambda: (batch_normed(), norms.alpha_bn),
        "tent trains the weights and biases of batch norms, but": lambda: (
            nn.Sequential(nn.BatchNorm1d(2, affine=False)), norms.tent(),
        ),
    }  # fmt: skip
    for line, args in wrong.items():
        with pytest.raises((ValueError, TypeError)) as raised:
            norms.calibrate(*args())
        assert str(raised.value).startswith(line)
    with pytest.raises(ValueError, match="restore found no calibrated batch norm in Sequential"):
        norms.restore(batch_normed())


def test_calibrate_minds_the_optimizers_that_live():
    model = batch_normed()
    before = repr(model)
    opt = rules.optimizer(model, rules.adamw())
    with pytest.raises(ValueError, match=r"norms\.calibrate takes a parameter out of the model, or freezes it"):
        norms.calibrate(model, norms.tent())
    with pytest.raises(ValueError, match="adab2n adds parameters: calibrate before you make the optimizer"):
        norms.calibrate(model, norms.adab2n(2))
    assert repr(model) == before
    norms.calibrate(model, norms.alpha_bn())  # neither
    norms.restore(model)
    del opt
    norms.calibrate(model, norms.adab2n(2))
    opt = rules.optimizer(model, rules.adamw())
    norms.restore(model)
    with pytest.raises(RuntimeError, match=r"norms\.restore took a parameter out"):
        opt.step()


def test_a_calibrated_layer_names_a_wrong_shape():
    model = batch_normed()
    norms.calibrate(model, norms.tent())
    with pytest.raises(ValueError, match="has 6 features on axis 1 but x has shape"):
        model[1](torch.randn(2, 5, 3))


def net():
    torch.manual_seed(5)
    inner = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.RMSNorm(6))
    model = nn.Sequential(nn.LayerNorm(6), inner, nn.ReLU())
    for p in model.parameters():
        nn.init.normal_(p, 1.0, 0.2)
    return model


def test_swap_replaces_every_norm_and_carries_the_same_parameters():
    model = net()
    old = {n: m for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    assert norms.swap(model, norms.dyt) == ["0", "1.1", "1.3"]
    for name, was in old.items():
        new = model.get_submodule(name)
        assert isinstance(new, norms.DyT)
        assert new.weight is was.weight
        assert getattr(was, "bias", None) is None or new.bias is was.bias
    assert model(torch.randn(2, 6)).isfinite().all()


def test_swap_to_the_same_mathematics_keeps_the_function():
    model, x = net(), torch.randn(4, 6)
    want = model(x)
    assert norms.swap(model, partial(norms.layer_norm, eps=1e-6), where="1.1") == ["1.1"]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_swap_keeps_dtype_mode_running_statistics_and_shared_layers():
    bn = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), bn, nn.ReLU(), bn).double()
    model(torch.randn(8, 3, 4, 4).double())
    want = model.eval()(x := torch.randn(2, 3, 4, 4).double())
    assert norms.swap(model, lambda d: norms.batch_norm(d, momentum=0.2)) == ["1", "3"]
    assert model[1] is model[3]
    assert not model[1].training
    torch.testing.assert_close(model(x), want)


def test_swap_reaches_torchs_encoder_layers_in_eval():
    """Their fast path would read norm1.weight and compute LayerNorm, whatever norm1 is."""
    for factory in (norms.rms_norm, norms.dyt):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        assert norms.swap(encoder, factory) == ["layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2"]
        for p in encoder.parameters():
            nn.init.normal_(p, 0.3, 0.3)
        x, pad = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [4], [3]])
        slow = encoder.eval()(x, src_key_padding_mask=pad).detach()
        with torch.no_grad():
            torch.testing.assert_close(encoder(x, src_key_padding_mask=pad)[~pad], slow[~pad])


def test_swap_that_does_nothing_is_an_error():
    wrong = {
        "swap looked for norm layers and found none; the model has module types Linear × 1": (
            nn.Sequential(nn.Linear(3, 3)), norms.dyt, None,
        ),
        'swap looked for norm layers named "head.*" and found none; the model has norms 0, 1.1, 1.3': (
            net(), norms.dyt, "head.*",
        ),
        'swap would change nothing: all 1 norms already are Norm("... d -> ...", 6, eps=1e-05)': (
            nn.Sequential(nn.LayerNorm(6)), norms.layer_norm, None,
        ),
        "swap would change nothing: all 1 norms already are DyT(6)": (nn.Sequential(norms.dyt(6)), norms.dyt, None),
        "swap replaces norms inside a model, but the model is itself a LayerNorm": (nn.LayerNorm(6), norms.dyt, None),
        "0 is a BatchNorm2d with its channels on axis 1, but DyT(6)": (nn.Sequential(nn.BatchNorm2d(6)), norms.dyt, None),
        "0 normalises over 2 axes at once": (nn.Sequential(nn.LayerNorm((2, 3))), norms.dyt, None),
    }  # fmt: skip
    for line, args in wrong.items():
        with pytest.raises(ValueError) as raised:
            norms.swap(*args)
        assert str(raised.value).startswith(line)


@pytest.mark.parametrize(
    "layer, factory",
    [
        (nn.LayerNorm(8), norms.layer_norm), (nn.RMSNorm(8, eps=1e-5), norms.rms_norm), (nn.BatchNorm1d(8), norms.batch_norm),
        (nn.BatchNorm2d(8), norms.batch_norm), (nn.InstanceNorm2d(8, affine=True), norms.instance_norm),
        (nn.GroupNorm(2, 8), partial(norms.group_norm, groups=2)),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_swap_knows_torchs_layer_as_the_norm_it_is_and_any_other_as_another(layer, factory):
    with pytest.raises(ValueError, match="would change nothing"):
        norms.swap(nn.Sequential(layer), factory)
    first = not isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    assert norms.swap(nn.Sequential(layer), partial(norms.dyt, channels_last=not first)) == ["0"]
    assert norms.swap(nn.Sequential(layer), partial(factory, eps=1e-3)) == ["0"]


def test_swap_tells_the_channels_first_layer_norm_of_other_libraries_from_torchs():
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    model, x = nn.Sequential(LayerNorm2d(6)), torch.randn(2, 6, 5, 4)
    want = model(x)
    with pytest.raises(ValueError, match="0 is a LayerNorm2d with its channels on axis 1"):
        norms.swap(model, norms.layer_norm)
    assert norms.swap(model, lambda d: norms.Norm("b c ... -> b ...", d)) == ["0"]
    torch.testing.assert_close(model(x), want)


def test_swap_takes_a_factory():
    for wrong in ("rms_norm", norms.rms_norm(6)):
        with pytest.raises(TypeError) as raised:
            norms.swap(net(), wrong)
        line = str(raised.value)
        assert line == f"swap takes a factory features → module, such as norms.rms_norm; got {wrong!r}"


@pytest.mark.parametrize("where, factory", [("0", norms.dyt), ("0", norms.rms_norm), ("1.3", norms.layer_norm)])
def test_swap_after_an_optimizer_of_ours_may_neither_drop_nor_add_a_parameter(where, factory):
    model, other = net(), net()
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(other[0].bias)
    opt = rules.optimizer(model, rules.adamw())
    before = repr(model)
    with pytest.raises(ValueError, match="an optimizer already trains norms that swap would replace"):
        norms.swap(model, factory, where)
    assert repr(model) == before
    norms.swap(model, partial(norms.layer_norm, eps=1e-3), "0")  # the same parameters in another layer
    assert {id(p) for p in model.parameters()} == {id(p) for g in opt.param_groups for p in g["params"]}
    norms.swap(other, factory, where)


# -- the norms of other libraries, by what they compute ---------------------------------------------------------------


class Affine(nn.Module):
    """Somebody's norm: x̂ (shift + weight) [+ bias], x̂ centred or not."""

    def __init__(self, d, center=False, shift=0.0, bias=False, eps=1e-6):
        super().__init__()
        self.center, self.shift, self.eps = center, shift, eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.center else x
        y = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.shift + self.weight)
        return y if self.bias is None else y + self.bias


class TheirNorm(Affine):
    pass


class TheirScale(Affine):
    pass


class GatedNorm(Affine):
    def forward(self, x, gate=None):
        return super().forward(x)


class ShiftedLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class WideLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


@pytest.mark.parametrize(
    "layer, twin",
    [
        (TheirNorm(6), norms.rms_norm),
        (TheirNorm(1056), norms.rms_norm),
        (TheirNorm(6, center=True, bias=True), norms.layer_norm),
        (TheirNorm(6, center=True), lambda d, eps: norms.Norm("... d -> ...", d, eps=eps, modulation="scale")),
        (WideLayerNorm(6, eps=1e-6), norms.layer_norm),
    ],
)
def test_swap_knows_a_norm_of_another_library_by_what_it_computes(layer, twin):
    for p in layer.parameters():
        nn.init.normal_(p)
    model, x = nn.Sequential(layer), torch.randn(2, 3, layer.weight.numel())
    want, state = model(x), torch.get_rng_state()
    with pytest.raises(ValueError, match="would change nothing"):
        norms.swap(model, partial(twin, eps=1e-6))
    assert norms.swap(model, partial(twin, eps=2e-6)) == ["0"]
    assert torch.equal(torch.get_rng_state(), state), "the probe draws from a generator of its own"
    assert model[0].weight is layer.weight
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-3)


def test_swap_tells_norms_apart_whose_weight_is_zero():
    layer = TheirNorm(6, center=True)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    assert norms.swap(model, partial(norms.rms_norm, eps=1e-6)) == ["0"]


@pytest.mark.parametrize(
    "layer", [TheirNorm(6, shift=1.0), TheirNorm(1, shift=1.0), TheirScale(6), GatedNorm(6), ShiftedLayerNorm(6)]
)
@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_swap_leaves_alone_what_only_looks_like_a_norm(layer, gain):
    """Gemma's x̂ (1 + weight), whatever its weight is; a layer of another name; one that takes a gate."""
    nn.init.constant_(layer.weight, gain)
    with pytest.raises(ValueError, match="looked for norm layers and found none"):
        norms.swap(nn.Sequential(layer), norms.rms_norm)


def test_swap_reaches_the_norms_of_llama_and_t5_and_not_those_of_gemma():
    size = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    llama = transformers.LlamaModel(transformers.LlamaConfig(**size, num_key_value_heads=1)).eval()
    ids = torch.arange(12).view(2, 6)
    want, weight = llama(ids).last_hidden_state, llama.norm.weight
    with pytest.raises(ValueError, match="all 5 norms already are"):
        norms.swap(llama, partial(norms.rms_norm, eps=1e-6))
    assert len(norms.swap(llama, partial(norms.rms_norm, eps=1.1e-6))) == 5
    assert llama.norm.weight is weight
    torch.testing.assert_close(llama(ids).last_hidden_state, want, rtol=1e-3, atol=1e-3)
    assert len(norms.swap(llama, norms.dyt)) == 5
    llama(ids).last_hidden_state.sum().backward()
    assert llama.norm.alpha.grad is not None

    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    t5 = transformers.T5EncoderModel(config)
    assert len(norms.swap(t5, norms.dyt)) == 5
    assert t5(ids).last_hidden_state.isfinite().all()
    gemma = transformers.GemmaModel(transformers.GemmaConfig(**size, num_key_value_heads=1, head_dim=16))
    with pytest.raises(ValueError, match=r"found none; the model has module types .*GemmaRMSNorm × 5"):
        norms.swap(gemma, norms.dyt)
