"""Mutants of norms."""

from _mutant import Mutant

MUTANTS = [
    Mutant("norms/_kernels.py", "q.mul_(4 * a * u)", "q.mul_(2 * a * u)", "laws/test_norms.py papers/test_norms_elementwise.py"),
    Mutant("norms/_kernels.py", ".view(r.shape).mul_(r).div_(d)", ".view(r.shape).div_(d)", "laws/test_norms.py papers/test_norms_named.py"),
    Mutant("norms/_norm.py", "(n / (n - 1) if self.center else 1.0)", "1.0", "laws/test_norms.py"),
    Mutant("norms/_swap.py", "m.activation_relu_or_gelu = 0", "pass", "laws/test_norms.py"),
    Mutant("norms/named.py", '"b (g c) ... -> b g"', '"b (c g) ... -> b g"', "papers/test_norms_named.py"),
    Mutant("norms/running.py", "new = var + a * (mean", "new = var + (mean", "papers/test_norms_running.py"),
    Mutant("norms/running.py", "torch.where(alone, recent, smooth) * z", "smooth * z", "papers/test_norms_running.py"),
    Mutant("norms/batches.py", "(values - self.running_mean[:, None]).square()", "(values - mean[:, None]).square()", "papers/test_norms_batches.py"),
    Mutant("norms/image.py", "torch.copysign(mean, signed) - mean", "torch.copysign(mean, mean) - mean", "papers/test_norms_image.py"),
    Mutant("norms/conditional.py", "rho * self.instance(x) + (1 - rho) * self.layer(x)", "rho * self.layer(x) + (1 - rho) * self.instance(x)", "papers/test_norms_conditional.py"),
    Mutant("norms/conditional.py", "align_corners=True", "align_corners=False", "papers/test_norms_conditional.py"),
    Mutant("norms/_sources.py", " + b * (1 - b) * far.square()", "", "papers/test_norms_statistics.py"),
    Mutant("norms/_sources.py", "a * k / max(1, k - 1)", "a", "papers/test_norms_statistics.py"),
    Mutant("norms/statistics.py", "old |= _pool(model, batches, name)", "old |= _pool(model, batches, None)", "papers/test_norms_statistics.py"),
    Mutant("norms/_calibrate.py", "orphan(m.source.parameters(), \"norms.restore\")", "pass", "laws/test_norms.py"),
    Mutant("norms/convert.py", "exact - exact.mean(axis, keepdim=True)", "exact - exact.mean(-1, keepdim=True)", "papers/test_norms_convert.py"),
    Mutant("norms/_fold.py", "shift - scale * m.running_mean", "shift + scale * m.running_mean", "test_fold.py"),
    Mutant("norms/gated.py", "(x * beta).reshape", "(rms(x, torch.ones_like(beta), eps) * beta).reshape", "papers/test_norms_gated.py"),
    Mutant("norms/gated.py", "rms(x * pre_weight, weight, eps)", "rms(x, weight, eps) * pre_weight", "papers/test_norms_gated.py"),
    Mutant("norms/named.py", "squares / (x.shape[-1] + 1) + eps", "squares / x.shape[-1] + eps", "papers/test_norms_named.py"),
    Mutant("norms/named.py", "math.ceil(p * d - 1e-9)", "max(1, int(p * d))", "papers/test_norms_named.py"),
    Mutant("norms/named.py", "length.clamp_min(eps)", "(length + eps)", "papers/test_norms_named.py"),
    Mutant("norms/standardize.py", "(1 - share) * delta.square()", "delta.square()", "papers/test_norms_standardize.py"),
    Mutant("norms/elementwise.py", "math.sqrt(self.features - 1)", "math.sqrt(self.features)", "papers/test_norms_elementwise.py"),
    Mutant("norms/_kernels.py", "q.mul_(a * u), torch.dot(u, qx)", "q.mul_(a), torch.dot(u, qx)", "papers/test_norms_elementwise.py"),
    Mutant("norms/gated.py", "return y * torch.sigmoid", "return 2 * y * torch.sigmoid", "papers/test_norms_gated.py"),
    Mutant("norms/standardize.py", "self.running_mean.add_(share * delta)", "self.running_mean.add_(delta)", "papers/test_norms_standardize.py"),
]  # fmt: skip
