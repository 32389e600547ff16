"""What is true of every loss: one finite value per example, and clear words on bad input."""

import pytest
import torch

from etude._method import methods

METHODS = [m for m in methods().values() if m.room == "losses"]
each = pytest.mark.parametrize("m", METHODS, ids=lambda m: m.name)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 4), (4,), (0, 4)])
def test_a_loss_has_the_shape_of_the_target_and_the_dtype_of_the_logits(m, shape, dtype):
    logits, target = torch.randn(shape).to(dtype), torch.randint(4, shape[:-1])
    losses = m.fn(logits, target)
    assert (losses.shape, losses.dtype) == (target.shape, dtype)
    assert (losses >= 0).all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_give_finite_losses_and_gradients(m, dtype):
    logits = (1e4 * torch.tensor([[1.0, -1, 0], [-1, 1, 1], [1, 1, 1]])).to(dtype).requires_grad_()
    losses = m.fn(logits, torch.tensor([1, 0, 2]))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all()
    assert grad.isfinite().all()


@each
def test_each_loss_is_that_of_its_example_alone(m):
    logits, target = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    whole = m.fn(logits, target)
    assert torch.equal(whole, torch.stack([m.fn(x, y) for x, y in zip(logits, target)]))
    torch.testing.assert_close(whole, torch.func.vmap(m.fn)(logits, target))
    assert torch.equal(whole.reshape(2, 3), m.fn(logits.reshape(2, 3, 4), target.reshape(2, 3)))


@each
def test_a_loss_does_not_depend_on_the_order_of_the_classes(m):
    logits, target, order = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,)), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(m.fn(logits[:, order], order.argsort()[target]), m.fn(logits, target))


@each
def test_gradient_is_that_of_finite_differences(m):
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: m.fn(x, torch.tensor([0, 2, 1, 2])), logits)


@each
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_any_integer_dtype_serves_as_target(m, dtype):
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))
    assert torch.equal(m.fn(logits, target.to(dtype)), m.fn(logits, target))


@each
@pytest.mark.parametrize("wrong", [4, -1, -100])
def test_a_class_that_does_not_exist_is_an_error(m, wrong):
    with pytest.raises(ValueError, match="must lie in 0 … 3 for logits of 4 classes"):
        m.fn(torch.randn(3, 4), torch.tensor([0, wrong, 1]))


@each
def test_shapes_and_dtypes_that_do_not_fit_are_errors(m):
    with pytest.raises(ValueError, match=r"logits \[3, 4, 5\] and target \[3, 5\]; classes go on the last axis"):
        m.fn(torch.randn(3, 4, 5), torch.randint(4, (3, 5)))
    with pytest.raises(ValueError, match=r"target \[2\]"):
        m.fn(torch.randn(3, 4), torch.randint(4, (2,)))
    with pytest.raises(TypeError, match=r"integer dtype, got torch\.float32"):
        m.fn(torch.randn(3, 4), torch.rand(3, 4))


def test_every_loss_compiles_into_one_graph():
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))

    def every(x, y):
        return [m.fn(x, y) for m in METHODS]

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(logits, target), every(logits, target)):
        torch.testing.assert_close(ours, eager)
