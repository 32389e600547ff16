"""What the papers say of the statistics of batch norms: recomputed, mixed, unmixed, balanced, adapted."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude import norms, rules

D = torch.float64


def net(dropout=0.0):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
        nn.Flatten(), nn.Linear(20, 3),
    ).double()  # fmt: skip
    for m in (model[1], model[5]):
        nn.init.normal_(m.weight, 1, 0.2)
        nn.init.normal_(m.bias)
    for _ in range(3):
        model(torch.randn(8, 2, 6, 6, dtype=D))
    return model.eval()


torch.manual_seed(0)
X = torch.randn(6, 2, 6, 6, dtype=D) * 2 + 1


def one(features=2, momentum=0.1):
    """A model of one batch norm that has learned something."""
    model = nn.Sequential(nn.BatchNorm2d(features, momentum=momentum)).double()
    model[0].running_mean.copy_(torch.linspace(-0.5, 0.7, features))
    model[0].running_var.copy_(torch.linspace(0.4, 2.0, features))
    return model.eval()


# -- Tent -------------------------------------------------------------------------------------------------------------


def official(model):
    """The authors' configuration: train mode, no running statistics, gradients of the batch norms alone."""
    model.train().requires_grad_(False)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(True)
            m.track_running_stats, m.running_mean, m.running_var = False, None, None
    return model


def test_tent_adapts_as_the_authors_configuration_does_step_by_step():
    theirs, ours = official(net()), net()
    assert norms.calibrate(ours, norms.tent()) == ["1", "5"]
    opts = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (theirs, ours)]
    for step in range(3):
        logits = [m(X + step) for m in (theirs, ours)]
        torch.testing.assert_close(*logits)
        losses = [-(logits[0].softmax(1) * logits[0].log_softmax(1)).sum(1).mean(), norms.entropy(logits[1]).mean()]
        for opt, loss in zip(opts, losses, strict=True):
            opt.zero_grad()
            loss.backward()
            opt.step()


def test_tent_trains_only_weight_and_bias_of_the_norms_and_lowers_the_entropy():
    model = net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    norms.calibrate(model, norms.tent())
    opt = rules.optimizer(model, rules.adamw(lr=1e-2, weight_decay=0.0))
    seen = []
    for _ in range(5):
        opt.zero_grad()
        loss = norms.entropy(model(X)).mean()
        loss.backward()
        opt.step()
        seen.append(loss.item())
    assert seen == sorted(seen, reverse=True)
    del opt
    norms.restore(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"1.weight", "1.bias", "5.weight", "5.bias"}
    assert all(p.requires_grad for p in model.parameters())


def test_tent_leaves_dropout_and_running_statistics_alone():
    model = net(dropout=0.5)
    want = copy.deepcopy(model.state_dict())
    norms.calibrate(model, norms.tent())
    assert torch.equal(model(X), model(X))
    norms.restore(model)
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


def test_tent_entropy_is_that_of_the_predicted_distribution():
    logits = torch.randn(4, 3, dtype=D)
    torch.testing.assert_close(norms.entropy(logits), torch.distributions.Categorical(logits=logits).entropy())
    assert norms.entropy(torch.tensor([[1e4, 0.0, -1e4]])).item() == 0


# -- alpha-BN ---------------------------------------------------------------------------------------------------------


def test_alpha_bn_goes_from_eval_to_the_statistics_of_the_batch():
    model = net()
    source, batch = model(X), copy.deepcopy(model).train()(X)
    for weight, want in ((1.0, source), (0.0, batch)):
        norms.calibrate(model, norms.alpha_bn(weight))
        torch.testing.assert_close(model(X), want)
        norms.restore(model)


def test_alpha_bn_mixes_means_and_variances():
    model = one()
    m, x = model[0], X
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    want = F.batch_norm(x, 0.7 * m.running_mean + 0.3 * mean, 0.7 * m.running_var + 0.3 * var, m.weight, m.bias)
    norms.calibrate(model, norms.alpha_bn(source_weight=0.7))
    torch.testing.assert_close(model(x), want)
    with pytest.raises(ValueError, match=r"source_weight lies in \[0, 1\], got 1.5"):
        norms.alpha_bn(1.5)


