"""norms.fold: what a norm multiplies and adds goes into the matrices beside it; models keep their function."""

import pytest
import torch
from torch import nn

from etude import norms

TOKENS = torch.arange(12).view(2, 6) % 11
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def out(model, x):
    return model(x).detach()


def learned(model, x, steps=3):
    for _ in range(steps):
        model.train()(x + torch.rand_like(x))
    return model.eval()


class Convolutional(nn.Module):
    """conv–norm pairs of every kind; the last norm has no matrix before it."""

    def __init__(self, norm=nn.BatchNorm2d, padding=0):
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.b, self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=4), norm(8)
        self.c, self.cn = nn.Conv2d(8, 6, 1), norm(6)
        self.dn, self.d = norm(6), nn.Conv2d(6, 4, 3, padding=padding)

    def forward(self, x):
        x = self.cn(self.c(self.bn(self.b(self.an(self.a(x)).relu())).relu()))
        return self.d(self.dn(x.relu())).mean((2, 3))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, norms.batch_norm])
def test_fold_puts_a_batch_norm_into_the_convolution_before_it_or_after_it(norm):
    model = learned(Convolutional(norm).double(), IMAGES.double())
    for m in (model.an, model.bn, model.cn, model.dn):
        nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    want = out(model, IMAGES.double())
    assert norms.fold(model, IMAGES.double()) == ["an", "bn", "cn", "dn"]
    assert norms.layers(model) == {}
    torch.testing.assert_close(out(model, IMAGES.double()), want, rtol=1e-12, atol=1e-12)
    padded = learned(Convolutional(norm, padding=1).double(), IMAGES.double())
    nn.init.normal_(padded.dn.bias)  # at the border the convolution would see 0, not the shift
    assert norms.fold(padded, IMAGES.double()) == ["an", "bn", "cn"]


def test_fold_puts_a_unified_norm_into_the_linear_layer_after_it():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model = nn.Sequential(norms.unified_norm(6), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    learned(model, x)
    nn.init.normal_(model[0].weight), nn.init.normal_(model[0].bias)
    x.requires_grad_()
    want = out(model, x)
    assert norms.fold(model, x) == ["0"]
    assert isinstance(model[0], nn.Identity)
    torch.testing.assert_close(out(model, x), want, rtol=1e-12, atol=1e-12)


def test_fold_of_two_norms_around_one_linear_layer_adds_up():
    torch.manual_seed(0)
    x = torch.randn(7, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)).double()
    learned(model, x)
    for p in model.parameters():
        nn.init.normal_(p)
    want = out(model, x)
    assert norms.fold(model, x) == ["1", "3"]
    assert repr(model[1]) == 'Norm("... d -> ...", 6, eps=1e-05, modulation="none")'
    torch.testing.assert_close(out(model, x), want, rtol=1e-12, atol=1e-12)


def test_fold_leaves_a_norm_that_something_else_reads_and_says_why_if_that_is_all():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, tokens):
            y = self.norm(self.embedding(tokens))
            return self.head(y), y

    for make, why in (
        (Twice, "norm has no linear layer of its own beside it"),
        (lambda: nn.Sequential(nn.Embedding(11, 4)), "no norm with a weight$"),
    ):
        model = make()
        with pytest.raises(ValueError, match=why):
            norms.fold(model, TOKENS)


def test_fold_where_only_what_is_named():
    model = nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    assert norms.fold(model, TOKENS, where="3") == ["3"]
    assert isinstance(model[1], nn.LayerNorm)
    with pytest.raises(ValueError, match="no norm with a weight named '7'"):
        norms.fold(model, TOKENS, where="7")


def test_fold_leaves_a_matrix_alone_that_has_another_use():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.embedding.weight
            nn.init.normal_(self.norm.weight)

        def forward(self, tokens):
            return self.head(self.norm(self.embedding(tokens)))

    with pytest.raises(ValueError, match="norm has no linear layer of its own beside it"):
        norms.fold(Tied(), TOKENS)
