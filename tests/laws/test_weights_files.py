"""What is written for others and for later: θ by version, peft's folders, plain LoRA for serving, codes for weights."""

import copy
import json

import pytest
import safetensors.torch
import torch
from scipy.stats import norm
from torch import nn

from etude import rules, weights
from etude._roles import roles

peft = pytest.importorskip("peft")
F64 = torch.float64


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()


IDS = torch.arange(12).view(2, 6)


def logits(model):
    return model(IDS).logits.detach()


def stirred(model):
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, weights.Adapter):
            for p in module.parameters(recurse=False):
                nn.init.normal_(p, std=0.3)
    return model


SHARED = {
    "lora": (weights.lora(r=2, alpha=3.0), lambda: peft.LoraConfig(r=2, lora_alpha=3)),
    "rslora": (weights.rslora(r=2, alpha=3.0), lambda: peft.LoraConfig(r=2, lora_alpha=3, use_rslora=True)),
    "dora": (weights.dora(r=2, alpha=3.0), lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True)),
    "pissa": (weights.pissa(r=2, alpha=3.0), lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa")),
    "olora": (weights.olora(r=2, alpha=3.0), lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="olora")),
    "oft": (weights.oft(4), lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False)),
    "oft_v2": (weights.oft_v2(4, k=3), lambda: peft.OFTConfig(r=0, oft_block_size=4)),
    "boft": (weights.boft(4, m=1), lambda: peft.BOFTConfig(boft_block_size=4)),
    "hra": (weights.hra(r=2), lambda: peft.HRAConfig(r=2)),
    "vera": (weights.vera(r=4), lambda: peft.VeraConfig(r=4)),
    "loha": (weights.loha(r=2, alpha=3.0), lambda: peft.LoHaConfig(r=2, alpha=3)),
    "lokr": (weights.lokr(r=1, alpha=3.0), lambda: peft.LoKrConfig(r=1, alpha=3)),
    "ia3": (weights.ia3(), lambda: peft.IA3Config(feedforward_modules=[])),
    "bone": (weights.bone(r=2), lambda: peft.MissConfig(r=2)),
    "bat": (weights.bat(r=2), lambda: peft.MissConfig(r=2, init_weights="bat")),
}  # fmt: skip
every_shared = pytest.mark.parametrize("map, config", SHARED.values(), ids=SHARED.keys())
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


@quiet
@every_shared
def test_peft_reads_what_we_write(map, config, tmp_path):
    ours = stirred(weights.put(llama(), map, on="*.[qv]_proj"))
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)
    weights.save_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)


@quiet
@every_shared
def test_we_read_what_peft_writes(map, config, tmp_path):
    config = config()
    config.target_modules = {"q_proj", "v_proj"}
    theirs = peft.get_peft_model(llama(), config)
    torch.manual_seed(7)
    for p in theirs.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    theirs.eval().save_pretrained(tmp_path)
    ours = weights.load_peft(llama(), tmp_path, name="theirs")
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    weights.save(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(weights.load(llama(), tmp_path / "ours")), logits(ours))
    weights.remove(ours)
    assert torch.equal(logits(ours), logits(llama()))


