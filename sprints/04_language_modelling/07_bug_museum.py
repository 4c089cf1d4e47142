"""The bug museum: mistakes in predicting text that raise no error, and what finds each of them.

Run:     uv run sprints/04_language_modelling/07_bug_museum.py      (5 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
Shapes:  S characters, V different ones; N windows of T characters, B of them in a batch
Note:    notes/07_bug_museum.md
"""

import string

from lab import stories
from lab.corpus import encode
from lab.lesson import Lesson, run
from lab.museum import Outcome, Twin, Variant, show
from lab.ngram import NGram

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

S, N, T, B, STEPS = 10_000, 100, 32, 8, 500


def nats(model: NGram, windows: Tensor) -> Tensor:
    """What each character after the first costs the model: (N, T + 1) -> (N, T)."""
    logits, _ = model(windows[:, :-1])  # (N, T, V)
    return cross_entropy(logits.mT, windows[:, 1:], reduction="none")  # (N, V, T), (N, T) -> (N, T)


class Case(Twin):
    """What the exhibits have in common."""

    seed: int
    text: str  # S characters of stories
    vocabulary: str
    model: NGram  # trigrams, counted in other stories
    documents: Tensor  # (N, T + 1): a newline, and how N more stories begin

    def encode(self, text: str) -> Tensor:
        return encode(text, self.vocabulary).to(self.documents.device)

    def decode(self, ids: Tensor) -> str:
        return "".join(self.vocabulary[number] for number in ids.flatten().tolist())


class NotShifted(Case):
    """Targets that are not shifted"""

    look = "training loss of a table of pairs"
    check = "decoded, the targets are the text from its second character on"
    repair = "targets = windows[:, 1:]"

    def made(self, wrong: bool) -> Outcome:
        windows = self.encode(self.text).unfold(0, T + 1, T)  # (N, T + 1): neighbours share one character
        return [windows[:, :-1], windows[:, :-1] if wrong else windows[:, 1:]]

    def seen(self, made: Outcome) -> str:
        V = len(self.vocabulary)
        counts = torch.bincount((made[0] * V + made[1]).flatten(), minlength=V**2).view(V, V)
        p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return f"{torch.xlogy(counts, p).sum().abs() / counts.sum():.2f}"

    def passes(self, variant: Variant) -> bool:
        _, targets = variant()
        return self.decode(targets) == self.text[1 : targets.numel() + 1]


class ShiftedTwice(Case):
    """Targets shifted twice: by the data set, and again by the loss"""

    look = "most likely after q, t and w:"
    check = "a table that learned the alphabet says b after a"
    repair = "the loss takes all logits and all targets, as they come"

    def made(self, wrong: bool) -> Outcome:
        windows, V = self.encode(self.text).unfold(0, T + 1, T), len(self.vocabulary)  # (N, T + 1)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        if wrong:
            inputs, targets = inputs[:, :-1], targets[:, 1:]
        return torch.bincount((inputs * V + targets).flatten(), minlength=V**2).view(V, V)

    def seen(self, made: Outcome) -> str:
        return " ".join(self.decode(made[self.vocabulary.index(letter)].argmax()) for letter in "qtw")

    def passes(self, variant: Variant) -> bool:
        self.text = 10 * string.ascii_lowercase
        after = variant()[self.encode("abc")].argmax(-1)
        return self.decode(after) == "bcd"


