"""lab.transformer: the blocks against PyTorch's own, the whole against what it may read and how it writes."""

import math

from lab.attention import MultiHeadAttention, causal_mask, padding_mask
from lab.influence import influence
from lab.positions import sinusoids
from lab.transformer import DecoderBlock, EncoderBlock, FeedForward, PostNorm, PreNorm, SwiGLU, Transformer

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SHAPES = [(1, 1, 1, 2, 1), (2, 5, 3, 6, 3), (3, 4, 7, 8, 2), (2, 9, 6, 20, 4)]  # B, T, S, C, H
ORDERS = pytest.mark.parametrize("residual", [PreNorm, PostNorm])


@pytest.fixture(params=range(2), autouse=True)
def in_float64(request):
    """Every test on two seeds, in double precision."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def scattered(module: nn.Module) -> nn.Module:
    """The module with all weights random, those of norms too."""
    for name, weight in module.named_parameters():
        weight.data = torch.randn_like(weight) / 2 + ("norm" in name and "weight" in name)
    return module


def parts(C: int, H: int, attentions: int, residual: type[PreNorm], activation=F.relu) -> list[PreNorm]:
    """What a block of the lab is put together from."""
    work = FeedForward(C, 3 * C, nn.ReLU if activation is F.relu else nn.GELU)
    sublayers = [*(MultiHeadAttention(C, H) for _ in range(attentions)), work]
    return [residual(sublayer, nn.LayerNorm(C)) for sublayer in sublayers]


def agree(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """In values and in the gradients of the inputs."""
    slope = torch.randn_like(ours)
    found, wanted = ([y, *torch.autograd.grad(y, inputs, slope)] for y in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("B", "T", "S", "C", "H"), SHAPES)
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
@ORDERS
def test_blocks_are_pytorchs(B, T, S, C, H, activation, residual):
    kind = {"dropout": 0.0, "activation": activation, "batch_first": True, "norm_first": residual is PreNorm}
    source_lengths, lengths = torch.randint(1, S + 1, (B,)), torch.randint(1, T + 1, (B,))
    x, source = torch.randn(B, T, C, requires_grad=True), torch.randn(B, S, C, requires_grad=True)
    back, real, source_real = causal_mask(T), padding_mask(lengths, T), padding_mask(source_lengths, S)

    theirs = scattered(nn.TransformerEncoderLayer(C, H, 3 * C, **kind))
    block = EncoderBlock(*parts(C, H, 1, residual, activation)).copy(theirs)
    agree(block(x), theirs(x), [x])
    agree(block(x, causal=True), theirs(x, ~back), [x])
    agree(block(x, real), theirs(x, src_key_padding_mask=~real[:, 0]), [x])
    agree(block(x, real, causal=True), theirs(x, ~back, ~real[:, 0]), [x])
    agree(block(x, real & back), theirs(x, ~back, ~real[:, 0]), [x])

    theirs = scattered(nn.TransformerDecoderLayer(C, H, 3 * C, **kind))
    block, inputs = DecoderBlock(*parts(C, H, 2, residual, activation)).copy(theirs), [x, source]
    hidden = {"memory_key_padding_mask": ~source_real[:, 0]}
    agree(block(x, source), theirs(x, source, ~back), inputs)
    agree(block(x, source, source_real), theirs(x, source, ~back, **hidden), inputs)
    agree(block(x, source, source_real, causal=False), theirs(x, source, **hidden), inputs)
    hidden["tgt_key_padding_mask"] = ~real[:, 0]
    agree(block(x, source, source_real, real), theirs(x, source, ~back, **hidden), inputs)
    spelt_out = block(x, source, source_real, back & real, causal=False)
    agree(spelt_out, theirs(x, source, ~back, **hidden), inputs)


@ORDERS
def test_residual_connections(residual):
    norm, sublayer, x = nn.LayerNorm(6), nn.Linear(6, 6), torch.randn(2, 3, 6)
    block = residual(sublayer, norm, dropout=0.5)
    plain = x + sublayer(norm(x)) if residual is PreNorm else norm(x + sublayer(x))
    assert torch.equal(block.eval()(x), plain)
    dropped = (block.train()(x) - x)[plain - x != 0] if residual is PreNorm else None
    assert dropped is None or 0 < (dropped == 0).double().mean() < 1  # what is added is dropped, never x


@pytest.mark.parametrize(("C", "hidden"), [(1, 1), (3, 8), (10, 4)])
def test_feed_forward_networks(C, hidden):
    x = torch.randn(2, 5, C)
    for activation, function in ((nn.ReLU, F.relu), (nn.GELU, F.gelu)):
        first, _, last = layer = FeedForward(C, hidden, activation)
        slow = function(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
        torch.testing.assert_close(layer(x), slow)
    layer = SwiGLU(C, hidden)
    gate, up, down = (part.weight for part in (layer.gate, layer.up, layer.down))
    torch.testing.assert_close(layer(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    assert sum(weight.numel() for weight in layer.parameters()) == 3 * C * hidden


@pytest.mark.parametrize(("T", "C"), [(1, 2), (7, 10), (50, 4)])
def test_sinusoids_are_those_of_a_loop(T, C):
    loop = torch.empty(T, C)
    for t in range(T):
        for i in range(C // 2):
            angle = t / 10_000 ** (2 * i / C)
            loop[t, 2 * i], loop[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    torch.testing.assert_close(sinusoids(T, C), loop.float())


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources of 5 and 3 real tokens of 5 and their mask, and targets of 4."""
    return torch.randint(9, (2, 5)), padding_mask(torch.tensor([5, 3]), 5), torch.randint(9, (2, 4))


def model(residual: type[PreNorm]) -> Transformer:
    return scattered(Transformer(9, 8, 2, 2, 16, longest=12, residual=residual).double()).eval()


@ORDERS
def test_what_the_transformer_reads(tokens, residual):
    (source, real, target), network = tokens, model(residual)
    reads, looks_back = influence(lambda source, target: network(source, target, real), source, target)
    assert torch.equal(reads, torch.block_diag(*real.expand(2, 4, 5).long()))
    assert torch.equal(looks_back, torch.block_diag(causal_mask(4), causal_mask(4)).long())


@ORDERS
def test_writing_is_step_by_step(tokens, residual):
    (source, real, _), network = tokens, model(residual)
    written = network.write(source, 1, 99, 12, real)  # an end that never comes
    for b, text in enumerate(written.tolist()):  # one text at a time, without its padding
        ids = [1]
        for _ in range(12):
            logits = network(source[b : b + 1, : real[b].sum()], torch.tensor([ids]))  # (1, t, V)
            ids.append(logits[0, -1].argmax().item())
        assert text == ids[1:]


@ORDERS
def test_after_the_end_comes_only_the_end(tokens, residual):
    source, real, _ = tokens
    network = model(residual)
    free = network.write(source, 1, 99, 12, real)  # an end that never comes
    end = free[0, 3].item()
    written = network.write(source, 1, end, 12, real)
    for text, unended in zip(written.tolist(), free.tolist(), strict=True):
        stop = unended.index(end) + 1 if end in unended else 12
        assert text == unended[:stop] + [end] * (12 - stop)
