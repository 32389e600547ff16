"""Every adapter, forward and backward, against the same Linear frozen, and against peft's own where peft has it.

Beside it the activations that the graph holds, as a share of the frozen layer's input, and the trained numbers. Ours
take the route they choose by themselves. An adapter with a rank has rank 16, all else is at its default but for
``KNOBS``: peft makes one butterfly factor where there is no GPU, so that one of ours is measured too.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
import typing
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._timing import medians
from etude import weights
from etude._method import methods

D, RANK = 1024, 16
KNOBS = {"t_lora": {"min_rank": RANK // 2}, "boft": {"m": 1}, "boft(m=2)": {}}


def playing(layer: nn.Module, rows: int) -> Callable[[], None]:
    """Forward and backward as inside a network: the input wants its gradient too."""
    x = torch.randn(rows, D, requires_grad=True)
    g = torch.randn(rows, D)

    def play() -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        layer(x).backward(g)

    return play


def held(layer: nn.Module, rows: int) -> float:
    """Bytes that the graph holds beside parameters and buffers, over the bytes of the input."""
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    found: dict[int, int] = {}

    def hold(t: Tensor) -> Tensor:
        if (at := t.untyped_storage().data_ptr()) not in known:
            found[at] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(rows, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        y = layer(x)
    del y
    return sum(found.values()) / x.nbytes


@functools.cache
def adapters() -> dict[str, Callable[..., weights.Adapter]]:
    """Every method of the room that makes one."""
    rooms = {name: m.fn for (room, name), m in methods().items() if room == "weights"}
    makers = {name: fn for name, fn in rooms.items() if _makes(fn)}
    found = {name: fn for name, fn in makers.items() if isinstance(fn(), weights.Adapter)}
    return found | {name: found[base] for name in KNOBS for base in [name.partition("(")[0]]}


def _makes(fn: Callable[..., Any]) -> bool:
    made = typing.get_type_hints(inspect.unwrap(fn)).get("return")
    return inspect.isclass(made) and issubclass(made, weights.Map)


def ours(name: str) -> nn.Sequential:
    """A Linear that carries the adapter; one born from data is given two batches."""
    torch.manual_seed(0)
    model, fn = nn.Sequential(nn.Linear(D, D)).requires_grad_(False), adapters()[name]
    adapter = fn(**{"r": RANK} if "r" in inspect.signature(fn).parameters else {}, **KNOBS.get(name, {}))
    batches = [torch.randn(2 * D, D) for _ in range(2)]
    born: dict[str, Any] = {"batches": batches, "loss": lambda m, x: m(x).square().mean()} if adapter.watch() else {}
    weights.put(model, adapter, on="0.weight", **born)
    return model


def peft_of(model: nn.Sequential) -> nn.Module | None:
    """What peft makes of the folder that we write, None where it has no such adapter."""
    import peft

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            weights.save_peft(model, folder)
        except ValueError:
            return None
        theirs = peft.PeftModel.from_pretrained(
            nn.Sequential(nn.Linear(D, D)).requires_grad_(False), folder, is_trainable=True
        )
    return typing.cast(nn.Module, theirs.base_model.model)


def rows(rounds: int = 7) -> list[tuple[str, float, str]]:
    """(what, seconds over the frozen layer's, note): forward and backward of Linear(1024, 1024)."""
    plain = {name: nn.Linear(D, D).requires_grad_(name == "trained") for name in ("frozen", "trained")}
    layers: dict[str, nn.Module] = dict(plain)
    for name in adapters():
        layers[name] = model = ours(name)
        if name != "boft(m=2)" and (theirs := peft_of(model)) is not None:
            layers[f"{name}, by peft"] = theirs
    found = []
    for n in (256, 2048):
        took = medians({name: playing(layer, n) for name, layer in layers.items()}, rounds)
        for name, t in took.items():
            count = sum(p.numel() for p in layers[name].parameters() if p.requires_grad)
            note = f"{1e3 * t:.1f} ms, holds {held(layers[name], n):.1f} inputs, trains {count:,}"
            found.append((f"{n} rows: {name}", t / took["frozen"], note))
    return found


if __name__ == "__main__":
    for what, ratio, note in rows():
        print(f"{what:48s} {ratio:6.2f}  {note}")
