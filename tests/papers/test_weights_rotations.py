"""What the papers of orthogonal fine-tuning say; peft as reference where it follows them."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from etude import weights

F64 = torch.float64


def adapted(map, into=12, out=7, std=0.4, **kwargs):
    """A layer with a map moved from its birth, the map, and what stood there before."""
    torch.manual_seed(3)
    layer = nn.Linear(into, out, dtype=F64)
    w0 = layer.weight.detach().clone()
    weights.put(layer, map, on="weight", **kwargs)
    mine = layer.parametrizations.weight[0]
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(std * torch.randn_like(p))
    return layer, mine, w0


def angles(w):
    """Cosines between the rows: what orthogonal fine-tuning keeps."""
    rows = w / w.norm(dim=1, keepdim=True)
    return rows @ rows.mT


def theirs(layer, config):
    peft = pytest.importorskip("peft")
    config = getattr(peft, config[0])(target_modules=["0"], **config[1])
    return peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)


def agree(ours, other, pairs, x, tol=1e-5):
    """Outputs, merged weights and gradients; pairs: (our θ, theirs, how ours is laid out as theirs)."""
    with torch.no_grad():
        for mine, p, there in pairs:
            p.copy_(there(mine))
    y, z = ours(x), other(x)
    torch.testing.assert_close(y, z, rtol=tol, atol=tol)
    one = torch.autograd.grad(y.pow(3).mean(), [m for m, _, _ in pairs])
    two = torch.autograd.grad(z.pow(3).mean(), [p for _, p, _ in pairs])
    for g, h, (_, _, there) in zip(one, two, pairs):
        torch.testing.assert_close(there(g), h, rtol=1e-3, atol=tol)
    torch.testing.assert_close(weights.merge(ours)[0].weight, other.merge_and_unload()[0].weight, rtol=tol, atol=tol)


STRICT = {
    "hra": weights.hra(r=6),
    "oft": weights.oft(block_size=4),
    "oft, ragged": weights.oft(block_size=5),
    "boft": weights.boft(block_size=4, m=3),
    "boft, ragged": weights.boft(block_size=8, m=2),
    "goft": weights.goft(),
}


@pytest.mark.parametrize("map", STRICT.values(), ids=STRICT.keys())
@pytest.mark.parametrize("into", [12, 11])
def test_oft_and_all_that_are_strict_keep_singular_values_and_angles(map, into):
    layer, _, w0 = adapted(map, into)
    assert (layer.weight - w0).norm() > 0.3 * w0.norm()
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.linalg.svdvals(w0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(angles(layer.weight), angles(w0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [weights.oft, weights.boft, weights.hra, weights.goft, weights.psoft])
def test_oft_and_all_that_are_strict_stay_orthogonal_along_100_steps(make):
    layer, x, y = nn.Linear(8, 5, dtype=F64), torch.randn(30, 8, dtype=F64), torch.randn(30, 5, dtype=F64)
    gram = layer.weight @ layer.weight.mT
    weights.freeze(weights.put(layer, make(), on="weight"))
    mine = layer.parametrizations.weight[0]
    params = [mine.q] if make is weights.psoft else list(mine.parameters())
    opt = torch.optim.Adam(params, lr=0.05)
    before = (layer(x) - y).square().mean().item()
    for _ in range(100):
        opt.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        opt.step()
    assert loss < 0.95 * before
    torch.testing.assert_close(layer.weight @ layer.weight.mT, gram.detach(), rtol=1e-9, atol=1e-9)


COUNTS = [
    (weights.hra(r=6), 16, 6 * 16),
    (weights.oft(block_size=4), 16, 4 * (4 * 3 // 2)),
    (weights.oft(block_size=5), 12, 10 + 10 + 1),  # blocks of 5, 5 and 2
    (weights.oft_v2(block_size=8), 16, 2 * 28),
    (weights.boft(block_size=4, m=3), 16, 3 * 16 * 3 // 2),  # m d (b − 1) / 2
    (weights.goft(), 13, 12),
    (weights.goft(scaling=True), 13, 12 + 13),
    (weights.qgoft(), 13, 4 * 12),
    (weights.psoft(r=5), 13, 5 * 4 // 2 + 2 * 5),
]


@pytest.mark.parametrize("map, into, count", COUNTS, ids=[str(c[0]) for c in COUNTS])
def test_oft_and_the_rest_train_as_many_numbers_as_their_papers_say(map, into, count):
    _, mine, _ = adapted(map, into, 9)
    assert sum(p.numel() for p in mine.parameters()) == count


# -- HRA --------------------------------------------------------------------------------------------------------------


def test_hra_is_a_chain_of_reflections_of_the_input():
    layer, mine, w0 = adapted(weights.hra(r=4), 5, 3)
    w, u = w0.tolist(), mine.u.mT.tolist()
    for v in u:
        square = sum(a * a for a in v)
        w = [[a - 2 * sum(p * q for p, q in zip(row, v)) / square * b for a, b in zip(row, v)] for row in w]
    torch.testing.assert_close(layer.weight, torch.tensor(w, dtype=F64), rtol=1e-12, atol=1e-12)


def test_hra_changes_the_weight_by_rank_r_at_most():
    layer, _, w0 = adapted(weights.hra(r=4), 20, 30)
    assert torch.linalg.matrix_rank(layer.weight - w0) == 4


def test_hra_is_born_in_pairs_that_cancel():
    layer = nn.Linear(10, 4, dtype=F64)
    w0 = layer.weight.detach().clone()
    mine = weights.put(layer, weights.hra(r=6), on="weight").parametrizations.weight[0]
    assert torch.equal(mine.u[:, ::2], mine.u[:, 1::2])
    assert 0.8 / math.sqrt(3) < mine.u.abs().max() <= 1 / math.sqrt(3)  # peft's kaiming_uniform_(a=√5) of [in, r / 2]
    torch.testing.assert_close(layer.weight, w0, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="hra: r=3 must be even: reflections are born in pairs that cancel"):
        weights.hra(r=3)


def test_hra_has_the_penalty_of_its_paper_which_is_not_zero_at_birth():
    model = nn.Sequential(nn.Linear(40, 4, dtype=F64), nn.Linear(4, 4))
    mine = weights.put(model, weights.hra(r=4), on="0")[0].parametrizations.weight[0]
    with torch.no_grad():
        mine.u.copy_(torch.eye(40)[:, :4] * torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert weights.orthogonality(model).item() == 0
        mine.u[:, 1] = 5 * mine.u[:, 0]
    assert weights.orthogonality(model).item() == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="Linear carries no adapter whose paper has a penalty: hra or qgoft"):
        weights.orthogonality(nn.Linear(3, 3))


def test_hra_equals_peft():
    base = nn.Linear(10, 6)
    other = theirs(base, ("HRAConfig", {"r": 4}))
    ours = nn.Sequential(base)
    weights.put(ours, weights.hra(r=4), on="0")
    u = ours[0].parametrizations.weight[0].u
    nn.init.normal_(u)
    agree(ours, other, [(u, other.base_model.model[0].hra_u["default"], lambda t: t)], torch.randn(4, 10))


# -- OFT, OFTv2, BOFT -------------------------------------------------------------------------------------------------


def test_oft_turns_each_block_of_inputs_by_the_cayley_map_of_a_skew_matrix():
    layer, mine, w0 = adapted(weights.oft(block_size=2), 4, 3)
    for block, q in enumerate(mine.q.tolist()):  # (I + Q) (I − Q)⁻¹ with Q = [[0, q], [−q, 0]]
        c, s = (1 - q * q) / (1 + q * q), 2 * q / (1 + q * q)
        a, b = w0[:, 2 * block], w0[:, 2 * block + 1]
        torch.testing.assert_close(layer.weight[:, 2 * block], c * a + s * b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.weight[:, 2 * block + 1], c * b - s * a, rtol=1e-12, atol=1e-12)


def test_oft_is_peft_with_the_other_sign():
    """peft's exact path solves (I − Q) (I + Q)⁻¹, the transpose of the paper's and of its own Neumann series."""
    base = nn.Linear(12, 6)
    other = theirs(base, ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}))
    ours = nn.Sequential(base)
    weights.put(ours, weights.oft(block_size=4), on="0")
    q = ours[0].parametrizations.weight[0].q
    nn.init.normal_(q, std=0.5)
    p = other.base_model.model[0].oft_R["default"].weight
    agree(ours, other, [(q, p, lambda t: -t.view(3, 6))], torch.randn(4, 12))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_oft_v2_equals_peft_with_k_plus_2_terms(k):
    base = nn.Linear(12, 6)
    terms = {"oft_block_size": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": k + 2}
    other = theirs(base, ("OFTConfig", terms))
    ours = nn.Sequential(base)
    weights.put(ours, weights.oft_v2(block_size=4, k=k), on="0")
    q = ours[0].parametrizations.weight[0].q
    nn.init.normal_(q, std=0.2)
    p = other.base_model.model[0].oft_R["default"].weight
    agree(ours, other, [(q, p, lambda t: t.view(3, 6))], torch.randn(4, 12))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_oft_v2_is_the_cayley_map_to_order_k_plus_1(k):
    gaps, drifts = [], []
    for size in (0.02, 0.01):
        one, mine, w0 = adapted(weights.oft_v2(block_size=6, k=k), 6, 6)
        two, exact, _ = adapted(weights.oft(block_size=6), 6, 6)
        with torch.no_grad():
            q = size * torch.linspace(-1, 1, 15, dtype=F64)
            mine.q.copy_(q)
            exact.q.copy_(q)
        gaps.append((one.weight - two.weight).norm().item())
        r = torch.linalg.solve(w0, one.weight.detach())
        drifts.append((r.mT @ r - torch.eye(6, dtype=F64)).norm().item())
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(k + 1, abs=0.1)
    even = k % 2 == 0  # where R is orthogonal to twice the order
    if k < 4:
        assert math.log2(drifts[0] / drifts[1]) == pytest.approx(2 * k + 2 if even else k + 1, abs=0.2)


@pytest.mark.parametrize("size, m", [(4, 3), (8, 2), (2, 4), (2, 1)])
def test_boft_is_a_product_of_butterfly_factors(size, m):
    """Each as a dense matrix: a block joins a half block and the one 2ⁱ half blocks further on."""
    d, half = 16, size // 2
    layer, mine, w0 = adapted(weights.boft(block_size=size, m=m), d, 16)
    q, r = iter(mine.q.tolist()), torch.eye(d, dtype=F64)
    for i in range(m):
        skew = torch.zeros(d, d, dtype=F64)
        firsts = [j * half for j in range(d // half) if not j >> i & 1]
        for first in firsts:
            block = [first + h for h in range(half)] + [first + 2**i * half + h for h in range(half)]
            for a, b in itertools.combinations(block, 2):
                skew[a, b] = next(q)
                skew[b, a] = -skew[a, b]
        eye = torch.eye(d, dtype=F64)
        r = (eye + skew) @ torch.linalg.inv(eye - skew) @ r
    assert next(q, None) is None
    torch.testing.assert_close(layer.weight, w0 @ r.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m, reach", [(1, 4), (2, 8), (3, 16), (4, 32)])
def test_boft_doubles_its_reach_with_every_factor(m, reach):
    layer, _, _ = adapted(weights.boft(block_size=4, m=m), 32, 32)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.eye(32))
    assert ((layer.weight.abs() > 1e-12).sum(0) == reach).all()


def test_boft_with_large_groups_is_played_factor_by_factor():
    """Beyond the size at which factors are multiplied out."""
    layer, _, w0 = adapted(weights.boft(block_size=16, m=5), 512, 4)
    torch.testing.assert_close(layer.weight @ layer.weight.mT, w0 @ w0.mT, rtol=1e-9, atol=1e-9)
    x = torch.randn(3, 512, dtype=F64)
    torch.testing.assert_close(layer(x), x @ layer.weight.mT + layer.bias, rtol=1e-9, atol=1e-9)


def test_boft_of_one_factor_equals_peft():
    base = nn.Linear(12, 6)
    other = theirs(base, ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1}))
    ours = nn.Sequential(base)
    weights.put(ours, weights.boft(block_size=4, m=1), on="0")
    mine, r = ours[0].parametrizations.weight[0], other.base_model.model[0].boft_R["default"]
    nn.init.normal_(mine.q, std=0.3)
    with torch.no_grad():
        i, j = torch.triu_indices(4, 4, 1)
        for block, q in zip(r[0], mine.q.view(3, 6)):
            block[i, j] = -2 * q  # peft takes Q = (R − Rᵀ) / 2 and (I − Q) (I + Q)⁻¹: the other sign
    x = torch.randn(4, 12)
    torch.testing.assert_close(ours(x), other(x), rtol=1e-5, atol=1e-5)


# -- PSOFT ------------------------------------------------------------------------------------------------------------


def test_psoft_turns_the_principal_part_and_leaves_the_rest():
    layer, mine, w0 = adapted(weights.psoft(r=4), 9, 7)
    u, s, vh = torch.linalg.svd(w0, full_matrices=False)
    main = (u[:, :4] * s[:4]) @ vh[:4]
    with torch.no_grad():
        mine.a.fill_(1)
        mine.b.fill_(1)
    turned = layer.weight - (w0 - main)
    assert (turned - main).norm() > 0.1 * main.norm()
    torch.testing.assert_close(torch.linalg.svdvals(turned)[:4], s[:4], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned @ turned.mT, main @ main.mT, rtol=1e-10, atol=1e-10)  # the neurons are the rows
    assert torch.linalg.matrix_rank(layer.weight - w0) <= 4


def test_psoft_equals_peft():
    base = nn.Linear(10, 6)
    other = theirs(base, ("PsoftConfig", {"r": 4, "psoft_alpha": 7}))
    ours = nn.Sequential(base)
    weights.put(ours, weights.psoft(r=4), on="0")
    mine, rot = ours[0].parametrizations.weight[0], other.base_model.model[0].psoft_R["default"]
    for p in mine.parameters():
        nn.init.normal_(p, mean=p.detach().mean().item(), std=0.3)
    pairs = [(mine.q, rot.weight), (mine.a, rot.vector_a), (mine.b, rot.vector_b)]
    agree(ours, other, [(m, p, lambda t: t) for m, p in pairs], torch.randn(4, 10))


@pytest.mark.parametrize(
    "make, line",
    [
        (lambda: weights.oft(block_size=1), "oft: block_size=1 must be a whole number, and at least 2"),
        (lambda: weights.oft_v2(k=0), "oft_v2: k=0 must be a whole number, and at least 1"),
        (
            lambda: weights.boft(block_size=3),
            "boft: block_size=3 must be even, so that m=2 factors can exchange halves",
        ),
        (lambda: weights.psoft(r=2.0), "psoft: r=2.0 must be a whole number, and at least 1"),
    ],
)
def test_oft_and_the_rest_refuse_in_one_line(make, line):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == line


def test_oft_needs_two_inputs_to_turn():
    with pytest.raises(ValueError, match="a fan-in of 1 leaves nothing to turn"):
        weights.put(nn.Linear(1, 4), weights.oft(), on="weight")
