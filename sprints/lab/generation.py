"""Text from a language model: what to choose, and how not to compute anything twice.

    pick = Sampler(draw, [temperature(0.8), top_p(0.95)])      # or greedy
    written = generate(model, prompts, pick, most=200, end=end)  # lists of tokens in, lists of tokens out
    for rows, tokens in stream(model, prompts, pick, end): …    # each new token as it comes

Derived in: 10_generation/02_key_value_cache
"""

from collections.abc import Callable, Iterator
from functools import partial

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
    return lambda logits, ids: logits / T


def top_k(k: int) -> Filter:
    """Only the k likeliest tokens (Fan, Lewis and Dauphin 2018); those as likely as the last of them stay."""

    def change(logits: Tensor, ids: Tensor) -> Tensor:
        least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        return logits.masked_fill(logits < least, -torch.inf)

    return change


def top_p(p: float) -> Filter:
    """The likeliest tokens, as few as are needed to come to probability p (Holtzman et al. 2020, eq. 2)."""

    def change(logits: Tensor, ids: Tensor) -> Tensor:
        ordered, places = logits.sort(descending=True)  # (B, V)
        chances = ordered.softmax(-1)
        surplus = chances.cumsum(-1) - chances >= p  # those before it come to p already
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

    Room for T places is taken at the first use, so that a new token is written beside the others and
    nothing is copied.
    """

    def __init__(self, blocks: int, T: int) -> None:
        self.length, self.T = 0, T
        self.kept: list[tuple[Tensor, Tensor] | None] = [None] * blocks
        self.blocks = [partial(self._keep, block) for block in range(blocks)]

    def _keep(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values (B, H, S, D) go behind the others; all so far come back."""
        if self.kept[block] is None:
            room = (*k.shape[:2], self.T, k.shape[3])
            self.kept[block] = k.new_empty(room), v.new_empty(room)
        keys, values = self.kept[block]
        after = self.length + k.shape[2]
        keys[:, :, self.length : after] = k
        values[:, :, self.length : after] = v
        return keys[:, :, :after], values[:, :, :after]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch only, in this order: the others have ended, or lost (beam search)."""
        self.kept = [pair and (pair[0][rows], pair[1][rows]) for pair in self.kept]


def cache_for(model: nn.Module) -> Cache:
    return Cache(model.settings["L"], model.settings["T"])


@torch.inference_mode()
def stream(
    model: nn.Module, prompts: list[list[int]], pick: Pick, end: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Step by step, which prompts go on, and the new token of each: (B,), (B,), until all have had `end`.

    The prompts may differ in length: what all of them have is read in one go; then a row is given its own
    prompt's tokens for as long as there are any, where others are given what was picked. A full context is
    begun anew with the last half of what was written. ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    device, room = next(model.parameters()).device, model.settings["T"]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    shared, rows = int(lengths.min()), torch.arange(len(prompts))
    ids = torch.tensor([prompt[:shared] for prompt in prompts], device=device)  # (B, T)
    new, cache = ids, cache_for(model)
    while len(rows):
        if cache.length + new.shape[1] > room:
            new, cache = ids[:, -(room // 2) :], cache_for(model)
        tokens, T = pick(model(new, cache)[:, -1], ids), ids.shape[1]  # (B, V) -> (B,)
        picked = (lengths <= T)[rows]
        if not picked.all():
            own = [prompts[row][T] if T < lengths[row] else 0 for row in rows]
            tokens = torch.where(picked.to(device), tokens, torch.tensor(own, device=device))
        new = tokens[:, None]
        ids = torch.cat([ids, new], dim=1)
        yield rows[picked], tokens.cpu()[picked]
        if end is not None and (ended := picked & (tokens.cpu() == end)).any():
            rows, stay = rows[~ended], (~ended).to(device)
            ids, new = ids[stay], new[stay]
            cache.select(stay)


def generate(
    model: nn.Module, prompts: list[list[int]], pick: Pick, most: int, end: int | None = None
) -> list[list[int]]:
    """What follows each prompt: at most `most` tokens, the last of which is `end` where it came to that."""
    written: list[list[int]] = [[] for _ in prompts]
    for rows, tokens in stream(model, prompts, pick, end):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            written[row].append(token)
        if len(rows) and all(len(written[row]) >= most for row in rows):
            break
    return [tokens[:most] for tokens in written]


@torch.inference_mode()
def beam_search(
    model: nn.Module, prompt: list[int], width: int, most: int, end: int | None = None
) -> list[tuple[float, list[int]]]:
    """The `width` likeliest continuations that were found, best first, each with its log probability.

    Of all that continue the best so far by one token, the best `width` are kept (Sutskever et al. 2014,
    section 3.2). Those that end wait aside until no other can become likelier.
    """
    device, cache = next(model.parameters()).device, cache_for(model)
    ids = torch.tensor([prompt], device=device)
    new, scores, ended = ids, torch.zeros(1, device=device), []
    for _ in range(most):
        chances = model(new, cache)[:, -1].float().log_softmax(-1)  # (B, V)
        total = (scores[:, None] + chances).flatten()  # (B, V) -> (B·V,)
        best = total.topk(min(2 * width, len(total)))
        rows, tokens = best.indices // chances.shape[1], best.indices % chances.shape[1]
        stops = tokens == end if end is not None else torch.zeros_like(tokens, dtype=torch.bool)
        for row, score in zip(rows[stops].tolist(), best.values[stops].tolist(), strict=True):
            ended.append((score, [*ids[row, len(prompt) :].tolist(), end]))
        rows, new, scores = (part[~stops][:width] for part in (rows, tokens[:, None], best.values))
        ids = torch.cat([ids[rows], new], dim=1)
        cache.select(rows)
        ended = sorted(ended, reverse=True)[:width]
        if not len(rows) or (len(ended) == width and scores[0] <= ended[-1][0]):
            break
    running = [(score, row[len(prompt) :].tolist()) for score, row in zip(scores.tolist(), ids, strict=True)]
    return sorted(ended + running, reverse=True)[:width]
