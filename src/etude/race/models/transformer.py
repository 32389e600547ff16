"""Transformers from the parts of `etude.blocks`: a causal one over tokens, and one over the patches of an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from etude.blocks import attention, mlp, pre_ln
from etude.race.models.mlp import MakeNorm, Place, placed

MakeAttention = Callable[..., nn.Module]
"""(d, heads, causal=…) → the module that mixes tokens: `blocks.attention`, `blocks.qk_norm`, …"""
MakeMlp = Callable[[int], nn.Module]
"""d → the module that acts on each token: `blocks.mlp`, `blocks.swiglu`, …"""
gelu_mlp = partial(mlp, activation=nn.GELU)


def transformer_layers(
    d: int, heads: int, depth: int, causal: bool, norm: MakeNorm, place: Place, mixer: MakeAttention, network: MakeMlp
) -> nn.Sequential:
    """``depth`` × (attention, then the network of each token), each placed; one norm at the end."""
    parts = (
        placed(place, d, f, norm=norm, layer=layer, layers=depth)
        for layer in range(1, depth + 1)
        for f in (mixer(d, heads, causal=causal), network(d))
    )
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
        network: MakeMlp = gelu_mlp,
    ):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.layers = transformer_layers(d, heads, depth, True, norm, place, mixer, network)
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
        network: MakeMlp = gelu_mlp,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patches of {patch} pixels do not tile an image of {size}")
        self.patches = nn.Unfold(patch, stride=patch)
        self.token, self.position = nn.Linear(c * patch**2, d), nn.Embedding((size // patch) ** 2, d)
        self.layers = transformer_layers(d, heads, depth, False, norm, place, mixer, network)
        self.head = nn.Linear(d, classes)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.token(self.patches(x).mT) + self.position.weight
        return self.head(self.layers(tokens).mean(1))  # type: ignore[no-any-return]
