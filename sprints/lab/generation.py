"""Text from a language model: what to choose, and how not to compute anything twice.

    pick = Sampler(draw, [temperature(0.8), top_p(0.95)])      # or greedy
    written = generate(model, prompts, pick, most=200, end=end)  # lists of tokens in, lists of tokens out
    for rows, tokens in stream(model, prompts, pick, end): …    # each new token as it comes
    model = for_writing(model)                                  # the same, faster for a single text on a CPU

Derived in: 10_generation/02_key_value_cache
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Pick = Callable[[Tensor, Tensor], Tensor]  # logits (B, V), ids so far (B, T) -> the next tokens (B,)
Filter = Callable[[Tensor, Tensor], Tensor]  # logits (B, V), ids so far (B, T) -> logits (B, V)


# ── What to choose (derived in lesson 01) ─────────────────────────────────────────────────────────────────


def greedy(logits: Tensor, ids: Tensor) -> Tensor:
    """The likeliest token of each row: (B, V) -> (B,)."""
    return logits.argmax(-1)


class Sampler:
    """Draws from softmax(logits), after the filters have changed them, one after the other."""

    def __init__(self, draw: torch.Generator, filters: list[Filter] | tuple = ()) -> None:
        self.draw, self.filters = draw, filters

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        """(B, V) -> (B,)."""
        logits = logits.float()
        for change in self.filters:
            logits = change(logits, ids)
        chances = logits.softmax(-1).cpu()  # drawn on the CPU, so that every device draws the same
        return torch.multinomial(chances, 1, generator=self.draw)[:, 0].to(logits.device)


def temperature(T: float) -> Filter:
    """Divides logits by T: below 1 the likely get likelier (Ackley, Hinton and Sejnowski 1985)."""
    if T <= 0:
        raise ValueError(f"no temperature: {T}; at 0 only the likeliest would be left, which is greedy")
    return lambda logits, ids: logits / T


def top_k(k: int) -> Filter:
    """Only the k likeliest tokens (Fan, Lewis and Dauphin 2018); those as likely as the last of them stay."""

    def change(logits: Tensor, ids: Tensor) -> Tensor:
        least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        return logits.masked_fill(logits < least, -torch.inf)

    return change


def top_p(p: float) -> Filter:
    """The likeliest tokens, as few as are needed to come to probability p (Holtzman et al. 2020, eq. 2).

    Of equally likely ones the first. The likeliest stays whatever p is, and at p = 1 all do.
    """

    def change(logits: Tensor, ids: Tensor) -> Tensor:
        ordered, places = logits.sort(descending=True, stable=True)  # (B, V)
        rest = ordered.softmax(-1).flip(-1).cumsum(-1).flip(-1)  # of itself and those behind it
        surplus = rest <= 1 - p  # those before it come to p already
        surplus[:, 0] = False
        return logits.masked_fill(surplus.gather(-1, places.argsort(-1)), -torch.inf)

    return change


def min_p(p: float) -> Filter:
    """Only tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""

    def change(logits: Tensor, ids: Tensor) -> Tensor:
        chances = logits.softmax(-1)
        return logits.masked_fill(chances < p * chances.amax(-1, keepdim=True), -torch.inf)

    return change


def repetition_penalty(penalty: float) -> Filter:
    """Tokens that were there already: logits above 0 divided by it, others times it (Keskar et al. 2019)."""

    def change(logits: Tensor, ids: Tensor) -> Tensor:
        there = logits.gather(-1, ids)  # (B, T)
        return logits.scatter(-1, ids, torch.where(there > 0, there / penalty, there * penalty))

    return change


# ── Nothing twice ─────────────────────────────────────────────────────────────────────────────────────────


