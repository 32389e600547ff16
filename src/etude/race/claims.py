"""What papers claim, as races: the claim in own words, the task on which it can be tried, and the verdict so far."""

from __future__ import annotations

import importlib.resources
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude import recipes
from etude._words import nearest
from etude.race import _text
from etude.race._errors import InputError, RaceError, one_line
from etude.race._model import Result
from etude.race.tasks import find_task

Verdict = Mapping[str, Any]
STORE = "claims.json"
OPEN = ("no significant difference", "under-tuned", "failed")


@dataclass(frozen=True)
class Claim:
    """``contenders``: baseline first; the claim is about the second. ``holds``: the words that would bear it out.

    ``size``: at what size it is tried here, against that of the paper.
    """

    name: str
    paper: str
    says: str
    task: str
    contenders: tuple[str, ...]
    holds: tuple[str, ...]
    size: str
    seeds: int = 10

    @property
    def command(self) -> str:
        """The one command that tries it."""
        return f"etude race {self.task} {shlex.join(self.contenders)} --seeds {self.seeds}"

    @property
    def lacks(self) -> str:
        """What of it this etude does not have, or nothing."""
        try:
            find_task(self.task)
            for contender in self.contenders:
                recipes.parse(contender)
        except (InputError, ValueError, TypeError) as error:
            return one_line(error).partition(";")[0]
        return ""

    def word(self, verdict: Verdict | None) -> str:
        """``holds here``, ``does not hold here``, ``open`` or ``not yet run``."""
        if verdict is None:
            return "not yet run"
        word = verdict["standings"][1]["word"]
        return "holds here" if word in self.holds else "open" if word in OPEN else "does not hold here"


CLAIMS = (
    Claim(
        "dyt-layernorm", "Zhu et al. 2025, Transformers without Normalization, arXiv:2503.10622",
        "A network with a scaled tanh in place of each norm trains as well as one with LayerNorm.",
        "digits:vit", ("adamw", "adamw + dyt"), ("better", "equivalent"),
        "a ViT of two blocks on 8 × 8 digits, for ViT, DiT and LLaMA up to 70B in the paper",
    ),
    Claim(
        "dyt-layernorm-bytes", "Zhu et al. 2025, Transformers without Normalization, arXiv:2503.10622",
        "The same, for a causal language model.",
        "bytes", ("adamw", "adamw + dyt"), ("better", "equivalent"),
        "a causal transformer of width 64 on the bytes of the standard library, for LLaMA 7B to 70B in the paper",
    ),
    Claim(
        "derf-layernorm", "Chen et al. 2025, Stronger Normalization-Free Transformers, arXiv:2512.10938",
        "erf(αx + s) in place of a norm does better than LayerNorm, RMSNorm and DyT.",
        "digits:vit", ("adamw", "adamw + derf", "adamw + dyt"), ("better",),
        "a ViT of two blocks on 8 × 8 digits, for ViT, DiT and GPT-2 in the paper",
    ),
    Claim(
        "rmsnorm-layernorm", "Zhang & Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467",
        "Leaving the mean out of LayerNorm costs nothing in quality.",
        "bytes", ("adamw", "adamw + rms_norm"), ("better", "equivalent"),
        "a causal transformer of width 64, for translation and reading models in the paper",
    ),
    Claim(
        "muon-adamw", "Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, "
        "https://kellerjordan.github.io/posts/muon/",
        "Momentum made orthogonal trains hidden matrices better than AdamW in the same number of steps.",
        "bytes", ("adamw", "muon"), ("better",),
        "a causal transformer of width 64, for GPT-2 124M to 1.5B in the paper",
    ),
    Claim(
        "lion-adamw", "Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675",
        "The sign of an interpolated momentum does better than AdamW, with half of its state.",
        "digits:vit", ("adamw", "lion"), ("better",),
        "a ViT of two blocks at batch 32, for ViTs at batch 4096 in the paper, which says that it gains with the batch",
    ),
    Claim(
        "lamb-adamw", "You et al. 2019, Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, "
        "arXiv:1904.00962",
        "A step as long as the layer's weights serves large batches, and costs nothing at small ones.",
        "digits", ("adamw", "lamb"), ("better", "equivalent"),
        "an MLP at batch 32: the small end alone, for BERT at batches above 32,000 in the paper",
    ),
    Claim(
        "sam-sgd", "Foret et al. 2020, Sharpness-Aware Minimization for Efficiently Improving Generalization, "
        "arXiv:2010.01412",
        "The gradient at the worst point nearby finds weights that generalise better than the plain gradient does.",
        "digits:conv", ("sgd(momentum=0.9)", "sgd(momentum=0.9) + sam"), ("better",),
        "a small residual network on 8 × 8 digits, for WideResNets on CIFAR in the paper; it takes twice the "
        "seconds",
    ),
    Claim(
        "swa-sgd", "Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, "
        "arXiv:1803.05407",
        "The mean of the weights of the last part of training generalises better than the last weights.",
        "digits:conv", ("sgd(momentum=0.9)", "sgd(momentum=0.9) + swa(start=400)"), ("better",),
        "a small residual network under a linear decay, for CIFAR networks under a high constant rate in the paper",
    ),
    Claim(
        "decay-decoupled", "Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization, arXiv:1711.05101",
        "Weight decay apart from the gradient generalises better than no decay under Adam.",
        "tabular:diabetes", ("adam", "adamw(weight_decay=0.1)"), ("better",),
        "a residual MLP on 442 patients, for ResNets on CIFAR in the paper",
    ),
    Claim(
        "cautious-adamw", "Liang et al. 2024, Cautious Optimizers: Improving Training with One Line of Code, "
        "arXiv:2411.16085",
        "Leaving out the coordinates in which update and gradient disagree speeds AdamW up at no cost.",
        "bytes", ("adamw", "cautious"), ("better",),
        "a causal transformer of width 64, for LLaMA pre-training in the paper",
    ),
    Claim(
        "weight-norm", "Salimans & Kingma 2016, Weight Normalization: A Simple Reparameterization to Accelerate "
        "Training of Deep Neural Networks, arXiv:1602.07868",
        "Length and direction of each row as parameters of their own speed training up.",
        "photo", ("adamw", "adamw + weight_norm"), ("better",),
        "a coordinate network on one photograph, for CIFAR networks and DRAW in the paper",
    ),
)  # fmt: skip