# -- UnMix-TNS --------------------------------------------------------------------------------------------------------


def test_unmix_tns_by_loops_over_examples_and_components():
    """Two passes, so that what the first leaves behind is seen by the second."""
    model = one()
    norms.calibrate(model, norms.unmix_tns(components=3, temperature=0.5, momentum=0.2, batch_size=12))
    layer = model[0]
    means, variances = layer.source.mean.tolist(), layer.source.var.tolist()
    rate = 1 - 0.8 ** (6 / 12)
    for shift in (0.0, 1.0):
        x = X + shift
        y = model(x)
        moved_mean = [[0.0] * 2 for _ in range(3)]
        moved_var = [[0.0] * 2 for _ in range(3)]
        for b in range(6):
            mu = [x[b, c].mean().item() for c in range(2)]
            var = [x[b, c].var(unbiased=False).item() for c in range(2)]
            near = [math.exp((mu[0] * m[0] + mu[1] * m[1]) / math.hypot(*mu) / math.hypot(*m) / 0.5) for m in means]
            p = [v / sum(near) for v in near]
            for c in range(2):
                ms = [(1 - p[k]) * means[k][c] + p[k] * mu[c] for k in range(3)]
                vs = [(1 - p[k]) * variances[k][c] + p[k] * var[c] for k in range(3)]
                mean = sum(ms) / 3
                total = sum(vs) / 3 + sum(m * m for m in ms) / 3 - mean * mean
                torch.testing.assert_close(y[b, c], (x[b, c] - mean) / math.sqrt(total + 1e-5))
                for k in range(3):
                    moved_mean[k][c] += rate * p[k] * (mu[c] - means[k][c]) / 6
                    moved_var[k][c] += rate * p[k] * (var[c] - variances[k][c]) / 6
        means = [[m + d for m, d in zip(*pair, strict=True)] for pair in zip(means, moved_mean, strict=True)]
        variances = [[v + d for v, d in zip(*pair, strict=True)] for pair in zip(variances, moved_var, strict=True)]


@pytest.mark.parametrize("components", [2, 5])
def test_unmix_tns_starts_as_a_mixture_with_the_mean_and_variance_of_the_source(components):
    """In expectation, here over the channels."""
    torch.manual_seed(0)
    model = one(20_000)
    model[0].running_var.fill_(2.0)
    norms.calibrate(model, norms.unmix_tns(components, alpha=0.3))
    source, norm = model[0].source, model[0].norm
    assert torch.equal(source.var, torch.full_like(source.var, 0.7 * 2.0))
    assert (source.mean - norm.running_mean).mean().item() == pytest.approx(0, abs=0.03)
    mixture = source.var.mean(0) + source.mean.var(0, unbiased=False)
    assert mixture.mean().item() == pytest.approx(2.0, abs=0.03)


def test_unmix_tns_of_one_component_is_instance_norm():
    model = one()
    norms.calibrate(model, norms.unmix_tns(components=1))
    torch.testing.assert_close(model[0].source.mean[0], model[0].norm.running_mean)
    torch.testing.assert_close(model(X), F.instance_norm(X))


def test_unmix_tns_of_an_example_does_not_depend_on_its_batch():
    model = one()
    norms.calibrate(model, norms.unmix_tns())
    alone = copy.deepcopy(model)(X[2:3])
    torch.testing.assert_close(model(X)[2:3], alone)


def test_unmix_tns_keeps_the_source_statistics_where_there_are_no_positions():
    model = nn.Sequential(nn.BatchNorm1d(2)).double().eval()
    model[0].running_mean.fill_(3.0)
    x = torch.randn(4, 2, dtype=D)
    want = model(x)
    norms.calibrate(model, norms.unmix_tns())
    torch.testing.assert_close(model(x), want)


