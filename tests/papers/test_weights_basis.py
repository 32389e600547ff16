"""What the paper says of SparseGrad."""

import copy

import pytest
import torch
from torch import nn

from etude import weights

F64 = torch.float64


def data(n=8):
    """Batches whose gradients have few directions: inputs and errors with decaying spectra, turned at random."""
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(10, 10, dtype=F64, generator=random))[0]
    x = torch.randn(n, 16, 10, dtype=F64, generator=random) * 0.5 ** torch.arange(10)
    return [b @ turn for b in x]


def target(x):
    return (x.cumsum(1)[:, :6] ** 3).detach()


def loss(model, x):
    return (model(x) - target(x)).square().sum()


def layer(sparse=False, share=0.1):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(10, 6, dtype=F64))
    mapped = copy.deepcopy(plain)
    weights.put(mapped, weights.sparsegrad(share, sparse), on="0", batches=data(), loss=loss)
    return plain, mapped, mapped[0].parametrizations.weight


def test_sparsegrad_changes_no_output_and_its_gradient_is_v_g_u():
    plain, mapped, chain = layer(share=1.0)
    x = data()[0]
    torch.testing.assert_close(mapped(x), plain(x), rtol=1e-12, atol=1e-12)
    for model in (plain, mapped):
        loss(model, x).backward()
    v, u = chain[0].V, chain[0].U
    torch.testing.assert_close(v @ v.mT, torch.eye(6, dtype=F64))
    torch.testing.assert_close(u @ u.mT, torch.eye(10, dtype=F64))
    torch.testing.assert_close(chain.original.grad, v.mT @ plain[0].weight.grad @ u)


def test_sparsegrad_factors_are_those_of_the_stack_of_gradients():
    """HOSVD: the left singular vectors of the two unfoldings of [n, out, in], here by numpy's own SVD of them."""
    plain, _, chain = layer()
    stack = []
    for x in data():
        plain.zero_grad()
        loss(plain, x).backward()
        stack.append(plain[0].weight.grad.clone())
    stack = torch.stack(stack)
    for factor, mode in ((chain[0].V, 1), (chain[0].U, 2)):
        left = torch.linalg.svd(stack.movedim(mode, 0).flatten(1))[0]
        torch.testing.assert_close((factor[:, :4] * left[:, :4]).sum(0).abs(), torch.ones(4, dtype=F64))


def test_sparsegrad_concentrates_a_gradient_in_few_entries():
    """And the basis of the authors' code, Uᵀ for U, does not."""
    plain, _, chain = layer()
    loss(plain, data(9)[-1]).backward()  # a batch that the basis has not seen
    g, v, u = plain[0].weight.grad, chain[0].V, chain[0].U

    def top(m):
        return (m.flatten().square().topk(3).values.sum() / m.square().sum()).item()

    ours = top(v.mT @ g @ u)
    assert ours > 0.8
    assert ours > top(g) + 0.1
    assert ours > top(v.mT @ g @ u.mT) + 0.1


def test_sparsegrad_keeps_the_largest_entries_of_each_step():
    plain, mapped, chain = layer()
    x = data()[0]
    for model in (plain, mapped):
        loss(model, x).backward()
    full = chain[0].V.mT @ plain[0].weight.grad @ chain[0].U
    kept = full.abs() >= full.abs().flatten().sort().values[-6]
    torch.testing.assert_close(chain.original.grad, full * kept)


def test_sparsegrad_trains_as_the_dense_layer_where_all_is_kept():
    """A basis change is orthogonal, so the trajectory of SGD is the same."""
    plain, mapped, _ = layer(share=1.0)
    for model in (plain, mapped):
        opt = torch.optim.SGD(model.parameters(), lr=1e-4)
        for x in data():
            opt.zero_grad()
            loss(model, x).backward()
            opt.step()
    torch.testing.assert_close(mapped[0].weight, plain[0].weight, rtol=1e-10, atol=1e-10)


def test_sparsegrad_gives_sparse_adam_its_gradient():
    """Which leaves the moments of all other entries alone."""
    _, dense, chain = layer()
    _, mapped, sparse_chain = layer(sparse=True)
    for model in (dense, mapped):
        loss(model, data()[0]).backward()
    g = sparse_chain.original.grad
    assert g.is_sparse
    assert g.coalesce().values().numel() == 6
    assert torch.equal(g.to_dense(), chain.original.grad)
    before = sparse_chain.original.detach().clone()
    opt = torch.optim.SparseAdam([sparse_chain.original], lr=0.1)
    opt.step()
    moved = sparse_chain.original != before
    assert torch.equal(moved, g.to_dense() != 0)
    assert torch.equal(opt.state[sparse_chain.original]["exp_avg"] != 0, moved)


def test_sparsegrad_shares_one_pair_among_the_weights_of_a_shape():
    model = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 6)).double()
    moment = torch.zeros(10, 10, dtype=F64)
    for x in data():
        model.zero_grad()
        loss(model, x).backward()
        moment += sum(model[i].weight.grad.mT @ model[i].weight.grad for i in (0, 2))
    weights.put(model, weights.sparsegrad(), on=["0", "2", "4"], batches=data(), loss=loss)
    one, two, other = (model[i].parametrizations.weight[0] for i in (0, 2, 4))
    assert torch.equal(one.V, two.V)
    assert torch.equal(one.U, two.U)
    turned = one.U.mT @ moment @ one.U
    assert (turned - turned.diag().diag()).abs().max() < 1e-9 * moment.abs().max(), "of the gradients of both"
    assert other.V.shape == (6, 6)
    assert not torch.equal(one.U, other.U)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_sparsegrad_refuses_a_share_of_none_or_of_more_than_all(share):
    with pytest.raises(ValueError, match=f"share={share}"):
        weights.sparsegrad(share)
