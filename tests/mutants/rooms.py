"""Mutants of the small rooms."""

from _mutant import Mutant

MUTANTS = [
    # init
    Mutant("init/identity.py", "(m - 1).bit_length() / 2)", "(m - 1).bit_length() // 2)", "papers/test_init_identity.py"),
    Mutant("init/identity.py", "k // 2)", "(k - 1) // 2)", "papers/test_init_identity.py"),
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
    Mutant("gradients/sharpness.py", "                    x.copy_(old)", "                    x.sub_(x - old)", "papers/test_gradients_sharpness.py laws/test_gradients.py"),
    Mutant("gradients/sharpness.py", "w.add_(g * scale.to(w.device))", "w.add_(g * (rho / g.norm()))", "papers/test_gradients_sharpness.py"),
    Mutant("gradients/sharpness.py", "            _rewind(generators)", "            pass", "papers/test_gradients_sharpness.py"),
    Mutant("gradients/_gradient.py", "return loss.detach(), ", "return loss, ", "laws/test_gradients.py"),
    Mutant("gradients/sharpness.py", "torch.stack(squares).sum(0).sqrt()", "torch.stack(squares).sum(0).sqrt().mean().expand(len(squares[0]))", "race/test_population.py"),
    # schedules
    Mutant("schedules/_schedule.py", "self.second(t - self.first.length)", "self.second(t)", "laws/test_schedules.py"),
    Mutant("schedules/decay.py", "span * self.t_mult", "span + self.t_mult", "papers/test_schedules_decay.py"),
    # after
    Mutant("after/average.py", "torch.promote_types(w.dtype, torch.float32)", "w.dtype", "papers/test_after_average.py"),
    Mutant("after/average.py", "1 / (cycles + 1)", "1 / (cycles + 2)", "papers/test_after_average.py"),
    Mutant("after/project.py", "joint = name + AND + offset if offset in weights else name", "joint = name", "papers/test_after_project.py"),
    # probes
    Mutant("probes/signal.py", "(w - kept).norm() / kept.norm()", "(w - kept).norm() / w.norm()", "papers/test_probes_signal.py"),
]  # fmt: skip
