"""Plants one bug at a time and demands that the named tests see it: `python tests/mutants.py [words to select by]`.

Each mutant is an edit of one place. A mutant that survives shows a hole in the tests, and so does a test that fails
without any.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKERS = 2


@dataclass(frozen=True)
class Mutant:
    """``old``, found exactly once in src/etude/``file``, becomes ``new``; ``tests``, under tests/, must fail."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # the spine: the tie to the paper, the catalogue, the commands
    Mutant("_method.py", "_CITATION.fullmatch(citation)", "_CITATION.match(citation)", "test_method.py"),
    Mutant("_method.py", "bound.apply_defaults()", "pass", "test_method.py"),
    Mutant("_method.py", "stamped.name != self.name", "True", "test_method.py"),
    Mutant("_method.py", "m.name == name and m.fn is of", "m.name == name", "test_method.py"),
    Mutant("_method.py", "_METHODS.values() if m.room in ROOMS]", "_METHODS.values()]", "test_method.py"),
    Mutant("catalogue/_tests.py", "key=len, reverse=True", "key=len", "test_catalogue.py::test_a_test_goes_to_the_longest_name"),
    Mutant("catalogue/_tests.py", 'f"test_{name}_"', 'f"test_{name}"', "test_catalogue.py::test_a_test_goes_to_the_longest_name"),
    Mutant("catalogue/_records.py", "fork_rng(devices=[])", "fork_rng(enabled=False)", "test_catalogue.py::test_reading_the_catalogue_draws_no_random_numbers"),
    Mutant("catalogue/_records.py", "k not in defaults or not", "k in defaults and not", "test_catalogue.py::test_a_value_is_told_by_what_is_not_at_its_default"),
    Mutant("catalogue/_find.py", "len(among) / max(1, ", "len(among) * max(1, ", "test_catalogue.py::test_rare_words_weigh_more"),
    Mutant("catalogue/_find.py", "key=lambda i: -scores[i]", "key=lambda i: scores[i]", "test_catalogue.py::test_rare_words_weigh_more"),
    Mutant("_commands.py", "        return 2\n", "        return 1\n", "test_cli.py::test_bad_input_is_one_line_and_writes_nothing"),
    Mutant("cli.py", "        sys.stdout.flush()\n", "", "test_cli.py::test_a_reader_that_leaves_early_is_no_error"),
    # init
    Mutant("init/identity.py", "(m - 1).bit_length() / 2)", "(m - 1).bit_length() // 2)", "papers/test_init_identity.py"),
    Mutant("init/identity.py", "k // 2)", "(k - 1) // 2)", "papers/test_init_identity.py"),
    # weights
    Mutant("weights/direction.py", "return v * (g / self._norm(v))", "return v * g / self._norm(v.detach())", "papers/test_weights_direction.py"),
    Mutant("weights/direction.py", "(w - mean) * (var", "(w - mean.detach()) * (var", "papers/test_weights_direction.py"),
    Mutant("weights/low_rank.py", "self.r, self.scale = r, alpha / r", "self.r, self.scale = r, alpha", "papers/test_weights_low_rank.py"),
    Mutant("weights/_map.py", "inside = bias if all(m.additive for m in above) else None", "inside = bias", "laws/test_weights.py"),
    Mutant("weights/_map.py", "w = self.eval().make(maps)", "w = self.make(maps)", "laws/test_weights.py"),
    # norms
    Mutant("norms/_kernels.py", "q.mul_(4 * a * u)", "q.mul_(2 * a * u)", "laws/test_norms.py papers/test_norms_elementwise.py"),
    Mutant("norms/_kernels.py", ".view(r.shape).mul_(r).div_(d)", ".view(r.shape).div_(d)", "laws/test_norms.py papers/test_norms_named.py"),
    Mutant("norms/_norm.py", "(n / (n - 1) if self.center else 1.0)", "1.0", "laws/test_norms.py"),
    Mutant("norms/_swap.py", "m.activation_relu_or_gelu = 0", "pass", "laws/test_norms.py"),
    Mutant("norms/named.py", '"b (g c) ... -> b g"', '"b (c g) ... -> b g"', "papers/test_norms_named.py"),
    # blocks
    Mutant("blocks/residual.py", "return self.norm_sum(x + y)", "return x + self.norm_sum(y)", "papers/test_blocks_residual.py"),
    Mutant("blocks/attention.py", "F.normalize(k, dim=-1)", "F.normalize(k, dim=-2)", "papers/test_blocks_attention.py"),
    # losses
    Mutant("losses/classify.py", "/ (logits.shape[-1] - 1)", "/ logits.shape[-1]", "papers/test_losses_classify.py"),
    Mutant("losses/classify.py", "torch.log_softmax(logits, -1)", "torch.log_softmax(logits, 0)", "papers/test_losses_classify.py"),
    # risks
    Mutant("risks/robust.py", "self.step_size * loss.detach()", "self.step_size * loss", "papers/test_risks_robust.py laws/test_risks.py"),
    Mutant("risks/robust.py", "adjustment / math.sqrt(n)", "adjustment / n", "papers/test_risks_robust.py"),
    Mutant("risks/robust.py", "count.clamp(min=1)", "count", "papers/test_risks_robust.py laws/test_risks.py"),
    # penalties
    Mutant("penalties/weights.py", "w.flatten(1), dim=1", "w.flatten(1), dim=0", "papers/test_penalties_weights.py"),
    Mutant("penalties/weights.py", ".square().sum()", ".square().mean()", "papers/test_penalties_weights.py"),
    # gradients
    Mutant("gradients/sharpness.py", "x.copy_(old)", "x.sub_(x - old)", "papers/test_gradients_sharpness.py laws/test_gradients.py"),
    Mutant("gradients/sharpness.py", "w.add_(g * scale.to(w.device))", "w.add_(g * (rho / g.norm()))", "papers/test_gradients_sharpness.py"),
    Mutant("gradients/sharpness.py", "            _rewind(generators)", "            pass", "papers/test_gradients_sharpness.py"),
    Mutant("gradients/_gradient.py", "return loss.detach(), ", "return loss, ", "laws/test_gradients.py"),
    # rules
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
    # schedules
    Mutant("schedules/_schedule.py", "self.second(t - self.first.length)", "self.second(t)", "laws/test_schedules.py"),
    Mutant("schedules/decay.py", "span * self.t_mult", "span + self.t_mult", "papers/test_schedules_decay.py"),
    # after
    Mutant("after/average.py", "torch.promote_types(w.dtype, torch.float32)", "w.dtype", "papers/test_after_average.py"),
    Mutant("after/average.py", "1 / (cycles + 1)", "1 / (cycles + 2)", "papers/test_after_average.py"),
    Mutant("after/project.py", "joint = name + AND + offset if offset in weights else name", "joint = name", "papers/test_after_project.py"),
    # probes
    Mutant("probes/signal.py", "(w - kept).norm() / kept.norm()", "(w - kept).norm() / w.norm()", "papers/test_probes_signal.py"),
    # recipes
    Mutant("recipes/_recipe.py", "{**dict(found[0].knobs), **given}", "given", "test_recipes.py"),
    Mutant("recipes/_part.py", "taken[1:] if method.room in FED else taken", "taken", "test_recipes.py"),
    Mutant("step.py", "total: Tensor = risk(each, *group)", "total: Tensor = each.mean()", "test_step.py"),
    # race
    Mutant("race/task.py", "            count += len(targets)", "            count += 1", "race/test_task.py"),
    Mutant("race/loop.py", 'stream_seed(seed, "data")', 'stream_seed(0, "data")', "race/test_task.py"),
    Mutant("race/store.py", "if checksum == _checksum(key, text) else None", "if checksum else None", "race/test_store.py"),
    Mutant("race/plan.py", '+ MOST * ("tune", "final", "aa").index(stage)', '+ ("tune", "final", "aa").index(stage)', "race/test_task.py"),
    Mutant("race/_statistics.py", "worst = max(worst, min(1.0, (len(p) - rank) * p[i]))", "worst = min(1.0, (len(p) - rank) * p[i])", "race/test_verdict.py"),
    Mutant("race/_statistics.py", "special.stdtrit(len(x) - 1, (1 + level) / 2)", "special.stdtrit(len(x), (1 + level) / 2)", "race/test_verdict.py"),
    Mutant("race/verdict.py", '"under-tuned" if standing.at_edge else "worse"', '"worse"', "race/test_verdict.py"),
    Mutant("race/verdict.py", "1 - 2 * plan.alpha", "1 - plan.alpha", "race/test_verdict.py"),
    Mutant("race/report.py", "autoescape=True", "autoescape=False", "race/test_report.py"),
]  # fmt: skip


