"""The bug museum: mistakes in generation that write fluent text all the same, and what finds each of them.

Run:     uv run sprints/10_generation/05_bug_museum.py      (6 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
         4. a penalty that always divides does with the story model what the right one does; with all its
            logits 30 lower, the same chances, it makes it repeat more than none does, the right one less
Shapes:  B texts of T tokens, V tokens to choose from, N throws
Writes:  results/10_generation/05_bug_museum.png
Note:    notes/05_bug_museum.md
"""

from collections.abc import Callable
from pathlib import Path

from lab import BadInput, stories
from lab.generation import Filter, Sampler, cache_for, generate, greedy, repetition_penalty, stream, top_p
from lab.gpt import GPT
from lab.lesson import Lesson, run
from lab.museum import Outcome, Twin, Variant, show
from lab.tokenizer import END, Tokenizer
from lab.training import load_model

import matplotlib.pyplot as plt
import torch
from torch import Tensor

MODEL = Path(__file__).resolve().parents[2] / "results/09_training_pipeline/02_train_gpt.model"
B, V, N = 16, 50, 10_000  # rows of made-up logits, tokens in each; throws of a die
P, PENALTY = 0.8, 1.3
WIDTH, START, MOST = 8, 8, 30  # beams; tokens that they begin with; tokens to write
TEXTS, TOKENS, PENALTIES = 32, 100, (1.0, 1.1, 1.2, 1.3, 1.4)
NONE = torch.zeros(1, 0, dtype=torch.long)  # no token so far: (B, 0)


def costs(model: GPT, ids: Tensor) -> Tensor:
    """The nats of each token but the first, by reading all of it at once: (B, T) -> (B, T - 1)."""
    chances = model(ids[:, :-1]).log_softmax(-1)  # (B, T - 1, V)
    return -chances.gather(-1, ids[:, 1:, None])[..., 0]


def divide(penalty: float) -> Filter:
    """The penalty on repetition, wrongly."""
    return lambda logits, ids: logits.scatter(-1, ids, logits.gather(-1, ids) / penalty)


class Case(Twin):
    """What the exhibits have in common."""

    model: GPT  # the story model, in float64
    tokenizer: Tokenizer
    end: int
    texts: list[str]  # stories
    documents: list[list[int]]  # END, and the tokens of a story
    seed: int

    def begin(self) -> None:
        self.draw = torch.Generator().manual_seed(self.seed)

    def on_device(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.tokens.weight.device)


class CrossingLeftOut(Case):
    """Top-p without the token that crosses p"""

    look = f"least probability left, of p = {P}:"
    check = "what is left comes to p, and less its last would not"
    repair = "shift by one: surplus where those before it come to p"

    def made(self, wrong: bool) -> Tensor:
        """The chances of the tokens that are left, 0 for the others: (B, V)."""
        logits = 3 * torch.randn(B, V, generator=self.draw)
        ordered, places = logits.sort(descending=True)
        surplus = ordered.softmax(-1).cumsum(-1) > P
        surplus[:, 0] = False  # the likeliest stays in any case
        fewer = ~surplus.gather(-1, places.argsort(-1))
        return logits.softmax(-1) * (fewer if wrong else top_p(P)(logits, NONE).isfinite())

    def seen(self, made: Tensor) -> str:
        return f"{made.sum(-1).min():.2f}"

    def passes(self, variant: Variant) -> bool:
        left = variant()
        total, last = left.sum(-1), left.where(left > 0, 1).amin(-1)  # (B,) both
        return ((total >= P - 1e-6) & (total - last < P)).all().item()


class PenaltyDivides(Case):
    """A penalty on repetition that divides whatever the sign"""

    look = f"chance of what was said, with a penalty of {PENALTY}:"
    check = "what was said has a lower logit, the rest the same"
    repair = "torch.where(there > 0, there / penalty, there * penalty)"

    def made(self, wrong: bool) -> Tensor:
        """Logits after the penalty: (1, V)."""
        self.logits = torch.randn(1, V, generator=self.draw) - 30
        self.said = torch.randint(V, (1, 5), generator=self.draw)
        return (divide if wrong else repetition_penalty)(PENALTY)(self.logits, self.said)

    def seen(self, made: Tensor) -> str:
        before, after = (x.softmax(-1)[0, self.said.unique()].sum() for x in (self.logits, made))
        return f"{before:.1%} -> {after:.1%}"

    def passes(self, variant: Variant) -> bool:
        moved = (variant() - self.logits).sign()  # (1, V)
        return torch.equal(moved, torch.zeros(1, V).scatter(-1, self.said, -1.0))


