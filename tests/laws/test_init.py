"""What is true of every initialisation, and of ``apply``."""

import functools

import pytest
import torch
from torch import nn

from etude import init
from etude._method import methods

METHODS = [m for m in methods().values() if m.room == "init"]
each = pytest.mark.parametrize("m", METHODS, ids=lambda m: m.name)


def model():
    return nn.Sequential(
        nn.Embedding(11, 6), nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Unflatten(1, (4, 2)),
        nn.Conv1d(4, 5, 2), nn.Flatten(), nn.Linear(5, 8), nn.Linear(8, 3),
    )  # fmt: skip


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 1), (6, 4, 3), (4, 6, 3, 3), (2, 3, 1, 2, 2)])
def test_new_values_have_the_shape_and_dtype_of_w_which_stays(m, shape, dtype):
    w = torch.randn(shape).to(dtype).requires_grad_()
    before = w.detach().clone()
    new = m.fn(w)
    assert (new.shape, new.dtype, new.device, new.requires_grad) == (w.shape, w.dtype, w.device, False)
    assert new.isfinite().all()
    assert new.count_nonzero() > 0
    assert torch.equal(w, before)
    assert new.untyped_storage().data_ptr() != w.untyped_storage().data_ptr()


@each
def test_values_do_not_depend_on_the_old_ones_nor_on_their_layout(m):
    w = torch.randn(4, 6, 3, 3)
    strided = torch.full_like(w, torch.nan).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    one = m.fn(w)
    torch.manual_seed(1)
    assert torch.equal(one, m.fn(strided))


@each
def test_half_precision_is_the_rounded_float(m):
    torch.manual_seed(1)
    one = m.fn(torch.empty(6, 4))
    torch.manual_seed(1)
    assert torch.equal(one.bfloat16(), m.fn(torch.empty(6, 4, dtype=torch.bfloat16)))


@each
def test_vectors_are_refused(m):
    with pytest.raises(ValueError, match=rf"{m.name} needs a weight \[out, in, …\], got shape \[3\]"):
        m.fn(torch.zeros(3))


@each
def test_apply_writes_the_weights_of_a_role_and_nothing_else(m):
    net = model()
    old = {n: p.detach().clone() for n, p in net.named_parameters()}
    held = {n: (id(p), p.data_ptr()) for n, p in net.named_parameters()}
    assert init.apply(net, m.fn) is net
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, old[n])}
    assert changed == {"2.weight", "7.weight"}
    assert all((id(p), p.data_ptr()) == held[n] and p.requires_grad for n, p in net.named_parameters())


@each
@pytest.mark.parametrize(
    "where, expected",
    [
        ("conv", {"5.weight"}),
        (["conv", "head"], {"5.weight", "8.weight"}),
        ("7*", {"7.weight"}),
        (["hidden", "0.weight"], {"0.weight", "2.weight", "7.weight"}),
    ],
)
def test_apply_takes_roles_patterns_and_lists(m, where, expected):
    net = model()
    old = {n: p.detach().clone() for n, p in net.named_parameters()}
    init.apply(net, m.fn, where)
    assert {n for n, p in net.named_parameters() if not torch.equal(p, old[n])} == expected


def test_apply_takes_knobs_as_a_partial_call():
    net = nn.Linear(4, 4)
    init.apply(net, functools.partial(init.orthogonal, gain=2.0), "weight")
    torch.testing.assert_close(net.weight @ net.weight.mT, 4 * torch.eye(4))


@pytest.mark.parametrize("f", [nn.init.orthogonal_, nn.init.xavier_normal_, nn.init.zeros_], ids=lambda f: f.__name__)
def test_apply_takes_functions_that_write_in_place(f):
    ours, theirs = nn.Linear(4, 6), nn.Linear(4, 6)
    torch.manual_seed(3)
    init.apply(ours, f, "weight")
    torch.manual_seed(3)
    f(theirs.weight)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.requires_grad


def test_apply_names_what_is_not_a_model_a_function_or_a_value():
    with pytest.raises(TypeError, match=r"must return the values of 2\.weight, got NoneType"):
        init.apply(model(), lambda w: None)
    with pytest.raises(TypeError, match="needs a model and a function, got function and Sequential"):
        init.apply(init.orthogonal, model())
    with pytest.raises(TypeError, match="needs a model and a function, got Sequential and Tensor"):
        init.apply(model(), init.orthogonal(torch.ones(2, 2)))


def test_apply_that_finds_nothing_says_what_there_is():
    with pytest.raises(ValueError, match="decoder"):
        init.apply(model(), init.zero_init, "decoder.*")
    with pytest.raises(ValueError, match=r"selects only vectors .* orthogonal\(gain=1.0\) writes weights"):
        init.apply(model(), init.orthogonal, "bias")


def test_apply_that_changes_nothing_is_an_error():
    net = init.apply(model(), init.zero_init)
    with pytest.raises(ValueError, match=r"zero_init.* changes nothing; 2\.weight, 7\.weight held"):
        init.apply(net, init.zero_init)


def test_apply_refuses_values_of_another_shape():
    with pytest.raises(ValueError, match=r"gave \[8, 1\] for 2.weight of shape \[8, 12\]"):
        init.apply(model(), lambda w: torch.ones(len(w), 1))
