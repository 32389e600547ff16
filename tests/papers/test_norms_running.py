"""What the papers of the norms that remember say: their algorithms in plain floats, batch after batch."""

import math

import pytest
import torch
from torch import nn

from etude import norms

D = torch.float64


def stream(*shape, seed=0, batches=1):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=D) * (1.5 + i) + 0.7 * i - 0.4 for i in range(batches)]


def drawn(norm):
    """The norm in float64 with weight and bias of its own."""
    rng = torch.Generator().manual_seed(9)
    for p in norm.double().parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=D)
    return norm


def passed(norm, x, pulled, *rest):
    """y, dx, dweight, dbias."""
    leaf = x.clone().requires_grad_()
    y = norm(leaf, *rest)
    return y.detach(), *torch.autograd.grad(y, [leaf, norm.weight, norm.bias], pulled)


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=D), rtol=1e-10, atol=1e-11)


def mean(values):
    return sum(values) / len(values)


class OnlineBox:
    """Online Normalization for one channel, a sample at a time, in plain floats."""

    def __init__(self, alpha_fwd, alpha_bkw, eps):
        self.alpha_fwd, self.alpha_bkw, self.eps = alpha_fwd, alpha_bkw, eps
        self.mu, self.var, self.e_y, self.e_1 = 0.0, 1.0, 0.0, 0.0

    def forward(self, samples):
        self.seen = []
        for x in samples:
            s = math.sqrt(self.var + self.eps)
            self.seen.append(([(v - self.mu) / s for v in x], s))
            m = mean(x)
            own = mean([(v - m) ** 2 for v in x])
            a = self.alpha_fwd
            self.var = a * self.var + (1 - a) * own + a * (1 - a) * (m - self.mu) ** 2
            self.mu = a * self.mu + (1 - a) * m
        return [y for y, _ in self.seen]

    def backward(self, gradients):
        out, s = [], 1 - self.alpha_bkw
        for g, (y, scale) in zip(gradients, self.seen, strict=True):
            g = [gi - s * self.e_y * yi for gi, yi in zip(g, y, strict=True)]
            self.e_y += mean([gi * yi for gi, yi in zip(g, y, strict=True)])
            gx = [gi / scale - s * self.e_1 for gi in g]
            self.e_1 += mean(gx)
            out.append(gx)
        return out


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 3, 2, 3), (1, 3, 4), (5, 3)])
def test_online_norm_is_the_papers_stream_in_plain_floats(shape):
    norm = drawn(norms.online_norm(3, alpha_fwd=0.9, alpha_bkw=0.8, ecm="clamping", clamp_val=1e9))
    boxes = [OnlineBox(0.9, 0.8, 1e-5) for _ in range(3)]
    for x, pulled in zip(stream(*shape, batches=4), stream(*shape, seed=1, batches=4), strict=True):
        y, dx, dweight, dbias = passed(norm, x, pulled)
        flat, g = x.reshape(len(x), 3, -1), pulled.reshape(len(x), 3, -1)
        for c, box in enumerate(boxes):
            w, b = norm.weight[c].item(), norm.bias[c].item()
            z = torch.tensor(box.forward(flat[:, c].tolist()), dtype=D)
            close(y.reshape(flat.shape)[:, c], w * z + b)
            close(dx.reshape(flat.shape)[:, c], box.backward((g[:, c] * w).tolist()))
            close(dweight[c], (g[:, c] * z).sum())
            close(dbias[c], g[:, c].sum())
    close(norm.running_mean, [box.mu for box in boxes])
    close(norm.running_var, [box.var for box in boxes])
    close(norm.error_scale, [box.e_y for box in boxes])
    close(norm.error_mean, [box.e_1 for box in boxes])


def test_online_norm_knows_no_batches():
    """A stream cut into batches of 6, of 3 and of 1 gives the same outputs and statistics."""
    (x,) = stream(6, 3, 4)
    seen = []
    for size in (6, 3, 1):
        norm = drawn(norms.online_norm(3, alpha_fwd=0.9))
        y = torch.cat([norm(part) for part in x.split(size)])
        seen.append((y, norm.running_mean, norm.running_var))
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_online_norm_guards_by_the_rms_of_a_sample_or_by_clamping():
    (x,) = stream(6, 3, 4)
    scaled = drawn(norms.online_norm(3))(50 * x)
    torch.testing.assert_close(scaled.square().mean((1, 2)), torch.ones(6, dtype=D), rtol=0, atol=1e-5)
    free, clamped = (drawn(norms.online_norm(3, ecm="clamping", clamp_val=c))(50 * x) for c in (1e9, 2.5))
    close(clamped, free.clamp(-2.5, 2.5))
    assert (clamped.abs() == 2.5).any()
    with pytest.raises(ValueError, match='ecm must be "layer scaling" or "clamping", not \'ls\''):
        norms.online_norm(3, ecm="ls")


