"""Bridges of a few lines: a Lightning module, or a Hugging Face Trainer, as a task. Neither library is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from etude.race._errors import InputError
from etude.race.task import Task, reshuffled

_UNHEARD = (
    "backward", "configure_gradient_clipping", "on_after_backward", "on_before_backward", "on_before_optimizer_step",
    "on_before_zero_grad", "on_train_batch_end", "on_train_batch_start", "on_train_epoch_end", "on_train_epoch_start",
    "optimizer_step", "optimizer_zero_grad",
)  # fmt: skip
"""Hooks of a LightningModule that change training and that a race does not call: its recipe takes their place."""


class Whole(list[Any]):
    """All batches of held-out data, judged in one call, so that a metric of the whole is exact."""


class Tested(Whole):
    """Those of the test data."""


class Judged(nn.Module):
    """A model that returns its own loss in training and its own metric in evaluation."""

    def __init__(self, module: nn.Module, loss: Callable[[Any], Tensor], metric: Callable[[Whole], float]):
        super().__init__()
        self.module = module
        self._loss, self._metric = loss, metric

    def forward(self, held: Any) -> Any:
        return self._loss(held[0]) if self.training else torch.tensor(self._metric(held), dtype=torch.float64)


def from_lightning(
    module: Any, data: Any, *, steps: int, metric: str = "val_loss", minimize: bool = True, **options: Any
) -> Task:
    """A task from a LightningModule and its LightningDataModule (or a pair of DataLoaders: training, validation).

    Training is ``training_step``, judged by what ``validation_step`` logs as ``metric``; on ``test_dataloader`` and
    ``test_step``, where there are any, the verdict is taken by the same name, or with test_ for val_. The recipe
    replaces ``configure_optimizers``. ``options``: other fields of `Task`.
    """
    if not getattr(module, "automatic_optimization", True):
        raise InputError(f"{type(module).__name__} optimizes by itself (automatic_optimization=False)")
    base = next(cls for cls in type(module).__mro__ if cls.__name__ == "LightningModule")
    if unheard := [name for name in _UNHEARD if getattr(type(module), name, None) is not getattr(base, name, None)]:
        raise InputError(f"{type(module).__name__} has {', '.join(unheard)}, which a race would not call")
    train, valid, test = _lightning_data(data)
    scores = _Scores(module)
    module.log, module.log_dict = scores.log, scores.log_all

    def judge(whole: Whole) -> float:
        kind = "test" if isinstance(whole, Tested) else "validation"
        name = metric.replace("val_", "test_", 1) if kind == "test" else metric
        return scores.over(whole, kind, name)

    tested = Tested(test) if test is not None and _overrides(module, base, "test_step") else None
    model = Judged(module, lambda batch: _step_loss(module.training_step(batch, 0)), judge)
    return _task(model, train, Whole(valid), tested, steps=steps, name=metric, minimize=minimize, **options)


def from_trainer(
    trainer: Any, *, metric: str = "eval_loss", minimize: bool = True, steps: int | None = None, **options: Any
) -> Task:
    """A task from a Hugging Face Trainer: its model, data, collator, loss and metrics; the recipe is its optimizer.

    Judged by ``metric``: ``"eval_loss"``, or what ``compute_metrics`` returns under that name (``eval_`` may be left
    out). ``steps``: those of the Trainer's arguments if None. ``options``: other fields of `Task`.
    """
    args = trainer.args
    train, valid = _raw(trainer, trainer.get_train_dataloader), _raw(trainer, trainer.get_eval_dataloader)
    if steps is None:
        steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * len(train))
    asked = metric.removeprefix("eval_")
    if asked != "loss" and trainer.compute_metrics is None:
        raise InputError(f"the metric {metric!r} needs compute_metrics, which this Trainer lacks")

    def loss(batch: Any) -> Tensor:
        value: Tensor = trainer.compute_loss(trainer.model, dict(batch))
        return value

    def judge(whole: Whole) -> float:
        if asked == "loss":
            each = [(loss(batch).item(), _examples(batch)) for batch in whole]
            return sum(value * n for value, n in each) / sum(n for _, n in each)
        found = _trainer_metrics(trainer, whole)
        if asked not in found:
            raise InputError(f"compute_metrics returns no {asked!r}; it returns {', '.join(found) or 'nothing'}")
        return float(found[asked])

    model = Judged(trainer.model, loss, judge)
    return _task(model, train, Whole(valid), None, steps=steps, name=metric, minimize=minimize, **options)


def _task(model: Judged, train: Iterable[Any], valid: Whole, test: Whole | None, **options: Any) -> Task:
    def epoch(generator: torch.Generator) -> Iterator[Any]:
        batches = reshuffled(train, generator) if isinstance(train, DataLoader) else iter(train)
        return (((batch,), range(_examples(batch))) for batch in batches)

    def held(whole: Whole) -> tuple[Whole, range]:
        return whole, range(sum(map(_examples, whole)))

    return Task(
        model, epoch, held(valid), lambda out, _: out, test=None if test is None else held(test),
        metric=lambda out, _: out, **options,
    )  # fmt: skip


class _Scores:
    """What a LightningModule logs during a pass over held-out data, as Lightning averages it: by examples."""

    def __init__(self, module: Any):
        self.module, self.n = module, 0
        self.sums: dict[str, float] = {}
        self.metrics: dict[str, Any] = {}

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        if hasattr(value, "compute"):  # a torchmetrics.Metric keeps its own average
            self.metrics[name] = value
        elif not self.module.training:
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * self.n

    def log_all(self, values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for name, value in values.items():
            self.log(name, value)

    def over(self, whole: Whole, kind: str, name: str) -> float:
        self.sums, self.metrics, step = {}, {}, getattr(self.module, f"{kind}_step")
        for part in self.module.modules():
            if hasattr(part, "compute") and hasattr(part, "reset"):  # a metric, from whatever it has seen before
                part.reset()
        for i, batch in enumerate(whole):
            self.n = _examples(batch)
            step(batch, i)
        total = sum(map(_examples, whole))
        self.n = total
        getattr(self.module, f"on_{kind}_epoch_end")()
        found = {key: value / total for key, value in self.sums.items()}
        for key, kept in self.metrics.items():
            found[key] = float(kept.compute())
        if name not in found:
            raise InputError(f"{kind}_step logs no {name!r}; it logs {', '.join(found) or 'nothing'}")
        return found[name]


def _step_loss(out: Any) -> Tensor:
    loss = out["loss"] if isinstance(out, Mapping) else out
    if not isinstance(loss, Tensor):
        raise TypeError(f"training_step returns the loss, or a dict with it; this one returned {type(out).__name__}")
    return loss


def _overrides(module: Any, base: type, name: str) -> bool:
    return getattr(type(module), name, None) is not getattr(base, name, None)


def _lightning_data(data: Any) -> tuple[Any, Any, Any]:
    if isinstance(data, (tuple, list)):
        return (*data, None) if len(data) == 2 else tuple(data)
    data.prepare_data()
    data.setup("fit")
    base = next(cls for cls in type(data).__mro__ if cls.__name__ == "LightningDataModule")
    train, valid, test = data.train_dataloader(), data.val_dataloader(), None
    if _overrides(data, base, "test_dataloader"):
        data.setup("test")
        test = data.test_dataloader()
    for name, loader in (("train", train), ("val", valid)):
        if isinstance(loader, (list, tuple, dict)):
            raise InputError(f"{name}_dataloader gives {len(loader)} loaders; a task has one")
    return train, valid, test


def _raw(trainer: Any, make: Callable[[], Any]) -> Any:
    """The Trainer's DataLoader as it is before Accelerate wraps it, whose shuffling could not be seeded from here."""
    trainer.accelerator.prepare = lambda *given, **_: given[0] if len(given) == 1 else given
    try:
        return make()
    finally:
        del trainer.accelerator.prepare


def _trainer_metrics(trainer: Any, whole: Whole) -> Mapping[str, Any]:
    """``compute_metrics`` of the logits and labels of all batches."""
    from transformers.trainer_utils import EvalPrediction

    logits, labels = [], []
    for batch in whole:
        named = dict(batch)
        labels.append(named["labels"].cpu())
        out = trainer.model(**named).logits
        kept = trainer.preprocess_logits_for_metrics
        logits.append((kept(out, named["labels"]) if kept else out).float().cpu())
    found: Mapping[str, Any] = trainer.compute_metrics(
        EvalPrediction(predictions=torch.cat(logits).numpy(), label_ids=torch.cat(labels).numpy())
    )
    return {key.removeprefix("eval_"): value for key, value in found.items()}


def _examples(batch: Any) -> int:
    """How many examples a batch holds: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    for part in parts:
        if n := _examples(part):
            return n
    return 0
