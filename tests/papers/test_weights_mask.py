"""What the papers say of magnitude masks and of FISH masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from etude import weights

F64 = torch.float64


def test_magnitude_mask_equals_torchs_l1_pruning():
    ours = nn.Conv2d(3, 4, 3, dtype=F64)
    theirs = prune.l1_unstructured(copy.deepcopy(ours), "weight", amount=0.4)
    weights.put(ours, weights.magnitude_mask(sparsity=0.4), on="conv")
    x = torch.randn(2, 3, 6, 6, dtype=F64)
    assert torch.equal(ours(x), theirs(x))
    assert (ours.weight == 0).sum() == round(0.4 * ours.weight.numel())
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    assert torch.equal(ours.parametrizations.weight.original.grad, theirs.weight_orig.grad)


def test_magnitude_mask_finds_a_winning_ticket_as_the_paper_does():
    """Train, prune the smallest, go back to the start: then f(x; m ∘ θ₀) trains, and the pruned stay zero."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(6, 3, dtype=F64), torch.randn(40, 6, dtype=F64), torch.randn(40, 3, dtype=F64)
    start = layer.weight.detach().clone()

    def train():
        opt = torch.optim.Adam(layer.parameters(), lr=0.05, weight_decay=0.01)
        for _ in range(20):
            opt.zero_grad()
            F.mse_loss(layer(x), y).backward()
            opt.step()

    train()
    trained = layer.weight.detach().clone()
    weights.put(layer, weights.magnitude_mask(sparsity=0.5), on="weight")
    kept = trained.abs() > trained.abs().flatten().sort().values[8]
    assert torch.equal(layer.weight, trained * kept)
    layer.weight = start
    assert torch.equal(layer.weight, start * kept)
    train()
    assert (layer.weight[~kept] == 0).all()
    assert (layer.weight[kept] != start[kept]).all()
    weights.put(weights.merge(layer), weights.magnitude_mask(sparsity=0.75), on="weight")  # a second round
    assert (layer.weight == 0).sum() == round(0.75 * 18)
    assert (layer.weight[~kept] == 0).all()


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1])
def test_magnitude_mask_refuses_a_share_that_prunes_nothing_or_all(sparsity):
    with pytest.raises(ValueError, match=f"sparsity={sparsity}"):
        weights.magnitude_mask(sparsity)
    with pytest.raises(ValueError, match="leaves all 2 entries"):
        weights.put(nn.Linear(2, 1), weights.magnitude_mask(0.1), on="weight")


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


BODY = ["0", "2", "3"]
X, Y = torch.randn(12, 5, dtype=F64, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 3
EXAMPLES = [(x[None], y[None]) for x, y in zip(X, Y)]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def importance(model, power):
    """Of each entry by name, example by example."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in EXAMPLES:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for n, p in model.named_parameters():
            total[n] += p.grad.abs() ** power
    model.zero_grad()
    return total


def trained_entries(model, steps=3):
    """Which entries of which weights differ after some steps."""
    before = {n: getattr(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]).clone() for n in NAMES}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        opt.step()
    after = {n: getattr(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in NAMES}
    return {n: before[n] != after[n] for n in NAMES}


NAMES = [n for n, _ in classifier().named_parameters()]
HEAD = 6 * 3 + 3


@pytest.mark.parametrize("grad, power", [("square", 2), ("absolute", 1)])
def test_fish_mask_trains_the_entries_of_largest_fisher_information_of_the_whole_model(grad, power):
    model = classifier()
    scores = importance(copy.deepcopy(model), power)
    total = sum(s.numel() for s in scores.values())
    k = int(0.4 * total) - HEAD
    body = torch.cat([scores[n].flatten() for n in NAMES if not n.startswith("5")])
    least = body.topk(k).values[-1]
    weights.put(
        model, weights.fish_mask(keep=0.4, grad=grad, whole=HEAD), on=BODY, batches=EXAMPLES, loss=cross_entropy
    )
    moved = trained_entries(model)
    for n in NAMES:
        assert torch.equal(moved[n], torch.ones_like(moved[n]) if n.startswith("5") else scores[n] >= least), n
    assert sum(m.sum() for m in moved.values()) == int(0.4 * total), "momentum and decay included, no other entry moves"


def test_fish_mask_holds_optimizer_state_for_its_entries_alone():
    model = classifier()
    weights.put(model, weights.fish_mask(keep=0.1), on=BODY, batches=EXAMPLES, loss=cross_entropy)
    trained_entries(weights.freeze(model))
    n = sum(p.numel() for name, p in classifier().named_parameters() if name[0] in BODY)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == int(0.1 * n)


def test_fish_mask_takes_the_papers_expectation_over_labels_by_its_loss():
    """Of softmax regression in closed form: Σ_x Σ_y p_y (p_j − [j = y])² xᵢ²."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    w = model[0].weight.detach().clone()

    def expected(model, batch):
        x, y = batch
        logp = F.log_softmax(model(x), 1)[0, y]
        return logp.detach().div(2).exp() * logp

    every = [(x, y) for x, _ in EXAMPLES for y in range(3)]
    weights.put(model, weights.fish_mask(keep=0.4), on="*", batches=every, loss=expected)
    p = (X @ w.T).softmax(1)
    scores = torch.einsum("nj,ni->ji", p * (1 - p), X**2)
    assert set(model[0].parametrizations.weight[0].index.tolist()) == set(scores.flatten().topk(6).indices.tolist())


def test_fish_mask_is_kept_as_places_and_values(tmp_path):
    model = classifier()
    weights.put(model, weights.fish_mask(keep=0.1), on=BODY, batches=EXAMPLES, loss=cross_entropy)
    trained_entries(weights.freeze(model))
    weights.save(model, tmp_path)
    fresh = weights.load(classifier(), tmp_path)
    torch.testing.assert_close(fresh(X), model(X))
    assert not torch.equal(fresh(X), classifier()(X))


def test_fish_mask_says_what_it_needs():
    with pytest.raises(ValueError, match=r"give weights\.put batches="):
        weights.put(classifier(), weights.fish_mask())
    with pytest.raises(ValueError, match=r"the 21 that train anyway are more than keep=0\.005 allows"):
        weights.put(classifier(), weights.fish_mask(whole=HEAD), on=BODY, batches=EXAMPLES, loss=cross_entropy)
    with pytest.raises(ValueError, match="keep=0"):
        weights.fish_mask(keep=0)
