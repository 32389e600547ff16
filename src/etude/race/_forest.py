"""The forest plot: every contender's paired difference from the baseline, its intervals, its seeds and its word."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence

from etude.race._draw import Row, Spec, draw, end, layer, quantity, rank, raw, word_colour
from etude.race._model import Result, Standing
from etude.race._text import difference, scale

Pair = tuple[float, float]
WIDE, NARROW = 872, 356
"""Pixels: the column of the page, and of a phone."""
MANY = 12
"""Contenders above which the rows stand closer."""


def forest(result: Result, wide: bool) -> str:
    """Paired differences from the baseline with their intervals, seeds as dots, the verdict beside; best on top."""
    base, *others = result.standings
    others.sort(key=lambda s: rank(s, result.plan.minimize))
    factor, unit = scale(base)
    rope = result.plan.rope * abs(base.mean or 0.0) * factor
    paired, dense = result.plan.paired, len(others) > MANY
    span = _span(others, base, factor, rope, paired)
    bars = [_bar(i, s, base, span, 2 if dense else 3) for i, s in enumerate(others)]
    left = 26 + round(9 * max(len(line) for bar in bars for line in bar["name"].split("\n"))) if wide else 2
    right = 26 + round(max(max(8.8 * len(bar["word"]), 7.6 * len(bar["numbers"])) for bar in bars)) if wide else 2
    row = (42 if dense else 58) if wide else 92
    width, height = (WIDE if wide else NARROW) - left - right, row * len(bars)
    better = "left" if result.plan.minimize else "right"
    title = f"difference from {base.contender}{', % of its ' + result.plan.metric if unit else ''}: {better} is better"
    x = quantity(
        "x", axis={"title": _folded(title, width), "grid": False, "tickCount": 7 if wide else 5},
        scale={"domain": list(span), "nice": False},
    )  # fmt: skip
    y = quantity("row", axis=None, scale={"domain": [-0.5, len(bars) - 0.5], "reverse": True, "nice": False})
    layers = [
        layer("rect", [{"x": -rope, "x2": rope}], x=x, x2=end("x2"), y=_at(0), y2=_at(height), _color="var(--band)"),
        layer("rule", [{"row": i - 0.5} for i in range(len(bars) + 1)], y=y, _color="var(--rule)"),
        layer("rule", [{"x": 0}], x=x, _color="var(--ink)", _strokeWidth=1),
        *_marks(bars, _dots(bars, others, base, span) if paired else [], x, y, 0 if wide else 14),
        *(_beside(bars, left, width, y) if wide else _above(bars, width, y)),
    ]
    spoken = "; ".join(f"{s.contender} {difference(s, base)}, {s.word}" for s in others)
    room = {"left": left, "right": right, "top": 4, "bottom": 50 if len(title) * 6.2 < width else 66}
    return draw(
        layers,
        width,
        height,
        f"{'Paired differences' if paired else 'Differences'} from {base.contender}: {spoken}",
        room,
    )


def _folded(title: str, width: int) -> list[str]:
    return textwrap.wrap(title, max(20, round(width / 6.2)))


def _marks(bars: list[Row], dots: list[Row], x: Spec, y: Spec, down: int) -> list[Spec]:
    """The t interval with its mean, the bootstrap-t interval under it, the seeds under both."""
    known = [bar for bar in bars if bar["low"] is not None]
    boots = [bar for bar in known if bar["blow"] is not None]
    inside = [bar for bar in known if not bar["outside"]]
    arrows, thin = (
        [bar | {"x": where, "text": text} for bar in known for where, text in bar[ends]] for ends in ("arrows", "thin")
    )
    own = raw("colour")
    return [
        layer("circle", dots, x=x, y=y, color=own, _size=26, _opacity=0.42, _yOffset=down + 12),
        layer(
            "rule", boots, x=x | {"field": "blow"}, x2=end("bhigh"), y=y, color=own, _strokeWidth=1.2, _yOffset=down + 3
        ),
        layer(
            "rule", known, x=x | {"field": "low"}, x2=end("high"), y=y, color=own, _strokeWidth=3.5, _yOffset=down - 3
        ),
        layer("circle", inside, x=x, y=y, color=own, _size=120, _opacity=1, _yOffset=down - 3),
        layer("text", arrows, x=x, y=y, text=raw("text"), color=own, _fontSize=15, _yOffset=down - 3),
        layer("text", thin, x=x, y=y, text=raw("text"), color=own, _fontSize=9, _yOffset=down + 3),
    ]


def _dots(bars: list[Row], others: Sequence[Standing], base: Standing, span: Pair) -> list[Row]:
    """The difference on every seed that lies within the axis."""
    factor, _ = scale(base)
    seeds = [(bar, factor * d) for bar, s in zip(bars, others) for d in _differences(s, base)]
    return [{"row": bar["row"], "x": d, "colour": bar["colour"]} for bar, d in seeds if span[0] <= d <= span[1]]


def _differences(standing: Standing, base: Standing) -> list[float]:
    return [x - y for x, y in zip(standing.values, base.values) if x is not None and y is not None]


def _span(others: Sequence[Standing], base: Standing, factor: float, rope: float, paired: bool = True) -> Pair:
    """The axis: wide enough for every contender but those far outside, whose bars end in an arrow."""
    known = [s for s in others if s.difference_interval]
    reach = [[*(s.difference_interval or ()), *(_differences(s, base) if paired else ())] for s in known]
    sizes = [max(map(abs, ends)) for ends in reach]
    usual = [factor * end for ends, size in zip(reach, sizes) if size <= 4 * statistics.median(sizes) for end in ends]
    low, high = min([*usual, -1.5 * rope]), max([*usual, 1.5 * rope])
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _bar(i: int, s: Standing, base: Standing, span: Pair, lines: int = 3) -> Row:
    """One row of the forest, its name in so many ``lines``; ends beyond the axis are cut and carry an arrow."""
    factor, _ = scale(base)
    name = "\n".join(textwrap.wrap(s.contender, 24, max_lines=lines, placeholder=" …"))
    bar: Row = {"row": i, "name": name, "word": s.word, "colour": word_colour(s.word), "low": None, "blow": None}
    failed = f"{len(s.failures)} of {len(s.values)} runs failed"
    bar["numbers"] = failed if s.word == "failed" or s.difference is None else difference(s, base)
    if s.difference is None or s.difference_interval is None:
        return bar
    bar |= {"x": factor * s.difference, "outside": not span[0] <= factor * s.difference <= span[1]}
    bar["low"], bar["high"], bar["arrows"] = _cut(s.difference_interval, factor, span)
    bar["thin"] = []
    if s.bootstrap_interval is not None:
        bar["blow"], bar["bhigh"], bar["thin"] = _cut(s.bootstrap_interval, factor, span)
    return bar


def _cut(interval: Pair, factor: float, span: Pair) -> tuple[float, float, list[tuple[float, str]]]:
    """The part of an interval within the axis, and an arrow for each end beyond it."""
    low, high = (factor * end for end in interval)
    arrows = [(span[0], "◀")] * (low < span[0]) + [(span[1], "▶")] * (high > span[1])
    return min(max(low, span[0]), span[1]), max(min(high, span[1]), span[0]), arrows


def _at(value: float) -> Spec:
    return {"value": value}


def _beside(bars: list[Row], left: int, width: int, y: Spec) -> list[Spec]:
    """The name at the edge of the page, word and numbers to the right of the plot."""
    start, right = _at(-left), _at(width + 20)
    word: Spec = {"_fontSize": 14, "_fontWeight": "bold"}
    return [
        layer("text", bars, x=start, y=y, text=raw("name"), _align="left", _baseline="middle", _lineBreak="\n", **word),
        layer("text", bars, x=right, y=y, text=raw("word"), color=raw("colour"), _align="left", _yOffset=-9, **word),
        layer("text", bars, x=right, y=y, text=raw("numbers"), _align="left", _yOffset=11, _color="var(--muted)"),
    ]


def _above(bars: list[Row], width: int, y: Spec) -> list[Spec]:
    """Name, word and numbers over the bar, for a narrow page."""
    bars = [bar | {"name": textwrap.shorten(bar["name"], 44, placeholder=" …")} for bar in bars]
    left, right = _at(0), _at(width)
    bold: Spec = {"_fontSize": 14, "_fontWeight": "bold", "_align": "left"}
    return [
        layer("text", bars, x=left, y=y, text=raw("name"), _yOffset=-31, **bold),
        layer("text", bars, x=left, y=y, text=raw("word"), color=raw("colour"), _yOffset=-12, **bold),
        layer("text", bars, x=right, y=y, text=raw("numbers"), _align="right", _yOffset=-12, _color="var(--muted)"),
    ]