@quiet
def test_a_dora_of_peft_scaled_by_the_root_of_its_rank_is_read(tmp_path):
    config = peft.LoraConfig(r=3, use_dora=True, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = weights.load_peft(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


@quiet
@pytest.mark.parametrize("m, block", [(2, 4), (3, 2)])
def test_a_butterfly_of_peft_is_read_as_its_own_layer_computes_it(m, block, tmp_path, monkeypatch):
    """Without a GPU peft keeps one factor; told that it has its kernel, it makes them all, and computes without it."""
    import peft.tuners.boft.layer as theirs

    monkeypatch.setattr(theirs, "get_fbd_cuda", lambda: True)
    plain = nn.Sequential(nn.Linear(16, 8))
    config = peft.BOFTConfig(boft_block_size=block, boft_n_butterfly_factor=m, target_modules=["0"])
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    layer = model.base_model.model[0]
    for p in (layer.boft_R["default"], layer.boft_s["default"]):
        nn.init.normal_(p, std=0.3)
    layer.fbd_cuda_available = False
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        r = layer.cayley_batch(layer.boft_R["default"].view(-1, block, block)).view(m, -1, block, block)
        diagonal = torch.stack([torch.block_diag(*factor) for factor in r])
        turns = layer.boft_P @ diagonal @ layer.boft_P.mT
        whole = turns[0]
        for turn in turns[1:]:
            whole = turn @ whole
        w = layer.boft_s["default"] * (plain[0].weight @ whole.mT).mT.mT
    torch.testing.assert_close(weights.load_peft(plain, tmp_path)[0].weight, w, rtol=1e-5, atol=1e-5)


@quiet
def test_a_vera_of_peft_whose_layers_differ_in_shape_is_read(tmp_path):
    theirs = peft.get_peft_model(llama(), peft.VeraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]))
    for p in theirs.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    theirs.eval().save_pretrained(tmp_path)
    ours = weights.load_peft(llama(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    other = weights.put(llama(), weights.vera(r=4), on="*.[qv]_proj")
    with pytest.raises(ValueError, match="cuts the projections of all layers from one"):
        weights.save_peft(weights.put(llama(), weights.vera(r=4), on="*_proj"), tmp_path / "no")
    assert torch.equal(logits(other), logits(llama())), "no base drawn from a seed was overwritten"


@quiet
def test_a_conv1d_and_an_embedding_go_to_peft_and_back(tmp_path):
    ours = gpt2()
    ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach().clone())
    ours.config.tie_word_embeddings = False
    base = copy.deepcopy(ours)
    stirred(weights.put(ours, weights.lora(r=2), on=["*.c_attn", "*.c_fc", "*.wpe"]))
    weights.save_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    again = weights.load_peft(copy.deepcopy(base), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-4, atol=1e-5)


@quiet
def test_ranks_that_differ_by_layer_go_to_peft_and_back(tmp_path):
    draw = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 13, (4, 6), generator=draw)} for _ in range(4)]
    ours = stirred(weights.put(llama(), weights.eva(r=2), on="*_proj", batches=batches))
    ranks = [m.r for m in ours.modules() if isinstance(m, weights.Adapter)]
    assert len(set(ranks)) > 1
    weights.save_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(weights.load_peft(llama(), tmp_path)), logits(ours), rtol=1e-4, atol=1e-5)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(F64)


