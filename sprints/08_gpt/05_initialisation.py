"""Initialisation of a GPT: how it starts at a guess among all tokens, and how depth is kept from adding up.

Run:     uv run sprints/08_gpt/05_initialisation.py      (7 s on two cores)
Proves:  1. GPT-2's rule written out gives the very weights of lab.gpt.initialise; a new model already reads
            all tokens before, and none after
         2. from 2 to 32 blocks the spread of the stream grows at least 3-fold without the 1/√(2L) rule, and
            less than 1.25-fold with it
         3. the variance of the stream is that of the embedding plus that of each of the 2L additions, within
            20 %, at every depth, with the rule and without it
         4. from C and σ alone follows the spread of the stream at the first place, within 12 % at every depth
         5. on its way back through the blocks the gradient grows by as much as the stream does on its way
            forward, within 35 %
         6. the loss at the start is ln V + Cσ²/2 within 0.02 nats, with the rule and without it
         7. as PyTorch's own layers start, with one matrix for tokens and scores, each token gives itself the
            score C / spread, and the loss is as large, within 5 %
Shapes:  B texts of T tokens, V different ones; L blocks of width C with H heads
Writes:  results/08_gpt/05_initialisation.png
Note:    notes/05_initialisation.md
"""

import math
from dataclasses import dataclass

from lab.attention import causal_mask
from lab.gpt import GPT, initialise
from lab.influence import influence
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

V, T, C, H, B = 256, 16, 256, 4, 8
STD, DEPTHS = 0.02, (2, 4, 8, 16, 32)
SIZES = ((256, 256, 2), (4_000, 128, 2), (1_000, 512, 2), (1_000, 256, 16))  # V, C, L
INTO_STREAM = ("output.weight", "feed_forward.sublayer.2.weight")  # the last matrix of each sublayer


def by_hand(model: GPT, std: float) -> list[Tensor]:
    """GPT-2's first weights, for each parameter of a model in its order."""
    found, L = [], len(model.blocks)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # a bias, or the scale of a norm
            found.append(torch.full_like(weight, 1.0 if name.endswith("norm.weight") else 0.0))
        else:
            sigma = std / math.sqrt(2 * L) if name.endswith(INTO_STREAM) else std
            found.append(sigma * torch.randn(weight.shape))
    return found


def new_model(lesson: Lesson, L: int, rule: bool = True, V: int = V, C: int = C) -> GPT:
    """A GPT at its start, with the 1/√(2L) rule or without it."""
    torch.manual_seed(lesson.seed)
    model = GPT(V, T, C, H, L)
    initialise(model, STD)
    for name, weight in model.named_parameters():
        if not rule and name.endswith(INTO_STREAM):
            weight.data *= math.sqrt(2 * L)
    return model.to(lesson.device)


def texts(lesson: Lesson, V: int, B: int) -> tuple[Tensor, Tensor]:
    """Random tokens, and what follows each of them: (B, T) twice."""
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(lesson.seed))
    return ids[:, :-1].to(lesson.device), ids[:, 1:].to(lesson.device)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean nats per token: (B, T, V), (B, T) -> ()."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def any_may_follow(logits: Tensor) -> float:
    """The loss if each of the V tokens is as likely to follow, so that no chance is in it: (B, T, V)."""
    return (logits.logsumexp(-1) - logits.mean(-1)).mean().item()


def variance(x: Tensor) -> float:
    """The mean square; means are about 0 at the start."""
    return x.detach().square().mean().item()


@dataclass
class Course:
    """Of the stream through a model: after the embedding, and after each of the 2L sublayers."""

    stream: list[Tensor]  # (B, T, C) each, with gradients
    added: list[Tensor]  # what each sublayer adds, one less

    @property
    def spreads(self) -> list[float]:
        return [math.sqrt(variance(x)) for x in self.stream]

    @property
    def slopes(self) -> list[float]:
        return [x.grad.norm().item() for x in self.stream]


def follow(model: GPT, ids: Tensor, targets: Tensor) -> Course:
    """Forward and back once, and keep what flows."""
    course = Course([], [])

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        course.stream.append(output)

    model.dropout.register_forward_hook(keep)  # what enters the first block
    for part in (part for block in model.blocks for part in (block.attention, block.feed_forward)):
        part.sublayer.register_forward_hook(lambda module, inputs, output: course.added.append(output))
        part.register_forward_hook(keep)
    loss_of(model(ids), targets).backward()
    return course


def additions(C: int, std: float) -> tuple[float, float]:
    """The variance that an attention and a feed-forward network add at the first place, without the rule.

    Each matrix multiplies a variance by its number of inputs times σ². A norm sends in variance 1.
    """
    attention = C * std**2 * C * std**2  # the values, then the output matrix; the first place sees itself
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
    hidden = (density * F.gelu(math.sqrt(C) * std * z, approximate="tanh").square()).sum().item()
    return attention, 4 * C * std**2 * hidden


