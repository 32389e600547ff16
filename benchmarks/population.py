"""Cells trained together over the same cells one after another, by a plain loop with torch's fused AdamW.

Per cell and step, in one run, the routes taking turns; beside it the build, and what is left of the gain when the build
is counted in over 32 cells of so many steps. ``python -m benchmarks.population [threads]``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from etude.race import Cell, Task
from etude.race.loop import stream_seed
from etude.race.population import How, Population
from etude.race.tasks import digits

CELLS = {"digits MLP": 32, "ConvNet, BatchNorm": 32, "small GPT": 8}
LENGTHS = (600, 3000)


def convnet(seed: int) -> Task:
    """8 × 8 digits through two convolutions with BatchNorm."""
    task = digits(seed)
    train = task.train[0].unflatten(1, (1, 8, 8)), task.train[1]  # type: ignore[index]
    valid = task.valid[0].unflatten(1, (1, 8, 8)), task.valid[1]  # type: ignore[index]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    return Task(model, train, valid, nn.functional.cross_entropy, steps=600)


class Block(nn.Module):
    """Causal attention and an MLP, each after a LayerNorm."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.then = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.qkv(self.before(x)).chunk(3, -1))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(-2, -3).flatten(-2))
        return x + self.mlp(self.then(x))


class Flat(nn.Module):
    """Cross-entropy of every token."""

    def forward(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())


def gpt(seed: int) -> Task:
    """Two blocks of width 64 over 64 bytes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(256, 64), Block(64, 4), Block(64, 4), nn.LayerNorm(64), nn.Linear(64, 256))
    text = torch.randint(256, (256, 65), generator=torch.Generator().manual_seed(0))
    pair = text[:, :-1], text[:, 1:]
    return Task(model, pair, (pair[0][:16], pair[1][:16]), Flat(), steps=600, batch=8)


def plain(task: Task) -> Callable[[], None]:
    """One step of the loop that anyone would write."""
    optimizer = torch.optim.AdamW(task.model.parameters(), fused=True)
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = task.batches(
        torch.Generator().manual_seed(stream_seed(0, "data"))
    )

    def step() -> None:
        inputs, targets = next(stream)
        optimizer.zero_grad()
        task.loss(task.model(inputs), targets).mean().backward()
        optimizer.step()

    return step


def crew(factory: Callable[[int], Task], cells: int, compiled: bool) -> tuple[Population, float]:
    """A population of cells that differ in seed and lr, and the seconds that its program took to build."""
    asked = [Cell("adamw", "tune", 1e-3 * (1 + i / cells), i) for i in range(cells)]
    how = How("population", cells, compiled)
    began = time.perf_counter()
    Population(factory, asked, how, steps=600, device="cpu")
    build = time.perf_counter() - began
    return Population(factory, asked, how, steps=600, device="cpu"), build


def rows(rounds: int = 12) -> list[tuple[str, float, str]]:
    """(what, gain per cell and step, the build and the gain with it)."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found = []
    for (name, cells), factory in zip(CELLS.items(), (digits, convnet, gpt)):
        step = plain(factory(0))
        made = {route: crew(factory, cells, route == "compiled") for route in ("traced", "compiled")}
        routes = {"loop": step, **{route: p.step for route, (p, _) in made.items()}}
        taken: dict[str, list[float]] = {route: [] for route in routes}
        for turn in range(rounds + 2):
            for route, play in routes.items():
                began = clock()
                for _ in range(8 if route == "loop" else 1):
                    play()
                if turn > 1:
                    taken[route].append((clock() - began) / (8 if route == "loop" else cells))
        per = {route: statistics.median(ts) for route, ts in taken.items()}
        for route, (_, build) in made.items():
            whole = {n: per["loop"] * n * cells / (per[route] * n * cells + build) for n in LENGTHS}
            note = ", ".join(f"{gain:.1f}× over {n} steps" for n, gain in whole.items())
            said = f"{per['loop'] * 1e6:.0f} → {per[route] * 1e6:.0f} µs; built in {build:.1f} s: {note}"
            found.append((f"{name}, {cells} cells, {route}", per["loop"] / per[route], said))
    return found


def main() -> None:
    """Print the table; one thread in process time, more in wall time."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    for what, gain, note in rows():
        print(f"{what:40s} {gain:5.1f}×   {note}", flush=True)


if __name__ == "__main__":
    main()
