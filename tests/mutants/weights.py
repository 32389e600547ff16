"""Mutants of weights."""

from _mutant import Mutant

MUTANTS = [
    Mutant("weights/direction.py", "return v * (g / self._norm(v))", "return v * g / self._norm(v.detach())", "papers/test_weights_direction.py"),
    Mutant("weights/direction.py", "(w - mean) * (var", "(w - mean.detach()) * (var", "papers/test_weights_direction.py"),
    Mutant("weights/low_rank.py", "self.r, self.scale = r, alpha / r", "self.r, self.scale = r, alpha", "papers/test_weights_low_rank.py"),
    Mutant("weights/_map.py", "inside = bias if all(m.additive for m in above) else None", "inside = bias", "laws/test_weights.py"),
    Mutant("weights/_map.py", "w = self.eval().make(maps)", "w = self.make(maps)", "laws/test_weights.py"),
]  # fmt: skip