class Cache:
    """The keys and values of every token that a model has read, for all its blocks.

    length    how many tokens that is; the model counts them
    blocks    for each block a function that takes new keys and values and returns all so far
    """

    def __init__(self, blocks: int, T: int) -> None:
        self.length, self.T = 0, T
        self.blocks = [Kept(T) for _ in range(blocks)]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch only, in this order: the others have ended, or lost (beam search)."""
        for block in self.blocks:
            block.select(rows)


class Kept:
    """The keys and values of one block.

    Room for T places is taken at the first use, so that a new token is written beside the others and
    nothing is copied.
    """

    def __init__(self, T: int) -> None:
        self.length, self.T = 0, T
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, H, S, D) go behind the others; all so far come back."""
        if not self.length:
            self.keys, self.values = (x.new_empty((*x.shape[:2], self.T, x.shape[3])) for x in (k, v))
        before, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, before : self.length] = k
        self.values[:, :, before : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        keys, values = self.keys[rows, :, : self.length], self.values[rows, :, : self.length]
        self.length = 0
        self(keys, values)


def cache_for(model: nn.Module) -> Cache:
    return Cache(model.settings["L"], model.settings["T"])


class InParts(nn.Linear):
    """nn.Linear; on a CPU a single row is multiplied with parts of the matrix, in one batch of products.

    One row is hardly more work than to fetch the matrix from memory, for which nn.Linear has one thread.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        if x.numel() > self.in_features or not x.is_cpu:
            return super().forward(x)
        P, size = math.gcd(self.out_features, 8), self.in_features
        parts, column = self.weight.view(P, -1, size), x.reshape(1, 1, size).expand(P, 1, size).mT
        if self.bias is None:
            product = torch.bmm(parts, column)  # (P, out / P, in) @ (P, in, 1) -> (P, out / P, 1)
        else:
            product = torch.baddbmm(self.bias.view(P, -1, 1), parts, column)
        return product.view(*x.shape[:-1], -1)


def for_writing(model: nn.Module) -> nn.Module:
    """A copy that computes the same, in about half the time for one token at a time on a CPU."""
    model = copy.deepcopy(model).requires_grad_(False)
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = InParts  # the same weights, another forward
    return model


def context_start(T: int, room: int) -> int:
    """Where the context of token number T begins: a full one is begun anew with its last half."""
    step = room // 2 + 1
    return step * max(0, math.ceil((T - room) / step))


@torch.inference_mode()
def stream(
    model: nn.Module, prompts: list[list[int]], pick: Pick, end: int | None = None, most: int = sys.maxsize
) -> Iterator[tuple[Tensor, Tensor]]:
    """Step by step, which prompts go on, and the new token of each: (B,), (B,).

    A row is dropped once it has had `end`, or `most` tokens. The prompts may differ in length: what all rows
    have is read in one go; from there on the longer ones are read while the shorter ones are written.
    ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    device, room = next(model.parameters()).device, model.settings["T"]
    rows, lengths = torch.arange(len(prompts)), torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.empty(len(prompts), 0, dtype=torch.long, device=device)  # (B, T)
    start, cache = 0, cache_for(model)
    while len(rows) and most > 0:
        T, shared = ids.shape[1], int(lengths.min())
        if shared > T:
            more = [prompts[row][T:shared] for row in rows.tolist()]
            ids, T = torch.cat([ids, torch.tensor(more, device=device)], dim=1), shared
        if T - start > room:
            start, cache = context_start(T, room), cache_for(model)
        logits = model(ids[:, start + cache.length :], cache)[:, -1]  # (B, V)
        tokens, reading = pick(logits, ids).cpu(), lengths > T  # (B,), (B,)
        for place in reading.nonzero()[:, 0].tolist():  # not picked: the prompt has more
            tokens[place] = prompts[rows[place]][T]
        ids = torch.cat([ids, tokens[:, None].to(device)], dim=1)
        yield rows[~reading], tokens[~reading]
        ended = T + 1 - lengths >= most
        if end is not None:
            ended |= ~reading & (tokens == end)
        if ended.any():
            stay = (~ended).nonzero()[:, 0]
            rows, lengths, ids = rows[stay], lengths[stay], ids[stay.to(device)]
            cache.select(stay.to(device))


def generate(
    model: nn.Module, prompts: list[list[int]], pick: Pick, most: int, end: int | None = None
) -> list[list[int]]:
    """What follows each prompt: at most `most` tokens, the last of which is `end` where it came to that."""
    written: list[list[int]] = [[] for _ in prompts]
    for rows, tokens in stream(model, prompts, pick, end, most):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            written[row].append(token)
    return written


@torch.inference_mode()
def beam_search(
    model: nn.Module, prompt: list[int], width: int, most: int, end: int | None = None
) -> list[tuple[float, list[int]]]:
    """The `width` likeliest continuations that were found, best first, each with its log probability.

    Of all that continue the best so far by one token, the best `width` are kept (Sutskever et al. 2014,
    section 3.2). Those that end wait aside until no other can become likelier. ValueError past the model's
    last place.
    """
    device, cache = next(model.parameters()).device, cache_for(model)
    new = ids = torch.tensor([prompt])
    scores, ended = torch.zeros(1, dtype=torch.float64), []
    for _ in range(most):
        logits = model(new.to(device), cache)[:, -1].cpu()  # (B, V); the rest is little work
        chances = logits.double().log_softmax(-1)
        best = (scores[:, None] + chances).flatten().topk(min(2 * width, chances.numel()))  # of B·V
        rows, tokens = best.indices // chances.shape[1], best.indices % chances.shape[1]
        stops = tokens == end if end is not None else torch.zeros_like(tokens, dtype=torch.bool)
        for row, score in zip(rows[stops].tolist(), best.values[stops].tolist(), strict=True):
            ended.append((score, [*ids[row, len(prompt) :].tolist(), end]))
        rows, new, scores = (part[~stops][:width] for part in (rows, tokens[:, None], best.values))
        ids = torch.cat([ids[rows], new], dim=1)
        cache.select(rows.to(device))
        ended = sorted(ended, reverse=True)[:width]
        if not len(rows) or (len(ended) == width and scores[0] <= ended[-1][0]):
            break
    running = zip(scores.tolist(), ids[:, len(prompt) :].tolist(), strict=True)
    return sorted([*ended, *running], reverse=True)[:width]
