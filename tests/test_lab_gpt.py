"""lab.gpt: equal to Hugging Face's GPT-2, in logits and gradients; what it reads, counts and refuses.

The comparisons need a package that the course does not: uv run --with transformers pytest -k hugging_face
"""

import copy
import math
from types import SimpleNamespace

from lab.attention import causal_mask
from lab.gpt import GPT, SIZES, block, initialise
from lab.influence import influence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#         V, T,  C, H, L
ODD = [(2, 1, 2, 1, 1), (37, 13, 12, 3, 3), (101, 24, 40, 5, 2), (65, 31, 66, 11, 4), (300, 17, 20, 1, 7)]
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
NAMES = {  # Hugging Face's -> the lab's; the queries', keys' and values' are one there and three here
    "transformer.wte.": "tokens.",
    "transformer.wpe.": "places.",
    "transformer.ln_f.": "norm.",
    "transformer.h.": "blocks.",
    "ln_1.": "attention.norm.",
    "attn.c_proj.": "attention.sublayer.output.",
    "ln_2.": "feed_forward.norm.",
    "mlp.c_fc.": "feed_forward.sublayer.0.",
    "mlp.c_proj.": "feed_forward.sublayer.2.",
}


def scattered(model: nn.Module, std: float = 0.3) -> nn.Module:
    """The model with all weights random, those of norms too, so that none passes for another."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            weight.copy_(std * torch.randn_like(weight) + norm)
    return model


# ── Hugging Face ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers: uv run --with transformers pytest")


def theirs(transformers, V: int, T: int, C: int, H: int, L: int) -> nn.Module:
    """Hugging Face's GPT-2, as it starts."""
    ends = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": C, "n_head": H, "n_layer": L}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).eval()


