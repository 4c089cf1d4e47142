"""GPT-2 (Radford et al. 2019), put together from the parts that sprints 6 and 7 derive.

    model = GPT(V=50_257, T=1_024, C=768, H=12, L=12)   # the smallest of its four sizes
    logits = model(ids)                                 # (B, T) -> (B, T, V): what follows each token

Derived in: 08_gpt/04_gpt
"""

from functools import partial

from lab.attention import MultiHeadAttention
from lab.transformer import EncoderBlock, FeedForward, PreNorm

import torch
from torch import Tensor, nn

# GPT-2's sizes; all have V = 50,257 tokens and T = 1,024 places.
SIZES = {
    "gpt2": {"C": 768, "H": 12, "L": 12},
    "gpt2-medium": {"C": 1024, "H": 16, "L": 24},
    "gpt2-large": {"C": 1280, "H": 20, "L": 36},
    "gpt2-xl": {"C": 1600, "H": 25, "L": 48},
}


class GPT(nn.Module):
    """A decoder-only transformer: L blocks of width C with H heads, each looking only back.

    V          tokens; one matrix (V, C) embeds them and scores them
    T          places, at most: there is a learned vector for each
    dropout    after the embedding, and on what each sublayer adds
    """

    def __init__(self, V: int, T: int, C: int, H: int, L: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.settings = {"V": V, "T": T, "C": C, "H": H, "L": L, "dropout": dropout}
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(block(C, H, dropout) for _ in range(L))
        self.norm = nn.LayerNorm(C)
        initialise(self)

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """ids (B, T) -> logits (B, T, V) for the token that follows each.

        cache    keeps the keys and values of each block: cache.length tokens were read before these, and
                 cache.blocks[l](k, v) gives block l all so far. ValueError past the last place.
        """
        before = cache.length if cache else 0
        after = before + ids.shape[1]
        if after > self.places.num_embeddings:
            raise ValueError(f"{after} tokens, but places for only {self.places.num_embeddings}")
        x = self.dropout(self.tokens(ids) + self.places.weight[before:after])  # (B, T, C)
        for index, block in enumerate(self.blocks):
            x = block(x, causal=True, cache=cache.blocks[index] if cache else None)
        if cache:
            cache.length = after
        return nn.functional.linear(self.norm(x), self.tokens.weight)  # (B, T, C) @ (C, V) -> (B, T, V)


def block(C: int, H: int, dropout: float = 0.0) -> EncoderBlock:
    """GPT-2's block: pre-norm, a hidden layer of 4C, GELU in its tanh form (Hendrycks and Gimpel 2016)."""
    gelu = partial(nn.GELU, approximate="tanh")
    return EncoderBlock(
        PreNorm(MultiHeadAttention(C, H), nn.LayerNorm(C), dropout),
        PreNorm(FeedForward(C, 4 * C, gelu), nn.LayerNorm(C), dropout),
    )


@torch.no_grad()
def initialise(model: GPT, std: float = 0.02) -> None:
    """GPT-2's start: weights from N(0, std²), biases 0, and 1/√(2L) on what writes into the residual stream.

    There are 2L such layers, two in each block (Radford et al. 2019, section 2.3). Derived in lesson 05.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for layer in outputs(model):
        layer.weight /= (2 * len(model.blocks)) ** 0.5


def outputs(model: nn.Module) -> list[nn.Linear]:
    """The layers that write into the residual stream: the last of each sublayer."""
    parts = [part for block in model.blocks for part in (block.attention, block.feed_forward)]
    return [[m for m in part.sublayer.children() if isinstance(m, nn.Linear)][-1] for part in parts]
