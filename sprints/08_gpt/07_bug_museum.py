"""The bug museum: mistakes with GPT and its tokens that raise no error, and what finds each of them.

Run:     uv run sprints/08_gpt/07_bug_museum.py      (6 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
         4. with loaded weights a wrong split and a wrong place cost over 0.1 nats, the other GELU under 0.001
Shapes:  B texts of T tokens, V different ones, C width, H heads of width D = C / H, L blocks
Writes:  results/08_gpt/07_bug_museum.png
Note:    notes/07_bug_museum.md
"""

import codecs
import re
from collections.abc import Callable
from functools import partial

from lab import stories
from lab.gpt import GPT
from lab.lesson import Lesson, run
from lab.museum import Outcome, Twin, Variant, show
from lab.tokenizer import END, Tokenizer

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

B, T, V, C, H, L = 6, 16, 320, 64, 4, 2
D, STEPS = C // H, 100
NAME = re.compile("|".join(stories.PRONOUNS))
TANH = partial(F.gelu, approximate="tanh")  # GPT-2's
Weights = dict[str, Tensor]


def learn(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int = STEPS) -> None:
    """One batch, by heart."""
    optimiser = torch.optim.Adam(parameters, lr=5e-3, fused=True)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()


def checkpoint(model: GPT) -> Weights:
    """A copy of the weights as GPT-2 keeps them: matrices (inputs, outputs), q, k and v in one of them."""
    found = {"wte.weight": model.tokens.weight, "wpe.weight": model.places.weight}
    found |= {f"ln_f.{name}": value for name, value in model.norm.named_parameters()}
    for number, block in enumerate(model.blocks):
        attention, work = block.attention.sublayer, block.feed_forward.sublayer
        for name, layers in {
            "attn.c_attn": (attention.query, attention.key, attention.value),
            "attn.c_proj": (attention.output,), "mlp.c_fc": (work[0],), "mlp.c_proj": (work[2],),
        }.items():  # fmt: skip
            found[f"h.{number}.{name}.weight"] = torch.cat([layer.weight for layer in layers]).T
            found[f"h.{number}.{name}.bias"] = torch.cat([layer.bias for layer in layers])
        for name, norm in {"ln_1": block.attention.norm, "ln_2": block.feed_forward.norm}.items():
            found[f"h.{number}.{name}.weight"], found[f"h.{number}.{name}.bias"] = norm.weight, norm.bias
    copied = {name: value.detach().clone() for name, value in found.items()}
    return copied | {"lm_head.weight": copied["wte.weight"]}  # one tensor under two names: they are tied


def split(qkv: Tensor) -> list[Tensor]:
    """Queries, keys and values, each of them heads beside heads: (B, T, 3C) -> three (B, H, T, D)."""
    return [part.unflatten(-1, (H, D)).transpose(1, 2) for part in qkv.chunk(3, -1)]


def split_by_heads(qkv: Tensor) -> list[Tensor]:
    """Heads, each of them its query, key and value: (B, T, 3C) -> three (B, H, T, D)."""
    return list(qkv.unflatten(-1, (H, 3, D)).permute(3, 0, 2, 1, 4))  # (B, T, H, 3, D) -> (3, B, H, T, D)