def named_as_here(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or gradients of them, under the lab's names; they keep (inputs, outputs)."""
    found = {}
    for name, weight in weights.items():
        if name == "lm_head.weight":  # the same as wte.weight
            continue
        weight = weight.t() if ".c_" in name else weight
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "c_attn" in name:
            for part, third in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                found[name.replace("attn.c_attn", f"attention.sublayer.{part}")] = third
        else:
            found[name] = weight
    return found


def copied(model: nn.Module) -> GPT:
    """The lab's GPT with their weights, every one of them."""
    config, like = model.config, model.lm_head.weight
    ours = GPT(config.vocab_size, config.n_positions, config.n_embd, config.n_head, config.n_layer)
    ours.to(like.dtype).load_state_dict(named_as_here(model.state_dict()))
    return ours


@pytest.mark.parametrize("sizes", ODD)
@pytest.mark.parametrize("seed", range(3))
def test_hugging_face_has_the_same_logits(transformers, sizes, seed):
    torch.manual_seed(seed)
    model = theirs(transformers, *sizes)
    for std in (None, 0.1):  # as they start, and with all weights random
        model = model if std is None else scattered(model, std)
        ours = copied(model)
        for B, T in ((1, sizes[1]), (3, max(1, sizes[1] - 1)), (2, 1)):
            ids = torch.randint(sizes[0], (B, T))
            with torch.no_grad():
                torch.testing.assert_close(ours(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", ODD)
def test_hugging_face_has_the_same_gradients(transformers, sizes):
    torch.manual_seed(0)
    model = scattered(theirs(transformers, *sizes)).double()
    ours, ids = copied(model), torch.randint(sizes[0], (3, sizes[1]))
    logits, wanted = ours(ids), model(ids).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    slope = torch.randn_like(logits)
    logits.backward(slope), wanted.backward(slope)
    found = {name: weight.grad for name, weight in ours.named_parameters()}
    expected = named_as_here({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_hugging_face_has_the_same_logits_at_full_size(transformers):
    torch.manual_seed(0)
    model, ids = theirs(transformers, 50_257, 1_024, **SIZES["gpt2"]), torch.randint(50_257, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(copied(model)(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


def test_hugging_face_starts_alike(transformers):
    sizes = (500, 300, 64, 2, 6)
    torch.manual_seed(0)
    here, there = GPT(*sizes).state_dict(), named_as_here(theirs(transformers, *sizes).state_dict())
    for name, weight in here.items():
        assert weight.std().item() == pytest.approx(there[name].std().item(), rel=0.05), name
        assert weight.mean().item() == pytest.approx(there[name].mean().item(), abs=0.002), name


# ── By itself ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", SIZES)
def test_sizes_to_the_last_parameter(size):
    with torch.device("meta"):
        model = GPT(50_257, 1_024, **SIZES[size])
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[size]


@pytest.mark.parametrize("sizes", [(5, 1, 2, 1, 1), (11, 6, 12, 3, 3), (3, 5, 10, 1, 2)])
def test_it_looks_only_back(sizes):
    torch.manual_seed(0)
    model, (V, T, *_) = scattered(GPT(*sizes).double()), sizes
    ids = torch.stack([torch.arange(T), torch.arange(1, T + 1)]) % V  # no two neighbours are alike
    triangle = torch.block_diag(causal_mask(T), causal_mask(T)).long()
    assert torch.equal(influence(model, ids), triangle)
    attention = model.blocks[-1].attention.sublayer  # where no residual connection adds the diagonal
    given = []
    attention.register_forward_hook(lambda module, inputs, output: given.append(output))
    assert torch.equal(influence(lambda ids: (model(ids), given[-1])[1], ids), triangle)


@pytest.mark.parametrize("cut", [(1,) * 13, (13,), (5, 8), (1, 6, 1, 5)])
def test_a_cache_changes_nothing(cut):
    torch.manual_seed(0)
    model, ids = scattered(GPT(37, 13, 12, 3, 3).double()), torch.randint(37, (2, 13))

    class Kept:
        def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if hasattr(self, "k"):
                k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            self.k, self.v = k, v
            return k, v

    cache = SimpleNamespace(length=0, blocks=[Kept() for _ in model.blocks])
    pieces = [model(piece, cache) for piece in ids.split(cut, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-10, atol=1e-10)
    assert cache.length == 13
    with pytest.raises(ValueError, match="14 tokens, but places for only 13"):
        model(ids[:, :1], cache)
    assert cache.length == 13
    assert cache.blocks[0].k.shape == (2, 3, 13, 4)


def test_too_long_a_text():
    model = GPT(37, 13, 12, 3, 3)
    assert model(torch.zeros(2, 13, dtype=torch.long)).shape == (2, 13, 37)
    with pytest.raises(ValueError, match="14 tokens, but places for only 13"):
        model(torch.zeros(2, 14, dtype=torch.long))


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="12 numbers cannot be shared by 5 heads"):
        GPT(37, 13, 12, 5, 3)


def test_its_settings_and_weights_build_it_again():
    torch.manual_seed(0)
    model = scattered(GPT(37, 13, 12, 3, 3, dropout=0.1)).eval()
    again = GPT(**model.settings).eval()
    again.load_state_dict(model.state_dict())
    ids = torch.randint(37, (2, 13))
    assert torch.equal(again(ids), model(ids))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))
    assert again.settings == {"V": 37, "T": 13, "C": 12, "H": 3, "L": 3, "dropout": 0.1}


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    model, ids = GPT(37, 13, 12, 3, 3, dropout=0.5), torch.randint(37, (2, 13))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_a_block_is_pytorchs():
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": nn.GELU("tanh")}
    layer = scattered(nn.TransformerEncoderLayer(12, 3, 48, **options).double())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    ours = block(12, 3).double().copy(layer)
    torch.testing.assert_close(ours(x, causal=True), layer(x, ~causal_mask(7)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("std", [0.02, 0.06])
def test_initialisation(std):
    torch.manual_seed(0)
    L = 8
    model = scattered(GPT(400, 300, 64, 2, L), std=9.0)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
    initialise(model, std)
    for name, weight in model.named_parameters():
        into_stream = name.endswith(("output.weight", "feed_forward.sublayer.2.weight"))
        if weight.ndim > 1:
            wanted = std / math.sqrt(2 * L) if into_stream else std
            assert weight.std().item() == pytest.approx(wanted, rel=0.05), name
        else:
            assert torch.equal(weight, torch.full_like(weight, "norm.weight" in name)), name
    ids = torch.randint(400, (4, 300))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(400) + 64 * std**2 / 2, abs=0.03)
