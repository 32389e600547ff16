"""How a block is played: one training pass with gradients; parameters are drawn by their names."""

import copy
import inspect
import zlib

import torch
from torch import nn


def make(method, **knobs):
    required = {"d": 72, "f": nn.Tanh()}  # 72 divides into 8 heads and into 9
    names = inspect.signature(method.fn).parameters
    return method.fn(**{k: v for k, v in required.items() if k in names} | knobs)


def play(value):
    block = copy.deepcopy(value).double().train()
    d = next(block.parameters()).shape[-1]
    with torch.no_grad():
        for name, p in block.named_parameters():
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            p.add_(0.3 * drawn) if p.ndim < 2 else p.copy_(drawn / d**0.5)
    x = torch.randn(2, 5, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)  # dropout
    y = block(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    return torch.cat([t.detach().flatten() for t in (y, *grads)])


TURNS = {
    "pre_ln.norm": ({}, {"norm": nn.RMSNorm}),
    "post_ln.norm": ({}, {"norm": nn.RMSNorm}),
    "peri_ln.norm": ({}, {"norm": nn.RMSNorm}),
    "peri_ln.norm_out": ({}, {"norm_out": nn.Identity}),
}
