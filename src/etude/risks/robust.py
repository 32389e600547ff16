"""Risks that protect the group that fares worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from etude._method import method
from etude.risks._risk import Risk, check


class GroupDro(Risk):
    """q_g ← q_g exp(step_size·ℓ_g)/Σ, then Σ q_g ℓ_g; the state is the buffer ``log_q``: [G], which eval() keeps."""

    log_q: Tensor
    shift: Tensor

    def __init__(self, group_counts: Sequence[int], step_size: float, adjustment: float) -> None:
        super().__init__()
        if not isinstance(group_counts, Iterable):
            raise TypeError(f"group_dro needs group_counts, a number for each group, got {group_counts!r}")
        counts = [int(n) for n in group_counts]
        if not counts or min(counts) < 1:
            raise ValueError(f"group_dro needs the number of training examples of each group (≥ 1), got {counts}")
        if not 0 <= step_size < math.inf or not 0 <= adjustment < math.inf:
            raise ValueError(f"group_dro needs finite step_size, adjustment ≥ 0, got {step_size} and {adjustment}")
        self.step_size = step_size
        self.register_buffer("log_q", torch.full((len(counts),), -math.log(len(counts))))
        self.register_buffer("shift", torch.tensor([adjustment / math.sqrt(n) for n in counts]), persistent=False)

    @property
    def q(self) -> Tensor:
        """The weight of each group, on the simplex.  [G]"""
        return self.log_q.exp()

    def forward(self, losses: Tensor, group: Tensor | None = None) -> Tensor:
        loss = self.group_means(losses, group) + self.shift
        log_q = self.log_q
        if self.training:
            log_q = torch.log_softmax(log_q + self.step_size * loss.detach(), 0)  # in logs nothing over- or underflows
            self.log_q.copy_(log_q)
        return (log_q.exp() @ loss).to(losses.dtype)

    def group_means(self, losses: Tensor, group: Tensor | None) -> Tensor:
        """The mean loss of each group, 0 where the batch holds none of it.  [n], [n] → [G]"""
        check(losses)
        groups = len(self.log_q)
        if not isinstance(group, Tensor) or group.shape != losses.shape[:1] or group.is_floating_point():
            got = f"{group.dtype} {list(group.shape)}" if isinstance(group, Tensor) else type(group).__name__
            raise ValueError(f"group_dro needs group: integers [{len(losses)}] in a tensor, one per loss; got {got}")
        wide = losses.to(torch.promote_types(losses.dtype, self.log_q.dtype))
        each = wide.reshape(len(losses), -1).mean(1)
        zero = each.new_zeros(groups)
        try:
            count = zero.index_add(0, group.long(), torch.ones_like(each))
        except IndexError as error:
            raise ValueError(f"groups must lie in 0 … {groups - 1} for {groups} group_counts") from error
        return zero.index_add(0, group.long(), each) / count.clamp(min=1)


@method(
    "Sagawa et al. 2019, Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization "
    "for Worst-Case Generalization, arXiv:1911.08731"
)
def group_dro(group_counts: Sequence[int], step_size: float = 0.01, adjustment: float = 0.0) -> GroupDro:
    """ℓ = Σ_g q_g ℓ_g with q_g ← q_g exp(step_size·ℓ_g)/Σ first, ℓ_g = the group's mean loss + adjustment/√n_g.

    For imbalanced or atypical groups and spurious correlations: the group that fares worst gets the most weight.
    ``group_counts``: n_g, the training examples of each group. A group that is absent from the batch has mean loss 0.
    The paper warns: a network that can fit everything needs strong weight decay or early stopping beside it.
    """
    return GroupDro(group_counts, step_size, adjustment)
