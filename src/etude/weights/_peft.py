"""Folders of adapters in peft's format: written and read, and any adapter at all written as a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from etude._method import stamp
from etude._roles import _is_transposed_linear
from etude.weights._formats import KINDS, LORA, Kind, Layer, State, kind_of, refuse, write_low_rank
from etude.weights._host import Weight, attach, born, following, held, weights_of
from etude.weights._map import Adapter, Chain, Map
from etude.weights._store import fill, opened, safetensors_torch

PREFIX = "base_model.model."


class Fit(NamedTuple):
    """The rank that ``to_lora`` gave a weight's change, and ‖change − its LoRA‖ / ‖change‖."""

    rank: int
    error: float


def save_peft(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Write one adapter of every weight (of this name) as peft does; peft and inference servers read the folder.

    What is LoRA once it is born, and takes something out of W (``pissa``, ``olora``, …), becomes a LoRA of twice the
    rank on the base as it is. What peft lays out in another way than we can is refused, and why.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[str, tuple[Adapter, Kind, Layer]] = {}
    for weight, maps in held(model, name, Adapter):
        if len(maps) > 1:
            raise ValueError(f"{weight.names[0]} carries {maps[0].name!r} and {maps[1].name!r}; choose one with name=")
        layer, m = _layer(weight), cast(Adapter, maps[0])
        kind = kind_of(stamp(m))
        seen[layer.path] = m, kind, layer
        tensors |= {f"{PREFIX}{layer.path}.{k}": t for k, t in kind.write(m, layer).items()}
    kinds = {id(kind): kind for _, kind, _ in seen.values()}
    refuse(
        len(kinds) > 1, f"one folder holds one kind of adapter, and these are {[k.makers[0] for k in kinds.values()]}"
    )
    (kind,) = kinds.values()
    configs = {path: kind.config(m) for path, (m, _, _) in seen.items()}
    if kind.peft_type == "VERA":
        tensors |= _one_projection([cast(Any, m) for m, _, _ in seen.values()])
    layers = [layer for _, _, layer in seen.values()]
    if kind.peft_type == "IA3":
        inputs = [path for path, (m, _, _) in seen.items() if cast(Any, m).inputs]
        configs = {path: {"feedforward_modules": inputs} for path in configs}
    return _write(model, folder, kind, layers, configs, tensors)


def to_lora(
    model: nn.Module, folder: str | Path, rank: int | None = None, tol: float = 1e-6, name: str | None = None
) -> dict[str, Fit]:
    """Write what the adapters that are on (of this name) change as a plain LoRA folder, in peft's format.

    Per weight the best approximation of W' − W of the least rank with an error of at most ``tol``, and of ``rank`` at
    most; returns ranks and errors, relative to the change, by weight. A change of a rank within reach is exact to
    rounding; an error beyond ``tol`` says that ``rank`` was too small, and that what is served is not what was trained.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"weights.to_lora: rank={rank} must be at least 1, or None for what tol= needs")
    fits: dict[str, Fit] = {}
    tensors: dict[str, Tensor] = {}
    layers: list[Layer] = []
    ranks: dict[str, dict[str, Any]] = {}
    for weight, maps in held(model, name, Adapter):
        layer, chain = _layer(weight), cast(Chain, weight.chain)
        with_, on = chain.still(chain.active()), [m for m in chain.active() if m not in maps]
        change = (with_.double() - chain.still(on).double()).movedim(weight.axis, 0).flatten(1)
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        left = s.square().flip(0).cumsum(0).flip(0).sqrt()  # of the change, beyond the first 0, 1, … singular values
        full = float(left[0])
        need = int((left > tol * full).sum()) if full else 0
        r = max(1, min(need, rank or need))
        fits[weight.names[0]] = Fit(r, float(left[r]) / full if full and r < len(left) else 0.0)
        root = s[:r].sqrt()
        a, b = (root[:, None] * v[:r]).to(with_.dtype), (u[:, :r] * root).to(with_.dtype)
        tensors |= {f"{PREFIX}{layer.path}.{k}": t for k, t in write_low_rank(a, b, layer).items()}
        layers.append(layer)
        ranks[layer.path] = {"r": r, "lora_alpha": r, "init_lora_weights": True}
    _write(model, folder, LORA, layers, ranks, tensors)
    return fits


def load_peft(
    model: nn.Module, folder: str | Path, name: str = "default", *, optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Make the adapters of a folder that peft wrote on a model that has none of this name.

    A folder that does not fit, or holds what has no equal here, changes nothing. ``optimizer``: as in ``put``.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    kinds = [kind for kind in KINDS if kind.peft_type == config["peft_type"]]
    refuse(not kinds, f"{config['peft_type']} has no equal here; there are {', '.join(k.peft_type for k in KINDS)}")
    refuse(config.get("bias", "none") != "none", f"this folder holds biases (bias={config.get('bias')!r})")
    refuse(
        config.get("modules_to_save"),
        f"this folder holds whole layers (modules_to_save={config.get('modules_to_save')})",
    )
    states, rest = _by_layer(opened(folder / "adapter_model.safetensors")[0], kinds[0])
    weights = {n: w for w in weights_of(model) for n in w.names}
    made: list[tuple[Weight, Map]] = []
    for path, state in states.items():
        weight = weights.get(f"{path}.weight")
        refuse(weight is None, f"the folder adapts {path}.weight, which {type(model).__name__} does not have")
        layer = _layer(cast(Weight, weight))
        for i, (pattern, theta) in enumerate(kinds[0].read(config, layer, state | rest)):
            mine = born(pattern, name if i == 0 else f"{name} {i}", cast(Weight, weight), state=theta)
            if any(k in cast(Adapter, mine).remade for k in theta):
                mine.__dict__["remade"] = ()  # these are peft's, and no seed of ours gives them
            made.append((cast(Weight, weight), fill(mine, mine.state_dict() | theta, layer.path)))
    once = list({id(weight): weight for weight, _ in made}.values())
    with following(optimizer, model, once, [p for weight in once for p in weight.theta], "weights.load_peft"):
        for weight, m in made:
            attach(weight, m)
    return model


def _layer(weight: Weight) -> Layer:
    """What peft would call this weight's layer, if it knows such layers."""
    (module, key), name = weight.spots[0], weight.names[0]
    refuse(len(weight.spots) > 1, f"{name} is tied to {', '.join(weight.names[1:])}, and its adapters see one layer")
    linear = isinstance(module, nn.Linear) or _is_transposed_linear(module)
    conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    refuse(
        key != "weight" or not (linear or conv or isinstance(module, nn.Embedding)),
        f"{name}: {type(module).__name__} is no layer that it adapts",
    )
    if conv:
        c = cast(nn.Conv2d, module)
        plain = c.groups == 1 and set(c.dilation) == {1} and c.padding_mode == "zeros"
        refuse(not plain, f"{name}: its convolutions know no groups, no dilation and no padding but zeros")
    w = weight.value()
    m = w.movedim(weight.axis, 0).flatten(1)
    return Layer(name.rpartition(".")[0], module, m.shape[0], m.shape[1], tuple(w.shape[2:]))


def _one_projection(maps: list[Any]) -> State:
    """peft keeps one A and one B for all layers, and cuts each layer's from them."""
    a, b = max((m.A for m in maps), key=lambda t: t.shape[1]), max((m.B for m in maps), key=len)
    cut = all(torch.equal(m.A, a[:, : m.A.shape[1]]) and torch.equal(m.B, b[: len(m.B)]) for m in maps)
    refuse(not cut, "its VeRA cuts the projections of all layers from one, and these layers' shapes differ")
    return {"base_model.vera_A": a, "base_model.vera_B": b}


def _write(
    model: nn.Module, folder: str | Path, kind: Kind, layers: list[Layer], configs: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
) -> Path:  # fmt: skip
    folder = Path(folder)
    first = next(iter(configs.values()))
    config = {"peft_type": kind.peft_type, "target_modules": _targets(model, list(configs)), **first}
    for knob in kind.per_layer:
        each = {path: c[knob] for path, c in configs.items()}
        config[{"r": "rank_pattern"}.get(knob, "alpha_pattern")] = {p: v for p, v in each.items() if v != first[knob]}
    same = all({**c, **{k: first[k] for k in kind.per_layer}} == first for c in configs.values())
    refuse(not same, "one folder has one setting for all layers, and these differ; give the layers their own adapters")
    if any(_is_transposed_linear(layer.module) for layer in layers):
        config["fan_in_fan_out"] = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    held_ = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    safetensors_torch().torch.save_file(held_, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _targets(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The layers as a list, or, where peft would take a name's end for another layer too, as a pattern."""
    names = [n for n, _ in model.named_modules()]
    clear = not any(n.endswith(f".{p}") for p in paths for n in names)
    return paths if clear else "|".join(p.replace(".", r"\.") for p in paths)


def _by_layer(tensors: dict[str, Tensor], kind: Kind) -> tuple[dict[str, State], State]:
    """The file's tensors by layer and by peft's name, and those of no layer."""
    states: dict[str, State] = {}
    rest: State = {}
    for full, t in tensors.items():
        key = next((k for k in kind.keys if full.endswith(f".{k}")), None)
        if key is None:
            rest[full.rpartition(".")[2]] = t
        else:
            states.setdefault(full.removeprefix(PREFIX)[: -len(key) - 1], {})[key] = t
    return states, rest