@pytest.mark.parametrize(
    "make, line",
    [
        (lambda: weights.put(net(), weights.fourierft(n_frequency=3)), "has no format for fourierft"),
        (lambda: weights.put(net(), weights.ia3()), "scales the bias too"),
        (lambda: weights.put(net(), weights.oft(5)), "blocks of 5 do not divide 6 inputs"),
        (
            lambda: weights.put(weights.put(net(), weights.lora(), name="a"), weights.lora(), name="b"),
            "choose one with",
        ),
        (lambda: weights.put(weights.put(net(), weights.lora(), on="0"), weights.hra(), on="2"), "holds one kind"),
        (lambda: weights.put(weights.put(net(), weights.hra(2), on="0"), weights.hra(4), on="2"), "has one setting"),
        (lambda: weights.put(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), weights.lora(), on="0"), "know no groups"),
    ],
)
def test_what_peft_has_no_place_for_is_refused(make, line, tmp_path):
    with pytest.raises(ValueError, match=line) as raised:
        weights.save_peft(make(), tmp_path / "no")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "change, line",
    [
        ({"peft_type": "LILY"}, "LILY has no equal here"),
        ({"init_lora_weights": "corda"}, "'corda' changed the base"),
        ({"bias": "all"}, "holds biases"),
        ({"modules_to_save": ["head"]}, "holds whole layers"),
    ],
)
def test_a_folder_of_peft_that_has_no_equal_is_refused(change, line, tmp_path):
    weights.save_peft(weights.put(net(), weights.lora(r=2)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    bare = net()
    with pytest.raises(ValueError, match=line):
        weights.load_peft(bare, tmp_path)
    assert not hasattr(bare[0], "parametrizations")


# -- serving ----------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("name", ["lora", "pissa", "hra", "bone", "ia3", "oft", "lora_xs"])
def test_any_adapter_is_served_as_a_plain_lora(name, tmp_path):
    ours = stirred(weights.put(llama(), getattr(weights, name)(), on="*.[qv]_proj"))
    fits = weights.to_lora(ours, tmp_path, tol=1e-6)
    assert set(fits) == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv"}
    assert max(fit.error for fit in fits.values()) <= 1e-6
    served = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(served), logits(ours), rtol=1e-4, atol=1e-5)


def test_to_lora_finds_the_rank_and_states_the_error(tmp_path):
    model = stirred(weights.put(weights.put(net(), weights.lora(r=2), name="a"), weights.hra(r=2), name="b"))
    w, w0 = model[2].weight.detach(), model[2].parametrizations.weight.original
    s = torch.linalg.svdvals(w - w0)
    assert weights.to_lora(model, tmp_path)["2.weight"] == (4, pytest.approx(0, abs=1e-6))
    rank, error = weights.to_lora(model, tmp_path, rank=3)["2.weight"]
    assert (rank, error) == (3, pytest.approx((s[3:].norm() / s.norm()).item()))
    again = weights.load_peft(net(), tmp_path)[2]
    assert ((again.weight - w).norm() / (w - w0).norm()).item() == pytest.approx(error)
    loose = weights.to_lora(model, tmp_path, tol=0.9)["2.weight"]
    assert loose.rank == 1
    weights.disable(model, "b")
    assert weights.to_lora(model, tmp_path, name="a")["0.weight"].rank == 2
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        weights.to_lora(model, tmp_path, rank=0)


# -- θ by version -----------------------------------------------------------------------------------------------------


def test_a_file_of_the_first_format_is_read_and_one_of_a_later_is_refused(tmp_path):
    model = stirred(weights.put(net(), weights.lora(r=2), on="0"))
    lora, file = model[0].parametrizations.weight[0], tmp_path / "one.safetensors"
    entry = {
        "weight": "0.weight", "name": "old", "room": "weights", "method": "lora", "knobs": {"r": 2, "alpha": 16.0}
    }  # fmt: skip
    theta = {"0.A": lora.A.detach(), "0.B": lora.B.detach()}
    safetensors.torch.save_file(theta, file, {"etude.weights": "1", "maps": json.dumps([entry])})
    x = torch.randn(3, 6, dtype=F64)
    torch.testing.assert_close(weights.load(net(), file)(x), model(x))
    safetensors.torch.save_file(theta, file, {"etude.weights": "99", "maps": json.dumps([entry])})
    with pytest.raises(ValueError, match="in format 99, and this etude reads up to 2: update it"):
        weights.load(net(), file)


def test_a_file_read_on_a_model_without_storage_keeps_its_numbers(tmp_path):
    model = stirred(weights.put(net(), weights.pissa(r=2)))
    file = weights.save(model, tmp_path)
    with torch.device("meta"):
        hollow = net()
    weights.load(hollow, file)
    original = {f"{i}.weight": f"{i}.parametrizations.weight.original" for i in (0, 2)}
    base = {original.get(k, k): v for k, v in net().state_dict().items()}
    assert not hollow.load_state_dict(base, strict=False, assign=True).unexpected_keys
    x = torch.randn(3, 6, dtype=F64)
    torch.testing.assert_close(hollow(x), model(x))


# -- codes ------------------------------------------------------------------------------------------------------------


def big(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 3)).to(dtype)


