"""Norms of images, forward and backward in training, over torch's BatchNorm2d."""

from __future__ import annotations

from torch import nn

from benchmarks._timing import medians
from benchmarks.norms import keep_freed_memory, step
from etude import norms

SHAPES = ((32, 64, 32, 32), (64, 256, 8, 8))


def rows(rounds: int = 31) -> list[tuple[str, float, str]]:
    """(what, ratio to torch BatchNorm2d, milliseconds): medians, the norms taking turns."""
    keep_freed_memory()
    ours = (
        norms.batch_norm, norms.instance_norm, norms.group_norm, norms.ghost_batch_norm, norms.batch_channel_norm,
        norms.online_norm, norms.evonorm_b0, norms.evonorm_s0, norms.pcnorm, norms.scnorm,
    )  # fmt: skip
    found = []
    for shape in SHAPES:
        d = shape[1]
        modules = {"torch BatchNorm2d": nn.BatchNorm2d(d), "torch GroupNorm": nn.GroupNorm(32, d)}
        modules |= {"torch InstanceNorm2d": nn.InstanceNorm2d(d, affine=True)}
        modules |= {factory.__name__: factory(d) for factory in ours}
        took = medians({name: step(norm, shape) for name, norm in modules.items()}, rounds)
        first = took["torch BatchNorm2d"]
        size = "×".join(map(str, shape))
        found += [(f"{size} {name}", t / first, f"{1e3 * t:.2f} ms") for name, t in took.items()]
    return found


if __name__ == "__main__":
    for what, ratio, note in rows():
        print(f"{what:40s} {ratio:6.2f}  {note}")
