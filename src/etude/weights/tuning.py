"""Tuning that leaves all weights frozen but the scales and shifts of norms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from etude._held import refuse_if_held
from etude._method import method
from etude._roles import roles
from etude.weights._host import weights_of


def _is_batch_norm(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.batchnorm._BatchNorm) or getattr(m, "pattern", None) == "b c ... -> c"


def _is_token_norm(m: nn.Module) -> bool:
    """A layer norm or an RMS norm: torch's, etude's, or one of a library of models."""
    return type(m).__name__.endswith(("LayerNorm", "RMSNorm")) or getattr(m, "pattern", None) == "... d -> ..."


def token_norms(model: nn.Module) -> list[nn.Module]:
    """Those that have something to train; none is an error."""
    found = [m for m in model.modules() if _is_token_norm(m) and any(True for _ in m.parameters(recurse=False))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer norm or RMS norm with a scale or shift")
    return found


def _train_only(model: nn.Module, modules: Iterable[nn.Module], what: str) -> nn.Module:
    trained = {id(p) for m in modules for p in m.parameters(recurse=False)}
    refuse_if_held([p for p in model.parameters() if p.requires_grad and id(p) not in trained], what)
    for weight in weights_of(model):
        if weight.chain:
            weight.chain.trains = False
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    return model


@method(
    "Frankle et al. 2020, Training BatchNorm and Only BatchNorm: On the Expressive Power of Random Features in CNNs, "
    "arXiv:2003.00152"
)
def bn_only(model: nn.Module, redraw: bool = True, head: bool = False) -> nn.Module:
    """Only γ and β of the batch norms train, 2 per channel; all other weights keep the values of their initialisation.

    ``redraw``: γ ~ U(0, 1) and β = 0 first, as the paper has it, on convolutions of He's initialisation; False for a
    trained model. ``head``: the output layer trains too. Running statistics go on moving. A model without batch norm
    is an error.
    """
    norms = [m for m in model.modules() if _is_batch_norm(m) and isinstance(m.weight, nn.Parameter)]
    if not norms:
        raise ValueError(f"bn_only trains batch norms, and {type(model).__name__} has none with a scale")
    heads = {n.rpartition(".")[0] for n, role in roles(model).items() if role == "head"} if head else set()
    if head and not heads:
        raise ValueError(f"bn_only: no output layer is to be told in {type(model).__name__}; leave head=False")
    _train_only(model, [*norms, *map(model.get_submodule, heads)], "weights.bn_only")
    for m in norms if redraw else []:
        nn.init.uniform_(m.get_parameter("weight"))
        if isinstance(m.bias, nn.Parameter):
            nn.init.zeros_(m.bias)
    return model


@method(
    "Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv:2312.11420"
)
def layernorm_tuning(model: nn.Module) -> nn.Module:
    """Only the scales and shifts of layer norms and RMS norms train; a model without any is an error."""
    return _train_only(model, token_norms(model), "weights.layernorm_tuning")


class TaskNorms(nn.Module):
    """A frozen model with a set of norm parameters per task, and keys [tasks, d] by which an example finds its set."""

    task: Tensor  # the one that trains; those after it have not begun

    def __init__(self, model: nn.Module, d: int, tasks: int):
        super().__init__()
        if tasks < 1:
            raise ValueError(f"layernorm_tuning_cl needs tasks of at least 1, got {tasks}")
        own = {id(p) for m in token_norms(model) for p in m.parameters(recurse=False)}
        self.names = [n for n, p in model.named_parameters() if id(p) in own]
        start = [model.get_parameter(n).detach() for n in self.names]
        self.model = model.requires_grad_(False)
        keys = nn.init.orthogonal_(start[0].new_empty(tasks, d))
        self.keys = nn.ParameterList(keys.unbind())
        self.sets = nn.ModuleList(nn.ParameterList(p.clone() for p in start) for _ in range(tasks))
        self.register_buffer("task", torch.tensor(0))
        self._train_current()

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """The features of x: [b, …] by the set of ``task``, or each by that of its own nearest key."""
        if task is not None:
            return self._by(x, task)
        tasks = self.choose(x)
        parts = {t: tasks == t for t in sorted(set(tasks.tolist()))}
        some = {t: self._by(x[rows], t) for t, rows in parts.items()}
        first = next(iter(some.values()))
        y = first.new_empty(len(x), *first.shape[1:])
        for t, rows in parts.items():
            y = y.masked_scatter(rows.view(-1, *[1] * (y.ndim - 1)), some[t])
        return y

    def query(self, x: Tensor) -> Tensor:
        """The features of x by the frozen model, its own norms included.  [b, d]"""
        with torch.no_grad():
            q: Tensor = self.model(x)
        return q

    def choose(self, x: Tensor) -> Tensor:
        """The task begun so far whose key has the largest cosine with the query.  [b]"""
        keys = torch.stack([*self.keys][: int(self.task) + 1])
        return F.cosine_similarity(self.query(x)[:, None], keys, dim=-1).argmax(1)

    def key_loss(self, x: Tensor) -> Tensor:
        """−mean cosine of the queries with the current task's key; of the tasks before, none is touched."""
        return -F.cosine_similarity(self.query(x), self.keys[int(self.task)], dim=-1).mean()

    @torch.no_grad()
    def next_task(self) -> None:
        """The current set stays as it is from now on; the next task's starts as a copy of it."""
        t = int(self.task)
        if t + 1 == len(self.sets):
            raise ValueError(f"layernorm_tuning_cl was made for {t + 1} tasks, and all have begun")
        for old, new in zip(self.sets[t].parameters(), self.sets[t + 1].parameters(), strict=True):
            new.copy_(old)
        self.task += 1
        self._train_current()

    def _train_current(self) -> None:
        for t, (key, norms) in enumerate(zip(self.keys, self.sets)):
            for p in (key, *norms.parameters()):
                p.requires_grad_(t == int(self.task))

    def _by(self, x: Tensor, task: int) -> Tensor:
        theta: dict[str, Tensor] = dict(zip(self.names, self.sets[task].parameters(), strict=True))
        y: Tensor = functional_call(self.model, theta, (x,))
        return y


@method(
    "De Min et al. 2023, On the Effectiveness of LayerNorm Tuning for Continual Learning in Vision Transformers, "
    "arXiv:2308.09610"
)
def layernorm_tuning_cl(model: nn.Module, d: int, tasks: int = 10) -> TaskNorms:
    """A set of layer-norm scales and shifts per task on a frozen model, and a key per task: argmax cos(query, key).

    ``model``: x → features [b, d], without the head. For each task, train ``keys`` by ``key_loss(x)``, then the current
    set through ``forward(x, task)`` and a head whose logits of other tasks' classes are masked, then
    ``next_task()``, which wants a new optimizer. The authors' second stage freezes all and trains the head on
    ``forward(x)``, whose sets are chosen by key, so that the head learns to bear wrong choices; until then the first
    stage's head is thrown away. Earlier sets keep their bits. Keys are drawn orthogonal.
    """
    return TaskNorms(model, d, tasks)