def gpt(w: Weights, ids: Tensor, split=split, gelu=TANH, first: int = 0) -> Tensor:
    """GPT-2 written out for a checkpoint: ids (B, T) -> logits (B, T, V)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["wte.weight"][ids] + w["wpe.weight"][first : first + ids.shape[1]]  # (B, T, C)
    for block in range(L):
        q, k, v = split(linear(norm(x, f"h.{block}.ln_1"), f"h.{block}.attn.c_attn"))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        joined = mixed.transpose(1, 2).flatten(2)  # (B, T, H, D) -> (B, T, C)
        x = x + linear(joined, f"h.{block}.attn.c_proj")
        hidden = gelu(linear(norm(x, f"h.{block}.ln_2"), f"h.{block}.mlp.c_fc"))  # (B, T, 4C)
        x = x + linear(hidden, f"h.{block}.mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].T  # (B, T, C) @ (C, V) -> (B, T, V)


class Case(Twin):
    """What the exhibits have in common."""

    model: GPT  # which knows its texts by heart, in float64
    texts: Tensor  # (B, T + 1)
    tokenizer: Tokenizer
    seed: int


class Loaded(Case):
    """What the exhibits have in common that read the weights of the model."""

    look = "loss, and the farthest logit:"
    check = "the logits are those of the model that was saved"
    mistake: tuple[str, object]  # an argument of gpt(), and what is wrong for it

    def begin(self) -> None:
        self.w = checkpoint(self.model)
        self.w["wpe.weight"].requires_grad_()

    def made(self, wrong: bool) -> Tensor:
        return gpt(self.w, self.texts[:, :-1], **dict([self.mistake] if wrong else []))

    def judged(self, made: Tensor) -> tuple[float, float]:
        """The loss, and how far the logits are from the model's at most."""
        off = (made - self.model(self.texts[:, :-1])).abs().max()
        return F.cross_entropy(made.mT, self.texts[:, 1:]).item(), off.item()

    def seen(self, made: Tensor) -> str:
        loss, off = self.judged(made)
        return f"{loss:.4f} {off:.4f}"

    def passes(self, variant: Variant) -> bool:
        return self.judged(variant())[1] < 1e-9


class SplitByHeads(Loaded):
    """Queries, keys and values cut out of their one matrix head by head"""

    repair = "qkv.chunk(3, -1)   and then the heads"
    mistake = "split", split_by_heads


class OtherGelu(Loaded):
    """PyTorch's GELU, for weights that were trained with GPT-2's"""

    repair = 'F.gelu(x, approximate="tanh")'
    mistake = "gelu", F.gelu


class FromOne(Loaded):
    """Places counted from 1"""

    check = "gradients reach the first T places, and no other"
    repair = "torch.arange(T)"
    mistake = "first", 1

    def passes(self, variant: Variant) -> bool:
        variant().sum().backward()
        used = self.w["wpe.weight"].grad.ne(0).any(-1).tolist()
        return used == [place < T for place in range(len(used))]


class TiedByCopy(Case):
    """A head that is tied to the embedding by a copy"""

    look = "numbers to train, and the farthest apart after 10 steps:"
    check = "head and embedding are still alike"
    repair = "head.weight = tokens.weight"

    def made(self, wrong: bool) -> Outcome:
        w = checkpoint(self.model)
        if wrong:
            w["lm_head.weight"] = w["wte.weight"].clone()
        parameters = list({id(value): value.requires_grad_() for value in w.values()}.values())
        inputs, targets = self.texts[:, :-1], self.texts[:, 1:]
        learn(parameters, lambda: F.cross_entropy(gpt(w, inputs).mT, targets), steps=10)
        numbers = torch.tensor(sum(value.numel() for value in parameters))
        return [w["wte.weight"].detach(), w["lm_head.weight"].detach(), numbers]

    def seen(self, made: Outcome) -> str:
        return f"{made[2]:,} {(made[0] - made[1]).abs().max():.3f}"

    def passes(self, variant: Variant) -> bool:
        embedding, head, _ = variant()
        return torch.equal(embedding, head)


class EndIgnored(Case):
    """A batch is filled up with END, and END is ignored in the loss"""

    look = "of 6 texts learned by heart, these come to an end:"
    check = "each is written to its END"
    repair = "ignore what comes after the first END"

    def made(self, wrong: bool) -> Tensor:
        """What the model writes alone, from the first token of each text: (B, T + 1)."""
        torch.manual_seed(self.seed)
        model, end = GPT(V, T, C, H, L).to(self.texts.device), self.tokenizer.special[END]
        places = torch.arange(T + 1, device=self.texts.device)
        self.lengths = T // 2 + torch.arange(B, device=self.texts.device)[:, None]  # (B, 1)
        self.wanted = self.texts.where(places < self.lengths, end)  # (B, T + 1)
        inputs, targets = self.wanted[:, :-1], self.wanted[:, 1:]
        ignored = targets == end if wrong else places[1:] > self.lengths
        targets = targets.masked_fill(ignored, -100)
        learn(list(model.parameters()), lambda: F.cross_entropy(model(inputs).mT, targets))
        written = inputs[:, :1]
        with torch.no_grad():
            for _ in range(T):
                written = torch.cat([written, model(written)[:, -1:].argmax(-1)], dim=1)
        return written

    def seen(self, made: Tensor) -> str:
        return f"{(made == self.tokenizer.special[END]).any(-1).sum()}"

    def passes(self, variant: Variant) -> bool:
        made = variant()
        places = torch.arange(T + 1, device=made.device)
        return ((made == self.wanted) | (places > self.lengths)).all().item()