# -- AdaB²N -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa, momentum", [(1.0, 0.1), (0.0, None)])
def test_adab2n_runs_from_the_mean_of_all_batches_to_batch_norms_momentum(kappa, momentum):
    ours, theirs = one(), nn.BatchNorm2d(2, momentum=momentum).double()
    theirs.load_state_dict(ours[0].state_dict())
    norms.calibrate(ours, norms.adab2n(tasks=2, kappa=kappa))
    ours.train()
    norms.tell_tasks(ours, torch.zeros(6, dtype=torch.int64))
    for step in range(4):
        torch.testing.assert_close(ours(X * step), theirs(X * step))  # one task: a plain batch norm
    norm = ours[0].norm
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    n = X.numel() / 2
    last = 0.9**4 if momentum else 0.0  # what is left of the start, which is no sample variance
    start = torch.linspace(0.4, 2.0, 2).double()
    torch.testing.assert_close(norm.running_var - last * start, (theirs.running_var - last * start) * (n - 1) / n)
    torch.testing.assert_close(ours.eval()(X), F.batch_norm(X, norm.running_mean, norm.running_var))


def test_adab2n_momentum_between_the_ends_by_the_recursion_of_its_paper():
    model, m, kappa = one(), 0.1, 0.4
    norms.calibrate(model, norms.adab2n(tasks=1, kappa=kappa))
    norms.tell_tasks(model.train(), torch.zeros(6, dtype=torch.int64))
    eta, want = None, model[0].norm.running_mean.clone()
    for step in range(3):
        eta = m**kappa if eta is None else eta / (eta + (1 - m) ** kappa)
        want += eta * ((X + step).mean((0, 2, 3)) - want)
        model(X + step)
        torch.testing.assert_close(model[0].norm.running_mean, want)


def test_adab2n_balances_the_tasks_of_a_batch():
    """Five examples of task 0, one of task 2, none of task 1."""
    model = one()
    norms.calibrate(model, norms.adab2n(tasks=3))
    w = model[0].source.weight
    w.data = torch.tensor([0.5, 9.0, 2.0], dtype=D)
    norms.tell_tasks(model.train(), torch.tensor([0, 0, 2, 0, 0, 0]))
    p = [math.exp(0.5) + 5, math.exp(2.0) + 1]
    share = [p[0] / sum(p) / 5] * 6
    share[2] = p[1] / sum(p)
    means = X.mean((2, 3))
    mean = sum(s * v for s, v in zip(share, means, strict=True))
    var = sum(s * (x - mean.view(2, 1, 1)).square().mean((1, 2)) for s, x in zip(share, X, strict=True))
    y = model(X)
    torch.testing.assert_close(y, F.batch_norm(X, mean, var))
    norm = model[0].norm
    want = (mean - norm.running_mean).square().mean() + (var - norm.running_var).square().mean()
    torch.testing.assert_close(norms.drift(model), want)
    (grad,) = torch.autograd.grad(norms.drift(model), w)
    assert (grad != 0).tolist() == [True, False, True]


def test_adab2n_is_nearer_to_all_tasks_than_batch_norm_when_old_ones_are_rare():
    torch.manual_seed(0)
    old, new = torch.randn(2, 400, 2, 3, 3, dtype=D) + torch.tensor([-2.0, 2.0], dtype=D).view(2, 1, 1, 1, 1)
    ours, theirs = one(), one()
    norms.calibrate(ours, norms.adab2n(tasks=2, kappa=0.5))
    ours[0].source.weight.data.fill_(8.0)
    norms.tell_tasks(ours.train(), torch.tensor([0] * 2 + [1] * 18))
    for i in range(20):
        batch = torch.cat([old[2 * i : 2 * i + 2], new[18 * i : 18 * i + 18]])
        ours(batch)
        theirs.train()(batch)
    pooled = torch.cat([old, new]).mean((0, 2, 3))
    far = [(m.running_mean - pooled).abs().max() for m in (ours[0].norm, theirs[0])]
    assert far[0] < 0.2 < 1 < far[1]


