"""lab.modern: a model of any parts, with a cache and without, and what the parts promise."""

from functools import partial

from lab.attention import MultiHeadAttention, causal_mask
from lab.generation import cache_for, generate, greedy
from lab.gpt import GPT
from lab.influence import influence
from lab.modern import Alibi, Decoder, QueryKeyNorm, Rotary, SquaredReLU, initialise, plain_norm
from lab.transformer import EncoderBlock, FeedForward, PreNorm, SwiGLU

import pytest
import torch
from torch import nn

V, T, C, H = 23, 12, 24, 3
KINDS = {
    "none": lambda: None,
    "rotary": lambda: Rotary(C // H, T),
    "alibi": lambda: Alibi(H),
    "norm": QueryKeyNorm,
    "norm, rotary": lambda: QueryKeyNorm(Rotary(C // H, T)),
}


SQUARED = partial(FeedForward, activation=SquaredReLU, bias=False)


def model(kind: str, work=SQUARED, groups: int = H) -> Decoder:
    torch.manual_seed(0)
    blocks = [
        EncoderBlock(
            PreNorm(
                MultiHeadAttention(C, H, groups=groups, bias=False, prepare=KINDS[kind]()), plain_norm(C)
            ),
            PreNorm(work(C, 4 * C), plain_norm(C)),
        )
        for _ in range(2)
    ]
    net = Decoder(V, T, C, blocks, plain_norm(C))
    initialise(net, std=0.5)
    return net.double()


@pytest.mark.parametrize(("kind", "groups"), [*((kind, H) for kind in KINDS), ("rotary", 1), ("norm", 1)])
def test_a_cache_changes_nothing_and_no_place_looks_ahead(kind, groups):
    net, ids = model(kind, groups=groups), torch.randint(V, (3, T))
    cache = cache_for(net)
    parts = [net(part, cache) for part in ids.split([5, 1, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net(ids), rtol=1e-10, atol=1e-10)
    assert torch.equal(influence(net, ids[:1]), causal_mask(T).long())


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes(kind):
    net, prompts = model(kind), [[1, 2, 3], [4]]
    alone = [generate(net, [prompt], greedy, 8)[0] for prompt in prompts]
    assert generate(net, prompts, greedy, 8) == alone


def test_tables_are_not_saved():
    assert all(name.endswith("weight") for name in model("norm, rotary").state_dict())


@pytest.mark.parametrize("work", [SwiGLU, FeedForward])
def test_outputs_of_zero_leave_the_embedding(work):
    net = model("rotary", work)
    initialise(net, std=0.5, zero_outputs=True)
    ids = torch.randint(V, (2, 5))
    expected = net.norm(net.tokens(ids)) @ net.tokens.weight.T
    torch.testing.assert_close(net(ids), expected)


def test_of_gpt2s_parts_it_is_gpt2():
    torch.manual_seed(0)
    gpt = GPT(V, T, C, H, L=2)
    twin = Decoder(V, T, C, GPT(V, T, C, H, L=2).blocks, nn.LayerNorm(C), nn.Embedding(T, C))
    twin.load_state_dict(gpt.state_dict())
    ids = torch.randint(V, (2, T))
    assert torch.equal(twin(ids), gpt(ids))
