"""How peft lays out the adapters that both have: per kind its names, its configuration, its shapes. One row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etude._method import Stamp
from etude.weights import births, hadamard, low_rank, rotations, scaling
from etude.weights._map import Adapter

Config = Mapping[str, Any]
State = dict[str, Tensor]
Stack = list[tuple[Adapter, State]]


@dataclass(frozen=True)
class Layer:
    """The layer an adapter stands on: its module and the path to it, the weight as a matrix, how a kernel is shaped."""

    path: str
    module: nn.Module
    out: int
    into: int
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """One of peft's kinds of adapter. ``write``: θ by peft's names; ``config``: its settings; ``read``: the way back.

    ``read`` gives the adapters that together are peft's one, from the weight outwards, each with its θ.
    """

    peft_type: str
    makers: tuple[str, ...]  # the methods of this room that are written so
    keys: tuple[str, ...]  # how peft names its tensors, below the layer's path
    write: Callable[[Any, Layer], State]
    config: Callable[[Any], dict[str, Any]]
    read: Callable[[Config, Layer, State], Stack]
    per_layer: tuple[str, ...] = ()  # settings that ``<name>_pattern`` gives layer by layer


def setting(config: Config, knob: str, pattern: str, path: str) -> Any:
    """A setting that the config may give for this layer alone, as peft looks it up."""
    found = [v for k, v in config.get(pattern, {}).items() if path == k or path.endswith(f".{k}")]
    return found[0] if found else config[knob]


def refuse(condition: object, why: str) -> None:
    if condition:
        raise ValueError(f"peft's format: {why}")


# -- LoRA, and what is LoRA once it is born ----------------------------------------------------------------------------


def write_low_rank(a: Tensor, b: Tensor, layer: Layer) -> State:
    """A: [r, in] and B: [out, r] as peft's."""
    if isinstance(layer.module, nn.Embedding):
        return {"lora_embedding_A": b.mT, "lora_embedding_B": a.mT}
    if layer.kernel:
        a = a.view(len(a), -1, *layer.kernel)
        b = b.view(*b.shape, *[1] * len(layer.kernel))
    return {"lora_A.weight": a, "lora_B.weight": b}


def _write_lora(m: low_rank.LoRA, layer: Layer) -> State:
    return write_low_rank(*m.factors(), layer) | ({"lora_magnitude_vector": m.m} if isinstance(m, scaling.DoRA) else {})


def _config_lora(m: low_rank.LoRA) -> dict[str, Any]:
    r = len(m.factors()[0])  # with what a birth took out of W beside it, twice the rank
    return {"r": r, "lora_alpha": m.scale * r, "use_dora": isinstance(m, scaling.DoRA), "init_lora_weights": True}


_ADDED = (True, False, "gaussian", "eva", "orthogonal")
_TAKEN = {"pissa": births.pissa, "olora": births.olora}


def _read_lora(config: Config, layer: Layer, state: State) -> Stack:
    r = setting(config, "r", "rank_pattern", layer.path)
    alpha = setting(config, "lora_alpha", "alpha_pattern", layer.path)
    root = math.sqrt(r) if config.get("use_rslora") else 1.0
    init, dora = config.get("init_lora_weights", True), bool(config.get("use_dora"))
    refuse(
        init not in _ADDED and (init not in _TAKEN or dora),
        f"init_lora_weights={init!r} changed the base in a way that cannot be made again; convert it with peft's "
        "path_initial_model_for_weight_conversion",
    )
    if isinstance(layer.module, nn.Embedding):
        theta = {"A": state["lora_embedding_B"].mT, "B": state["lora_embedding_A"].mT}
    else:
        theta = {"A": state["lora_A.weight"].flatten(1), "B": state["lora_B.weight"].flatten(1)}
    if dora:
        return [(scaling.dora(r, alpha * root), theta | {"m": state["lora_magnitude_vector"].flatten()})]
    if init in _TAKEN:
        refuse(root != 1, f"init_lora_weights={init!r} with use_rslora")
        return [(_TAKEN[init](r, alpha), theta)]
    return [(scaling.rslora(r, alpha) if config.get("use_rslora") else low_rank.lora(r, alpha), theta)]


