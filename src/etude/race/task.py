"""A task is what ``factory(seed)`` returns: a model, its data, its loss. No base class, no trainer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Any, Any]
Stream = Callable[[torch.Generator], Iterable[Batch]]


@dataclass
class Task:
    """A model to train, data to train and judge it on, and how it is judged.

    ``train``: tensors (inputs [n, …], targets [n, …]), drawn in shuffled batches of ``batch``; or a function that
    takes a ``torch.Generator`` and returns one epoch of (input, target) batches, shuffled by nothing but that
    generator. ``valid``: one (input, target) pair, or a sequence of batches. ``test``: likewise; when given, the
    learning rate is chosen on ``valid`` and the verdict is taken on ``test``. ``loss``: (output, target) → one value
    per example or their mean. ``metric``: likewise, averaged over the data; the loss when not given. ``name`` names
    the metric, ``minimize`` says whether less is better. ``steps``: length of the full schedule. ``roles``: parameter
    name → role, where the model's own layers do not say it.
    """

    model: nn.Module
    train: tuple[Tensor, Tensor] | Stream
    valid: Batch | Sequence[Batch]
    loss: Callable[[Any, Any], Tensor]
    steps: int
    batch: int = 32
    test: Batch | Sequence[Batch] | None = None
    metric: Callable[[Any, Any], Tensor] | None = None
    name: str = "loss"
    minimize: bool = True
    roles: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"a task's model is a torch.nn.Module; this is a {type(self.model).__name__}")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"a task has steps ≥ 1 and batch ≥ 1; these are {self.steps} and {self.batch}")
        if not callable(self.train) and len(self.train[0]) != len(self.train[1]):
            raise ValueError(f"train has {len(self.train[0])} inputs and {len(self.train[1])} targets")

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Training batches without end, epoch after epoch, in an order that the generator alone decides."""
        while True:
            epoch = iter(self.train(generator) if callable(self.train) else self._shuffled(*self.train, generator))
            first = next(epoch, None)
            if first is None:
                raise ValueError("an epoch of the task's training data holds no batch")
            yield first
            yield from epoch

    def _shuffled(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> Iterator[Batch]:
        batch = min(self.batch, len(targets))
        order = torch.randperm(len(targets), generator=generator)
        for rows in torch.split(order, batch):
            if len(rows) == batch:
                yield inputs[rows], targets[rows]

    @torch.no_grad()
    def measure(self, model: nn.Module, data: Batch | Sequence[Batch], device: str = "cpu") -> float:
        """The metric of ``model`` in evaluation mode, averaged over the examples of ``data``."""
        total, count = 0.0, 0
        was_training = model.training
        model.eval()
        for inputs, targets in _as_batches(data):
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            value = (self.metric or self.loss)(model(inputs), targets)
            total += value.double().mean().item() * len(targets)
            count += len(targets)
        model.train(was_training)
        return total / count

    def data_hash(self) -> str:
        """sha256 of the data; of a stream, its first eight batches under seed 0."""
        digest = hashlib.sha256()
        streamed = callable(self.train)
        train = list(itertools.islice(self.batches(torch.Generator().manual_seed(0)), 8)) if streamed else self.train
        for part in (train, self.valid, self.test):
            _feed(digest, part)
        return digest.hexdigest()


def to_device(value: Any, device: str) -> Any:
    """Tensors, also inside tuples, lists and dicts, moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    return value


def digest_state(model: nn.Module) -> str:
    """sha256 of the model's structure and of every parameter and buffer."""
    digest = hashlib.sha256(str(model).encode())
    _feed(digest, model.state_dict())
    return digest.hexdigest()


def _as_batches(data: Batch | Sequence[Batch]) -> Sequence[Batch]:
    pair = isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple)
    return [data] if pair else data  # type: ignore[list-item]


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
