"""What the papers say of tuning norms alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LNTuningConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn

from etude import norms, rules, weights

F64 = torch.float64


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 48, 3, stride=2, bias=False), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(48 * 4, 10)),
    )


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_bn_only_trains_two_numbers_a_channel():
    model = weights.bn_only(convnet())
    assert trainable(model) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (32 + 48)
    assert trainable(weights.bn_only(convnet(), head=True)) - trainable(model) == {"7.weight", "7.bias"}


def test_bn_only_draws_gamma_from_0_to_1_and_beta_0():
    model = convnet()
    nn.init.normal_(model[4].bias)
    weights.bn_only(model)
    gamma = model[4].weight
    assert 0 <= gamma.min() < 0.1
    assert 0.9 < gamma.max() <= 1
    assert (model[4].bias == 0).all()
    kept = convnet()
    assert all(
        torch.equal(p, q) for p, q in zip(weights.bn_only(kept, redraw=False).parameters(), convnet().parameters())
    )


def test_bn_only_learns_digits_on_random_features_and_leaves_them_their_bits():
    """Far above chance, and above as many of the random weights trained in their place."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)

    def train(model, mask=1.0):
        random = torch.Generator().manual_seed(0)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        theta = [p for p in model.parameters() if p.requires_grad]
        opt = torch.optim.SGD(theta, lr=1.0, momentum=0.9)
        for _ in range(100):
            some = torch.randint(1000, (128,), generator=random)
            opt.zero_grad()
            F.cross_entropy(model(x[some]), y[some]).backward()
            for p in theta:
                p.grad *= mask
            opt.step()
        assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trainable(model)
        return (model.eval()(x[1000:]).argmax(1) == y[1000:]).float().mean().item()

    torch.manual_seed(1)
    ours = train(weights.bn_only(convnet()))
    others = weights.bn_only(convnet()).requires_grad_(False)
    w = others[3].weight.requires_grad_(True)
    mask = torch.zeros(w.numel()).index_fill(0, torch.randperm(w.numel())[:160], 1.0).view_as(w)
    assert ours > 0.55
    assert ours > train(others, mask) + 0.05


def test_bn_only_takes_etudes_batch_norm_and_freezes_under_a_map():
    model = nn.Sequential(nn.Linear(4, 6), norms.batch_norm(6), nn.Linear(6, 2))
    weights.put(model, weights.weight_norm(), on="0")
    weights.bn_only(model)
    assert trainable(model) == {"1.weight", "1.bias"}
    assert not weights.merge(model)[0].weight.requires_grad


def transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LayerNorm(8))


@pytest.mark.filterwarnings("ignore")  # peft's and transformers' own
def test_layernorm_tuning_trains_what_pefts_does():
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    ours = weights.layernorm_tuning(transformers.LlamaForCausalLM(config))
    names = sorted({n.rpartition(".")[0].rpartition(".")[2] for n in trainable(ours)})
    theirs = get_peft_model(transformers.LlamaForCausalLM(config), LNTuningConfig(target_modules=names))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert names == ["input_layernorm", "norm", "post_attention_layernorm"]
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == count == 5 * 16


def test_layernorm_tuning_trains_scales_and_shifts_of_token_norms_alone():
    model = weights.layernorm_tuning(nn.Sequential(transformer(), norms.rms_norm(8), nn.BatchNorm1d(8)))
    names = {"norm1", "norm2"}
    assert {n.split(".")[-2] for n in trainable(model)} == names | {"2", "1"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5 * 2 * 8 + 8


@pytest.mark.parametrize("tune", [weights.bn_only, weights.layernorm_tuning])
def test_layernorm_tuning_and_bn_only_refuse_a_model_without_such_norms(tune):
    with pytest.raises(ValueError, match="has no"):
        tune(nn.Sequential(nn.Linear(3, 3)))


def test_layernorm_tuning_is_refused_where_an_optimizer_trains_the_rest():
    model = transformer()
    opt = rules.optimizer(model, rules.adamw())
    with pytest.raises(ValueError, match="layernorm_tuning takes a parameter out"):
        weights.layernorm_tuning(model)
    assert opt.param_groups
    assert all(p.requires_grad for p in model.parameters())


class Features(nn.Module):
    """Tokens to one vector."""

    def __init__(self):
        super().__init__()
        self.net = transformer()

    def forward(self, x):
        return self.net(x).mean(1)


def task(t, n=16):
    """Inputs that say which task they are of."""
    random = torch.Generator().manual_seed(t)
    return torch.randn(n, 6, 5, dtype=F64, generator=random) + 3 * torch.eye(5, dtype=F64)[t]


def learn(model, x, steps=15):
    """Both stages of a task: its key, then its norms towards some other features."""
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    t = int(model.task)
    for _ in range(steps):
        opt.zero_grad()
        (model.key_loss(x) + (model(x, t) - t).square().mean()).backward()
        opt.step()


@pytest.fixture
def continual():
    return weights.layernorm_tuning_cl(Features().double(), 8, tasks=3)


def test_layernorm_tuning_cl_trains_two_vectors_a_norm_and_a_key(continual):
    assert sum(p.numel() for p in continual.parameters() if p.requires_grad) == 5 * 2 * 8 + 8
    keys = torch.stack([*continual.keys])
    torch.testing.assert_close(keys @ keys.mT, torch.eye(3, dtype=F64))
    x = task(0)
    torch.testing.assert_close(continual(x, 0), continual.model(x), rtol=0, atol=0)


def test_layernorm_tuning_cl_forgets_nothing_bit_for_bit(continual):
    x = task(0)
    start = copy.deepcopy(continual.model.state_dict())
    learn(continual, x)
    learned = continual(x, 0).detach()
    assert not torch.equal(learned, continual.model(x))
    continual.next_task()
    assert torch.equal(continual(x, 1), learned), "the next set starts as a copy of the last"
    for _ in range(2):
        learn(continual, task(int(continual.task)))
        assert torch.equal(continual(x, 0), learned)
        if int(continual.task) < 2:
            continual.next_task()
    assert all(torch.equal(v, start[k]) for k, v in continual.model.state_dict().items())
    with pytest.raises(ValueError, match="made for 3 tasks, and all have begun"):
        continual.next_task()


def test_layernorm_tuning_cl_chooses_each_examples_set_by_its_nearest_key(continual):
    for t in range(3):
        learn(continual, task(t))
        if t < 2:
            continual.next_task()
    mixed = torch.cat([task(t, 4) for t in (2, 0, 1)])
    q, keys = continual.model(mixed), torch.stack([*continual.keys])
    cosine = torch.tensor([[(a @ k / a.norm() / k.norm()).item() for k in keys] for a in q])
    assert torch.equal(continual.choose(mixed), cosine.argmax(1))
    assert continual.choose(mixed).tolist() == [2] * 4 + [0] * 4 + [1] * 4
    y = continual(mixed)
    for i, t in ((0, 2), (4, 0), (8, 1)):
        torch.testing.assert_close(y[i : i + 4], continual(mixed[i : i + 4], t))


def test_layernorm_tuning_cl_looks_at_the_tasks_begun_and_moves_the_current_key_alone(continual):
    assert (continual.choose(torch.cat([task(0), task(1)])) == 0).all()
    continual.next_task()
    x = task(1)
    loss = continual.key_loss(x)
    q = continual.model(x)
    k = continual.keys[1]
    assert loss.item() == pytest.approx(-sum((a @ k / a.norm() / k.norm()).item() for a in q) / len(q))
    loss.backward()
    assert [n for n, p in continual.named_parameters() if p.grad is not None] == ["keys.1"]
