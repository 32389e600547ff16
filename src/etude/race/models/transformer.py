"""Transformers from the parts of `etude.blocks`: a causal one over tokens, and one over the patches of an image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from etude.blocks import attention, pre_ln
from etude.race.models.mlp import MakeNorm, Place

MakeAttention = Callable[..., nn.Module]
"""(d, heads, causal=…) → the module that mixes tokens: `blocks.attention`, `blocks.qk_norm`, …"""


def _layers(
    d: int, heads: int, depth: int, causal: bool, norm: MakeNorm, place: Place, mixer: MakeAttention
) -> nn.Sequential:
    """``depth`` × (attention, then two linear layers four times as wide between), each placed; one norm at the end."""
    parts: list[nn.Module] = []
    for _ in range(depth):
        wide = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        parts += [place(d, mixer(d, heads, causal=causal), norm), place(d, wide, norm)]
    return nn.Sequential(*parts, norm(d))


class GPT(nn.Module):
    """Logits of the next token at every place. tokens: [b, t], t ≤ ``context``; the result: [b, t, vocabulary]."""

    def __init__(
        self,
        vocabulary: int,
        context: int = 128,
        d: int = 64,
        heads: int = 4,
        depth: int = 2,
        *,
        norm: MakeNorm = nn.LayerNorm,
        place: Place = pre_ln,
        mixer: MakeAttention = attention,
    ):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.layers = _layers(d, heads, depth, True, norm, place, mixer)
        self.head = nn.Linear(d, vocabulary, bias=False)
        for weight in (self.token.weight, self.position.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[-1]]
        return self.head(self.layers(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Square patches as tokens, the mean over them, a head. x: [b, c, size, size]; the result: [b, classes]."""

    def __init__(
        self,
        size: int,
        patch: int,
        c: int,
        classes: int,
        d: int = 48,
        heads: int = 4,
        depth: int = 2,
        *,
        norm: MakeNorm = nn.LayerNorm,
        place: Place = pre_ln,
        mixer: MakeAttention = attention,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patches of {patch} pixels do not tile an image of {size}")
        self.patches = nn.Unfold(patch, stride=patch)
        self.token, self.position = nn.Linear(c * patch**2, d), nn.Embedding((size // patch) ** 2, d)
        self.layers = _layers(d, heads, depth, False, norm, place, mixer)
        self.head = nn.Linear(d, classes)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.token(self.patches(x).mT) + self.position.weight
        return self.head(self.layers(tokens).mean(1))  # type: ignore[no-any-return]
