"""Drawing: Vega-Lite layers to inline SVG, coloured by the page's own CSS variables."""

from __future__ import annotations

import html
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import vl_convert

from etude.race._model import Result, Standing

Spec = dict[str, Any]
Row = dict[str, Any]

COLOURS = 8
FONT = "Helvetica, Arial, sans-serif"
"""The figures are laid out by the measures of this font; the page falls back to one with the same."""
CONFIG: Spec = {
    "aria": False,
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    "text": {"fontSize": 13, "color": "var(--ink)"},
    "axis": {
        "labelColor": "var(--muted)", "titleColor": "var(--muted)", "gridColor": "var(--rule)", "labelFontSize": 12,
        "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8, "domain": False, "ticks": False,
        "labelPadding": 6, "labelLimit": 0, "titleLimit": 0,
    },
}  # fmt: skip


def ranked(result: Result) -> list[Standing]:
    """The baseline, then the best first and the failed last."""
    base, *others = result.standings
    return [base, *sorted(others, key=lambda s: rank(s, result.plan.minimize))]


def rank(standing: Standing, minimize: bool) -> tuple[bool, float]:
    """Best first, failed last: the few survivors of a failed contender may look the best."""
    return standing.word == "failed", (standing.difference or 0.0) * (1 if minimize else -1)


def shown(result: Result) -> list[str]:
    """The contenders with a colour of their own: all, or the baseline and the best where they are many."""
    names = result.plan.contenders
    return list(names) if len(names) <= COLOURS else [s.contender for s in ranked(result)[:COLOURS]]


def colour(result: Result, contender: str) -> str:
    """The contender's own colour; the baseline's is ink, and those beyond the palette share a faint one."""
    names = shown(result)
    return f"var(--c{names.index(contender)})" if contender in names else "var(--faint)"


def word_colour(word: str) -> str:
    """The colour of a verdict; words without one of their own are muted."""
    known = ("better", "worse", "equivalent", "under-tuned", "failed")
    return f"var(--{word})" if word in known else "var(--neutral)"


_CLIP = re.compile(r"\bclip\d+\b")
_LONG = re.compile(r"-?\d+\.\d{3,}")


def draw(layers: Sequence[Spec], width: int, height: int, label: str, room: Mapping[str, int] | None = None) -> str:
    """An inline SVG that scales with its column, one image to a screen reader.

    The axes are fitted into [width, height], or, with ``room``, stand around it in that many pixels a side.
    """
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": width, "height": height, "config": CONFIG, "layer": list(layers), "padding": dict(room) if room else 2,
        "autosize": {"type": "none"} if room else {"type": "fit", "contains": "padding"},
    }  # fmt: skip
    svg = vl_convert.vegalite_to_svg(spec)
    svg = re.sub(r' (xmlns(:xlink)?|version|class|role|aria-\w+|pointer-events)="[^"]*"', "", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: _LONG.sub(lambda n: f"{float(n[0]):.2f}", tag[0]), svg)
    clips = {old: str(i) for i, old in enumerate(dict.fromkeys(_CLIP.findall(svg)))}  # ids unique on the page,
    own = zlib.crc32((label + _CLIP.sub("", svg)).encode())  # and the same in every drawing of the same figure
    svg = _CLIP.sub(lambda m: f"c{own}-{clips[m[0]]}", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def layer(mark: str, rows: Iterable[Row], **encoding: Any) -> Spec:
    """One mark over some rows. Encodings: a field's name, or a channel; keys that start with _ belong to the mark."""
    settings = {k[1:]: v for k, v in encoding.items() if k.startswith("_")}
    channels = {k: v if isinstance(v, dict) else quantity(v) for k, v in encoding.items() if not k.startswith("_")}
    return {"mark": {"type": mark, **settings}, "data": {"values": list(rows)}, "encoding": channels}


def quantity(field: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": None, **more}


def end(field: str) -> Spec:
    return {"field": field}


def raw(field: str) -> Spec:
    """A field that already holds the colour or the text itself."""
    return {"field": field, "type": "nominal", "scale": None, "legend": None}