# -- the rest ----------------------------------------------------------------------------------------------------------


def _write_ia3(m: scaling.IA3, layer: Layer) -> State:
    refuse(
        not m.inputs and getattr(layer.module, "bias", None) is not None, "its IA3 scales the bias too, ours does not"
    )
    return {"ia3_l": m.l.view(1, -1) if m.inputs else m.l.view(-1, 1)}


def _read_ia3(_: Config, layer: Layer, state: State) -> Stack:
    inputs = len(state["ia3_l"]) == 1 and layer.out != 1
    refuse(not inputs and getattr(layer.module, "bias", None) is not None, "its IA3 scales the bias too, ours does not")
    return [(scaling.ia3(inputs), {"l": state["ia3_l"].flatten()})]


def _read_vera(config: Config, layer: Layer, state: State) -> Stack:
    r = len(state["vera_lambda_d"])
    refuse("vera_A" not in state, "this VeRA was saved without its projections (save_projection=False)")
    a, b = state["vera_A"][:, : layer.into], state["vera_B"][: layer.out]
    theta = {"A": a, "B": b, "b": state["vera_lambda_b"], "d": state["vera_lambda_d"]}
    return [(scaling.vera(r, seed=config.get("projection_prng_key", 0)), theta)]


def _read_loha(config: Config, layer: Layer, state: State) -> Stack:
    r, alpha = (setting(config, k, p, layer.path) for k, p in (("r", "rank_pattern"), ("alpha", "alpha_pattern")))
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    return [(hadamard.loha(r, alpha), {ours: state[theirs] for ours, theirs in names.items()})]


def _write_lokr(m: hadamard.LoKr, _: Layer) -> State:
    large: State = {"lokr_w2": m.D} if m.E is None else {"lokr_w2_a": m.D, "lokr_w2_b": m.E}
    return {"lokr_w1": m.C} | large


def _read_lokr(config: Config, layer: Layer, state: State) -> Stack:
    refuse("lokr_w1" not in state, "our LoKr has a whole small factor, and this one splits it (decompose_both)")
    refuse(config.get("decompose_factor", -1) != -1, "our LoKr splits the widths evenly (decompose_factor=-1)")
    r, alpha = (setting(config, k, p, layer.path) for k, p in (("r", "rank_pattern"), ("alpha", "alpha_pattern")))
    large = {"D": state["lokr_w2"]} if "lokr_w2" in state else {"D": state["lokr_w2_a"], "E": state["lokr_w2_b"]}
    return [(hadamard.lokr(r, alpha), {"C": state["lokr_w1"]} | large)]


def _read_miss(config: Config, _: Layer, state: State) -> Stack:
    kind = config.get("init_weights", True)
    refuse(kind not in (True, False, "bat"), f"init_weights={kind!r}")
    block = state["miss_block"]
    return (
        [(hadamard.bat(block.shape[-1]), {"B": block})]
        if kind == "bat"
        else [(hadamard.bone(len(block)), {"D": block})]
    )


def _read_hra(config: Config, _: Layer, state: State) -> Stack:
    refuse(config.get("apply_GS"), "our HRA does not orthogonalise its reflections (apply_GS)")
    return [(rotations.hra(state["hra_u"].shape[1]), {"u": state["hra_u"]})]