def spread_at_first_place(L: int, rule: bool) -> float:
    """Embedding and place, then L times what two sublayers add, or 1/(2L) of it."""
    return math.sqrt(2 * STD**2 + L * sum(additions(C, STD)) / (2 * L if rule else 1))


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)

    lesson.heading("The rule")
    ours, theirs = [], []
    for L, std in ((1, 0.02), (6, 0.05)):
        model = GPT(11, 5, 12, 3, L)
        torch.manual_seed(lesson.seed)
        initialise(model, std)
        torch.manual_seed(lesson.seed)
        ours, theirs = ours + list(model.parameters()), theirs + by_hand(model, std)
    ids = torch.arange(5, device=lesson.float64_device)[None]
    looks = influence(GPT(11, 5, 12, 3, 6).to(ids.device, torch.float64), ids)
    sigmas = f"σ {STD}, and {STD / math.sqrt(24):.4f} into the stream of 12 blocks"
    print(f"{sigmas}; biases 0, norms 1 and 0")
    lesson.proves_equal(1, [*ours, looks], [*theirs, causal_mask(5).long()])

    lesson.heading(
        f"Spread of the stream, width {C}: embedded {math.sqrt(2) * STD:.3f}; at the end, and the formula"
    )
    ids, targets = texts(lesson, V, B)
    courses = {
        (rule, L): follow(new_model(lesson, L, rule), ids, targets) for rule in (False, True) for L in DEPTHS
    }
    off, off_formula = [], []
    for (rule, L), course in courses.items():
        first, formula = math.sqrt(variance(course.stream[-1][:, 0])), spread_at_first_place(L, rule)
        parts = variance(course.stream[0]) + sum(map(variance, course.added))
        off.append(course.spreads[-1] ** 2 / parts - 1)
        off_formula.append(first / formula - 1)
        told = f"{course.spreads[-1]:.3f}, first place {first:.3f} ({formula:.3f})"
        print(f"{'with   ' if rule else 'without'} 1/√(2L)   {L:2} blocks   {told}")
    grown = []
    for rule in (False, True):
        shallow, deep = (courses[rule, L].spreads[-1] for L in (DEPTHS[0], DEPTHS[-1]))
        grown.append(deep / shallow)
    told = f"{grown[0]:.2f}-fold and {grown[1]:.2f}-fold"
    lesson.proves(2, grown[0] > 3 and 0.8 < grown[1] < 1.25, told)
    lesson.proves(3, max(map(abs, off)) < 0.2, f"within {max(map(abs, off)):.1%}")
    lesson.proves(4, max(map(abs, off_formula)) < 0.12, f"within {max(map(abs, off_formula)):.1%}")

    lesson.heading("Forward the stream grows, back the gradient")
    off = []
    for (rule, L), course in courses.items():
        forward, back = course.spreads[-1] / course.spreads[0], course.slopes[0] / course.slopes[-1]
        off.append(back / forward - 1)
        if L in (DEPTHS[0], DEPTHS[-1]):
            told = f"stream {forward:5.1f}-fold, gradient {back:5.1f}-fold"
            print(f"{'with   ' if rule else 'without'} 1/√(2L)   {L:2} blocks   {told}")
    lesson.proves(5, max(map(abs, off)) < 0.35, f"within {max(map(abs, off)):.0%}")

    lesson.heading("Loss at the start")
    off = []
    for V_, C_, L in SIZES:
        ids, _ = texts(lesson, V_, 64)
        with torch.no_grad():
            found = [any_may_follow(new_model(lesson, L, rule, V_, C_)(ids)) for rule in (True, False)]
        expected = math.log(V_) + C_ * STD**2 / 2
        off += [loss - expected for loss in found]
        told = f"ln V {math.log(V_):.3f}   and Cσ²/2 {expected:.3f}   found {found[0]:.3f}, {found[1]:.3f}"
        print(f"V {V_:5,}, C {C_}, L {L:2}   {told}")
    lesson.proves(6, max(map(abs, off)) < 0.02, f"within {max(map(abs, off)):.3f}")

    lesson.heading("As PyTorch's own layers start: embeddings from N(0, 1), here tied to the scores")
    off = []
    for V_, C_, L in SIZES[:-1]:
        torch.manual_seed(lesson.seed)
        model = GPT(V_, T, C_, H, L)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        ids, targets = texts(lesson, V_, 64)
        with torch.no_grad():
            x = model.to(lesson.device).tokens(ids) + model.places.weight
            for block in model.blocks:
                x = block(x, causal=True)
            logits = model.norm(x) @ model.tokens.weight.T
        score, wanted = logits.gather(-1, ids[..., None]).mean().item(), C_ / math.sqrt(variance(x))
        loss, sure = loss_of(logits, targets).item(), logits.softmax(-1).gather(-1, ids[..., None]).mean()
        off += [score / wanted - 1, loss / wanted - 1]
        told = f"its own score {score:5.1f}, C / spread {wanted:5.1f}, its probability {sure:.2f}"
        print(f"V {V_:5,}, C {C_}   ln V {math.log(V_):.2f}, loss {loss:5.1f}   {told}")
    lesson.proves(7, max(map(abs, off)) < 0.05, f"within {max(map(abs, off)):.1%}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 3.4), layout="constrained", sharey=True)
    for rule, colour, name in ((False, "C0", "without 1/√(2L)"), (True, "C1", "with it")):
        ends = [math.sqrt(variance(courses[rule, L].stream[-1][:, 0])) for L in DEPTHS]
        left.plot(DEPTHS, [spread_at_first_place(L, rule) for L in DEPTHS], color=colour)
        left.plot(DEPTHS, ends, "o", color=colour, label=name)
        course = courses[rule, DEPTHS[-1]]
        right.plot([k / 2 for k in range(len(course.spreads))], course.spreads, color=colour)
        scale = course.spreads[0] / course.slopes[-1]
        right.plot(
            [k / 2 for k in range(len(course.slopes))], [g * scale for g in course.slopes], "--", color=colour
        )
    left.set_xscale("log", base=2)
    left.set_xticks(DEPTHS, DEPTHS)
    left.set(yscale="log", xlabel="blocks", ylabel="spread", title="at the end, first place; — formula")
    left.legend(fontsize="small", loc="upper left")
    right.set(xlabel=f"block of {DEPTHS[-1]}", title="all places: stream —, gradient - -")
    figure.suptitle("The 1/√(2L) rule makes the stream's spread the same at every depth", fontsize="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