class Smuggled(Case):
    """A special token that comes in with plain text"""

    look = "decoded, it is the same text; special tokens in it:"
    check = "no text becomes a special token"
    repair = "tokenizer.encode(text)   and END by its number, between documents"
    text = f"Rosa wrote {END} on the wall."

    def made(self, wrong: bool) -> Outcome:
        special, ids = self.tokenizer.special, self.tokenizer.encode(self.text)
        if wrong:
            before, after = (self.tokenizer.encode(part) for part in self.text.split(END))
            ids = [*before, special[END], *after]
        count = sum(number in special.values() for number in ids)
        return [torch.tensor(list(self.tokenizer.decode_bytes(ids))), torch.tensor(count)]

    def seen(self, made: Outcome) -> str:
        return f"{made[1]}"

    def passes(self, variant: Variant) -> bool:
        return variant()[1].item() == 0


class TokenByToken(Case):
    """A text that is decoded token by token"""

    look = "one reads"
    check = "what is shown is the text"
    repair = 'codecs.getincrementaldecoder("utf-8")(), for the bytes of each token'
    text = "Zoë, in a café"

    def made(self, wrong: bool) -> Tensor:
        """The characters that each token adds, as their numbers: (tokens, 16), filled up with 0."""
        whole, decode = codecs.getincrementaldecoder("utf-8")(), self.tokenizer.decode_bytes
        ids = [[number] for number in self.tokenizer.encode(self.text)]
        added = [self.tokenizer.decode(number) if wrong else whole.decode(decode(number)) for number in ids]
        return torch.tensor([[ord(character) for character in text.ljust(16, "\0")] for text in added])

    def seen(self, made: Tensor) -> str:
        return "".join(map(chr, made[made > 0].tolist()))

    def passes(self, variant: Variant) -> bool:
        return self.seen(variant()) == self.text


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    told = [story.text for story in stories.write(lesson.seed, 100_000)]
    Case.seed, Case.tokenizer = lesson.seed, Tokenizer.learn(told, V)
    named = {text[found.start()]: text[found.start() :] for text in told if (found := NAME.search(text))}
    texts = [Case.tokenizer.encode(text)[: T + 1] for text in list(named.values())[:B]]
    Case.texts = torch.tensor(texts).to(lesson.float64_device)
    torch.manual_seed(lesson.seed)
    Case.model = GPT(V, 2 * T, C, H, L).to(lesson.float64_device).double()
    inputs, targets = Case.texts[:, :-1], Case.texts[:, 1:]
    learn(list(Case.model.parameters()), lambda: F.cross_entropy(Case.model(inputs).mT, targets))
    loaded = [SplitByHeads, FromOne, OtherGelu]
    show(lesson, [*loaded, TiedByCopy, EndIgnored, Smuggled, TokenByToken])
    losses, off = zip(*(case.judged(case.wrong()) for case in (kind() for kind in loaded)), strict=True)
    with torch.no_grad():
        saved = F.cross_entropy(Case.model(inputs).mT, targets).item()
    cost = [loss - saved for loss in losses]
    held = min(cost[:2]) > 0.1 and abs(cost[2]) < 0.001
    lesson.proves(4, held, "{:.2f}, {:.2f} and {:.5f}".format(*map(abs, cost)))

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    names = "q, k, v cut by heads", "places from 1", "the other GELU"
    for marker, numbers, name in (("o", losses, "loss"), ("D", off, "farthest logit")):
        axes.plot(numbers, range(3), marker, markersize=9, label=name)
    axes.axvline(saved, color="k", linestyle="--", label="loss as saved")
    axes.set(xscale="log", xlabel="loss in nats, or distance of the logits", ylim=(2.5, -0.5))
    axes.set(title="The loss does not show every mistake in reading weights")
    axes.set_yticks(range(3), names)
    figure.legend(loc="outside lower center", ncols=3)
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