def test_adab2n_asks_for_the_tasks_and_for_a_pass_before_its_drift():
    model = one()
    with pytest.raises(ValueError, match="no adab2n layer in Sequential"):
        norms.tell_tasks(model, torch.zeros(6))
    norms.calibrate(model, norms.adab2n(tasks=2))
    with pytest.raises(ValueError, match="there was none"):
        norms.drift(model)
    with pytest.raises(ValueError, match="tasks of the 6 examples first; got none"):
        model.train()(X)
    norms.tell_tasks(model, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="got 2"):
        model(X)


# -- PreciseBN and AdaBN ----------------------------------------------------------------------------------------------

UNEQUAL = [X[:1], X[1:4] * 3, X[4:] - 5]


def test_precise_bn_pools_batches_of_any_size_as_if_they_were_one():
    model = one()
    norms.precise_bn(model, ((x, "a target") for x in UNEQUAL))
    var, mean = torch.var_mean(torch.cat(UNEQUAL), (0, 2, 3), correction=0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)


def test_precise_bn_has_the_means_of_torchs_update_bn_and_its_variances_within_batches():
    batches = [X[:3], X[3:] + 2]
    ours, theirs = net(), net()
    norms.precise_bn(ours, batches)
    torch.optim.swa_utils.update_bn(batches, theirs)
    for a, b in ((ours[1], theirs[1]), (ours[5], theirs[5])):
        torch.testing.assert_close(a.running_mean, b.running_mean)
    x = [ours[0](batch) for batch in batches]
    between = torch.stack([v.mean((0, 2, 3)) for v in x]).var(0, unbiased=False)
    n = x[0].numel() / 4
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var * (n - 1) / n + between)


def test_precise_bn_leaves_modes_and_drops_nothing_out_and_gives_the_old_statistics_back():
    model = net(dropout=0.5).train()
    model[5].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    old = norms.precise_bn(model, [X])
    assert [m.training for m in model.modules()] == modes
    first = {k: v.clone() for k, v in model.state_dict().items()}
    norms.precise_bn(model, [X])
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    model.load_state_dict(old, strict=False)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_adabn_is_the_whole_target_set_at_once_however_it_is_cut():
    whole, target = net(), torch.cat(UNEQUAL)
    want = copy.deepcopy(whole).train()(target)
    for batches in ([target], UNEQUAL, [*target[:, None]]):
        model = net()
        norms.adabn(model, batches)
        torch.testing.assert_close(model.eval()(target), want)


def test_adabn_standardises_every_layer_on_the_target():
    model, seen = net(), []
    norms.adabn(model, UNEQUAL)
    for m in (model[1], model[5]):
        m.register_forward_hook(lambda m, _, y: seen.append((y - m.bias.view(-1, 1, 1)) / m.weight.view(-1, 1, 1)))
    model(torch.cat(UNEQUAL))
    for y in seen:
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(y.shape[1], dtype=D), rtol=0, atol=1e-12)
        torch.testing.assert_close(y.var((0, 2, 3), unbiased=False), torch.ones(y.shape[1], dtype=D), rtol=1e-3, atol=0)


def test_adabn_undoes_a_shift_and_scale_of_the_target_domain():
    model = net()
    norms.adabn(model, [X])
    want = model(X)
    model[0].bias.data.zero_()
    norms.adabn(model, [3 * X])
    torch.testing.assert_close(model(3 * X), want, rtol=1e-3, atol=1e-3)


def test_adabn_refuses_an_iterator_no_batches_and_a_shared_layer():
    with pytest.raises(TypeError, match="no iterator"):
        norms.adabn(net(), iter([X]))
    for recompute in (norms.precise_bn, norms.adabn):
        with pytest.raises(ValueError, match="no batches"):
            recompute(net(), [])
    bn = nn.BatchNorm2d(2)
    with pytest.raises(ValueError, match="2 is called more than once"):
        norms.adabn(nn.Sequential(bn, nn.ReLU(), bn).double(), [X])
