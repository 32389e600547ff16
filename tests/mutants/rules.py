"""Mutants of rules."""

from _mutant import Mutant

MUTANTS = [
    Mutant("_linalg.py", "gram, gram, gram, beta=b, alpha=c", "gram, gram, gram, beta=b, alpha=b", "papers/test_rules_named.py"),
    Mutant("_linalg.py", "y.flatten(-2).norm(dim=-1)", "y.flatten(-3).norm(dim=-1)", "laws/test_rules.py"),
    Mutant("_roles.py", 'elif role == "embedding"', 'elif role == "head"', "test_rules_engine.py"),
    Mutant("rules/statistic.py", "mix_(s.exp_avg, u, c.beta2)", "mix_(s.exp_avg, u, c.beta1)", "papers/test_rules_named.py"),
    Mutant("rules/statistic.py", "m = m / c.bias if self.debias else m", "m = m", "papers/test_rules_named.py"),
    Mutant("rules/statistic.py", "mix_(s.exp_avg.clone(), u, c.beta1)", "mix_(s.exp_avg, u, c.beta1)", "papers/test_rules_named.py"),
    Mutant("rules/geometry.py", "mix_square_(s.exp_avg_sq, g, c.beta)", "mix_square_(s.exp_avg_sq, u, c.beta)", "papers/test_rules_named.py"),
    Mutant("rules/geometry.py", "0.2 * math.sqrt(max(m, n))", "0.2 * math.sqrt(min(m, n))", "papers/test_rules_named.py"),
    Mutant("rules/geometry.py", "math.sqrt(max(1, m / n))", "math.sqrt(max(1, n / m))", "papers/test_rules_named.py"),
    Mutant("rules/gate.py", "torch.add(u, w, alpha=rate) if rate else u", "torch.sub(u, w, alpha=rate) if rate else u", "papers/test_rules_named.py"),
    Mutant("rules/gate.py", "size / step, 1.0)", "step / size, 1.0)", "papers/test_rules_named.py"),
    Mutant("rules/_rule.py", "vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)", "vector_norm(x)", "laws/test_rules.py::test_a_rule_on_a_stack_equals_the_rule_on_each_member_alone"),
    Mutant("rules/_rule.py", "average.lerp_(x, 1 - beta)", "average.lerp_(x, beta)", "papers/test_rules_named.py"),
    Mutant("rules/_bucket.py", "bucket.steps[slice(None) if whole else mine] += 1", "bucket.steps += 1", "laws/test_rules.py"),
    Mutant("rules/_rounding.py", "lost = (x - rounded)", "lost = (rounded - x)", "test_rules_engine.py"),
    Mutant("rules/_rounding.py", "return torch.where(tips, torch.nextafter(lost, torch.zeros_like(lost)), lost)", "return lost", "test_rules_engine.py"),
    Mutant("_held.py", "mine and live is not but", "mine and live is but", "laws/test_weights.py"),
    Mutant("rules/_bucket.py", "if held is not m.shown or", "if", "test_rules_engine.py"),
    Mutant("rules/_bucket.py", "total.index_add_(0, torch.tensor(mine, device=device),", "total.index_add_(0, 0 * torch.tensor(mine, device=device),", "laws/test_rules.py"),
    Mutant("rules/_bucket.py", "sorted(by_count.items())", "sorted(by_count.items())[:1]", "laws/test_rules.py"),
    Mutant("rules/_rounding.py", "(key ^ (t * 0x85EBCA77))", "key", "test_rules_engine.py"),
    Mutant("rules/_engine.py", "else torch.float32 if p.dtype in LOW else p.dtype", "else p.dtype", "laws/test_rules.py"),
    Mutant("rules/_checkpoint.py", "params = [at[name] for name in mine[\"param_names\"]]", "params = list(at.values())", "test_rules_engine.py"),
    Mutant("rules/_engine.py", "v.detach().clone() if isinstance", "v.detach().to(p.dtype).clone() if isinstance", "laws/test_rules.py"),
    Mutant("rules/_optimizer.py", 'role in MATRICES', 'role == "hidden"', "test_rules_engine.py"),
]  # fmt: skip
