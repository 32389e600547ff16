"""How a race's numbers are written: as many digits as the uncertainty earns, true minus signs, units that fit."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from etude.race._asked import MOST
from etude.race._model import Plan, Result, Standing
from etude.race._remarks import remarks
from etude.race.verdict import DIFFERENT

Pair = tuple[float, float]
NAMED = 6
"""Contenders that a sentence names; beyond, the last are counted."""


def number(value: float, half: float | None = None, signed: bool = False) -> str:
    """A value to two digits of its half-width, else to three of its own: ``number(-8.31, 2.7)`` is "−8.3"."""
    sign = "+" if signed and value > 0 else ""
    size = max(half, abs(value) * 1e-5) if half else abs(value) / 10
    decimals = 2 if size == 0 or not math.isfinite(size) else max(0, 1 - math.floor(math.log10(size)))
    shown = f"{value:{sign}.{decimals}f}" if decimals <= 6 else f"{value:{sign}.2e}"
    return shown.replace("-", "−" if float(shown) else "").replace("+", "+" if float(shown) else "")


def with_interval(value: float | None, interval: Pair | None, signed: bool = False, unit: str = "") -> str:
    """``0.0312 [0.0290, 0.0334]``, or a dash."""
    if value is None:
        return "–"
    if interval is None:
        return number(value, signed=signed) + unit
    half = (interval[1] - interval[0]) / 2
    low, high = (number(end, half, signed) for end in interval)
    return f"{number(value, half, signed)}{unit} [{low}, {high}]"


def scale(base: Standing) -> tuple[float, str]:
    """The factor and unit of differences: percent of the baseline's mean, or the metric itself where that is 0."""
    return (100 / abs(base.mean), " %") if base.mean else (1.0, "")


def difference(standing: Standing, base: Standing) -> str:
    """``−8.3 % [−11.1, −5.6]``: the paired difference with its 95 % interval."""
    factor, unit = scale(base)
    if standing.difference is None or standing.difference_interval is None:
        return "–"
    low, high = standing.difference_interval
    return with_interval(factor * standing.difference, (factor * low, factor * high), signed=True, unit=unit)


def seconds(value: float | None) -> str:
    """Three digits and the unit that fits: ``812 µs``, ``1.35 ms``, ``12.1 s``, ``3.4 min``, ``2.1 h``."""
    if value is None:
        return "–"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value / 3600:.3g} h"


def size(value: int | None) -> str:
    """Bytes in powers of 1,000: ``24.6 kB``."""
    if value is None:
        return "–"
    power = min(4, int(math.log10(value) / 3)) if value else 0
    return f"{value / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def ratio(value: float | None, base: float | None) -> str:
    """``1.32×``, or a dash."""
    return f"{value / base:.2f}×" if value is not None and base else "–"


def rate(lr: float) -> str:
    """A learning rate to two digits: ``0.0032``, ``1e-05``."""
    return f"{lr:.2g}"


def chosen(standing: Standing) -> str:
    """The learning rate taken, a star where it is at the edge; a dash where none is known or every one has failed."""
    if not standing.lr or (standing.tuned and all(mean is None for _, mean in standing.tuned)):
        return "–"
    return rate(standing.lr) + "*" * standing.at_edge


def watched(plan: Plan) -> str:
    """The metric of tuning and of the curves, never of test data: ``validation loss``, or a command's own name."""
    data, _, name = plan.metric.partition(" ")
    return f"validation {name}" if data in ("test", "validation") and name else plan.metric


def folded(name: str, width: int) -> str:
    """A name in lines of at most ``width``: broken after spaces, commas and parentheses, if need be after ``=``."""
    parts = re.findall(r"[^\s,(]*[\s,(]*", name)
    fitting = [[part] if len(part.rstrip()) <= width else re.split("(?<==)", part) for part in parts]
    lines = [""]
    for part in itertools.chain(*fitting):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def chance(p: float | None) -> str:
    """``p = .031`` style, without the letter: ``0.031``, ``< 0.0001``."""
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def headline(result: Result) -> list[tuple[str, str]]:
    """The verdict in sentences, each with the word it speaks of, best news first."""
    base, *others = result.standings
    none = "no significant difference from"
    forms = {
        "better": ("is better than {}", "are better than {}"),
        "equivalent": ("is equivalent to {}", "are equivalent to {}"),
        "no significant difference": (f"shows {none} {{}}", f"show {none} {{}}"),
        "worse": ("is worse than {}", "are worse than {}"),
        "under-tuned": ("is behind {} but under-tuned", "are behind {} but under-tuned"),
        "failed": ("failed", "failed"),
    }
    sentences = [("failed", f"The baseline {base.contender} failed.")] if base.word == "failed" else []
    for word, form in forms.items():
        mine = [s for s in others if s.word == word]
        mine.sort(key=lambda s: s.difference or 0.0, reverse=not result.plan.minimize)
        names = [f"{s.contender} ({_short(s, base)})" if word in ("better", "worse") else s.contender for s in mine]
        if len(names) > NAMED:
            names = [*names[: NAMED - 1], f"{len(names) - NAMED + 1} others"]
        if names:
            said = form[len(names) > 1].format(base.contender)
            sentences.append((word, f"{listed(names)} {said}."))
    return sentences


