"""nGPT: what its paper and its authors' code say of the model, its steps and its sphere."""

import math

import pytest
import torch
from torch import nn

from etude import after, blocks, recipes, rules
from etude.recipes import parse

TOKENS = torch.arange(12).view(2, 6) % 7
WRITERS = ("out.weight", "down.weight")


def built(**knobs):
    torch.manual_seed(0)
    return recipes.ngpt(7, d=16, layers=2, heads=2, **knobs).double()


def loss(logits):
    return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten())


def lengths(model):
    """Of every vector of the model that lives in R^d."""
    found = {}
    for n, w in model.named_parameters():
        if w.ndim == 2:
            found[n] = torch.linalg.vector_norm(w, dim=0 if n.endswith(WRITERS) else 1)
    assert len(found) == 2 + 2 * 7
    return torch.cat([v.flatten() for v in found.values()])


def test_ngpt_starts_with_unit_vectors_in_every_matrix():
    torch.testing.assert_close(lengths(built()), torch.ones_like(lengths(built())))


def test_ngpt_holds_its_hidden_state_at_length_one_after_every_block():
    model, seen = built(), []
    for m in model.modules():
        if isinstance(m, blocks.Residual):
            m.register_forward_hook(lambda _m, _x, y: seen.append(torch.linalg.vector_norm(y, dim=-1)))
    model(TOKENS)
    assert len(seen) == 4
    torch.testing.assert_close(torch.stack(seen), torch.ones(4, 2, 6, dtype=torch.float64))


def test_ngpt_logits_are_cosines_times_a_learned_scale_of_each_word():
    model = built(s_z=3.0)
    h = model.layers(model.embedding(TOKENS))
    cosines = nn.functional.cosine_similarity(h.unsqueeze(-2), model.head.weight, dim=-1)
    torch.testing.assert_close(model(TOKENS), 3 * cosines)
    with torch.no_grad():
        model.s_z.p[2] *= 5
    torch.testing.assert_close(model(TOKENS)[..., 2], 15 * cosines[..., 2])
    torch.testing.assert_close(model(TOKENS)[..., 3], 3 * cosines[..., 3])


def test_ngpt_with_alpha_zero_hands_the_embeddings_through():
    model = built(alpha=0.0)
    torch.testing.assert_close(model(TOKENS), model.embedding.weight[TOKENS] @ model.head.weight.T)


def test_ngpt_is_the_loop_of_its_paper():
    """Equations 10 and 11, with rotary positions left out by taking one token."""
    model, d, heads = built(), 16, 2
    token = torch.tensor([[3]])

    def unit(v):
        return v / v.norm()

    h = model.embedding.weight[3]
    for layer in model.layers:
        a, m = layer.attention.f, layer.mlp.f
        x = a.out.weight @ (a.v.weight @ h)  # one token attends to itself alone
        h = unit(h + 0.05 * (unit(x) - h))
        u, v = math.sqrt(d) * (m.up.weight @ h), math.sqrt(d) * (m.gate.weight @ h)
        h = unit(h + 0.05 * (unit(m.down.weight @ (u * v * torch.sigmoid(v))) - h))
    assert (len(model.layers), model.layers[0].attention.f.heads) == (2, heads)
    torch.testing.assert_close(model(token)[0, 0], model.head.weight @ h)


def test_ngpt_predicts_from_what_came_before():
    model, later = built(), TOKENS.clone()
    later[:, -1] = (later[:, -1] + 1) % 7
    torch.testing.assert_close(model(later)[:, :-1], model(TOKENS)[:, :-1])
    assert not torch.allclose(model(later)[:, -1], model(TOKENS)[:, -1])


@pytest.mark.parametrize(
    "name, init, scale",
    [
        ("s_z", 1.0, 0.25),
        ("layers.0.attention.join.a", 0.05, 0.25),
        ("layers.1.mlp.join.a", 0.05, 0.25),
        ("layers.0.attention.f.qk.s", 1.0, 0.25),
        ("layers.0.mlp.f.s_u", 1.0, 1.0),
    ],
)
def test_ngpt_steps_of_its_scales_are_init_over_scale_times_the_learning_rate(name, init, scale):
    """The effective learning rate of section 2.5: adam moves p by lr, so what is used by lr · init / scale."""
    model = built()
    s = model.get_submodule(name)
    assert (s.init, s.scale) == (init, pytest.approx(scale))
    before = s().detach().clone()
    assert torch.allclose(before, torch.full_like(before, init))
    opt = rules.optimizer(model, rules.adamw(lr=1e-3, weight_decay=0.0))
    loss(model(TOKENS)).backward()
    opt.step()
    moved = (s() - before).abs().median().item()
    assert moved == pytest.approx(1e-3 * init / scale, rel=1e-2)


def test_hypersphere_holds_every_vector_at_length_one_after_each_step():
    model = built()
    opt = rules.optimizer(model, rules.adamw(lr=0.05, weight_decay=0.0))
    bound = after.attach(opt, model, recipes.hypersphere())
    for _ in range(5):
        before = model.layers[0].attention.f.q.weight.detach().clone()
        opt.zero_grad()
        loss(model(TOKENS)).backward()
        opt.step()
        torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)))
    assert not torch.equal(before, model.layers[0].attention.f.q.weight)
    assert bound.t == 5
    bound.remove()
    opt.step()
    assert (lengths(model) - 1).abs().max() > 1e-3


def test_hypersphere_leaves_the_scales_alone_and_projects_before_the_first_step():
    model = built()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    scales = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim < 2}
    recipes.hypersphere().bind(model)
    torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)))
    assert all(torch.equal(model.get_parameter(n), p) for n, p in scales.items())
    with pytest.raises(ValueError, match="tells by its residual blocks how a model is made; Linear has none"):
        recipes.hypersphere().bind(nn.Linear(3, 3))


def test_hypersphere_stands_in_a_recipe():
    recipe = parse("adamw(weight_decay=0.0) + hypersphere + weight_average")
    assert [type(v).__name__ for v in recipe.after] == ["Sphere", "Ema"]
    model = recipe.apply(built())
    opt = recipe.optimizer(model, lr=0.02)
    for value in recipe.after:
        after.attach(opt, model, value)
    first = loss(model(TOKENS)).item()
    for _ in range(30):
        opt.zero_grad()
        loss(model(TOKENS)).backward()
        opt.step()
    assert loss(model(TOKENS)).item() < 0.9 * first
    torch.testing.assert_close(lengths(model), torch.ones_like(lengths(model)))
