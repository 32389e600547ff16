"""Conversions that change nothing of what a model computes, on models of torch, etude, timm and transformers."""

import copy

import peers
import pytest
import torch
import transformers
from torch import nn

from etude import blocks, norms, rules

TOKENS = torch.arange(12).view(2, 6) % 11
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Torchs(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, d), nn.Parameter(torch.randn(1, 6, d))
        layer = nn.TransformerEncoderLayer(d, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(d), enable_nested_tensor=False)
        self.head = nn.Linear(d, 11)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens) + self.position))


class Ours(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(11, d), norms.layer_norm(d), nn.Linear(d, 11, bias=False)
        layers = (blocks.attention(d, 2), blocks.mlp(d), blocks.attention(d, 2), blocks.mlp(d, activation=nn.GELU))
        self.blocks = nn.Sequential(*(blocks.pre_ln(d, f) for f in layers))

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def vit(**options):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return peers.timm_model("vision_transformer").VisionTransformer(**sizes, **options)


def gpt2(head=True, tied=False):
    size = {"vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    ends = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tied}
    return (transformers.GPT2LMHeadModel if head else transformers.GPT2Model)(transformers.GPT2Config(**size, **ends))


MODELS = {
    "torch": (Torchs, TOKENS),
    "etude": (Ours, TOKENS),
    "timm": (vit, IMAGES),
    "timm that pools": (lambda: vit(global_pool="avg"), IMAGES),
    "timm with registers": (lambda: vit(reg_tokens=2, no_embed_class=True, qk_norm=True), IMAGES),
    "transformers": (gpt2, TOKENS),
}
every = pytest.mark.parametrize("name", MODELS)


def built(name, dtype=torch.float64):
    make, x = MODELS[name] if isinstance(name, str) else (name, TOKENS)
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        nn.init.normal_(p, 0.1, 0.25)
    return model.to(dtype), x if x.dtype == torch.long else x.to(dtype)


def out(model, x):
    y = model(x)
    return (y if torch.is_tensor(y) else y[0]).detach()


def kinds(model):
    return sorted({type(m).__name__ for m in norms.layers(model).values()})


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("convert", [norms.pre_rms_norm, norms.pre_crms_norm, norms.fold])
@every
def test_pre_rms_norm_pre_crms_norm_and_fold_leave_the_function_of_every_model(name, convert, dtype, near):
    model, x = built(name, dtype)
    want, params, training = out(model, x), [*model.parameters()], [m.training for m in model.modules()]
    converted = convert(model, x)
    assert len(converted) >= 3
    assert (out(model, x) - want).abs().max() <= near * max(1.0, want.abs().max().item())
    assert {*map(id, params)} >= {*map(id, model.parameters())} or convert is not norms.pre_rms_norm
    assert [m.training for m in model.modules()][:1] == training[:1]
    y = model(x)
    (y if torch.is_tensor(y) else y[0]).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()


@every
def test_pre_rms_norm_makes_the_mean_of_the_stream_zero(name):
    model, x = built(name)
    means, stream = [], norms.pre_rms_norm(model, x)
    assert len(stream) == 5, "qk-norms read no stream and stay"
    for n in stream:
        norm = model.get_submodule(n)
        assert (norm.center, norm.modulation) == (False, "scale and shift")
        norm.register_forward_pre_hook(lambda _, args: means.append(args[0].mean(-1).abs().max().item()))
    out(model, x)
    assert len(means) == 5
    assert max(means) < 1e-14
    if "registers" not in name:
        with pytest.raises(ValueError, match="there is no layer norm to convert"):
            norms.pre_rms_norm(model, x)


def test_pre_rms_norm_subtracts_the_mean_of_what_is_written_and_of_nothing_else():
    model, x = built(Ours)
    before = copy.deepcopy(model)
    norms.pre_rms_norm(model, x)
    for n, p in model.named_parameters():
        was = before.get_parameter(n)
        writes = n.endswith((".out.weight", ".out.bias", ".down.weight", ".down.bias", "embedding.weight"))
        axis = -1 if n == "embedding.weight" or p.ndim == 1 else 0
        torch.testing.assert_close(p, was - was.mean(axis, keepdim=True) if writes else was, msg=n)


def test_pre_crms_norm_makes_the_stream_and_its_matrices_one_entry_narrower():
    model, x = built(Ours)
    assert norms.pre_crms_norm(model, x) == ["norm"] + [f"blocks.{i}.norm_in" for i in range(4)]
    assert kinds(model) == ["TokenNorm"]
    assert [repr(m) for m in norms.layers(model).values()] == ["TokenNorm(crms, 15, eps=1e-05)"] * 5
    assert {m.weight.shape[1] for m in (model.embedding, model.head, model.blocks[0].f.q)} == {15}
    assert (model.blocks[1].f.up.in_features, model.blocks[1].f.down.out_features) == (15, 15)
    assert (model.embedding.embedding_dim, model.blocks[0].f.q.out_features) == (15, 16)


def test_pre_crms_norm_restores_the_entry_where_a_matrix_cannot_be_narrower():
    model, x = built("torch")
    norms.pre_crms_norm(model, x)
    first = model.encoder.layers[0]
    assert first.self_attn.in_proj_weight.shape == (48, 16)
    assert type(first.norm1).__name__ == "Restored"
    assert (first.self_attn.out_proj.weight.shape, first.linear1.weight.shape) == ((15, 16), (32, 15))


def test_pre_rms_norm_and_crms_norm_refuse_what_they_do_not_know():
    class Scaled(Ours):
        def forward(self, tokens):
            return self.head(self.norm(self.embedding(tokens) * torch.linspace(0.5, 1, 16, dtype=torch.float64)))

    class Gated(Ours):
        def forward(self, tokens):
            return self.head(self.norm(2 * self.blocks[0](self.embedding(tokens)).relu()))

    class Leaking(Ours):
        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.head(self.norm(x)), x

    class Peeking(Ours):
        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.head(self.norm(x)) + self.head(x.sigmoid())

    class Buffered(Ours):
        def forward(self, tokens):
            return self.head(self.norm(self.embedding(tokens) + torch.ones(16, dtype=torch.float64)))

    class Post(Ours):
        def forward(self, tokens):
            return self.head(self.norm(self.blocks[0].norm_in(self.embedding(tokens)).tanh()))

    reasons = {
        Scaled: "at norm, Mul writes to it",
        Gated: "the stream is read by Add",
        Leaking: "the stream is an output of the model",
        Peeking: "the stream is read by Sigmoid",
        Buffered: "at norm, something that no parameter made is written to it",
        lambda: gpt2(tied=True): "transformer.wte.weight is read by T",
        lambda: nn.Sequential(nn.Embedding(11, 4), nn.RMSNorm(4)): "there is no layer norm to convert in Sequential",
    }
    for make, why in reasons.items():
        for convert in (norms.pre_rms_norm, norms.pre_crms_norm):
            model, x = built(make)
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(ValueError, match=why) as caught:
                convert(model, x)
            assert "\n" not in str(caught.value)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model, x = built(Post)  # the first norm reads a stream, the second something bent
    want = out(model, x)
    assert norms.pre_rms_norm(model, x) == ["blocks.0.norm_in"]
    torch.testing.assert_close(out(model, x), want)


def test_pre_crms_norm_takes_everything_back_when_the_model_cannot_run_with_it():
    model, x = built(lambda: gpt2(head=False))
    state, shown = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(ValueError, match="GPT2Model does not run any more when it is converted: shape"):
        norms.pre_crms_norm(model, x)
    assert repr(model) == shown
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_pre_crms_norm_comes_before_the_optimizer():
    for convert in (norms.pre_rms_norm, norms.pre_crms_norm, norms.fold):
        model, x = built(Ours)
        opt = rules.optimizer(model, rules.adamw())
        with pytest.raises(ValueError, match="an optimizer already trains this Ours"):
            convert(model, x)
        del opt
