"""Deterministic weights that pass signals on: partial identities, and Hadamard matrices where the width grows."""

from __future__ import annotations

import torch
from torch import Tensor

from etude._linalg import hadamard
from etude._method import method


@method(
    "Zhao et al. 2021, ZerO Initialization: Initializing Neural Networks with only Zeros and Ones, arXiv:2110.12661"
)
def zero_init(w: Tensor) -> Tensor:
    """W = I where out ≤ in, else the top left corner of 2^(-c/2) H, H Sylvester's Hadamard matrix, c = ⌈log₂ out⌉.

    w: [out, in, *k]; a convolution holds the matrix at the centre k//2 of its kernel and zeros elsewhere. The paper
    also zeros biases and the last transform of each residual block; that needs the model and is not done here.
    """
    if w.ndim < 2:
        raise ValueError(f"zero_init needs a weight [out, in, …], got shape {list(w.shape)}; leave vectors out")
    m, n = w.shape[:2]
    if m <= n:
        matrix = torch.eye(m, n)
    else:  # the first n columns of order 2^c repeat those of the smallest order q ≥ n: no [2^c, 2^c] is built
        q = 1 << (n - 1).bit_length()
        matrix = hadamard(q)[:, :n].repeat(-(-m // q), 1)[:m] / 2 ** ((m - 1).bit_length() / 2)
    fresh = torch.zeros_like(w)
    centre = fresh
    for k in reversed(w.shape[2:]):
        centre = centre.select(-1, k // 2)
    centre.copy_(matrix)
    return fresh
