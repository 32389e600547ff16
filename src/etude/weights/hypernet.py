"""Weights that another network makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from etude._method import method


class MagnitudeInvariantHypernetwork(nn.Module):
    """gamma: [inputs] or [b, inputs] → {name: a parameter of the main network, with b in front where there is one}."""

    def __init__(self, model: nn.Module, inputs: int, hidden: Sequence[int]):
        super().__init__()
        if inputs < 1:
            raise ValueError(f"magnitude_invariant_hypernetwork needs inputs of at least 1, got {inputs}")
        own = {n: p.detach() for n, p in model.named_parameters()}
        if not own:
            raise ValueError(f"{type(model).__name__} has no parameters to predict")
        self.inputs, self.shapes = inputs, {n: p.shape for n, p in own.items()}
        widths = [2 * inputs, *hidden]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [_linear(a, b, "leaky_relu"), nn.LeakyReLU()]
        self.hidden = nn.Sequential(*layers)
        self.out = _linear(widths[-1], sum(p.numel() for p in own.values()), "linear")
        with torch.no_grad():
            self.out.bias.copy_(torch.cat([p.flatten() for p in own.values()]))

    def forward(self, gamma: Tensor) -> dict[str, Tensor]:
        if gamma.shape[-1:] != (self.inputs,):
            raise ValueError(f"the hypernetwork has {self.inputs} inputs, but gamma has shape {list(gamma.shape)}")
        angle = gamma * (math.pi / 2)
        theta: Tensor = self.out(self.hidden(torch.cat([angle.cos(), angle.sin()], -1)))
        parts = torch.split(theta, [s.numel() for s in self.shapes.values()], -1)
        return {n: part.reshape(*gamma.shape[:-1], *s) for (n, s), part in zip(self.shapes.items(), parts)}


def _linear(d: int, out: int, nonlinearity: str) -> nn.Linear:
    layer = nn.Linear(d, out)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity=nonlinearity)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)
    return layer


@method(
    "Gonzalez Ortiz et al. 2023, Magnitude Invariant Parametrizations Improve Hypernetwork Learning, arXiv:2304.07645"
)
def magnitude_invariant_hypernetwork(
    model: nn.Module, inputs: int = 1, hidden: tuple[int, ...] = (16, 64, 128)
) -> MagnitudeInvariantHypernetwork:
    """θ(γ) = θ₀ + W h(E(γ)), E(γ) = [cos(π γ / 2), sin(π γ / 2)], h an MLP of LeakyReLUs and γ: [.., inputs] in [0, 1].

    ‖E‖ is √inputs for every γ, where γ itself would set the scale of what is predicted, and so of the gradients. θ₀ is
    learned, from the parameters ``model`` has; W is drawn N(0, 1 / |θ|). ``torch.func.functional_call(model, h(γ), x)``
    runs the model on the prediction.
    """
    return MagnitudeInvariantHypernetwork(model, inputs, hidden)
