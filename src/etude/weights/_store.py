"""Files of adapters: θ alone, with the stamps from which ``load`` makes the same adapters on a bare model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from etude._method import _METHODS, stamp
from etude.weights._host import Weight, attach, born, following, held, weights_of
from etude.weights._map import Adapter, Map

FORMAT = 2


def save(model: nn.Module, path: str | Path, name: str | None = None) -> Path:
    """Write the adapters (of this name) to ``path``, a folder or a ``.safetensors`` file; returns the file written."""
    st, file = safetensors_torch(), _file(path)
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for weight, maps in held(model, name, Adapter):
        for m in maps:
            made = stamp(m)
            if made is None:
                raise ValueError(
                    f"{m!r} cannot be saved: it is not made by a @method factory, so load could not make it"
                )
            shape = list(weight.value().shape)
            which = {"weight": weight.names[0], "shape": shape, "name": m.name}
            entries.append(which | {"room": made.room, "method": made.name, "knobs": made.knobs})
            theta = {k: t for k, t in m.state_dict().items() if k not in cast(Adapter, m).remade}
            tensors |= {f"{len(entries) - 1}.{k}": t.detach().cpu().contiguous() for k, t in theta.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    st.torch.save_file(tensors, file, metadata={"etude.weights": str(FORMAT), "maps": json.dumps(entries)})
    return file


def load(
    model: nn.Module, path: str | Path, name: str | None = None, *, optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Make the adapters of a file on a model that has none of these names; a file that does not fit changes nothing.

    ``name``: what they are to be called here, if not what the file calls them. ``optimizer``: as in ``put``.
    """
    file = _file(path)
    tensors, head = opened(file)
    if not head.get("etude.weights", "").isdecimal():
        raise ValueError(f"{file} is not a file of etude's adapters; its header is {head}")
    if int(head["etude.weights"]) > FORMAT:
        raise ValueError(f"{file} is in format {head['etude.weights']}, and this etude reads up to {FORMAT}: update it")
    weights = {n: w for w in weights_of(model) for n in w.names}
    made: list[tuple[Weight, Map]] = []
    entries: list[dict[str, Any]] = json.loads(head["maps"])
    if name is not None and len(names := sorted({entry["name"] for entry in entries})) > 1:
        raise ValueError(f"{file} holds {', '.join(map(repr, names))}, which cannot all be called {name!r}")
    for i, entry in enumerate(entries):
        weight = weights.get(entry["weight"])
        if weight is None:
            raise ValueError(f"{file} adapts {entry['weight']}, which {type(model).__name__} does not have")
        theta = {k.partition(".")[2]: t for k, t in tensors.items() if k.partition(".")[0] == str(i)}
        made.append((weight, _rebuilt(entry, name or entry["name"], weight, theta)))
    once = list({id(weight): weight for weight, _ in made}.values())
    with following(optimizer, model, once, [p for weight in once for p in weight.theta], "weights.load"):
        for weight, m in made:
            attach(weight, m)
    return model


def _rebuilt(entry: dict[str, Any], name: str, weight: Weight, theta: dict[str, Tensor]) -> Map:
    method = _METHODS.get((entry["room"], entry["method"]))
    if method is None:
        raise ValueError(
            f"the file holds {entry['room']}.{entry['method']}, which is not known here; import its module"
        )
    knobs = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["knobs"].items()}
    mine, shape = born(method.fn(**knobs), name, weight, state=theta), list(weight.value().shape)
    if entry.get("shape", shape) != shape:  # format 1 did not tell
        raise ValueError(f"{entry['weight']}: the file's {mine!r} does not fit: {entry['shape']} there, {shape} here")
    again = {k: t for k, t in mine.state_dict().items() if k in cast(Adapter, mine).remade}
    return fill(mine, {**again, **theta}, entry["weight"])


def fill(mine: Map, theta: dict[str, Tensor], where: str) -> Map:
    """Give a map born for a weight the θ of a file. Tensors that it shares with other maps are left to those."""
    now = mine.state_dict()
    theta = {k: t.to(now[k].dtype, copy=True) if k in now else t for k, t in theta.items()}  # a file's are not aligned
    theta = {k: t.to(now[k].device) if k in now and not now[k].is_meta else t for k, t in theta.items()}
    try:
        mine.load_state_dict(theta, assign=True)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ValueError(f"{where}: the file's {mine!r} does not fit: {last}") from error
    return mine


def opened(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its header."""
    st = safetensors_torch()
    try:
        with st.safe_open(file, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except st.SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from None


def _file(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in ("", ".safetensors") and not path.is_dir():
        raise ValueError(f"adapters are kept in a folder (no suffix) or in a .safetensors file; got {path}")
    return path if path.suffix == ".safetensors" else path / "adapter.safetensors"


def safetensors_torch() -> Any:
    """The safetensors package, or what to do without it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files of adapters need safetensors: pip install safetensors") from error
    return safetensors