class SeedAnew(Case):
    """The seed set anew for each token"""

    look = "a die thrown twice shows the same side:"
    check = "each pair comes as often as the product of its chances"
    repair = "one generator for the whole text"

    def made(self, wrong: bool) -> Tensor:
        """Two throws of N dice: (2, N)."""
        throws = []
        for _ in range(2):
            draw = torch.Generator().manual_seed(self.seed) if wrong else self.draw
            throws.append(Sampler(draw)(torch.zeros(N, 6), NONE))
        return torch.stack(throws)

    def seen(self, made: Tensor) -> str:
        return f"{(made[0] == made[1]).float().mean():.0%}"

    def passes(self, variant: Variant) -> bool:
        first, second = variant()
        shares = torch.bincount(6 * first + second, minlength=36) / N  # (36,)
        return (shares - 1 / 36).abs().max().item() < 0.01


class LastPlace(Case):
    """Shorter prompts filled up at the right, and the last place read"""

    look = "one reads"
    check = "a row of a batch writes what it writes alone"
    repair = "read at length - 1, fill up at the left, or do not fill up"

    def made(self, wrong: bool) -> Tensor:
        """What is written behind prompts of different lengths: (3, MOST)."""
        self.prompts = [document[: 9 + row] for row, document in enumerate(self.documents[:3])]
        if not wrong:
            return torch.tensor(generate(self.model, self.prompts, greedy, MOST))
        ids = self.on_device([[*prompt, *[self.end] * (11 - len(prompt))] for prompt in self.prompts])
        for _ in range(MOST):
            ids = torch.cat([ids, greedy(self.model(ids)[:, -1], ids)[:, None]], dim=1)
        return ids[:, 11:].cpu()

    def seen(self, made: Tensor) -> str:
        return self.tokenizer.decode([*self.prompts[1][-4:], *made[1, :6].tolist()]).strip()

    def alone(self, prompt: list[int]) -> list[int]:
        """The likeliest token each time, without a cache."""
        ids = list(prompt)
        for _ in range(MOST):
            ids.append(self.model(self.on_device([ids]))[0, -1].argmax().item())
        return ids[len(prompt) :]

    def passes(self, variant: Variant) -> bool:
        return variant().tolist() == [self.alone(prompt) for prompt in self.prompts]


class AllAtOnce(Case):
    """A batch that stops when all its rows end at once"""

    look = "tokens behind an END:"
    check = "behind an END there is nothing but END"
    repair = "stream(model, prompts, pick, end)   which drops a row at its END"

    def made(self, wrong: bool) -> Tensor:
        """The last lines of four stories, filled up with END: (4, 2 · MOST)."""
        prompts, pick = [document[:-10] for document in self.documents[:4]], Sampler(self.draw)
        written: list[list[int]] = [[] for _ in prompts]
        for rows, tokens in stream(self.model, prompts, pick, None if wrong else self.end, 2 * MOST):
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                written[row].append(token)
            if all(text[-1:] == [self.end] for text in written):
                break
        return torch.tensor([text + [self.end] * (2 * MOST - len(text)) for text in written])

    def behind(self, made: Tensor) -> Tensor:
        """Tokens that are behind an END and none themselves: (4, T), bool."""
        ends = made == self.end
        return (ends.cumsum(-1) > 0) & ~ends

    def seen(self, made: Tensor) -> str:
        return f"{self.behind(made).sum()} of {made.numel()}"

    def passes(self, variant: Variant) -> bool:
        return not self.behind(variant()).any()