def test_online_norm_learns_the_moments_of_a_stationary_stream_and_uses_only_them_in_eval():
    norm = norms.online_norm(2, alpha_fwd=0.99, ecm="clamping", clamp_val=1e9).double()
    rng = torch.Generator().manual_seed(0)
    for _ in range(40):
        y = norm(3 * torch.randn(64, 2, 8, generator=rng, dtype=D) + 5)
    torch.testing.assert_close(norm.running_mean, torch.full((2,), 5.0, dtype=D), rtol=0.05, atol=0)
    torch.testing.assert_close(norm.running_var, torch.full((2,), 9.0, dtype=D), rtol=0.1, atol=0)
    assert y.mean().abs() < 0.1
    assert abs(y.var() - 1) < 0.1
    norm.eval()
    (x,) = stream(3, 2, 4)
    mu, var = norm.running_mean.clone(), norm.running_var.clone()
    close(norm(x), (x - mu[:, None]) / (var[:, None] + 1e-5).sqrt())
    assert torch.equal(norm.running_mean, mu)


def test_online_norm_gradients_become_orthogonal_to_one_and_to_the_output():
    """The control process bounds what gathers, so that the means of gx and of gx · y tend to 0."""
    rng = torch.Generator().manual_seed(0)
    norm = norms.online_norm(1, alpha_bkw=0.9, ecm="clamping", clamp_val=1e9).double()
    sums = torch.zeros(2, dtype=D)
    for _ in range(50):
        x = torch.randn(32, 1, 4, generator=rng, dtype=D)
        y, dx, _, _ = passed(norm, x, torch.ones_like(x) + 0.5 * x)
        sums += torch.stack([dx.sum(), (dx * y).sum()]) / 4
    steps = 50 * 32
    assert (sums.abs() / steps < 0.02).all()  # uncontrolled: 1 and 0.5
    assert max(norm.error_mean.abs().max(), norm.error_scale.abs().max()) < 20


class PowerBox:
    """PowerNorm for one channel in plain floats, after the scaling of tokens."""

    def __init__(self, alpha_fwd, alpha_bkw, warmup, eps):
        self.alpha_fwd, self.alpha_bkw, self.warmup, self.eps = alpha_fwd, alpha_bkw, warmup, eps
        self.psi2, self.e, self.t = 1.0, 0.0, 0

    def forward(self, tokens, counted):
        self.t += 1
        now = mean([v * v for v, c in zip(tokens, counted, strict=True) if c])
        self.root = math.sqrt((now if self.t <= self.warmup else self.psi2) + self.eps)
        if self.t < self.warmup:
            self.psi2 = self.psi2 * (self.t - 1) / self.t + now / self.t
        self.psi2 = self.alpha_fwd * self.psi2 + (1 - self.alpha_fwd) * now
        self.z = [v / self.root for v in tokens]
        return self.z

    def backward(self, g):
        g = [gi - (1 - self.alpha_bkw) * self.e * zi for gi, zi in zip(g, self.z, strict=True)]
        self.e += mean([gi * zi for gi, zi in zip(g, self.z, strict=True)])
        return [gi / self.root for gi in g]