def test_quantize_in_8_bits_rounds_to_127ths_of_the_largest_of_a_block():
    model, plain = big(F64), big(F64)
    error = weights.quantize(model, bits=8, block=10)["0.weight"]
    blocks = plain[0].weight.detach().view(-1, 10)
    for b, got in zip(blocks.tolist(), model[0].weight.detach().view(-1, 10).tolist()):
        top = max(map(abs, b))
        assert got == pytest.approx([round(x / top * 127) / 127 * top for x in b], abs=1e-7)
    w = plain[0].weight
    assert error == pytest.approx(((model[0].weight - w).norm() / w.norm()).item(), rel=1e-4)


def test_quantize_in_4_bits_takes_the_nearest_of_the_normal_floats_of_qlora():
    """The levels are made as QLoRA's: quantiles of a normal, 8 above zero, 7 below, and zero, scaled to 1."""
    above, below = (norm.ppf(torch.linspace(0.9677083, 0.5, n, dtype=F64)[:-1]) for n in (9, 8))
    levels = torch.tensor(sorted([*above, 0.0, *-below]), dtype=F64)
    levels /= levels.abs().max()
    model, plain = big(F64), big(F64)
    weights.quantize(model, block=8)
    blocks = plain[2].weight.detach().view(-1, 8)
    top = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / top)[..., None].sub(levels).abs().argmin(-1)
    torch.testing.assert_close(model[2].weight.detach().view(-1, 8), levels[nearest] * top, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits, worst", [(8, 0.01), (4, 0.12)])
def test_adapters_train_on_codes_and_merge_into_weights_that_round_again(bits, worst):
    model, x = big(), torch.randn(5, 100)
    errors = weights.quantize(model, bits=bits)
    assert set(errors) == {"0.weight", "2.weight"}
    assert 0 < max(errors.values()) < worst
    assert roles(model)["0.parametrizations.weight.original"] == "hidden"
    held = sum(t.numel() * t.element_size() for t in [*model[0].parameters(), *model[0].buffers()])
    assert held < (64 * 100 * bits / 8 + 64 * 100 / 64 * 4 + 64 * 4 + 100)
    weights.put(model, weights.lora(r=4))
    opt = rules.optimizer([p for p in model.parameters() if p.requires_grad], rules.sgd(lr=0.1))
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    y = model(x)
    merged = weights.merge(copy.deepcopy(model))
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), y)
    assert torch.equal(weights.unmerge(copy.deepcopy(merged))(x), y)
    again = weights.quantize(merged, bits=bits)
    assert 0 < max(again.values()) < worst


def test_codes_are_not_kept_as_weights_for_the_backward():
    model, kept = big(), []
    weights.put(model, weights.lora(r=4), on="2", name="none")
    weights.remove(model)
    weights.quantize(model, bits=4)
    weights.put(model, weights.lora(r=4))
    x = torch.randn(5, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = model(x)
    assert max(kept) <= 64 * 100 / 2
    (g,) = torch.autograd.grad(y.sum(), x)
    merged = weights.merge(model)
    (h,) = torch.autograd.grad(merged(x).sum(), x)
    torch.testing.assert_close(g, h)


def test_codes_go_through_state_dict_and_deepcopy():
    model, other = big(), big()
    weights.quantize(model)
    for p in other.parameters():
        nn.init.zeros_(p)
    weights.quantize(other)
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 100)
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_quantize_refuses_what_it_cannot_do():
    for ask, line in [
        ({"bits": 3}, "choose 8 or 4"),
        ({"block": 7}, "must be even"),
        ({"on": "*.bias"}, "selects no w"),
    ]:
        with pytest.raises(ValueError, match=line):
            weights.quantize(big(), **ask)
    with pytest.raises(ValueError, match="carries maps: quantize before them"):
        weights.quantize(weights.put(big(), weights.lora()))
    model = big()
    opt = rules.optimizer(model, rules.adamw())
    with pytest.raises(ValueError, match=r"weights\.quantize takes a parameter out"):
        weights.quantize(model)
    assert isinstance(model[0].weight, nn.Parameter)
    weights.quantize(model, optimizer=opt)
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
