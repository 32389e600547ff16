"""What is true of every map V → W, and of the host that carries it."""

import copy
import gc
import inspect
import json
import typing

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize as P
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D  # a linear layer whose weight is [in, out]

from etude import rules, weights
from etude._method import methods, stamp


def makes_a_map(fn):
    """By its signature: other methods of the room act on a model, or are pure functions."""
    made = typing.get_type_hints(inspect.unwrap(fn)).get("return")
    return inspect.isclass(made) and issubclass(made, weights.Map)


MAPS = {m.name: m.fn for (room, _), m in methods().items() if room == "weights" and makes_a_map(m.fn)}
ADAPTERS = {name: fn for name, fn in MAPS.items() if isinstance(fn(), weights.Adapter)}
REPARAMETRISATIONS = {name: fn for name, fn in MAPS.items() if name not in ADAPTERS}
TWINS = {name: fn for name, fn in ADAPTERS.items() if type(fn()).linear is not weights.Adapter.linear}


class Experts(nn.Module):
    """A stack of matrices in one parameter, as fused mixtures of experts have it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 6) / 2)

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.weight, x)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d, grouped, dilated, 1×3": (lambda: nn.Conv2d(4, 6, (1, 3), groups=2, dilation=2), (2, 4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), None),
    "Hugging Face's Conv1D": (lambda: Conv1D(5, 6), (4, 6)),
    "experts": (Experts, (4, 6)),
}


def by_inputs(fn):
    """Whether the map is born from the inputs of a layer, which only some layers have."""
    watch = fn().watch()
    return watch is not None and watch.needs == "inputs"


def gives(layer, fn):
    """Whether the layer has the data that the map is born from; where it has not, putting it is refused."""
    if isinstance(layer, Experts):
        return fn().watch() is None
    return not by_inputs(fn) or not isinstance(layer, (nn.ConvTranspose2d, nn.Embedding))


ON_LAYERS = [
    pytest.param(fn, layer, shape, id=f"{name}-{where}")
    for where, (layer, shape) in LAYERS.items()
    for name, fn in MAPS.items()
    if gives(layer(), fn)
]
every_map_on_every_layer = pytest.mark.parametrize("make, layer, shape", ON_LAYERS)
on_any_weight = pytest.mark.parametrize("make", [fn for fn in MAPS.values() if not by_inputs(fn)])
every_map = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())
every_adapter = pytest.mark.parametrize("make", ADAPTERS.values(), ids=ADAPTERS.keys())
every_reparametrisation = pytest.mark.parametrize("make", REPARAMETRISATIONS.values(), ids=REPARAMETRISATIONS.keys())
every_twin = pytest.mark.parametrize("make", TWINS.values(), ids=TWINS.keys())


def put(model, map, *args, **kwargs):
    """``weights.put``, with two batches of what the model takes for a map that is born from data."""
    if map.watch() and not any(p.is_meta for p in model.parameters()):
        dtype, draw = (
            next(p.dtype for p in model.parameters() if p.is_floating_point()),
            torch.Generator().manual_seed(1),
        )
        batches = [torch.randn(shape_of(model), generator=draw, dtype=torch.float64).to(dtype) for _ in range(2)]
        kwargs |= {"batches": batches, "loss": loss}
    return weights.put(model, map, *args, **kwargs)


def shape_of(model):
    known = {nn.Conv1d: (2, 4, 7), nn.Conv2d: (2, 4, 7, 7), nn.ConvTranspose2d: (2, 4, 5, 5)}
    rows = (12, model.in_features if isinstance(model, nn.Linear) else 6)
    return next((shape for kind, shape in known.items() if isinstance(model, kind)), rows)


def loss(model, x):
    if isinstance(model, nn.Embedding) or hasattr(model, "embed"):
        y = model(torch.arange(7))
    elif isinstance(model, nn.MultiheadAttention):
        y = model(*3 * [torch.cat([x, x[:, :2]], 1)])[0]
    else:
        y = model(x)
    return (y[0] if isinstance(y, tuple) else y).pow(3).sum()


class Gain(weights.Adapter):
    """W' = s ∘ W per output unit: an adapter that does not merely add, of somebody else's."""

    def born(self, w):
        self.s = nn.Parameter(w.new_ones(len(w)))

    def forward(self, w):
        return w * self.s.view(-1, *[1] * (w.ndim - 1))

    def linear(self, x, base):
        return base(x) * self.s


class Double(weights.Map):
    """W = 2 V: the plainest reparametrisation whose right inverse is not the identity."""

    def forward(self, v):
        return 2 * v

    def right_inverse(self, w):
        return w / 2


def sample(shape, dtype):
    return torch.randint(0, 7, (3,)) if shape is None else torch.randn(shape, dtype=dtype)


def stirred(model):
    """The model with every map's θ moved away from birth."""
    for module in model.modules():
        if isinstance(module, weights.Map):
            for p in module.parameters(recurse=False):
                nn.init.normal_(p, std=0.5)
    return model


