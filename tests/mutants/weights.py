"""Mutants of weights."""

from _mutant import Mutant

MUTANTS = [
    Mutant("weights/direction.py", "return v * (g / _length(v, self.axis))", "return v * (g / _length(v.detach(), self.axis))", "papers/test_weights_direction.py"),
    Mutant("weights/direction.py", "(w - mean) * (var", "(w - mean.detach()) * (var", "papers/test_weights_direction.py"),
    Mutant("weights/low_rank.py", "* birth.takes}\")\n        self.r, self.scale, self.birth = r, alpha / r, birth", "* birth.takes}\")\n        self.r, self.scale, self.birth = r, alpha, birth", "papers/test_weights_low_rank.py"),
    Mutant("weights/_map.py", "inside = bias if all(m.additive for m in above) else None", "inside = bias", "laws/test_weights.py"),
    Mutant("weights/_map.py", "w = self.eval().make(maps)", "w = self.make(maps)", "laws/test_weights.py"),
    Mutant("weights/births.py", "root = (s / scale).sqrt()", "root = s.sqrt()", "papers/test_weights_births.py"),
    Mutant("weights/low_rank.py", "torch.cat([self.B, -self.B0], 1)", "torch.cat([self.B, self.B0], 1)", "papers/test_weights_births.py laws/test_weights_files.py"),
    Mutant("weights/births.py", "v[part] @ inverse, scale)", "v[part] @ moment, scale)", "papers/test_weights_births.py"),
    Mutant("weights/_quantize.py", "(unit * 127).round()", "(unit * 127).trunc()", "laws/test_weights_files.py laws/test_weights.py"),
    Mutant("weights/_formats.py", "m.k + 2", "m.k + 1", "laws/test_weights_files.py"),
    Mutant("weights/scaling.py", "torch.linalg.vector_norm(v.detach(), dim=1)", "torch.linalg.vector_norm(v, dim=1)", "papers/test_weights_scaling.py"),
    Mutant("weights/hadamard.py", '"iajb,ibc->iajc"', '"iajb,icb->iajc"', "papers/test_weights_hadamard.py"),
    Mutant("weights/elastic.py", "(now - mean[k]).abs()", "now", "papers/test_weights_elastic.py"),
    Mutant("weights/chain.py", "return ga + x @ a, gb - b @ x", "return ga - x @ a, gb + b @ x", "papers/test_weights_chain.py"),
    Mutant("_linalg.py", "gram.triu(1) + 0.5 *", "gram.tril(-1) + 0.5 *", "papers/test_weights_orthogonal.py"),
    Mutant("weights/rotations.py", "Butterfly(r[i], 2**i)", "Butterfly(r[i], 1)", "papers/test_weights_rotations.py"),
    Mutant("weights/givens.py", "Product((q, Scale(self.s)))", "Product((Scale(self.s), q))", "papers/test_weights_givens.py"),
    Mutant("weights/structured.py", "return into / self.m1 / 2, into", "return into / self.m1, into", "papers/test_weights_structured.py"),
    Mutant("weights/direction.py", "return w * (gamma / sigma)", "return w * (gamma / sigma.detach())", "papers/test_weights_direction.py"),
    Mutant("weights/mask.py", "(sum(sizes) + self.whole) - self.whole", "(sum(sizes) + self.whole)", "papers/test_weights_mask.py"),
    Mutant("weights/basis.py", "torch.stack([watch.right for watch in kind]).sum(0)", "kind[0].right", "papers/test_weights_basis.py"),
    Mutant("weights/tweak.py", "i / len(blocks)", "(i + 1) / len(blocks)", "papers/test_weights_tweak.py"),
]  # fmt: skip