def _short(standing: Standing, base: Standing) -> str:
    return difference(standing, base).partition(" [")[0]


def notes(result: Result) -> list[tuple[str, str]]:
    """What must be read with the verdict, as (kind, line): the A/A control, the visible, the open, the failed."""
    base, *others = result.standings
    lines = [("bad" if result.aa.word == DIFFERENT else "aa", _control(result))]
    factor, unit = scale(base)
    visible = sorted(factor * s.visible for s in others if s.visible and s.word != "failed")
    if visible:
        span = [number(visible[0], visible[0]), number(visible[-1], visible[-1])]
        shown = span[0] if span[0] == span[1] else " to ".join(span)
        lines.append(("visible", f"This race could see differences of {shown}{unit} and more (80 % power)."))
    if said := _open(result):
        lines.append(("open", f"{said}."))
    if result.looks:
        counts = listed([f"{n}" for n in result.looks])
        lines.append(("bad", f"Judged before at {counts} seeds: p-values are of a single look."))
    if twins := [s.contender for s in others if s.difference == 0 and s.values == base.values]:
        what = f"{listed(twins)}: the very numbers of {base.contender} on every seed; did it take effect?"
        lines.append(("bad", what))
    if result.plan.metric.startswith("validation ") or (base.tuned and not result.plan.steps):
        lines.append(("shared", "No test data: learning rates and verdict are taken on the same validation data."))
    if base.at_edge:
        lines.append(("bad", f"{base.contender}'s lr is at the edge of its grid; mistrust “better”."))
    lines += [("bad", line) for s in result.standings if (line := failed_runs(s))]
    return lines + remarks(result)


def _open(result: Result) -> str:
    """How many more seeds would decide what is undecided, and what all contenders' runs on them would cost."""
    (base, *others), plan = result.standings, result.plan
    each = {s.contender: plan.seconds_per_run.get(s.contender, s.seconds or 0.0) for s in result.standings}
    a_seed = (sum(each.values()) + each[base.contender]) / plan.workers  # the A/A control runs on more seeds too
    some, never = list[tuple[int, str]](), list[str]()
    for s in others:
        if s.word != "no significant difference" or s.failures or base.failures or not s.difference:
            continue  # decided, or nothing that more seeds would mend
        if s.more is None or len(plan.final_seeds) + s.more > MOST:
            never.append(s.contender)
        else:
            cost = f" ({seconds(s.more * a_seed)})" if a_seed else ""
            some.append((s.more, f"{s.contender}{cost}"))
    rest = len(some) - NAMED + 1 if len(some) > NAMED else 0
    some = sorted(some)[: NAMED - 1] if rest else some
    first = f"About {some[0][0]:,} more seed{'s' * (some[0][0] > 1)} would probably decide " if some else ""
    said = [f"{first}{some[0][1]}", *(f"about {n:,} {name}" for n, name in some[1:])] if some else []
    said += [f"more for {rest} others"] * bool(rest)
    if len(never) > NAMED:
        never = [*never[: NAMED - 1], f"{len(never) - NAMED + 1} others"]
    no = [f"{'no' if some else 'No'} number of seeds this race allows would decide {listed(never)}"] if never else []
    return "; ".join([", ".join(said)] * bool(said) + no)


def failed_runs(standing: Standing) -> str:
    """``sgd: 10 of 10 final runs failed (diverged at step 120: loss is nan)``, or nothing."""
    if not standing.failures:
        return ""
    reasons = sorted({line.partition(": ")[2] for line in standing.failures})
    more = f"; {len(reasons) - 1} more" if len(reasons) > 1 else ""
    many = f"{len(standing.failures)} of {len(standing.values)} final runs failed"
    return f"{standing.contender}: {many} ({reasons[0]}{more})."


def _control(result: Result) -> str:
    if not result.plan.aa_seeds:
        return "No A/A control: etude did not train these runs."
    p = "" if result.aa.p is None else f" (p = {chance(result.aa.p)})".replace("= <", "<")
    failed = f" {len(result.aa.failures)} of its runs failed." if result.aa.failures else ""
    return f"A/A control: {result.aa.word}{p}.{failed}"