class BeamsReordered(Case):
    """Beams that change places, and a cache that does not"""

    look = "log probability that the best text was found by, and that it has:"
    check = "each text has the probability that it was found by"
    repair = "cache.select(rows)"

    def made(self, wrong: bool) -> Outcome:
        """The texts, and their log probabilities: (WIDTH, T), (WIDTH,)."""
        cache = cache_for(self.model)
        new = ids = self.on_device([self.documents[0][:START]] * WIDTH)  # (WIDTH, T)
        scores = torch.tensor([0.0] + [-torch.inf] * (WIDTH - 1)).to(self.model.tokens.weight)
        for _ in range(MOST):
            chances = self.model(new, cache)[:, -1].log_softmax(-1)  # (WIDTH, V)
            scores, best = (scores[:, None] + chances).flatten().topk(WIDTH)  # of WIDTH · V
            rows, new = best // chances.shape[1], best[:, None] % chances.shape[1]
            ids = torch.cat([ids[rows], new], dim=1)
            if not wrong:
                cache.select(rows)
        return [ids, scores]

    def judged(self, made: Outcome) -> tuple[Tensor, Tensor]:
        """What the texts were found by, and what they have: (WIDTH,) both."""
        return made[1], -costs(self.model, made[0])[:, -MOST:].sum(-1)

    def seen(self, made: Outcome) -> str:
        return "{:.2f} {:.2f}".format(*(part[0] for part in self.judged(made)))

    def passes(self, variant: Variant) -> bool:
        return torch.allclose(*self.judged(variant()), rtol=1e-9)


class SpaceBehind(Case):
    """A prompt that ends in a space"""

    look = "nats of the first 20 words of a story:"
    check = "prompt and continuation cost what the text costs"
    repair = "tokenizer.encode(prompt.rstrip(' '))"

    def made(self, wrong: bool) -> Tensor:
        """The nats of 10 words, the prompt, and of the next 10: ()."""
        words = self.texts[0].split(" ")
        prompt, rest = " ".join(words[:10]), " ".join(["", *words[10:20]])
        if wrong:
            prompt, rest = prompt + " ", rest[1:]
        return self.cost([*self.tokenizer.encode(prompt), *self.tokenizer.encode(rest)])

    def cost(self, ids: list[int]) -> Tensor:
        return costs(self.model, self.on_device([[self.end, *ids]])).sum()

    def seen(self, made: Tensor) -> str:
        return f"{made:.1f}"

    def passes(self, variant: Variant) -> bool:
        text = " ".join(self.texts[0].split(" ")[:20])
        return torch.allclose(variant(), self.cost(self.tokenizer.encode(text)), rtol=1e-9)


def repeated(model: GPT, penalise: Callable[[float], Filter], lower: float, seed: int) -> Tensor:
    """The share of tokens that their text has had before, for each of the PENALTIES."""
    shares = []
    for penalty in PENALTIES:
        filters = [lambda logits, ids: logits - lower, penalise(penalty)]
        pick = Sampler(torch.Generator().manual_seed(seed), filters)
        texts = generate(model, [[Case.end]] * TEXTS, pick, TOKENS)
        shares.append(1 - sum(len(set(text)) for text in texts) / (TEXTS * TOKENS))
    return torch.tensor(shares)


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    model, tokenizer, facts = load_model(MODEL, lesson.float64_device)
    if not facts.get("corpus", "stories ").startswith("stories "):
        raise BadInput(f"{MODEL} has learned other texts; this lesson needs a model of the stories")
    Case.model, Case.tokenizer = model.double().requires_grad_(False), tokenizer
    Case.texts, Case.end = [story.text for story in stories.write(lesson.seed, 3_000)], tokenizer.special[END]
    Case.documents = [[Case.end, *tokenizer.encode(text)] for text in Case.texts]
    Case.seed, filters = lesson.seed, [CrossingLeftOut, PenaltyDivides, SeedAnew]
    show(lesson, [*filters, LastPlace, AllAtOnce, BeamsReordered, SpaceBehind])

    model, curves = model.float(), {}
    for lower in (0, 30):
        for name, penalise in {"right": repetition_penalty, "always divided": divide}.items():
            curves[name, lower] = repeated(model, penalise, lower, lesson.seed)
    alike = (curves["always divided", 0] - curves["right", 0]).abs().max() < 0.02
    right, wrong = (curves[name, 30] for name in ("right", "always divided"))
    held = alike and wrong[2:].min() > wrong[0] + 0.02 and right[2:].max() < right[0]  # from 1.2 on
    told = f"{wrong[0]:.0%} without one, {wrong[-1]:.0%} with 1.4, {right[-1]:.0%} with the right one"
    lesson.proves(4, bool(held), told)

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for look, ((name, lower), shares) in zip(("o-", "x--", "s-", "D-"), curves.items(), strict=True):
        axes.plot(PENALTIES, 100 * shares, look, label=name + f", logits {lower} lower" * (lower > 0))
    axes.set(xlabel="penalty", ylabel="% of tokens had before", ylim=(20, None))
    axes.set(title="A wrong penalty shows when the logits lie below 0")
    axes.legend(loc="upper left")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
