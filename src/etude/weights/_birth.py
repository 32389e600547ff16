"""How an adapter's θ starts: a birth makes it from the weight, and from what the weight has seen of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from etude._roles import _is_transposed_linear

Factors = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Any], Any]


class Watch:
    """What one weight sees in a pass over batches; a subclass keeps only the statistic that its birth asks for."""

    needs: ClassVar[Literal["inputs", "gradient"]]
    shown = 0  # how often it saw something
    rank: int | None = None  # what ``Map.allot`` gives this weight; 0 leaves the weight alone

    def see(self, x: Tensor) -> None:
        """Inputs: x [samples, rows, in], one row per use of the weight. Gradient: x [out, in], one per batch."""
        raise NotImplementedError


class Moment(Watch):
    """Σ xᵀx / (max x)² over samples x: [rows, in], then ``value``: its mean, [in, in], as CorDA's authors take it."""

    needs = "inputs"

    def __init__(self) -> None:
        self.n, self.sum = 0, torch.zeros(())

    def see(self, x: Tensor) -> None:
        top = x.amax((1, 2), keepdim=True).abs()
        x = (x / torch.where(top > 0, top, 1.0)).flatten(0, 1)
        self.sum = self.sum.to(x) + x.mT @ x
        self.n += len(top)

    @property
    def value(self) -> Tensor:
        return self.sum / self.n


class Components(Watch):
    """The k leading principal components of all rows: ``axes`` [≤ k, in] and their ``values``, batch by batch."""

    needs = "inputs"

    def __init__(self, k: int) -> None:
        self.k, self.n, self.total = k, 0, 0.0
        self.axes, self.values, self.mean = torch.empty(0), torch.empty(0), torch.empty(0)
        self.cosine = torch.empty(0)  # of each component with itself one batch before

    def see(self, x: Tensor) -> None:
        x = x.flatten(0, 1)
        n, mean = len(x), x.mean(0)
        x = x - mean
        self.total += float(x.square().sum())
        if self.n:  # the rows so far stand in as their components, the two means as one row more
            shift = (self.mean - mean) * (self.n * n / (self.n + n)) ** 0.5
            self.total += float(shift.square().sum())
            x = torch.cat([self.values[:, None] * self.axes, x, shift[None]])
            mean = mean + (self.mean - mean) * (self.n / (self.n + n))
        _, s, v = torch.linalg.svd(x, full_matrices=False)
        v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
        if self.n:
            both = min(len(self.axes), len(v))
            self.cosine = (self.axes[:both] * v[:both]).sum(1)
        self.axes, self.values, self.mean, self.n = v[: self.k], s[: self.k], mean, self.n + n

    @property
    def explained(self) -> Tensor:
        """The part of all variance along each component.  [≤ k]"""
        return self.values.square() / self.total


class Gradient(Watch):
    """Σ over batches of the gradient of the loss: ``sum``, [out, in]."""

    needs = "gradient"

    def __init__(self) -> None:
        self.sum = torch.zeros(())

    def see(self, x: Tensor) -> None:
        self.sum = self.sum.to(x) + x


@dataclass(frozen=True)
class Birth:
    """W → θ: ``make(w, r, scale, seen)`` gives the factors of an adapter for the matrix w: [out, in].

    ``takes``: whether what the factors make is taken out of W, so that the adapted weight is W still. The base keeps
    its bits: the adapter remembers what was taken and subtracts it. ``watch``: makes what must see the data first.
    """

    make: Callable[[Tensor, int, float, Any], Factors]
    takes: bool = False
    watch: Callable[[], Watch] | None = None

    def __call__(self, w: Tensor, r: int, scale: float, seen: Watch | None) -> Factors:
        """The factors, worked out in float32 at least, in w's dtype; of a birth from data on no data, their shapes."""
        if self.watch is not None and seen is None:
            return w.new_empty(min(r, *w.shape), w.shape[1]), w.new_empty(w.shape[0], min(r, *w.shape))
        wide = w if w.dtype == torch.float64 else w.float()
        return tuple(f.to(w.dtype).contiguous() for f in self.make(wide, r, scale, seen))


