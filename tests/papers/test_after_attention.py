"""QK-clip (Kimi Team 2025): logits by hand, head by head, and what it holds down under Muon."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from plays.after import attentive
from torch import nn

from etude import after, blocks, rules

transformers = pytest.importorskip("transformers")


def largest(m, x, visible=None):
    """S of each head, 1/√c max_ij q_i · k_j, in plain floats. m: an attention with layers q and k; x: [b, t, d]."""
    q, k, c = m.q(x).tolist(), m.k(x).tolist(), m.q.out_features // m.heads
    found = []
    for h in range(m.heads):
        own, key = h * c, h // (m.heads // m.kv_heads) * c
        logits = [
            sum(q[b][i][own + n] * k[b][j][key + n] for n in range(c)) / math.sqrt(c)
            for b in range(len(x)) for i in range(x.shape[1]) for j in range(x.shape[1])
            if visible is None or visible[i][j]
        ]  # fmt: skip
        found.append(max(logits))
    return found


def heads(w, n):
    return w.detach().clone().view(n, -1, *w.shape[1:])


def steep(**more):
    """Four heads, of which some have logits beyond 100 and some do not."""
    torch.manual_seed(3)
    m = blocks.Attention(16, 4, **more).double()
    with torch.no_grad():
        for h, size in enumerate((1.0, 9.0, 2.0, 30.0)):
            m.q.weight.view(4, 4, 16)[h] *= size
    return m, 5 * torch.randn(2, 5, 16, dtype=torch.float64)


def test_qk_clip_brings_the_largest_logit_of_a_head_to_tau_and_leaves_the_bits_of_other_heads():
    m, x = steep()
    before, q, k = largest(m, x), heads(m.q.weight, 4), heads(m.k.weight, 4)
    over = [s > 100 for s in before]
    assert sorted(over) == [False, False, True, True]
    bound = after.qk_clip().bind(m)
    m(x)
    bound()
    now = largest(m, x)
    for h, s in enumerate(before):
        gamma = min(1.0, 100 / s)
        assert now[h] == pytest.approx(100.0 if over[h] else s, rel=1e-12)
        for was, w in ((q[h], heads(m.q.weight, 4)[h]), (k[h], heads(m.k.weight, 4)[h])):
            assert torch.equal(was, w) != over[h]
            torch.testing.assert_close(w, math.sqrt(gamma) * was, rtol=1e-12, atol=0)


def test_qk_clip_below_tau_changes_nothing_and_neither_does_what_is_only_evaluated():
    m, x = steep()
    bound = after.qk_clip(tau=1e4).bind(m)
    kept = copy.deepcopy(m.state_dict())
    m(x)
    bound()
    low = after.qk_clip(tau=1.0).bind(m)
    with torch.no_grad():
        m(x)
    low()
    assert all(torch.equal(kept[n], w) for n, w in m.state_dict().items())


def test_qk_clip_takes_the_largest_logit_of_all_forwards_since_the_last_step():
    m, x = steep()
    bound = after.qk_clip(tau=10.0).bind(m)
    for part in (x / 3, x, x / 2):
        m(part)
    bound()
    assert max(largest(m, x)) == pytest.approx(10.0, rel=1e-12)
    bound()
    assert max(largest(m, x)) == pytest.approx(10.0, rel=1e-12)


def test_qk_clip_leaves_keys_that_heads_share_alone_and_the_queries_take_gamma_whole():
    m, x = steep(kv_heads=2)
    before, k = largest(m, x), m.k.weight.detach().clone()
    bound = after.qk_clip(tau=20.0).bind(m)
    m(x)
    bound()
    assert torch.equal(m.k.weight, k)
    assert largest(m, x) == pytest.approx([min(s, 20.0) for s in before], rel=1e-12)
    assert max(before) > 20


@pytest.mark.parametrize("how", ["causal", "bool", "float"])
def test_qk_clip_counts_the_logits_that_a_query_sees(how):
    m, x = steep(causal=how == "causal")
    low = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = {"causal": None, "bool": low, "float": (~low).double() * torch.finfo(torch.float64).min}[how]
    everywhere, before = largest(m, x), largest(m, x, low.tolist())
    assert everywhere != before
    bound = after.qk_clip(tau=8.0).bind(m)
    m(x, mask=mask)
    bound()
    assert largest(m, x, low.tolist()) == pytest.approx([min(s, 8.0) for s in before], rel=1e-12)


def test_qk_clip_follows_rotary_positions():
    """Turned queries and keys: the largest logit after the clip is tau, whatever turns them."""
    m, x = steep(position=blocks.rotary_attention(16, 4).position)
    bound = after.qk_clip(tau=7.0).bind(m)
    m(x)
    bound()
    m(x)
    assert bound.kept["q.weight + k.weight"].max().item() == pytest.approx(7.0, rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_qk_clip_holds_the_logits_of_models_of_transformers(kind):
    size = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 8}
    if kind == "llama":
        model = transformers.LlamaModel(transformers.LlamaConfig(**size, num_key_value_heads=2, vocab_size=11))
    else:
        model = transformers.BertModel(transformers.BertConfig(**size, vocab_size=11, hidden_dropout_prob=0.0))
    model = model.double().eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            w.mul_(20 if "q_proj" in name or "query" in name else 1)
    ids = torch.arange(14).view(2, 7) % 11
    bound = after.qk_clip(tau=1e-2).bind(model)
    assert len(bound.kept) == 2
    model(ids)
    first = next(iter(bound.kept.values()))
    assert first.max() > 1e-2
    bound()
    model(ids)
    assert first.max().item() == pytest.approx(1e-2, rel=1e-9)


def train(clip):
    torch.manual_seed(0)
    model = nn.Sequential(blocks.attention(16, 4), nn.Linear(16, 16), blocks.attention(16, 4), nn.Linear(16, 3))
    opt = rules.optimizer(model, rules.muon(lr=0.1, weight_decay=0.0))
    seen = after.qk_clip(tau=1e6).bind(model)
    if clip:
        after.attach(opt, model, after.qk_clip(tau=20.0))
    x, y = torch.randn(8, 6, 16), torch.randint(3, (8, 6))
    tops = []
    for _ in range(90):
        opt.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        opt.step()
        seen()
        model(x)
        tops.append(max(most.max().item() for most in seen.kept.values()))
    return tops


def test_qk_clip_bounds_the_logits_that_grow_under_muon():
    """The paper: with Muon at scale logits pass 1000; clipped, they stay near τ. A step may pass it before the clip."""
    free, held = train(clip=False), train(clip=True)
    assert free[-1] > 1000
    assert max(held) < 60


def test_qk_clip_compiled_sees_what_the_plain_model_sees():
    m, x = steep()
    bound = after.qk_clip(tau=10.0).bind(m)
    torch.compile(m, backend="aot_eager")(x)
    bound()
    assert max(largest(m, x)) == pytest.approx(10.0, rel=1e-12)


def test_qk_clip_replicas_that_saw_other_examples_stay_replicas(monkeypatch):
    """What all_reduce does between two processes is done here between two models."""
    (one, x), (two, _) = steep(), steep()
    bounds = [after.qk_clip(tau=10.0).bind(m) for m in (one, two)]
    one(x), two(x / 2)
    (first,), (second,) = (list(bound.kept.values()) for bound in bounds)
    top = torch.maximum(first, second)
    assert not torch.equal(second, top)

    def all_reduce(tensor, op):
        assert op is torch.distributed.ReduceOp.MAX
        tensor.copy_(top)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for bound in bounds:
        bound()
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert max(largest(two, x)) == pytest.approx(10.0, rel=1e-12)


def test_qk_clip_refuses_what_it_could_not_clip():
    with pytest.raises(ValueError, match="found nothing to do: Linear has no weight that it concerns"):
        after.qk_clip().bind(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="cannot clip 0: its qk stands between"):
        after.qk_clip().bind(nn.Sequential(blocks.qk_norm(16, 4)))
    with pytest.raises(ValueError, match="cannot see the logits of '0', a MultiheadAttention"):
        after.qk_clip().bind(nn.Sequential(nn.MultiheadAttention(16, 4)))
    m, x = steep()
    bound = after.qk_clip().bind(m)
    m.heads = 2
    m.q.forward = lambda x: x[..., :8]
    with pytest.raises(ValueError, match=r"q.weight .*: 16 rows are not 2 heads of 4 each"):
        m(x)
    size = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    model = transformers.LlamaModel(transformers.LlamaConfig(**size, vocab_size=11, attn_implementation="eager"))
    bound = after.qk_clip().bind(model)
    with pytest.raises(ValueError, match=r"saw no logits of layers.0.self_attn.q_proj.weight \+ .*: it needs F.scaled"):
        model(torch.arange(5)[None])
    del bound
    model = attentive()
    bound = after.qk_clip().bind(model)
    with torch.no_grad():
        model[0].q.weight.fill_(math.inf)
    model(torch.ones(1, 2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a logit of 0.q.weight .* is not finite"):
        bound()


def test_qk_clip_is_off_again_after_remove_and_after_a_forward_that_failed():
    m, x = steep()
    opt = torch.optim.SGD(m.parameters(), lr=0.0)
    bound = after.attach(opt, m, after.qk_clip())
    with pytest.raises(RuntimeError):
        m(x[..., :3])
    assert not torch.overrides._get_current_function_mode_stack()
    bound.remove()
    m(x)
    assert not any(most.any() for most in bound.kept.values())