def _write_oft(m: rotations.OFT, layer: Layer) -> State:
    refuse(m.width != m.d, f"{layer.path}: blocks of {m.b} do not divide {m.d} inputs")
    q = m.q.view(m.d // m.b, -1)
    return {"oft_R.weight": -q if m.k is None else q}  # its exact map turns the other way than its series


def _config_oft(m: rotations.OFT) -> dict[str, Any]:
    refuse(m.k == 1, "its Cayley-Neumann series has two powers at least (k=2)")
    terms = {} if m.k is None else {"num_cayley_neumann_terms": m.k + 2}
    return {"r": 0, "oft_block_size": m.b, "use_cayley_neumann": m.k is not None} | terms


def _read_oft(config: Config, layer: Layer, state: State) -> Stack:
    q = state["oft_R.weight"]
    refuse(config.get("coft"), "our OFT is not constrained (coft)")
    refuse(config.get("block_share"), "our OFT does not share one block (block_share)")
    b = layer.into // len(q)
    if config.get("use_cayley_neumann", True):
        terms = config.get("num_cayley_neumann_terms", 5)
        refuse(terms < 3, f"num_cayley_neumann_terms={terms} leaves no more than I + 2 Q")
        return [(rotations.oft_v2(b, k=max(terms, 4) - 2), {"q": q.flatten()})]
    return [(rotations.oft(b), {"q": -q.flatten()})]


def _write_boft(m: rotations.OFT, layer: Layer) -> State:
    refuse(m.width != m.d, f"{layer.path}: blocks of {m.b} do not divide {m.d} inputs")
    i, j = torch.triu_indices(m.b, m.b, 1)
    r = m.q.new_zeros(m.m, m.d // m.b, m.b, m.b)
    r[..., i, j] = m.q.detach().view(m.m, m.d // m.b, -1)
    return {"boft_R": r.mT - r, "boft_s": m.q.new_ones(layer.out, 1)}


def _read_boft(_config: Config, _layer: Layer, state: State) -> Stack:
    r = state["boft_R"]
    b = r.shape[-1]
    i, j = torch.triu_indices(b, b, 1)
    turned: Stack = [(rotations.boft(b, len(r)), {"q": ((r.mT - r)[..., i, j] / 2).flatten()})]
    s = state["boft_s"].flatten()
    return turned if (s == 1).all() else [*turned, (scaling.ia3(), {"l": s})]  # peft learns a gain per output beside it


def _named(**names: str) -> tuple[tuple[str, ...], Callable[[Adapter, Layer], State]]:
    """θ whose tensors peft has in the same shape: peft's name by ours."""
    return tuple(names.values()), lambda m, _: {theirs: getattr(m, ours) for ours, theirs in names.items()}


LORA = Kind(
    "LORA",
    ("lora", "rslora", "dora", "lora_init", "pissa", "milora", "olora", "corda", "eva", "orthogonal_adaptation"),
    ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    _write_lora, _config_lora, _read_lora, ("r", "lora_alpha"),
)  # fmt: skip
KINDS = (
    LORA,
    Kind("IA3", ("ia3",), ("ia3_l",), _write_ia3, lambda _: {}, _read_ia3),
    Kind(
        "VERA", ("vera",), *_named(b="vera_lambda_b", d="vera_lambda_d"),
        lambda m: {"r": m.r, "d_initial": m.d_initial, "projection_prng_key": m.seed}, _read_vera,
    ),
    Kind(
        "LOHA", ("loha",), *_named(B1="hada_w1_a", A1="hada_w1_b", B2="hada_w2_a", A2="hada_w2_b"),
        lambda m: {"r": m.r, "alpha": m.scale * m.r}, _read_loha,
    ),
    Kind(
        "LOKR", ("lokr",), ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), _write_lokr,
        lambda m: {"r": m.r, "alpha": m.scale * m.r}, _read_lokr,
    ),
    Kind("MISS", ("bone",), *_named(D="miss_block"), lambda m: {"r": m.r}, _read_miss),
    Kind("MISS", ("bat",), *_named(B="miss_block"), lambda m: {"r": m.r, "init_weights": "bat"}, _read_miss),
    Kind("HRA", ("hra",), *_named(u="hra_u"), lambda m: {"r": m.r}, _read_hra),
    Kind("OFT", ("oft", "oft_v2"), ("oft_R.weight",), _write_oft, _config_oft, _read_oft),
    Kind(
        "BOFT", ("boft",), ("boft_R", "boft_s"), _write_boft,
        lambda m: {"boft_block_size": m.b, "boft_n_butterfly_factor": m.m}, _read_boft,
    ),
)  # fmt: skip


def kind_of(made: Stamp | None) -> Kind:
    """The kind that this method is written as."""
    name = made.name if made else "an adapter without a stamp"
    for kind in KINDS:
        if name in kind.makers:
            return kind
    written = ", ".join(maker for kind in KINDS for maker in kind.makers)
    raise ValueError(
        f"peft has no format for {name}; it has one for {written}. weights.to_lora writes any adapter as a plain LoRA"
    )
