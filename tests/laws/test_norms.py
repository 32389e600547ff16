"""What is true of every norm, of the pattern language, and of swap."""

import copy
import pickle
from functools import partial

import pytest
import torch
import transformers
from plays.norms import make
from torch import nn
from torch.func import functional_call, grad, vmap

from etude import norms, rules
from etude._method import methods
from etude._roles import roles

NORMS = [m for m in methods().values() if m.room == "norms"]
each = pytest.mark.parametrize("method", NORMS, ids=lambda m: m.name)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def built(method):
    norm = make(method)
    torch.manual_seed(3)
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    return norm


def example(norm, scale=1.0):
    torch.manual_seed(4)
    return scale * torch.randn((3, norm.features, 4) if norm.axis == 1 else (3, 4, norm.features)) + scale


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_and_dtype_are_kept_and_x_is_not_touched(method, dtype):
    norm = built(method)
    reference = norm(example(norm))
    low = copy.deepcopy(norm).to(dtype)
    x = example(norm).to(dtype)
    before, leaf = x.clone(), x.requires_grad_()
    y = low(leaf)
    y.sum().backward()
    assert (y.shape, y.dtype, leaf.grad.dtype) == (x.shape, dtype, dtype)
    assert torch.equal(x.detach(), before)
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.05)


@each
def test_low_precision_input_meets_float32_weights_and_autocast(method):
    norm = built(method)
    x = example(norm).bfloat16().requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(example(norm))
    torch.testing.assert_close(inside.float(), norm(example(norm)), rtol=0.02, atol=0.02)


@each
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_finite_forward_and_backward_from_zero_to_huge(method, scale):
    norm = built(method)
    x = example(norm, scale).requires_grad_()
    y = norm(x)
    y.square().sum().backward()
    assert all(t.isfinite().all() for t in (y, x.grad, *(p.grad for p in norm.parameters())))


@each
def test_state_copies_and_pickles_rebuild_the_same_norm(method):
    norm = built(method)
    norm(example(norm))
    fresh = make(method)
    fresh.load_state_dict(norm.state_dict())
    want = norm.eval()(example(norm))
    for twin in (fresh, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin.eval()(example(norm)), want)
        assert repr(twin) == repr(norm)


@each
def test_every_parameter_has_the_role_of_a_norm(method):
    assert set(roles(nn.Sequential(make(method))).values()) == {"norm"}


@each
def test_compiles_whole_to_the_same_values_and_gradients(method):
    norm = built(method)
    seen = []
    for route in (norm, torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager", dynamic=False)):
        x = example(norm).requires_grad_()
        y = route(x)
        seen.append((y, *torch.autograd.grad(y.square().sum(), [x, *route.parameters()])))
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


@each
def test_a_population_under_vmap_is_each_member_alone(method):
    norm = built(method).double().eval()
    x = example(norm).double()
    params = {k: v.detach() for k, v in norm.named_parameters()}
    stacked = {k: torch.stack([v, 2 * v, -v]) for k, v in params.items()}

    def loss(p):
        return functional_call(norm, p, (x,)).square().sum()

    both = {"vmap(grad)": vmap(grad(loss))(stacked), "grad(vmap)": grad(lambda p: vmap(loss)(p).sum())(stacked)}
    for got in both.values():
        for i in range(3):
            alone = grad(loss)({k: v[i] for k, v in stacked.items()})
            for k in params:
                torch.testing.assert_close(got[k][i], alone[k])
    last = list(params)[-1]  # only one of the parameters differs
    vmap(grad(lambda v: functional_call(norm, params | {last: v}, (x,)).sum()))(stacked[last])


@each
def test_by_hand_backward_agrees_with_the_one_that_can_be_differentiated(method):
    norm = built(method).double().eval()
    x = example(norm).double().requires_grad_()
    leaves = [x, *norm.parameters()]
    pulled = example(norm).double().sin()
    fast = torch.autograd.grad(norm(x), leaves, pulled)
    slow = torch.autograd.grad(norm(x), leaves, pulled, create_graph=True)
    for one, two in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


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
    for line, call in wrong.items():
        with pytest.raises((ValueError, TypeError)) as raised:
            call()
        assert str(raised.value).startswith(line)


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
    for name, layer in old.items():
        new = model.get_submodule(name)
        assert isinstance(new, norms.DyT)
        assert new.weight is layer.weight
        assert getattr(layer, "bias", None) is None or new.bias is layer.bias
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
    model = net()
    opt = rules.optimizer(model, rules.adamw())
    before = repr(model)
    with pytest.raises(ValueError, match="an optimizer already trains norms that swap would replace"):
        norms.swap(model, factory, where)
    assert repr(model) == before
    norms.swap(model, partial(norms.layer_norm, eps=1e-3), "0")  # the same parameters in another layer
    assert {id(p) for p in model.parameters()} == {id(p) for g in opt.param_groups for p in g["params"]}
    norms.swap(net(), factory, where)  # another model


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