def token_rms(x, groups, eps=1e-5):
    parts = [p / (p.square().mean(-1, keepdim=True) + eps).sqrt() for p in x.chunk(groups, -1)]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("warmup", [0, 2, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_power_norm_is_the_papers_algorithm_in_plain_floats(warmup, padded):
    norm = drawn(norms.power_norm(4, alpha_fwd=0.7, alpha_bkw=0.6, warmup_iters=warmup, groups=2))
    boxes = [PowerBox(0.7, 0.6, warmup, 1e-5) for _ in range(4)]
    padding = torch.tensor([[False, True, False], [True, False, False]])
    counted = (~padding).flatten().tolist() if padded else [True] * 6
    for x, pulled in zip(stream(2, 3, 4, batches=4), stream(2, 3, 4, seed=1, batches=4), strict=True):
        y, dx, dweight, dbias = passed(norm, x, pulled, *([padding] if padded else []))
        leaf = x.clone().requires_grad_()
        scaled = token_rms(leaf, 2)
        z, g = torch.empty(6, 4, dtype=D), torch.empty(6, 4, dtype=D)
        for c, box in enumerate(boxes):
            z[:, c] = torch.tensor(box.forward(scaled.detach().view(6, 4)[:, c].tolist(), counted), dtype=D)
            g[:, c] = torch.tensor(box.backward((pulled.view(6, 4)[:, c] * norm.weight[c]).tolist()), dtype=D)
        close(y.view(6, 4), z * norm.weight + norm.bias)
        close(dx, torch.autograd.grad(scaled, leaf, g.view_as(scaled))[0])
        close(dweight, (pulled.view(6, 4) * z).sum(0))
        close(dbias, pulled.sum((0, 1)))
    close(norm.running_square, [box.psi2 for box in boxes])


def test_power_norm_follows_the_papers_recursion_of_nu():
    """ν_t = ν_{t−1} (1 − (1 − α) Γ_t) + (1 − α) Λ_t, with Γ the mean square of z and Λ the mean of g · z."""
    norm, nu = norms.power_norm(3, warmup_iters=0).double(), torch.zeros(3, dtype=D)
    for x, pulled in zip(stream(5, 3, batches=3), stream(5, 3, seed=1, batches=3), strict=True):
        y, *_ = passed(norm, x, pulled)
        nu = nu * (1 - 0.1 * y.square().mean(0)) + 0.1 * (pulled * y).mean(0)
        close(0.1 * norm.error, nu)


def test_power_norm_divides_the_gradient_by_the_running_root_as_the_paper_says():
    norm = norms.power_norm(3, warmup_iters=0, eps=1e-12).double()
    norm.running_square.fill_(16.0)
    (x,), (pulled,) = stream(5, 3), stream(5, 3, seed=1)
    leaf = x.clone().requires_grad_()
    y, dx, _, _ = passed(norm, x, pulled)
    scaled = token_rms(leaf, 1, 1e-12)
    close(y, scaled.detach() / 4)
    close(dx, torch.autograd.grad(scaled / 4, leaf, pulled)[0])


@pytest.mark.parametrize("made", [norms.power_norm, norms.unified_norm])
def test_power_norm_and_unified_norm_fold_into_the_next_linear_in_eval(made):
    norm = drawn(made(4))
    for x in stream(6, 4, batches=3):
        norm(x)
    norm.eval()
    linear = nn.Linear(4, 3, dtype=D)
    scale = norm.weight / (norm.running_square + 1e-5).sqrt()
    (x,) = stream(6, 4, seed=5)
    inside = token_rms(x, 1) if made is norms.power_norm else x
    folded = nn.functional.linear(inside, linear.weight * scale, linear.bias + linear.weight @ norm.bias)
    close(linear(norm(x)), folded)
    close(linear(norm(x[:1])), folded[:1])


class UnifiedBox:
    """Unified Normalization of all channels in plain floats; rows are tokens."""

    def __init__(self, d, window, warmup, filtration, momentum, eps):
        self.d, self.m, self.warmup, self.filtration, self.momentum, self.eps = (
            d, window, warmup, filtration, momentum, eps,
        )  # fmt: skip
        self.t, self.fired = 0, 0
        self.running, self.ema = [1.0] * d, [0.0] * d
        self.x2s, self.gzs = [[0.0] * d for _ in range(window)], [[0.0] * d for _ in range(window)]

    def geometric(self, c):
        column = [row[c] for row in self.x2s]
        return math.prod(column) ** (1 / self.m)

    def forward(self, rows, counted):
        self.t += 1
        t, m, d = self.t, self.m, self.d
        x2 = [mean([r[c] ** 2 for r, k in zip(rows, counted, strict=True) if k]) for c in range(d)]
        self.skip = m == 1
        roots = [math.sqrt(v) for row in self.x2s for v in row]
        spread = sum((r - mean(roots)) ** 2 for r in roots) / (len(roots) - 1)
        self.x2s[t % m] = list(x2)
        if self.filtration and t >= self.warmup:
            gaps = [mean([row[c] for row in self.x2s]) - self.geometric(c) for c in range(d)]
            if any(gap > m * spread for gap in gaps):
                self.x2s[t % m], self.skip = list(self.running), True
                self.fired += 1
        self.own = t <= m or t < self.warmup or self.skip
        v = x2 if self.own else [self.geometric(c) for c in range(d)]
        self.root = [math.sqrt(vc + self.eps) for vc in v]
        self.r = [a / math.sqrt(b + self.eps) for a, b in zip(self.root, self.running, strict=True)]
        late = t > max(1000, self.warmup) and not self.skip
        self.r = [min(5.0, max(0.2, r)) if late else 1.0 for r in self.r]
        self.running = [self.momentum * b + (1 - self.momentum) * vc for b, vc in zip(self.running, v, strict=True)]
        self.z = [[r[c] / self.root[c] for c in range(d)] for r in rows]
        return self.z

    def backward(self, pulled, weight):
        t, m, d = self.t, self.m, self.d
        out = [[0.0] * d for _ in self.z]
        for c in range(d):
            g = [row[c] * weight[c] * self.r[c] for row in pulled]
            p = mean([gi * z[c] for gi, z in zip(g, self.z, strict=True)])
            self.gzs[t % m][c] = self.ema[c] if self.skip else p
            smooth = p if self.own else mean([row[c] for row in self.gzs])
            self.ema[c] = self.momentum * self.ema[c] + (1 - self.momentum) * smooth
            take = smooth if self.skip else self.ema[c]
            for i, gi in enumerate(g):
                out[i][c] = (gi - take * self.z[i][c]) / self.root[c]
        return out


def follow(norm, box, xs, pulls, padding=None):
    counted = [True] * len(xs[0]) if padding is None else (~padding).tolist()
    for x, pulled in zip(xs, pulls, strict=True):
        y, dx, dweight, dbias = passed(norm, x, pulled, *([] if padding is None else [padding]))
        z = torch.tensor(box.forward(x.tolist(), counted), dtype=D)
        close(y, z * norm.weight + norm.bias)
        close(dx, box.backward(pulled.tolist(), norm.weight.tolist()))
        close(dweight, (pulled * z).sum(0) * torch.tensor(box.r, dtype=D))
        close(dbias, pulled.sum(0))
        close(norm.running_square, box.running)


@pytest.mark.parametrize("window, warmup, filtration", [(3, 0, False), (3, 6, False), (1, 0, False), (3, 2, True)])
def test_unified_norm_is_the_authors_algorithm_in_plain_floats(window, warmup, filtration):
    norm = drawn(norms.unified_norm(4, window, warmup, filtration, momentum=0.7))
    box = UnifiedBox(4, window, warmup, filtration, 0.7, 1e-5)
    follow(norm, box, stream(6, 4, batches=8), stream(6, 4, seed=1, batches=8))
    close(norm.window, box.x2s)
    close(norm.gradients, box.gzs)


def test_unified_norm_leaves_padding_out_of_the_forward_statistics():
    norm, padding = drawn(norms.unified_norm(4, 2, 0)), torch.tensor([False, True, True, False, False, False])
    box = UnifiedBox(4, 2, 0, False, 0.9, 1e-5)
    follow(norm, box, stream(6, 4, batches=4), stream(6, 4, seed=1, batches=4), padding)


def test_unified_norm_makes_up_for_the_change_of_scale_after_a_thousand_steps():
    norm, box = drawn(norms.unified_norm(4, 2, 0, momentum=0.9)), UnifiedBox(4, 2, 0, False, 0.9, 1e-5)
    xs = stream(6, 4, batches=6)
    xs[4] = 40 * xs[4]  # r reaches its bound of 5
    norm.steps.fill_(998)
    box.t = 998
    follow(norm, box, xs, stream(6, 4, seed=1, batches=6))
    assert max(box.r) > 2.0


def test_unified_norm_filters_an_outlier_and_puts_the_running_statistic_in_its_slot():
    rng = torch.Generator().manual_seed(0)
    norm = norms.unified_norm(4, window_size=4, warmup_iters=5, outlier_filtration=True).double()
    box = UnifiedBox(4, 4, 5, True, 0.9, 1e-5)
    xs = [torch.randn(200, 4, generator=rng, dtype=D) * (1 + 0.5 * (i % 2)) for i in range(9)]
    xs[7] = 1000 * xs[7]
    pulls = [0.01 * x for x in xs]
    follow(norm, box, xs[:7], pulls[:7])
    fired, kept = box.fired, norm.running_square.clone()
    follow(norm, box, xs[7:8], pulls[7:8])
    assert box.fired == fired + 1
    close(norm.window[8 % 4], kept)
    y = norm(xs[7])
    assert y.square().mean() < 3  # by its own statistics, not by the window's


def test_unified_norm_of_a_window_of_one_is_rms_batch_norm():
    norm, plain = norms.unified_norm(4, window_size=1).double(), norms.Norm("b d -> d", 4, center=False).double()
    for x, pulled in zip(stream(6, 4, batches=3), stream(6, 4, seed=1, batches=3), strict=True):
        for one, two in zip(passed(norm, x, pulled), passed(plain, x, pulled), strict=True):
            # The authors drop eps from the projection: z · mean(g z), for z² + eps / v on average 1.
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_online_norm_and_its_kin_give_way_to_another_norm_and_take_its_place_in_a_model():
    """Found by what they are, not by a probe, which would move what they remember."""
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.ReLU()).double()
    bias = model[1].bias
    assert norms.swap(model, norms.online_norm) == ["1"]
    assert model[1].bias is bias
    with pytest.raises(ValueError, match="would change nothing"):
        norms.swap(model, norms.online_norm)
    assert torch.equal(model[1].running_mean, torch.zeros(4, dtype=D))
    assert norms.swap(model, norms.batch_norm) == ["1"]
    with pytest.raises(ValueError, match="channels on axis 1"):
        norms.swap(nn.Sequential(norms.online_norm(4)), norms.power_norm)