class SharedWindows(Case):
    """Windows that training and held-out text share"""

    look = "held-out nats per character"
    check = "on random characters no held-out loss is below ln V"
    repair = "split the text first, cut windows then"

    def made(self, wrong: bool) -> Outcome:
        ids, draw = self.encode(self.text), torch.Generator().manual_seed(self.seed)
        parts = [part.unfold(0, T + 1, T // 8) for part in ids.tensor_split([len(ids) * 9 // 10])]
        if wrong:
            windows = ids.unfold(0, T + 1, T // 8)  # each is mostly the one before it
            order = torch.randperm(len(windows), generator=draw, device="cpu").to(ids.device)
            parts = windows[order].tensor_split([len(parts[0])])
        training, held_out = parts  # (…, T + 1) each
        table = NGram(training.flatten(), len(self.vocabulary), 3, smoothing=0.1)
        return nats(table, held_out).mean()

    def seen(self, made: Outcome) -> str:
        return f"{made:.3f}"

    def passes(self, variant: Variant) -> bool:
        V, draw = len(self.vocabulary), torch.Generator().manual_seed(self.seed)
        self.text = self.decode(torch.randint(V, (S,), generator=draw, device="cpu"))
        return (variant() >= torch.tensor(V).log()).item()


class PerplexityOfSum(Case):
    """Perplexity of a sum over the characters"""

    look = "perplexity"
    check = "guessing with equal chances has perplexity V"
    repair = "losses.mean().exp()"

    def made(self, wrong: bool) -> Outcome:
        losses = nats(self.model, self.documents)  # (N, T)
        return (losses.sum(-1) if wrong else losses).mean().exp()

    def seen(self, made: Outcome) -> str:
        return f"{made:.3g}"

    def passes(self, variant: Variant) -> bool:
        V = len(self.vocabulary)
        self.model = lambda ids: (torch.zeros(*ids.shape, V), None)
        return torch.allclose(variant(), torch.tensor(float(V)))


class TimesBatchSize(Case):
    """Perplexity times batch size"""

    look = "perplexity"
    check = "batches of any size give the same perplexity"
    repair = "((means * sizes).sum() / N).exp()   nats are averaged, and exp comes last"
    size = B

    def made(self, wrong: bool) -> Outcome:
        batches = self.documents.split(self.size)
        means = torch.stack([nats(self.model, batch).mean() for batch in batches])  # one for each batch
        sizes = torch.tensor([len(batch) for batch in batches])
        return (means.exp() * sizes).mean() if wrong else ((means * sizes).sum() / N).exp()

    def seen(self, made: Outcome) -> str:
        return f"{made:.2f}"

    def passes(self, variant: Variant) -> bool:
        found = []
        for self.size in (1, B, N):
            found.append(variant())
        return torch.allclose(torch.stack(found), found[0])


class StateCarried(Case):
    """State carried from one document into the next"""

    look = "nats for the first character of a document"
    check = "a document costs the same, whatever was read before it"
    repair = "logits, _ = model(inputs)   no state: nothing came before"

    def made(self, wrong: bool) -> Outcome:
        losses, state = [], None
        for document in self.documents:  # (T + 1,)
            logits, after = self.model(document[None, :-1], state)  # (1, T, V)
            losses.append(cross_entropy(logits[0], document[1:], reduction="none"))
            state = after if wrong else None
        return torch.stack(losses)  # (N, T)

    def seen(self, made: Outcome) -> str:
        return f"{made[:, 0].mean():.2f}"

    def passes(self, variant: Variant) -> bool:
        forwards, self.documents = variant(), self.documents.flip(0)
        backwards, self.documents = variant(), self.documents.flip(0)
        return torch.equal(forwards, backwards.flip(0))


class Greedy(Case):
    """Greedy sampling that loops"""

    look = "it writes"
    check = "what it writes costs the model its own entropy, within 10%"
    repair = "torch.multinomial(chances, 1)"

    def made(self, wrong: bool) -> Outcome:
        draw, written, state = torch.Generator().manual_seed(self.seed), [self.documents[:B, :1]], None
        for _ in range(STEPS):
            logits, state = self.model(written[-1], state)
            chances = logits[:, -1].softmax(-1).cpu()  # (B, V)
            drawn = chances.argmax(-1, keepdim=True) if wrong else chances.multinomial(1, generator=draw)
            written.append(drawn.to(self.documents.device))  # (B, 1)
        return torch.cat(written, dim=1)  # (B, STEPS + 1)

    def seen(self, made: Outcome) -> str:
        return repr(self.decode(made[0, 1:37]))

    def passes(self, variant: Variant) -> bool:
        text = variant()
        logits, _ = self.model(text[:, :-1])  # (B, STEPS, V)
        expected = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return (nats(self.model, text).mean() / expected - 1).abs().item() < 0.1


def main(lesson: Lesson) -> None:
    torch.set_default_device(lesson.device)
    told = [story.text for story in stories.write(lesson.seed, 15 * S)]
    Case.seed, Case.text = lesson.seed, "".join(told)[:S]
    Case.vocabulary = "".join(sorted(set("".join(told) + string.ascii_lowercase)))
    training = encode("".join(told[N:]), Case.vocabulary)
    Case.model = NGram(training, len(Case.vocabulary), 3, smoothing=0.01)
    Case.documents = torch.stack([encode("\n" + story[:T], Case.vocabulary) for story in told[:N]])
    show(
        lesson,
        [NotShifted, ShiftedTwice, SharedWindows, PerplexityOfSum, TimesBatchSize, StateCarried, Greedy],
    )


if __name__ == "__main__":
    run(main)
