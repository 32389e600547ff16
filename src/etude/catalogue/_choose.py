"""Which optimizer: a page's table of needs and the rules that speak of them, with the state that each keeps."""

from __future__ import annotations

from torch import nn

from etude import rules
from etude._method import methods
from etude.catalogue._find import find
from etude.catalogue._records import Record, records

NEEDS = (
    "matrices", "less memory", "no learning rate to tune", "no schedule", "without a warmup", "large batches",
    "loss spikes", "noise", "curvature", "language models", "convolutional networks", "recurrent networks",
    "sparse features", "fine-tuning", "continual learning",
)  # fmt: skip
"""What is asked for, in the words that `etude find` takes; "less memory" is answered by the bytes."""
MOST = 8
START, END = "<!-- which optimizer: written by `make docs` -->\n", "<!-- end of which optimizer -->\n"


def which_optimizer(needs: tuple[str, ...] = NEEDS) -> str:
    """The table as Markdown. Nobody answers it by hand: the docstrings do, and ``memory``."""
    among = [r for r in records() if r["room"] == "rules"]
    weighs = {r["name"]: _bytes(r["name"]) for r in among}
    lines = [
        f"{len(among)} rules, listed by `etude list --room rules`. By what they say they are good for, as `etude find`",
        "has it, each with its bytes of state for one weight of a 512 × 512 matrix in float32 (adamw: 8):",
        "", "| you look for | rules |", "|---|---|",
    ]  # fmt: skip
    for need in needs:
        found = _least(among, weighs) if need == "less memory" else find(need, among)
        told = [f"`{r['name']}` {_short(weighs[r['name']])}" for r in found[:MOST]]
        if told:
            lines.append(f"| {need} | {' · '.join(told)} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table between its two marks."""
    return between(page, START, which_optimizer(), END)


def between(page: str, start: str, text: str, end: str) -> str:
    """The page with this text between two marks of it."""
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no place for the table: a line {start.strip()} and later {end.strip()}")
    return f"{before}{start}{text}{end}{after}"


def _short(size: float) -> str:
    return f"{size:.2g}" if size >= 0.01 else "0"


def _least(among: list[Record], weighs: dict[str, float]) -> list[Record]:
    """The rules that keep least, those first that keep nothing for a weight."""
    return sorted(among, key=lambda r: weighs[r["name"]])


def _bytes(name: str) -> float:
    """Bytes of state for one weight of a hidden matrix."""
    hidden, head = nn.Linear(512, 512, bias=False, device="meta"), nn.Linear(512, 1, bias=False, device="meta")
    return rules.memory(methods()["rules", name].fn(), nn.Sequential(hidden, head)) / hidden.weight.numel()