def mlp(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# -- every map --------------------------------------------------------------------------------------------------------


@every_map_on_every_layer
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_putting_a_map_changes_nothing(make, layer, shape, dtype, tol):
    """Or, where the map says that it changes a weight, putting it a second time changes nothing."""
    layer, map = layer().to(dtype).eval(), make()
    x = sample(shape, dtype)
    if map.changes:
        weights.merge(put(layer, map, on="weight"))
        tol = 2e-2  # as far as its power iteration or its eps reach
    before, w0 = layer(x), layer.weight.detach().clone()
    put(layer, map, on="weight")
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(layer.weight, w0, rtol=tol, atol=tol)
    torch.testing.assert_close(layer(x), before, rtol=10 * tol, atol=10 * tol)


@pytest.mark.parametrize(
    "make, layer",
    [(fn, layer) for layer, _ in LAYERS.values() for fn in MAPS.values() if not gives(layer(), fn)],
)
def test_a_birth_from_data_that_a_layer_does_not_have_is_refused(make, layer):
    layer = layer()
    with pytest.raises(ValueError, match=r"takes the inputs of a linear|which no single expert of weight can be shown"):
        put(layer, make(), on="weight")
    assert not P.is_parametrized(layer)


@every_map
def test_a_weight_stored_transposed_is_mapped_as_the_linear_layer_it_is(make):
    linear, conv = nn.Linear(6, 5, dtype=torch.float64).eval(), Conv1D(5, 6).double().eval()
    conv.load_state_dict({"weight": linear.weight.T, "bias": linear.bias})
    for layer in (linear, conv):
        torch.manual_seed(0)
        stirred(put(layer, make(), on="weight", name="first"))
    theirs, ours = (dict(m.parametrizations.weight.named_parameters()) for m in (linear, conv))
    for name, p in ours.items():  # θ of an adapter is the same; what stands for the weight is transposed
        theta = theirs[name] if name[0].isdigit() or p.ndim != 2 else theirs[name].T  # cores are no weights
        assert p.shape == theta.shape
        torch.testing.assert_close(p, theta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(conv.weight, linear.weight.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(conv(X), linear(X), rtol=1e-6, atol=1e-6)
    weights.put(conv, weights.lora(), on="weight", name="second")  # once mapped, its class is a subclass
    assert conv.parametrizations.weight[-1].A.shape[1] == 6
    assert weights.merge(conv).weight.is_contiguous()


@every_map
def test_a_map_that_says_it_changes_a_weight_does(make):
    layer = nn.Linear(6, 5).double()
    w0 = layer.weight.detach().clone()
    put(layer, make(), on="weight")
    assert (not torch.allclose(layer.weight, w0, rtol=0, atol=1e-9)) == bool(make().changes)


@every_map_on_every_layer
def test_merge_is_exact_and_unmerge_restores_the_bits(make, layer, shape):
    layer = layer().eval()
    plain, keys = type(layer), list(layer.state_dict())
    stirred(put(layer, make(), on="weight"))
    x = sample(shape, torch.float32)
    w, y, state = layer.weight.detach().clone(), layer(x), copy.deepcopy(layer.state_dict())
    weights.merge(layer)
    assert type(layer) is plain
    assert set(layer.state_dict()) == set(keys)
    assert torch.equal(layer.weight, w)
    torch.testing.assert_close(layer(x), y)
    weights.unmerge(layer)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    assert layer.state_dict().keys() == state.keys()
    assert torch.equal(layer(x), y)


@every_map_on_every_layer
def test_gradients_are_finite_and_go_where_theta_is(make, layer, shape):
    layer = layer()
    put(layer, make(), on="weight")
    layer(sample(shape, torch.float32)).square().sum().backward()
    chain = layer.parametrizations.weight
    trained = list((chain[0] if isinstance(chain[0], weights.Adapter) else chain).parameters())
    assert trained
    assert all(p.requires_grad and p.grad.isfinite().all() for p in trained)
    if isinstance(chain[0], weights.Adapter):
        assert all(p.grad is None and not p.requires_grad for p in chain.parameters(recurse=False))


@every_map_on_every_layer
def test_bfloat16_stays_bfloat16(make, layer, shape):
    layer = layer().bfloat16()
    put(layer, make(), on="weight")
    assert {p.dtype for p in layer.parameters()} == {layer.weight.dtype} == {torch.bfloat16}
    y = layer(sample(shape, torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@every_map
def test_the_state_goes_through_state_dict(make):
    one, other = (put(mlp(), make()) for _ in range(2))
    stirred(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(X), other.eval()(X))


@every_map
def test_a_deepcopy_lives_its_own_life(make):
    model = stirred(put(mlp(), make())).eval()
    y, twin = model(X), copy.deepcopy(model)
    assert torch.equal(twin(X), y)
    weights.merge(twin)
    assert torch.equal(model(X), y)
    weights.merge(model)
    weights.unmerge(twin)
    assert torch.equal(twin(X), y)


@every_map
def test_a_model_without_storage_takes_a_map_and_its_state(make):
    with torch.device("meta"):
        model = put(mlp(), make())
    filled = stirred(put(mlp(), make())).eval()
    model.to_empty(device="cpu").load_state_dict(filled.state_dict())
    assert torch.equal(model.eval()(X), filled(X))


@on_any_weight
def test_a_map_takes_every_weight_of_an_attention_and_of_an_lstm(make):
    attention, lstm = nn.MultiheadAttention(8, 2).double().eval(), nn.LSTM(6, 5).double()
    put(attention, make(), on="*")
    biases = {"in_proj_bias"} if make().takes(attention.out_proj.bias) else set()
    assert set(attention.parametrizations) == {"in_proj_weight"} | biases
    assert P.is_parametrized(attention.out_proj, "weight")
    put(lstm, make())
    assert set(lstm.parametrizations) == {"weight_ih_l0", "weight_hh_l0"}
    lstm(torch.randn(3, 2, 6, dtype=torch.float64))[0].sum().backward()
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    y = stirred(attention)(x, x, x)[0]
    merged = weights.merge(copy.deepcopy(attention))
    torch.testing.assert_close(merged(x, x, x)[0], y)
    with torch.no_grad():  # torch's fast path
        torch.testing.assert_close(attention(x, x, x)[0], y)


@every_map
def test_remove_gives_back_the_layer(make):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    stirred(put(model, make()))
    y = model.eval()(X)
    weights.remove(model)
    assert not any(P.is_parametrized(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    if isinstance(make(), weights.Adapter):
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    else:
        torch.testing.assert_close(model(X), y)


@every_map
def test_a_tied_weight_is_mapped_once_under_every_alias(make):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i):
            return self.head(self.embed(i))

    model, i = Tied().double().eval(), torch.arange(7)
    put(model, make(), on="head.weight")
    stirred(model)
    assert model.head.parametrizations.weight is model.embed.parametrizations.weight
    assert torch.equal(model.head.weight, model.embed.weight)
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(list(model.embed.parameters()))
    y, w = model(i), model.head.weight
    torch.testing.assert_close(y, w @ w.T)
    twin = copy.deepcopy(model)
    assert twin.head.parametrizations.weight is twin.embed.parametrizations.weight
    weights.merge(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(i), y)
    weights.unmerge(model)
    assert torch.equal(model(i), y)
    assert model.head.parametrizations.weight is model.embed.parametrizations.weight


@every_map
def test_a_map_prints_as_the_call_that_makes_it(make):
    map = make()
    assert repr(map) == str(stamp(map))
    layer = put(nn.Linear(3, 3), map, on="weight", name="mine")
    assert repr(map) in repr(layer)
    assert "'mine'" in repr(layer)


@every_map
def test_an_optimizer_made_before_is_brought_up_to_date(make):
    model = mlp()
    opt = torch.optim.Adam(model.named_parameters(), lr=1e-2)
    model(X).square().sum().backward()
    opt.step()
    put(model, make(), optimizer=opt)
    (group,) = opt.param_groups
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == {id(p) for p in trained.values()}
    assert all(trained[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    assert all(any(p is q for q in group["params"]) for p in opt.state)
    before = {n: p.detach().clone() for n, p in trained.items()}
    for _ in range(2):
        opt.zero_grad()
        model(X).square().sum().backward()
        opt.step()
    assert not any(torch.equal(p, before[n]) for n, p in trained.items())


def trained(opt):
    return {id(p) for group in opt.param_groups for p in group["params"]}


@every_map
def test_what_an_optimizer_of_ours_trains_does_not_leave_the_model_behind_its_back(make):
    """Put refuses and changes nothing; after merge and remove the optimizer's next step refuses; one handed in is kept up."""
    model = mlp().eval()
    opt = rules.optimizer(model, rules.adamw())

    def refused(act, *args):
        before = {n: id(p) for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=f"{act.__name__} takes a parameter out .* pass optimizer="):
            act(model, *args)
        assert {n: id(p) for n, p in model.named_parameters()} == before

    def kept_up(act, *args):
        act(model, *args, optimizer=opt)
        assert trained(opt) == {id(p) for p in model.parameters() if p.requires_grad}
        opt.step()

    def stops(act):
        act(model)
        with pytest.raises(RuntimeError, match=f"weights.{act.__name__} took a parameter out"):
            opt.step()

    other = mlp()  # which nobody trains
    w = other[0].weight
    put(other, make())
    if not any(p is w and p.requires_grad for p in other.parameters()):
        refused(put, make())
    kept_up(put, make())
    stops(weights.merge)
    weights.unmerge(model)
    opt.step()  # what it trains is back
    kept_up(weights.merge)
    stops(weights.unmerge)
    weights.merge(model, optimizer=opt)
    opt = rules.optimizer(model, rules.adamw())
    kept_up(weights.unmerge)
    if isinstance(make(), weights.Adapter):
        refused(weights.put, weights.lora(r=2), "hidden", "second")
    kept_up(weights.remove)
    put(model, make(), optimizer=opt)
    stops(weights.remove)


def test_a_route_takes_no_maps_later():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    opt = rules.optimizer(model, rules.muon())
    with pytest.raises(ValueError, match="sends parameters to several rules by role; make it after the maps"):
        weights.put(model, weights.weight_norm(), optimizer=opt)


def test_an_optimizer_that_is_gone_holds_nothing():
    model = mlp()
    opt = rules.optimizer(model, rules.adamw())
    del opt
    gc.collect()
    weights.put(model, weights.lora())


def test_a_map_that_keeps_the_parameter_may_come_after_the_optimizer():
    model = mlp()
    opt = rules.optimizer(model, rules.adamw())
    weights.put(model, weights.spectral_norm())
    assert trained(opt) == {id(p) for p in model.parameters()}


def test_loading_after_the_optimizer_needs_that_optimizer(tmp_path):
    file = weights.save(weights.put(mlp(), weights.lora()), tmp_path)
    model = mlp()
    opt = rules.optimizer(model, rules.adamw())
    with pytest.raises(ValueError, match=r"weights\.load takes a parameter out"):
        weights.load(model, file)
    assert not P.is_parametrized(model[0])
    weights.load(model, file, optimizer=opt)
    assert trained(opt) == {id(p) for p in model.parameters() if p.requires_grad}


# -- reparametrisations -----------------------------------------------------------------------------------------------


@every_reparametrisation
def test_assigning_a_weight_goes_back_through_the_map(make):
    layer = put(nn.Linear(6, 5).double().eval(), make(), on="weight")
    w = put(nn.Linear(6, 5).double().eval(), make(), on="weight").weight.detach()
    if getattr(make(), "drops", ""):  # why it cannot: then it can for what it makes itself
        layer.weight = w
        assert not torch.allclose(layer.weight, w)
        w = 2 * layer.weight.detach()
    layer.weight = w
    torch.testing.assert_close(layer.weight, w, rtol=5e-2, atol=1e-4)


@every_reparametrisation
def test_a_reparametrisation_under_an_adapter_is_frozen_and_thaws(make):
    model = put(mlp(), make(), name="under").eval()
    y = model(X)
    weights.put(model, weights.lora(r=2), name="over")
    torch.testing.assert_close(model(X), y)
    roots = list(model[0].parametrizations.weight.parameters(recurse=False))
    assert not any(p.requires_grad for p in roots)
    y = stirred(model)(X)
    merged = weights.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(X), y)
    weights.remove(model, "over")
    assert all(p.requires_grad for p in roots)
    with pytest.raises(ValueError, match="already carries a map named 'under'"):
        put(model, make(), name="under")


@every_reparametrisation
def test_a_reparametrisation_comes_before_the_adapters(make):
    with pytest.raises(ValueError, match="must come before the adapters"):
        put(weights.put(mlp(), weights.lora()), make())


def test_two_reparametrisations_on_one_weight():
    model = weights.put(weights.put(mlp(), weights.weight_norm()), weights.spectral_norm()).eval()
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="must be the first map"):
        weights.put(weights.put(mlp(), weights.spectral_norm()), weights.weight_norm())
    with pytest.raises(ValueError, match=r"spectral_norm\(.*stands on weight_norm"):
        weights.merge(model, "spectral_norm")
    y = model(X)
    torch.testing.assert_close(weights.merge(model)(X), y)


def test_a_second_reparametrisation_changes_nothing_either():
    model = weights.put(mlp(), weights.weight_norm())
    y = model(X)
    torch.testing.assert_close(weights.put(model, Double())(X), y)


@every_reparametrisation
@pytest.mark.parametrize("act", [weights.merge, weights.remove])
def test_a_weight_frozen_by_hand_under_a_reparametrisation_stays_frozen(act, make):
    model = put(mlp(), make()).requires_grad_(False)
    assert not any(p.requires_grad for p in act(model).parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_map_that_does_not_go_back_to_the_weight_is_refused(dtype):
    class Forgetful(weights.Map):
        def forward(self, v):
            return 1.1 * v

    model = mlp(dtype)
    with pytest.raises(ValueError, match=r"^0\.weight: Forgetful would change the weight by 10\.\d%") as caught:
        weights.put(model, Forgetful())
    assert "\n" not in str(caught.value)
    assert not any(P.is_parametrized(m) for m in model.modules())
    Forgetful.changes = "a tenth more"
    weights.put(model, Forgetful())


@every_reparametrisation
def test_acting_on_a_map_in_training_moves_no_buffer(make):
    model = put(mlp(), make()).train()
    before = copy.deepcopy(model.state_dict())
    weights.unmerge(weights.merge(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[0].parametrizations.weight[0].training


# -- adapters ---------------------------------------------------------------------------------------------------------


@every_twin
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_both_routes_agree(make, shape, bias):
    layer = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    one = stirred(put(copy.deepcopy(layer), make(), on="weight", route="apply"))
    other = put(copy.deepcopy(layer), make(), on="weight", route="weight")
    other.load_state_dict(one.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert type(one).forward is not nn.Linear.forward
    assert type(other).forward is nn.Linear.forward
    torch.testing.assert_close(one(x), other(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one(x), F.linear(x, one.weight, one.bias), rtol=1e-12, atol=1e-12)
    found = [
        torch.autograd.grad(m(x).pow(3).sum(), [x, *m.parametrizations.weight[0].parameters()]) for m in (one, other)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [fn for fn in REPARAMETRISATIONS.values() if fn().product])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_a_reparametrisation_without_w_multiplies_as_w_does(make, shape):
    one = put(nn.Linear(6, 5, dtype=torch.float64), make(), on="weight", route="apply")
    other = weights.put(nn.Linear(6, 5, dtype=torch.float64), make(), on="weight", route="weight")
    other.load_state_dict(one.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert type(one).forward is not nn.Linear.forward
    assert type(other).forward is nn.Linear.forward
    torch.testing.assert_close(one(x), other(x), rtol=1e-12, atol=1e-12)
    found = [torch.autograd.grad(m(x).pow(3).sum(), [x, *m.parametrizations.weight.parameters()]) for m in (one, other)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Shapes(TorchDispatchMode):
    """The shapes of everything computed, views of what the layer holds aside."""

    def __init__(self, layer):
        super().__init__()
        held = [*layer.parameters(), *layer.buffers()]
        self.held, self.seen = {t.untyped_storage().data_ptr() for t in held}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.held:
            self.seen.add(tuple(out.shape))
        return out


@every_twin
@pytest.mark.parametrize("route, dense", [("auto", False), ("apply", False), ("weight", True)])
def test_a_frozen_weight_costs_no_dense_gradient(make, route, dense):
    layer = stirred(put(nn.Linear(131, 129), make(), on="weight", route=route))
    x = torch.randn(3, 131, requires_grad=True)
    with Shapes(layer) as shapes:
        layer(x).sum().backward()
    assert ((129, 131) in shapes.seen) == dense
    assert layer.parametrizations.weight.original.grad is None


@every_adapter
def test_disabled_is_the_base_bit_for_bit(make):
    model = mlp(torch.float32)
    x, y = X.float(), model(X.float())
    stirred(put(model, make(), on="*"))
    assert not torch.allclose(model(x), y)
    weights.disable(model)
    assert torch.equal(model(x), y)
    assert "(off)" in repr(model)
    with pytest.raises(ValueError, match="all disabled"):
        weights.merge(model)
    weights.enable(model)
    assert not torch.allclose(model(x), y)


@pytest.mark.parametrize("name", [name for name, fn in ADAPTERS.items() if fn().additive])
def test_adapters_that_merely_add_are_merged_in_any_order(name):
    model = stirred(put(put(mlp(), ADAPTERS[name](), name="a"), ADAPTERS[name](), name="b"))
    y = model(X)
    weights.merge(model, "b")
    assert [m.name for m in model[0].parametrizations.weight] == ["a"]
    torch.testing.assert_close(model(X), y)


@every_adapter
def test_two_adapters_that_are_on_are_both_merged(make):
    model = stirred(put(put(mlp(), make(), name="a"), make(), name="b"))
    both = model(X)
    singles = []
    for name in ("a", "b"):
        weights.disable(model, name)
        singles.append(model[0].weight.detach())
        weights.enable(model, name)
    if make().additive:
        total = singles[0] + singles[1] - model[0].parametrizations.weight.original
        torch.testing.assert_close(model[0].weight, total)
    torch.testing.assert_close(weights.merge(copy.deepcopy(model))(X), both)
    weights.disable(model, "b")
    only = model(X)
    weights.merge(model)
    assert [m.name for m in model[0].parametrizations.weight] == ["b"]
    torch.testing.assert_close(model(X), only)
    weights.enable(model, "b")
    torch.testing.assert_close(model(X), both)
    weights.unmerge(model)
    torch.testing.assert_close(model(X), both)
    assert [m.name for m in model[0].parametrizations.weight] == ["a", "b"]


@every_adapter
@pytest.mark.parametrize("to", ["folder", "one.safetensors"])
def test_a_saved_adapter_rebuilds_itself_on_a_bare_model(make, to, tmp_path):
    model = stirred(put(mlp(), make(), name="style"))
    file = weights.save(model, tmp_path / to)
    assert file.stat().st_size < 10_000
    held = safetensors.torch.load_file(file)
    assert sum(t.numel() for t in held.values()) == sum(
        t.numel()
        for m in model.modules()
        if isinstance(m, weights.Adapter)
        for k, t in m.state_dict().items()
        if k not in m.remade
    )
    other = weights.load(mlp(), tmp_path / to)
    assert torch.equal(other(X), model(X))
    assert repr(other) == repr(model)
    assert not other[0].parametrizations.weight.original.requires_grad
    with pytest.raises(ValueError, match="already carries a map named 'style'"):
        weights.load(other, file)
    wider = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    with pytest.raises(ValueError, match=r"^[02]\.weight: the file's .* does not fit"):
        weights.load(wider, file)
    with pytest.raises(ValueError, match=r"adapts 0\.weight, which Linear does not have"):
        weights.load(nn.Linear(6, 8), file)
    assert not any(P.is_parametrized(m) for m in wider.modules()), "nothing was changed"


@every_adapter
def test_freeze_leaves_the_adapters(make):
    model = put(put(mlp(), make(), name="a"), make(), name="b")
    weights.freeze(model, "b")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".weight.1." in n} != set()


@every_twin
def test_the_apply_route_compiles_as_one_graph(make):
    torch._dynamo.reset()  # its limit of recompilations counts all adapters together
    model = stirred(weights.put(put(mlp(), make(), name="a"), Gain(), name="b"))
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(X), model(X))
    weights.disable(model, "a")
    torch.testing.assert_close(fast(X), model(X))


@every_twin
def test_the_apply_route_trains_as_a_population(make):
    models = [stirred(put(mlp(), make())) for _ in range(3)]
    state = torch.func.stack_module_state(models)
    y = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (X,)))(*state)
    torch.testing.assert_close(y, torch.stack([m(X) for m in models]))


@every_adapter
@pytest.mark.parametrize("act", [weights.merge, weights.remove])
def test_what_freeze_froze_stays_frozen_and_what_an_adapter_froze_thaws(act, make):
    assert all(p.requires_grad for p in act(put(mlp(), make())).parameters())
    frozen = act(weights.freeze(put(mlp(), make())))
    assert not any(p.requires_grad for p in frozen.parameters())
    before = mlp().requires_grad_(False)
    assert not any(p.requires_grad for p in act(put(before, make())).parameters())
    thawed = weights.freeze(put(mlp(), make())).requires_grad_(True)
    assert all(p.requires_grad for p in act(thawed).parameters())
    one = weights.freeze(put(put(mlp(), make(), name="a"), make(), name="b"), "b")
    weights.remove(one, "b")
    assert not any(p.requires_grad for p in one.parameters())


# -- an adapter from outside the house --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(Gain, weights.lora), (weights.lora, Gain)])
def test_adapters_of_different_kinds_stack_in_order_on_both_routes(order):
    base = mlp()
    model = copy.deepcopy(base)
    for i, make in enumerate(order):
        put(model, make(), name=str(i))
    stirred(model)
    y = model(X)
    for w in (0, 2):  # the weight route, by hand
        chain = model[w].parametrizations.weight
        with torch.no_grad():
            base[w].weight.copy_(chain[1].forward(chain[0].forward(chain.original)))
    torch.testing.assert_close(base(X), y)
    with pytest.raises(ValueError, match="cannot go into the weight before it"):
        weights.merge(model, "1")
    torch.testing.assert_close(weights.merge(model, "0")(X), y)
    torch.testing.assert_close(weights.merge(model)(X), y)
    assert torch.equal(weights.unmerge(model)(X), y)


def test_a_map_put_or_removed_between_merge_and_unmerge_stays_so():
    model = stirred(weights.put(weights.put(mlp(), weights.lora(), name="a"), weights.lora(), name="b"))
    weights.merge(model, "a")
    weights.remove(model, "b")
    weights.put(model, weights.lora(), name="c")
    weights.unmerge(model)
    assert [m.name for m in model[0].parametrizations.weight] == ["a", "c"]


def test_unmerge_undoes_every_merge():
    model = stirred(weights.put(mlp(), weights.lora(), name="a"))
    weights.merge(model)
    stirred(weights.put(model, weights.lora(), name="b"))
    y = model(X)
    weights.merge(model)
    weights.unmerge(model)
    assert [m.name for m in model[0].parametrizations.weight] == ["a", "b"]
    torch.testing.assert_close(model(X), y)
    weights.put(weights.merge(model), weights.weight_norm())
    with pytest.raises(ValueError, match="was put on a merged weight"):
        weights.unmerge(model)
    weights.unmerge(weights.remove(model, "weight_norm"))
    torch.testing.assert_close(model(X), y)


def test_two_adapters_of_one_weight_are_saved_and_loaded_in_order(tmp_path):
    model = weights.put(mlp(), weights.lora(r=2), name="a")
    stirred(weights.put(model, weights.lora(r=3, alpha=1.0), on="0", name="b"))
    loaded = weights.load(mlp(), weights.save(model, tmp_path))
    assert torch.equal(loaded(X), model(X))
    assert [str(stamp(m)) for m in loaded[0].parametrizations.weight] == [
        "lora(r=2, alpha=16.0)",
        "lora(r=3, alpha=1.0)",
    ]
    only = weights.load(mlp(), weights.save(model, tmp_path / "b", "b"))
    assert not P.is_parametrized(only[2])


def test_an_adapter_rides_on_a_parametrization_of_torch():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    y = model(X)
    weights.put(model, weights.lora())
    torch.testing.assert_close(model(X), y)
    y = stirred(model)(X)
    with pytest.raises(ValueError, match="cannot go into the weight before it"):
        weights.merge(model)
    torch.testing.assert_close(model(X), y)
    weights.remove(model)
    assert type(model[0].parametrizations.weight[0]).__module__.startswith("torch")


# -- choosing and refusing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "on, mapped",
    [
        ("hidden", {"0.weight", "2.weight"}),
        ("head", {"4.weight"}),
        ("2", {"2.weight"}),
        ("[02].weight", {"0.weight", "2.weight"}),
        (["head", "0"], {"0.weight", "4.weight"}),
        ("*", {"0.weight", "2.weight", "4.weight"}),
    ],
)
def test_weights_are_chosen_by_role_or_name(on, mapped):
    model = weights.put(mlp(), weights.lora(), on=on)
    assert {f"{n}.weight" for n, m in model.named_modules() if P.is_parametrized(m)} == mapped


def test_names_stay_the_weights_own_after_a_first_map():
    model = weights.put(mlp(), weights.lora(), name="a")
    weights.put(model, weights.lora(), on="0.weight", name="b")
    weights.put(model, weights.lora(), on="hidden", name="c")
    assert [m.name for m in model[0].parametrizations.weight] == ["a", "b", "c"]
    assert [m.name for m in model[2].parametrizations.weight] == ["a", "c"]


@pytest.mark.parametrize(
    "error, match, ask",
    [
        (ValueError, "has the role or the name 'attn'; roles here: .*hidden", {"on": "attn"}),
        (ValueError, "selects no weight .* can ride on", {"on": "*.bias"}),
        (ValueError, "route='fast': choose one of auto, weight, apply", {"route": "fast"}),
        (TypeError, r"such as weights.lora\(r=8\); got <function lora", {"map": weights.lora}),
    ],
)
def test_a_bad_request_is_refused_in_one_line(error, match, ask):
    model = mlp()
    with pytest.raises(error, match=match) as caught:
        weights.put(model, **{"map": weights.lora(), **ask})
    assert "\n" not in str(caught.value)
    assert not any(P.is_parametrized(m) for m in model.modules())


@pytest.mark.parametrize("module", [nn.Conv2d(3, 3, 3), nn.MultiheadAttention(4, 2).out_proj])
def test_the_apply_route_is_refused_where_no_forward_is_called(module):
    with pytest.raises(ValueError, match='route="apply" needs a map with a twin'):
        weights.put(module, weights.lora(), on="weight", route="apply")


@pytest.mark.parametrize(
    "act", [weights.merge, weights.remove, weights.enable, weights.disable, weights.freeze, weights.unmerge]
)
def test_nothing_to_act_on_is_an_error(act):
    with pytest.raises(ValueError, match=r"no adapter|no map|nothing to unmerge"):
        act(mlp())
    if act is not weights.unmerge:
        with pytest.raises(ValueError, match="named 'style'; there are 'lora'"):
            act(weights.put(mlp(), weights.lora()), "style")


def test_a_reparametrisation_cannot_be_disabled_or_saved(tmp_path):
    model = weights.put(mlp(), weights.weight_norm())
    for act in (weights.disable, weights.freeze, lambda m: weights.save(m, tmp_path)):
        with pytest.raises(ValueError, match="no weight carries any adapter"):
            act(model)


def test_assigning_under_an_adapter_is_refused():
    layer = weights.put(nn.Linear(3, 3), weights.lora(), on="weight")
    with pytest.raises(NotImplementedError, match="merge or remove it before you assign"):
        layer.weight = torch.zeros(3, 3)


def test_a_file_of_another_kind_or_format_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a file of etude's adapters"):
        weights.load(mlp(), file)
    entry = {"weight": "0.weight", "name": "n", "room": "weights", "method": "lorra", "knobs": {}}
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, {"etude.weights": "1", "maps": json.dumps([entry])})
    with pytest.raises(ValueError, match=r"weights\.lorra, which is not known here"):
        weights.load(mlp(), file)


def test_a_loaded_adapter_can_be_given_another_name(tmp_path):
    model = stirred(weights.put(mlp(), weights.lora(r=2), name="a"))
    file = weights.save(model, tmp_path / "a")
    weights.load(model, file, name="b")
    assert [m.name for m in model[0].parametrizations.weight] == ["a", "b"]
    both = weights.save(model, tmp_path / "both")
    with pytest.raises(ValueError, match="holds 'a', 'b', which cannot all be called 'c'"):
        weights.load(mlp(), both, name="c")


@pytest.mark.parametrize("cut", [slice(0), slice(4), slice(40), slice(-10), None])
def test_a_damaged_file_is_one_line(tmp_path, cut):
    file = weights.save(weights.put(mlp(), weights.lora(r=2)), tmp_path)
    file.write_bytes(file.read_bytes()[cut] if cut else b"junk, and no tensors")
    with pytest.raises(ValueError, match="is damaged, or no safetensors file") as caught:
        weights.load(mlp(), file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("act", [weights.save, weights.load])
def test_a_file_that_is_not_called_safetensors_is_refused(act, tmp_path):
    with pytest.raises(ValueError, match=r"in a folder \(no suffix\) or in a \.safetensors file; got .*a\.pt"):
        act(weights.put(mlp(), weights.lora()), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_a_stamp_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="not made by a @method factory"):
        weights.save(weights.put(mlp(), Gain()), tmp_path)


@every_twin
def test_a_layer_with_another_map_on_its_bias_gets_its_forward_back(make):
    layer = nn.Linear(6, 5).double()
    P.register_parametrization(layer, "bias", nn.Tanh())
    stirred(put(layer, make(), on="weight"))
    y = layer(X)
    torch.testing.assert_close(F.linear(X, layer.weight, layer.bias), y)
    torch.testing.assert_close(weights.merge(layer)(X), y)
    assert type(layer).forward is nn.Linear.forward


def test_an_optimizer_of_ours_trains_the_adapter_put_later():
    model = mlp()
    opt = rules.optimizer(model, rules.adamw())
    for later in (False, True):
        if later:
            weights.put(model, weights.lora(), optimizer=opt)
        opt.zero_grad()
        model(X).square().sum().backward()
        opt.step()
    assert model[0].parametrizations.weight[0].B.abs().min() > 0


def test_parameters_of_a_frozen_model_get_a_group_of_their_own():
    model = mlp()
    opt = torch.optim.SGD(model[4].parameters(), lr=0.1)
    weights.put(model, weights.lora(), optimizer=opt)
    assert [len(g["params"]) for g in opt.param_groups] == [2, 4]
