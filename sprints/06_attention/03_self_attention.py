"""Self-attention: every place asks, every place answers, and what comes back is an average.

Run:     uv run sprints/06_attention/03_self_attention.py      (14 s on two cores; 10 s with --steps 200)
Proves:  1. a loop, products and PyTorch's own agree, in the gradients of the text and all three matrices too
         2. what can change what: lower triangular with the causal mask, full without
         3. all 120 orders of five places merely reorder the output; with a mask or positions only one does
         4. a head can take the mean of the past, and copy the place before; two heads subtract neighbours
         5. it cannot leave the range of the values it sees, nor tell a text from the same text twice
         6. the language model is this head on the last K characters, read whole or in pieces
         7. trained, one head loses less on held-out text than the bigram table, and more than a known floor
Shapes:  B texts, T places that look, S places looked at, C width, D width of the head, V characters,
         K characters in view
Writes:  results/06_attention/03_self_attention.png, results/06_attention/03_self_attention.json
Note:    notes/03_self_attention.md
"""

import itertools
import math

from lab.attention import causal_mask
from lab.corpus import LEAD, load
from lab.fit import fit
from lab.influence import draw as draw_influence
from lab.influence import influence, rows
from lab.ladder import first_mistake, nats_per_character, rung
from lab.lesson import Lesson, run
from lab.ngram import NGram
from lab.positions import sinusoids

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

K, C, D, B, T, RATE = 16, 64, 64, 4, 64, 1e-2
SHAPES = (1, 1, 1, 1), (2, 5, 3, 4), (3, 7, 8, 2)  # B, T, C, D
PIECE = 26  # characters in the picture


def head_by_loop(x: Tensor, Wq: Tensor, Wk: Tensor, Wv: Tensor, causal: bool) -> Tensor:
    """Place after place of one text: x (T, C), matrices (C, D) -> (T, D)."""
    outputs = []
    for t in range(len(x)):
        seen = range(t + 1) if causal else range(len(x))
        query = x[t] @ Wq  # (D,): what this place looks for
        scores = [query @ (x[s] @ Wk) / math.sqrt(len(query)) for s in seen]  # each key says what is there
        total = sum(score.exp() for score in scores)
        outputs.append(sum(score.exp() / total * (x[s] @ Wv) for score, s in zip(scores, seen, strict=True)))
    return torch.stack(outputs)


def head(x: Tensor, Wq: Tensor, Wk: Tensor, Wv: Tensor, mask: Tensor | None = None) -> Tensor:
    """All places at once: x (…, T, C), matrices (C, D), mask (T, T), True means look -> (…, T, D)."""
    q, k, v = x @ Wq, x @ Wk, x @ Wv  # (…, T, C) -> (…, T, D)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (…, T, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


class OneHead(nn.Module):
    """A language model of one head and nothing else: each place sees the last K characters, itself included.

    The window is a text of its own: place 0 is the oldest character in it, place K - 1 the one that looks.
    """

    def __init__(self, V: int, K: int, C: int, D: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V + 1, C)  # the last one stands for nothing: no character at all
        self.places = nn.Parameter(torch.randn(K, C))
        self.query, self.key, self.value = (nn.Linear(C, D, bias=False) for _ in range(3))
        self.output = nn.Linear(D, V)

    def nothing(self, ids: Tensor) -> Tensor:
        """What came before, if nothing did: (B, T) -> (B, K - 1)."""
        return ids.new_full((len(ids), len(self.places) - 1), self.tokens.num_embeddings - 1)

    def look(self, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T), state (B, K - 1) -> weights (B, T, 1, K) and values (B, T, K, D) of each window."""
        now, K = self.tokens(ids), len(self.places)  # (B, T, C)
        tokens = torch.cat([self.tokens(state), now], dim=1)  # (B, K - 1 + T, C)
        q = self.query(now + self.places[-1])[:, :, None]  # (B, T, D) -> (B, T, 1, D)
        # The key of a sum is the sum of the keys, so that no character is projected K times for its K places.
        k = self.key(tokens).unfold(1, K, 1).mT + self.key(self.places)  # (B, T, D, K) -> (B, T, K, D)
        v = self.value(tokens).unfold(1, K, 1).mT + self.value(self.places)
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), v

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> logits (B, T, V); the state is the K - 1 characters before them, (B, K - 1)."""
        state = self.nothing(ids) if state is None else state
        weights, v = self.look(ids, state)
        mixed = (weights @ v).squeeze(2)  # (B, T, 1, K) @ (B, T, K, D) -> (B, T, D)
        return self.output(mixed), torch.cat([state, ids], dim=1)[:, ids.shape[1] :]


