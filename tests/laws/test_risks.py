"""What is true of every risk: one number from the losses of a batch, its state in buffers."""

import copy
import io

import pytest
import torch
from plays import risks as plays

from etude._method import methods, stamp

METHODS = [m for m in methods().values() if m.room == "risks"]
each = pytest.mark.parametrize("m", METHODS, ids=lambda m: m.name)
GROUP = torch.tensor([0, 1, 2, 0, 1, 0])


def batch(seed=0):
    return torch.rand(6, generator=torch.Generator().manual_seed(seed))


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_risk_is_one_number_of_the_dtype_of_the_losses(m, dtype):
    losses = batch().to(dtype).requires_grad_()
    risk = plays.make(m)(losses, GROUP)
    assert (risk.shape, risk.dtype) == ((), dtype)
    (grad,) = torch.autograd.grad(risk, losses)
    assert grad.isfinite().all()
    assert (grad >= 0).all()


@each
def test_the_risk_of_equal_losses_is_that_loss(m):
    risk = plays.make(m)
    for _ in range(5):
        assert risk(torch.full((6,), 0.7), GROUP).item() == pytest.approx(0.7, rel=1e-6)


@each
def test_the_order_of_the_examples_does_not_matter(m):
    order = torch.randperm(6)
    one, other = plays.make(m).double(), plays.make(m).double()
    for seed in range(3):
        losses = batch(seed).double()
        torch.testing.assert_close(one(losses, GROUP), other(losses[order], GROUP[order]))


@each
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_groups_may_have_any_integer_dtype(m, dtype):
    group = GROUP.clamp(max=1)
    assert torch.equal(plays.make(m)(batch(), group.to(dtype)), plays.make(m)(batch(), group))


@each
def test_losses_of_tokens_count_by_their_mean_in_each_example(m):
    tokens = torch.rand(6, 5)
    torch.testing.assert_close(plays.make(m)(tokens, GROUP), plays.make(m)(tokens.mean(1), GROUP))


@each
def test_state_survives_state_dict_and_copy(m):
    risk = plays.make(m)
    for seed in range(5):
        risk(10 * batch(seed), GROUP)
    file = io.BytesIO()
    torch.save(risk.state_dict(), file)
    file.seek(0)
    loaded, copied = plays.make(m), copy.deepcopy(risk)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3):
        expected = risk(batch(seed), GROUP)
        assert torch.equal(loaded(batch(seed), GROUP), expected)
        assert torch.equal(copied(batch(seed), GROUP), expected)


@each
def test_evaluation_changes_no_state(m):
    risk = plays.make(m).eval()
    before = copy.deepcopy(risk.state_dict())
    one = risk(batch(), GROUP)
    assert torch.equal(one, risk(batch(), GROUP))
    assert all(torch.equal(v, before[k]) for k, v in risk.state_dict().items())


@each
def test_huge_losses_stay_finite(m):
    risk = plays.make(m)
    for scale in (1e6, 1.0, 1e6):
        for seed in range(2):
            assert risk(scale * batch(seed).roll(seed), GROUP.roll(seed)).isfinite()


@each
def test_a_batch_without_losses_is_an_error(m):
    for wrong in (torch.empty(0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"losses \[n\], one per example"):
            plays.make(m)(wrong, GROUP[:0])


@pytest.mark.parametrize("m", [m for m in METHODS if m.name != "mean"], ids=lambda m: m.name)  # it looks at no groups
@pytest.mark.parametrize("missing", [3, -1])
def test_a_group_that_does_not_exist_is_an_error(m, missing):
    risk = plays.make(m)
    before = copy.deepcopy(risk.state_dict())
    with pytest.raises(ValueError, match="must lie in 0 … 2 for 3 group_counts"):
        risk(batch(), torch.tensor([0, 1, 2, missing, 0, 0]))
    for group in (None, GROUP[:4], GROUP.float(), GROUP.tolist()):
        with pytest.raises(ValueError, match=r"needs group: integers \[6\]"):
            risk(batch(), group)
    assert all(torch.equal(v, before[k]) for k, v in risk.state_dict().items())
    for counts in ([], [3, 0]):
        with pytest.raises(ValueError, match="number of training examples of each group"):
            m.fn(counts)
    for wrong in (-0.1, float("nan"), float("inf")):
        for knob in ("step_size", "adjustment"):
            with pytest.raises(ValueError, match="finite step_size, adjustment ≥ 0"):
                m.fn([3, 3], **{knob: wrong})
    with pytest.raises(TypeError, match="group_counts, a number for each group, got 2"):
        m.fn(2)


@each
def test_a_risk_prints_its_name_and_knobs(m):
    knobs = ", ".join(f"{k}={v!r}" for k, v in stamp(plays.make(m)).knobs.items())
    assert repr(plays.make(m)) == f"{m.name}({knobs})"


def test_every_risk_compiles_into_one_graph():
    eager = [plays.make(m) for m in METHODS]
    compiled = torch.compile(lambda risks, x, g: [risk(x, g) for risk in risks], fullgraph=True, backend="aot_eager")
    ours = compiled(copy.deepcopy(eager), batch(), GROUP)
    for a, b in zip(ours, [risk(batch(), GROUP) for risk in eager]):
        torch.testing.assert_close(a, b)