def claim(name: str) -> Claim:
    """The claim of that name."""
    found = {c.name: c for c in CLAIMS}
    if name not in found:
        raise InputError(f"no claim {name!r}; nearest: {nearest(name, found)}; etude claims lists them")
    return found[name]


def _store() -> Path:
    return Path(str(importlib.resources.files("etude.race"))) / STORE


def stored() -> dict[str, Verdict]:
    """Claim → the verdict of its last race that was kept."""
    file = _store()
    held: dict[str, Verdict] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return held


def summary(result: Result) -> dict[str, Any]:
    """A race in short: what is kept of it beside a claim."""
    plan = result.plan
    return {
        "task": plan.task, "metric": plan.metric, "steps": plan.steps, "seeds": len(plan.final_seeds),
        "aa": result.aa.word, "etude": result.lock.get("etude"), "torch": result.lock.get("torch"),
        "device": result.lock.get("device"),
        "standings": [
            {
                "contender": s.contender, "word": s.word, "mean": s.mean, "difference": s.difference,
                "interval": s.difference_interval, "p_holm": s.p_holm,
                "shown": "" if s is result.standings[0] else _text.difference(s, result.standings[0]),
            }
            for s in result.standings
        ],
    }  # fmt: skip


def keep(name: str, result: Result) -> None:
    """Store the verdict of a claim in the package's own data."""
    held = {**stored(), claim(name).name: summary(result)}
    ordered = {c.name: held[c.name] for c in CLAIMS if c.name in held}
    try:
        text = json.dumps(ordered, indent=1, ensure_ascii=False) + "\n"
        _store().write_text(text, encoding="utf-8")
    except OSError as error:
        raise RaceError(f"cannot write {_store()}: {error.strerror or error}") from error


def markdown() -> str:
    """The page ``docs/claims.md``."""
    held = stored()
    run = sum(c.name in held for c in CLAIMS)
    lines = [
        "# What papers claim, tried at the size of a laptop",
        "",
        f"{len(CLAIMS)} claims, {run} of them raced so far. Each is tried by one command, at an equal tuning budget "
        "and on fresh paired seeds; `etude claims NAME` shows it, with `--run` it races it. A claim that does "
        "not hold here may hold at the size of its paper: the third column tells both.",
        "",
        "This page is written by `etude claims --markdown` from `etude/race/claims.py` and the verdicts beside it.",
        "",
        "| claim | in own words | tried on | verdict |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| [{c.name}](#{c.name}) | {c.says} | {c.size} | **{c.word(held.get(c.name))}** |" for c in CLAIMS]
    for c in CLAIMS:
        lines += ["", f"## {c.name}", "", c.paper, "", c.says, "", f"- race: `{c.command}`", f"- size: {c.size}"]
        lines += [f"- borne out by: {' or '.join(c.holds)}", f"- verdict: {c.word(held.get(c.name))}"]
        lines += _shown(held[c.name]) if c.name in held else []
    return "\n".join(lines) + "\n"


def _shown(verdict: Verdict) -> list[str]:
    base, *others = verdict["standings"]
    told = [f"{s['contender']} is {s['word']}: {s['shown']} against {base['contender']}" for s in others]
    machine = f"etude {verdict['etude']}, torch {verdict['torch']}, {verdict['device']}"
    return [f"- {line}" for line in told] + [f"- {verdict['seeds']} seeds; A/A: {verdict['aa']}; {machine}"]