def with_gradients(output: Tensor, inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, inputs, slope)]


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    corpus = load(
        lesson.data, lesson.seed, lesson.device
    )  # first: a file that cannot be used ends the run here
    draw = torch.Generator().manual_seed(lesson.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    def matrices(C: int, D: int) -> list[Tensor]:
        return [randn(C, D) for _ in range(3)]

    lesson.heading("One head, three ways")
    ours, slow, theirs = [], [], []
    for b, t, c, d in SHAPES:
        for causal in (False, True):
            mask = causal_mask(t, device=lesson.float64_device) if causal else None
            x, slope = randn(b, t, c).requires_grad_(), randn(b, t, d)
            inputs = [x, *(W.requires_grad_() for W in matrices(c, d))]
            q, k, v = (x @ W for W in inputs[1:])
            by_loop = torch.stack([head_by_loop(text, *inputs[1:], causal) for text in x])
            by_torch = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            ours += with_gradients(head(*inputs, mask), inputs, slope)
            slow += with_gradients(by_loop, inputs, slope)
            theirs += with_gradients(by_torch, inputs, slope)
    print(f"x {b, t, c}, three matrices {c, d}: queries, keys and values {b, t, d} -> output {b, t, d}")
    lesson.proves_equal(1, [ours, ours], [slow, theirs])

    lesson.heading("What can change what")
    places, weights = 5, matrices(4, 4)
    earlier = causal_mask(places, device=lesson.float64_device)
    masked = influence(lambda x: head(x, *weights, earlier), randn(1, places, 4))
    full = influence(lambda x: head(x, *weights), randn(1, places, 4))
    print("causal mask   no mask")
    print("\n".join(f"{left}     {right}" for left, right in zip(rows(masked), rows(full), strict=True)))
    wanted = [torch.ones(places, places).tril().long(), torch.ones(places, places).long()]
    lesson.proves_equal(2, [masked, full], wanted)

    lesson.heading("The order of the places")
    x, weights, earlier = randn(5, 4), matrices(4, 4), causal_mask(5, device=lesson.float64_device)
    table = sinusoids(5, 4).to(x)
    readers = {
        "no mask, no positions": lambda x: head(x, *weights),
        "causal mask": lambda x: head(x, *weights, earlier),
        "positions": lambda x: head(x + table, *weights),
    }
    followed = {}
    for name, read in readers.items():
        apart = [
            (read(x[list(order)]) - read(x)[list(order)]).abs().max().item()
            for order in itertools.permutations(range(5))
        ]
        followed[name] = sum(difference < 1e-10 for difference in apart)
        print(f"{name:22} the output follows {followed[name]:3} of {len(apart)} orders of the input")
    lesson.proves(3, list(followed.values()) == [120, 1, 1])

    lesson.heading("What an average can do")
    content = torch.tensor([[3], [1], [4], [1], [5], [9], [2], [6]]).to(x)  # (8, 1)
    x, earlier = torch.cat([content, torch.eye(8).to(x)], dim=1), causal_mask(8, device=x.device)
    Wv, Wk = torch.eye(9).to(x).split([1, 8], dim=1)  # the value is the content, the key says which place
    this, before = 1e4 * Wk, 1e4 * Wk.roll(-1, dims=1)  # queries: my own place, the place before mine
    can = {
        "all scores equal": head(x, 0 * Wk, Wk, Wv, earlier),
        "the place before": head(x, before, Wk, Wv, earlier),
        "this one less that": head(x, this, Wk, Wv, earlier) + head(x, before, Wk, -Wv, earlier),
    }
    for name, row in {"content": content, **can}.items():
        print(f"{name:20}" + " ".join(f"{number:5.2f}" for number in row[:, 0]))
    means = content.cumsum(0) / torch.arange(1, 9).to(x)[:, None]
    shifted = torch.cat([content[:1], content[:-1]])  # the first place has none before it: it sees itself
    lesson.proves_equal(4, list(can.values()), [means, shifted, content - shifted])

    lesson.heading("What it cannot do")
    inside, once, twice, earlier = [], [], [], causal_mask(12, device=x.device)
    for _ in range(100):
        x, weights = randn(12, 4), matrices(4, 4)
        output, v = head(x, *weights, earlier), x @ weights[2]  # (T, D)
        least, most = v.cummin(0).values, v.cummax(0).values  # of what each place has seen so far
        inside.append((output >= least - 1e-9) & (output <= most + 1e-9))
        once.append(head(x, *weights).repeat(2, 1))
        twice.append(head(x.repeat(2, 1), *weights))  # (2T, C): the same text again behind itself
    inside = torch.stack(inside)
    print(f"outputs between the least and the most seen: {inside.sum():,} of {inside.numel():,}")
    lesson.proves_equal(5, [inside, *twice], [torch.ones_like(inside), *once])

    lesson.heading("One head on real text")
    V = corpus.V
    torch.manual_seed(lesson.seed)
    model = OneHead(V, 4, 3, 5).double().to(lesson.float64_device)
    ids, parameters = torch.arange(12)[None].to(lesson.float64_device) % V, list(model.parameters())
    whole, slope = model(ids)[0], randn(1, 12, V)
    windows = torch.cat([model.nothing(ids), ids], dim=1).unfold(1, 4, 1)  # (1, 15) -> (1, T, 4)
    layers = (model.query, model.key, model.value)
    x = model.tokens(windows) + model.places  # (1, T, 4, C)
    mixed = head(x, *(layer.weight.T for layer in layers))  # (1, T, 4, D)
    slow = model.output(mixed[:, :, -1])  # each window's last place, which sees all of it
    state, pieces = None, []
    for piece in ids.split([1, 2, 4, 5], dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    window = influence(lambda ids: model(ids)[0], ids)
    ways = [with_gradients(way, parameters, slope) for way in (whole, slow, torch.cat(pieces, dim=1))]
    band = torch.ones(12, 12).tril().triu(-3).long()
    lesson.proves_equal(6, [*ways[1], *ways[2], window], [*ways[0], *ways[0], band])

    torch.manual_seed(lesson.seed)
    model = OneHead(V, K, C, D).to(lesson.device)
    _, seconds = fit(model, corpus, lesson, B=B, T=T, rate=RATE)
    step = rung("attention", model, corpus, sum(p.numel() for p in model.parameters()), seconds, lesson.seed)
    loss = step["nats_per_character"]
    unigram, bigram, trigram = (
        nats_per_character(NGram(corpus.train, V, n, smoothing=0.1), corpus) for n in (1, 2, 3)
    )
    print(f"ln V {math.log(V):.3f}   unigram {unigram:.3f}   bigram {bigram:.3f}   trigram {trigram:.3f}")
    print(f"one head {loss:.3f}" + (f"   floor {corpus.floor:.3f}" if corpus.floor else ""))
    lesson.proves(7, (corpus.floor or 0) < loss < bigram, f"{loss / bigram - 1:+.0%}", full_run=True)
    lesson.measured(rungs=[step])
    print(f"it writes: {step['sample'][: (first_mistake(step['sample']) or 0) + 40]!r}")

    document = corpus.held_out[0][None, : LEAD + PIECE]
    with torch.no_grad():
        weights, _ = model.look(document, model.nothing(document))
    weights = weights[0, :, 0].cpu()  # (LEAD + PIECE, K)
    print("mean weight on itself, 1 back, …:", " ".join(f"{w:.2f}" for w in weights.mean(0).flip(0)[:8]))
    picture = torch.zeros(len(weights), K - 1 + len(weights))
    for t, row in enumerate(weights):
        picture[t, t : t + K] = row
    picture = picture[LEAD:, K - 1 + LEAD :]  # (PIECE, PIECE)
    text = [c if "!" <= c <= "~" else "·" for c in corpus.decode(document[0, LEAD:])]

    figure = plt.figure(figsize=(6, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.4, 1))
    axes = left.subplots()
    axes.imshow(picture, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(PIECE), text, fontsize="x-small")
    axes.set_yticks(range(PIECE), text, fontsize="x-small")
    axes.tick_params(length=0)
    axes.set(title=f"Where one head looks in the last {K}", xlabel="looked at", ylabel="looks")
    above, below = right.subplots(2, 1)
    draw_influence(above, masked, "causal mask")
    draw_influence(below, full, "no mask")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, data="stories", steps=2_000)