def plant(mutant: Mutant, tree: Path) -> str:
    """Edit one place; returns the text that was there."""
    file = tree / "src" / "etude" / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times, not once")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return text


def pytest(tree: Path, tests: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a copy on the sources of that copy."""
    env = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    named = [str(tree / "tests" / test) for test in tests.split()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-m",
        "not long",
        *more,
        *named,
    ]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=1200)


def copy() -> Path:
    """What the tests need, in a folder of its own."""
    tree = Path(tempfile.mkdtemp(prefix="etude-mutant-"))
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tests", "docs", "benchmarks"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tree)
    return tree


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if all(w in f"{m.file} {m.old} {m.tests}" for w in words)]
    if not chosen:
        print(f"no mutant speaks of {' '.join(words)!r}", file=sys.stderr)
        return 2
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for _ in range(WORKERS):
        trees.put(copy())
    began = time.monotonic()

    def clean(tests: str) -> str:
        tree = trees.get()
        try:
            done = pytest(tree, tests)
            return "" if done.returncode == 0 else done.stdout + done.stderr
        finally:
            trees.put(tree)

    def caught(mutant: Mutant) -> bool:
        tree = trees.get()
        whole = plant(mutant, tree)
        try:
            code = pytest(tree, mutant.tests).returncode
        finally:
            (tree / "src" / "etude" / mutant.file).write_text(whole, encoding="utf-8")
            trees.put(tree)
        said = {0: "SURVIVED", 1: "caught  ", 2: "caught  "}.get(code, f"pytest exit {code}")
        print(f"{said}  {mutant.file}: {mutant.old.strip()!r} → {mutant.new.strip()!r}  [{mutant.tests}]", flush=True)
        return code in (1, 2)

    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            broken = [said for said in pool.map(clean, sorted({m.tests for m in chosen})) if said]
            if broken:
                print("the tests fail without any mutant:", *broken, sep="\n", file=sys.stderr)
                return 1
            seen = list(pool.map(caught, chosen))
    finally:
        while not trees.empty():
            shutil.rmtree(trees.get())
    print(f"{sum(seen)} of {len(seen)} caught in {time.monotonic() - began:.0f} s")
    return 0 if all(seen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
