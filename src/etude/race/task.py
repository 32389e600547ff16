"""A task is what ``factory(seed)`` returns: a model, its data, its loss. No base class, no trainer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Any, Any]
Stream = Callable[[torch.Generator], Iterable[Batch]]
Factory = Callable[[int], "Task"]


@dataclass
class Task:
    """A model to train, data to train and judge it on, and how it is judged.

    ``train``: tensors (inputs [n, …], targets [n, …]), drawn in shuffled batches of ``batch``; or a function that
    takes a ``torch.Generator`` and returns one epoch of (input, target) batches, shuffled by nothing but that
    generator. ``valid``: one (input, target) pair, or a list or DataLoader of batches. ``test``: likewise; when given,
    the learning rate is chosen on ``valid`` and the verdict is taken on ``test``. ``loss``: (output, target) → one
    value per example or their mean. ``metric``: likewise, averaged over the data; the loss when not given. ``name``
    names the metric, ``minimize`` says whether less is better. ``steps``: length of the full schedule. ``roles``:
    parameter name → role, where the model's own layers do not say it.
    """

    model: nn.Module
    train: tuple[Tensor, Tensor] | Stream
    valid: Batch | Iterable[Batch]
    loss: Callable[[Any, Any], Tensor]
    steps: int
    batch: int = 32
    test: Batch | Iterable[Batch] | None = None
    metric: Callable[[Any, Any], Tensor | float] | None = None
    name: str = "loss"
    minimize: bool = True
    roles: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"a task's model is a torch.nn.Module; this is a {type(self.model).__name__}")
        if any(map(nn.parameter.is_lazy, self.model.parameters())):
            raise ValueError("the model has lazy layers; give their sizes, or run a batch through it in the factory")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"a task has steps ≥ 1 and batch ≥ 1; these are {self.steps} and {self.batch}")
        if not callable(self.train):
            _check_train(self.train)
        for name, data in (("valid", self.valid), ("test", () if self.test is None else self.test)):
            _check_held_out(name, data)
        if self.metric is None and not self.minimize:
            raise ValueError("minimize=False needs a metric; without one the loss is judged, and less of it is better")

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Training batches without end, epoch after epoch, in an order that the generator alone decides."""
        if not callable(self.train):
            inputs, targets = self.train
            yield from ((inputs[rows], targets[rows]) for rows in self.rows(generator))
            return
        while True:
            epoch = iter(self.train(generator))
            first = next(epoch, None)
            if first is None:
                raise ValueError("an epoch of the task's training data holds no batch")
            yield first
            yield from epoch

    def rows(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Which rows of the training tensors make each batch, without end; what an epoch leaves over is left out."""
        count = len(self.train[1])  # type: ignore[index]
        batch = min(self.batch, count)
        while True:
            yield from torch.split(torch.randperm(count, generator=generator)[: count // batch * batch], batch)

    @torch.no_grad()
    def measure(self, model: nn.Module, data: Batch | Iterable[Batch], device: str = "cpu") -> float:
        """The metric of ``model`` in evaluation mode, averaged over the examples of ``data``."""
        total, count = 0.0, 0
        was_training = model.training
        model.eval()
        for inputs, targets in batches_of(data):
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            value = torch.as_tensor((self.metric or self.loss)(model(inputs), targets))
            total += value.double().mean().item() * len(targets)
            count += len(targets)
        model.train(was_training)
        return total / count

    def data_hash(self) -> str:
        """sha256 of the data; of a stream, its first eight batches under seed 0."""
        digest = hashlib.sha256()
        streamed = callable(self.train)
        train = list(itertools.islice(self.batches(torch.Generator().manual_seed(0)), 8)) if streamed else self.train
        _feed(digest, train)
        for data in (self.valid, self.test):
            for batch in batches_of(data) if data is not None else ():
                _feed(digest, batch)
            digest.update(b"end")
        return digest.hexdigest()


def to_device(value: Any, device: str) -> Any:
    """Tensors, also inside tuples, lists and dicts, moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        moved = [to_device(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)  # a namedtuple takes them apart
    return value


def digest_state(model: nn.Module) -> str:
    """sha256 of the model's structure and of every parameter and buffer."""
    digest = hashlib.sha256(str(model).encode())
    _feed(digest, model.state_dict())
    return digest.hexdigest()


def _check_train(train: Any) -> None:
    pair = isinstance(train, (tuple, list)) and len(train) == 2
    if not pair or not all(isinstance(part, Tensor) for part in train):
        raise TypeError(
            "train is a pair of tensors (inputs, targets), or a function of a torch.Generator that yields batches; "
            f"this is {_kind(train)}"
        )
    if len(train[0]) != len(train[1]):
        raise ValueError(f"train has {len(train[0])} inputs and {len(train[1])} targets")
    if not len(train[0]):
        raise ValueError("train holds no example")


def _check_held_out(name: str, data: Any) -> None:
    if isinstance(data, Iterator):
        raise TypeError(f"{name} is a one-shot iterator, spent after one pass; give a list or a DataLoader of batches")
    bare = isinstance(data, (tuple, list)) and len(data) > 0 and isinstance(data[0], Tensor)
    if isinstance(data, Tensor) or not isinstance(data, Iterable) or (bare and not _is_batch(data)):
        raise TypeError(
            f"{name} is one batch, the tuple (inputs, targets), or a list or DataLoader of such pairs; "
            f"this is {_kind(data)}"
        )


def _kind(value: Any) -> str:
    if not isinstance(value, (tuple, list)):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"


def _is_batch(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple)


def batches_of(data: Any) -> Iterator[Batch]:
    """The batches of held-out data, one or several; none is an error."""
    examples = 0
    for inputs, targets in [data] if _is_batch(data) else data:
        examples += len(targets)
        yield inputs, targets
    if not examples:
        raise ValueError("the validation or test data hold no example")


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            digest.update(str(key).encode())
            _feed(digest, entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            _feed(digest, entry)
    else:
        digest.update(repr(value).encode())
