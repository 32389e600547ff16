"""A small residual network of 3 × 3 convolutions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor, nn

MakeNorm = Callable[[int], nn.Module]


class Basic(nn.Module):
    """act(skip(x) + norm(conv(act(norm(conv(x)))))). x: [b, c, h, w]; the result: [b, c', h / stride, w / stride]."""

    def __init__(self, c: int, out: int, stride: int, norm: MakeNorm, act: Callable[[], nn.Module]):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c, out, 3, stride, padding=1, bias=False),
            norm(out),
            act(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            norm(out),
        )
        self.skip = nn.Identity() if (c, stride) == (out, 1) else nn.Conv2d(c, out, 1, stride, bias=False)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.skip(x) + self.body(x))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """A stem, one basic block per width (each after the first halves the image), the mean over space, a head.

    x: [b, c, h, w]; the result: [b, classes].
    """

    def __init__(
        self,
        c: int,
        classes: int,
        widths: tuple[int, ...] = (16, 32),
        norm: MakeNorm = nn.BatchNorm2d,
        act: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(c, widths[0], 3, padding=1, bias=False), norm(widths[0]), act())
        pairs = itertools.pairwise((widths[0], *widths))
        self.blocks = nn.Sequential(*(Basic(a, b, 1 + (i > 0), norm, act) for i, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))  # type: ignore[no-any-return]