# -- one pass over the data -------------------------------------------------------------------------------------------


@dataclass
class Site:
    """A weight of the model, as ``gather`` needs it."""

    name: str
    modules: list[nn.Module]  # whose ``weight`` it is
    tap: Tensor  # whose gradient is the weight's
    axis: int  # of the output units


def gather(
    model: nn.Module, sites: list[Site], watches: list[Watch], batches: Iterable[Any], loss: Loss | None,
    enough: Callable[[list[Watch]], bool],
) -> None:  # fmt: skip
    """One pass in eval mode: every watch sees its site's inputs or gradients, until ``enough`` of them, or the end.

    ``loss(model, batch)`` runs the model; without it a batch is what the model takes: a tensor, a tuple or a mapping.
    Random state, training mode and gradients are left as they were.
    """
    by_gradient = watches[0].needs == "gradient"
    if by_gradient and loss is None:
        raise ValueError("this birth takes the gradient of a loss: give loss=, a function of (model, batch)")
    for site in sites:
        if not by_gradient and not any(_takes_rows(m) for m in site.modules):
            raise ValueError(
                f"{site.name}: this birth takes the inputs of a linear or convolutional layer, and this weight's "
                f"{'is a ' + type(site.modules[0]).__name__ if site.modules else 'is none'}: choose others with on="
            )
    taps = [site.tap for site in sites]
    looking = _thawed(taps) if by_gradient else _listening(sites, watches)
    with _still(model), torch.random.fork_rng(), torch.set_grad_enabled(by_gradient), looking:
        for batch in batches:
            value = (loss or _run)(model, batch)
            if by_gradient:
                found = torch.autograd.grad(value, taps, allow_unused=True)
                for watch, site, g in zip(watches, sites, found, strict=True):
                    if g is not None:
                        _show(watch, g.movedim(site.axis, 0).reshape(g.shape[site.axis], -1))
            if all(watch.shown for watch in watches) and enough(watches):
                break
    for site, watch in zip(sites, watches):
        if not watch.shown:
            raise ValueError(f"{site.name}: no batch of batches= shows this weight any data")


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _takes_rows(module: nn.Module) -> bool:
    """Whether its weight is a matrix that multiplies rows of its input."""
    if isinstance(module, nn.Linear) or _is_transposed_linear(module):
        return True
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)


@contextmanager
def _listening(sites: list[Site], watches: list[Watch]) -> Iterator[None]:
    """Every call of a site's layer shows its input to the site's watch."""

    def listen(watch: Watch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: _show(watch, _rows(module, args[0]))

    handles = [
        module.register_forward_pre_hook(listen(watch))
        for site, watch in zip(sites, watches, strict=True)
        for module in site.modules
        if _takes_rows(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _thawed(taps: list[Tensor]) -> Iterator[None]:
    frozen = [tap for tap in taps if not tap.requires_grad]
    for tap in frozen:
        tap.requires_grad_(True)
    try:
        yield
    finally:
        for tap in frozen:
            tap.requires_grad_(False)


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    was = [m for m in model.modules() if m.training]
    try:
        model.eval()
        yield
    finally:
        for m in was:
            m.training = True


def _show(watch: Watch, x: Tensor) -> None:
    watch.see(x.detach() if x.dtype == torch.float64 else x.detach().float())
    watch.shown += 1


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """What the weight, as a matrix [out, in], multiplies: [samples, rows, in]."""
    if not isinstance(module, _ConvNd):
        return x.flatten(1, -2) if x.ndim > 2 else x.reshape(1, -1, x.shape[-1])
    n = len(module.kernel_size)
    x = x if x.ndim == n + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i, (k, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation)):
        x = x.unfold(2 + i, gap * (k - 1) + 1, step)[..., ::gap]
    x = x.reshape(len(x), module.groups, -1, *x.shape[2:]).movedim(
        2, 2 + n
    )  # [samples, groups, *places, in / groups, *kernel]
    return x.flatten(1, 1 + n).flatten(2)
