"""Evaluation: what a language model's numbers say, how sure one can be of them, and how they are got wrong.

Run:     uv run sprints/09_training_pipeline/06_evaluation.py      (9 s on two cores)
Proves:  1. the nats of every token, in padded batches, are those of each document read alone, token by token
         2. perplexity is the same for any size and order of the batches; the mean of batch means, the mean of
            batch perplexities, and a mean that counts the padding are not
         3. bits per byte are real bits: a coder that has nothing but the model's chances writes a document in
            that many, give or take 2, and reads it back
         4. resampled documents give intervals that cover the truth in 88 to 98 % of simulated held-out sets;
            intervals from single tokens do in less than 80 %, where documents differ
         5. the exact interval of a share covers it at least 95 % of the time, whatever it is; the share give
            or take 1.96 standard errors does so less than 88 % of the time, where 99 % are flawless
         6. the loss falls along a document; windows cut without regard to context start high: their first
            tokens lose more than the same tokens do with all that came before them
Shapes:  N documents of at most T tokens, V different ones
Writes:  results/09_training_pipeline/06_evaluation.png, results/09_training_pipeline/06_evaluation.json
Note:    notes/06_evaluation.md
"""

import math
import zlib
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean

from lab import ladder, training
from lab.gpt import GPT
from lab.lesson import Lesson, run
from lab.stories import parse
from lab.stream import losses, read
from lab.tokenizer import END

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MODEL = Path(__file__).resolve().parents[2] / "results/09_training_pipeline/02_train_gpt.model"
OPTIONS = {"--model": {"type": Path, "default": MODEL, "help": "of sprint 9", "metavar": "FILE"}}
TOLD, STUDIED, CODED = 200, 8, 100  # stories to tell; documents read one by one; tokens to code
WAYS = ("all nats by all tokens", "mean of batch means", "mean of batch perplexities", "padding counted")
SETS, DOCUMENTS, TIMES = 500, 100, 500  # simulated held-out sets, documents in each, times resampled


@torch.no_grad()
def token_by_token(model: GPT, document: Tensor) -> list[float]:
    """The nats of each token after the first, with all before it as context: (T + 1,)."""
    ids = document.to(next(model.parameters()).device)
    return [-model(ids[None, :t])[0, -1].log_softmax(0)[ids[t]].item() for t in range(1, len(ids))]


@torch.no_grad()
def padded(model: GPT, pieces: list[Tensor], end: int, B: int = 32) -> tuple[Tensor, Tensor]:
    """The nats of all targets, of the padding too, and which are real: (N, T), (N, T) bool."""
    ids = pad_sequence(pieces, batch_first=True, padding_value=end)  # (N, T + 1)
    ids = ids.to(next(model.parameters()).device)
    lengths = torch.tensor([len(piece) - 1 for piece in pieces])
    nats = []
    for batch in ids.split(B):
        chances = model(batch[:, :-1]).float().log_softmax(-1)  # (B, T, V)
        nats.append(-chances.gather(-1, batch[:, 1:, None])[..., 0].cpu().double())  # (B, T)
    return torch.cat(nats), torch.arange(ids.shape[1] - 1) < lengths[:, None]


def perplexities(nats: Tensor, real: Tensor, B: int) -> list[float]:
    """The right one, and three wrong ones, by batches of B, each as wide as its longest document."""
    batches = list(zip(nats.split(B), real.split(B), strict=True))  # (B, T), (B, T)
    sums = [(part * mask).sum().item() for part, mask in batches]
    counts = [mask.sum().item() for _, mask in batches]
    whole = [part[:, : mask.sum(1).max()] for part, mask in batches]
    means = [nats / count for nats, count in zip(sums, counts, strict=True)]
    return [
        math.exp(sum(sums) / sum(counts)),
        math.exp(fmean(means)),  # a token in a batch of few counts more
        fmean(map(math.exp, means)),  # the exponential of a mean is not the mean of exponentials
        math.exp(
            sum(part.sum().item() for part in whole) / sum(part.numel() for part in whole)
        ),  # what follows the end of a document is nobody's loss
    ]


@torch.no_grad()
def edges(model: GPT, ids: list[int]) -> list[int]:
    """The next token's chances, end to end, as whole numbers: token i has from edges[i] to edges[i + 1]."""
    logits = model(torch.tensor([ids], device=next(model.parameters()).device))[0, -1]  # (V,)
    return [0, *accumulate((logits.float().softmax(0).cpu() * 2**24).long().add(1).tolist())]


def encode(model: GPT, ids: list[int]) -> tuple[int, int]:
    """Arithmetic coding of ids[1:]: a number of n bits; 0.number in binary lies in the ids' own interval."""
    low, width, whole = 0, 1, 1  # the interval of all texts that begin so: from low / whole, width / whole
    for t in range(1, len(ids)):
        at = edges(model, ids[:t])
        low, whole = low * at[-1] + width * at[ids[t]], whole * at[-1]
        width *= at[ids[t] + 1] - at[ids[t]]
    n = 0
    while ((number := -((-low << n) // whole)) + 1) * whole > (low + width) << n:
        n += 1
    return number, n


def decode(model: GPT, number: int, n: int, first: int, count: int) -> list[int]:
    """The ids again."""
    ids, low, width, whole = [first], 0, 1, 1
    for _ in range(count):
        at = edges(model, ids)
        place = (number * whole - (low << n)) * at[-1] // (width << n)
        ids.append(bisect_right(at, place) - 1)
        low, whole = low * at[-1] + width * at[ids[-1]], whole * at[-1]
        width *= at[ids[-1] + 1] - at[ids[-1]]
    return ids


def bootstrap(nats: Tensor, sizes: Tensor, draw: torch.Generator) -> tuple[float, float]:
    """A 95 % interval for nats by size, from N documents: what as many others might have given."""
    drawn = torch.randint(len(nats), (TIMES, len(nats)), generator=draw)  # (TIMES, N), with replacement
    ratios = nats[drawn].sum(1) / sizes[drawn].sum(1)  # (TIMES,)
    return tuple(ratios.quantile(torch.tensor([0.025, 0.975]).to(ratios)).tolist())


def from_tokens(nats: Tensor) -> tuple[float, float]:
    """The same, as if every token were drawn by itself: (S,)."""
    error = 1.96 * nats.std().item() / math.sqrt(len(nats))
    return nats.mean().item() - error, nats.mean().item() + error


def simulated(draw: torch.Generator) -> tuple[float, float]:
    """How often the two cover the truth, which is 1, where some documents are harder than others."""
    covered = torch.zeros(2)
    for _ in range(SETS):
        hard = torch.exp(0.3 * torch.randn(DOCUMENTS, 1, generator=draw) - 0.3**2 / 2)  # their mean is 1
        nats = -torch.rand(DOCUMENTS, 60, generator=draw).log() * hard  # (documents, tokens)
        real = torch.arange(60) < torch.randint(20, 61, (DOCUMENTS, 1), generator=draw)
        intervals = bootstrap((nats * real).sum(1), real.sum(1), draw), from_tokens(nats[real])
        covered += torch.tensor([low <= 1 <= high for low, high in intervals])
    return tuple((covered / SETS).tolist())


def binomial(n: int, p: Tensor) -> Tensor:
    """The chances of 0 … n successes in n trials: (P,) -> (P, n + 1)."""
    k, p = torch.arange(n + 1).double(), p.double()[:, None]
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (ways + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p)).exp()


def exact_intervals(n: int) -> tuple[Tensor, Tensor]:
    """For each count of successes the shares that make neither it or more, nor it or less, a 2.5 % surprise.

    Clopper and Pearson 1934; (n + 1,) both.
    """
    k = torch.arange(n + 1)
    low, high = torch.zeros(n + 1).double(), torch.ones(n + 1).double()
    for _ in range(50):  # halve the stretch in which the lower end lies
        middle = (low + high) / 2
        surprise = (binomial(n, middle) * (k >= k[:, None])).sum(1) <= 0.025
        low, high = torch.where(surprise, middle, low), torch.where(surprise, high, middle)
    return low, 1 - low.flip(0)


def plain_intervals(n: int) -> tuple[Tensor, Tensor]:
    """The share, give or take 1.96 standard errors: (n + 1,) both."""
    share = torch.arange(n + 1).double() / n
    error = 1.96 * (share * (1 - share) / n).sqrt()
    return share - error, share + error


def coverage(intervals: tuple[Tensor, Tensor], n: int, p: Tensor) -> Tensor:
    """How likely it is that the interval covers the share that made the count: (P,) -> (P,)."""
    low, high = intervals
    return (binomial(n, p) * ((low <= p[:, None]) & (p[:, None] <= high))).sum(1)


def by_place(nats: Tensor, places: Tensor, count: int) -> Tensor:
    """The mean nats at each of the first places, nan where there is no token: (S,), (S,) -> (count,)."""
    sums = torch.zeros(count).double().index_add(0, places, nats.double())
    return sums / places.bincount(minlength=count)


def draw_places(curves: dict[str, Tensor]) -> Figure:
    """Mean nats by place, four places together."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, curve), look in zip(curves.items(), ("o-", "s-", "^--"), strict=True):
        means = curve.unfold(0, 4, 4).nanmean(-1)[:40]  # (places / 4,)
        axes.plot(torch.arange(len(means)) * 4 + 2.5, means, look, label=name, markersize=4)
    axes.set(xlabel="place in the document or window", ylabel="nats per token", ylim=(0, None))
    figure.legend(loc="outside lower left", ncols=2, fontsize="small")
    axes.set_title("A window that is cut anywhere starts high")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    model, tokenizer, facts = training.load_model(lesson.options.model, lesson.device)
    name, _, texts, floor = read(lesson.data, lesson.seed, characters=1)
    if facts.get("corpus", name).startswith("stories ") != name.startswith("stories "):
        lesson.needs = "a model of such texts"
    T, end, draw = model.settings["T"], tokenizer.special[END], torch.Generator().manual_seed(lesson.seed)
    documents = [torch.tensor([end, *tokenizer.encode(text)]) for text in texts]
    pieces = [part[i : i + T + 1] for part in documents for i in range(0, len(part) - 1, T)]  # (T + 1,) each

    lesson.heading("Nats")
    nats, real = padded(model, pieces, end)  # (N, T), (N, T)
    together = losses(model, documents, T)  # (S,)
    alone = [token_by_token(model, piece) for piece in pieces[:STUDIED]]
    some = torch.tensor([value for values in alone for value in values])
    total = together.double().sum().item()
    characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    print(f"held out of {name}: {len(together):,} tokens, in pieces of at most {T}; {total:,.1f} nats")
    lesson.proves_equal(1, [some, nats[real].float()], [together[: len(some)], together], tolerance=1e-4)

    lesson.heading("Perplexity")
    order = real.sum(1).argsort()
    ways = [perplexities(nats, real, B) for B in (1, 8, 32)] + [perplexities(nats[order], real[order], 32)]
    print("batches of                            1          8         32     32, by length")
    for way, values in zip(WAYS, zip(*ways, strict=True), strict=True):
        print(f"{way:27}" + "".join(f"{value:11,.4f}" for value in values))
    spread = [max(values) / min(values) - 1 for values in zip(*ways, strict=True)]
    lesson.proves(2, spread[0] < 1e-9 and min(spread[1:]) > 1e-6)

    lesson.heading("Bits")
    print("per           nats   perplexity     bits   bits of the floor")
    for unit, count in (("token", len(together)), ("character", characters), ("byte", size)):
        least = f"{floor * characters / count / math.log(2):20.4f}" if floor else ""
        each = total / count
        print(f"{unit:9}{each:9.4f}{math.exp(each):13.4f}{each / math.log(2):9.4f}{least}")
    ids, needed = pieces[0][: CODED + 1].tolist(), sum(alone[0][:CODED]) / math.log(2)
    number, n = encode(model, ids)
    raw = tokenizer.decode_bytes(ids[1:])
    packed = 8 * len(zlib.compress(raw, 9))
    print(f"{len(raw)} bytes are {8 * len(raw):,} bits of text, {packed:,} by zlib; the model's chances")
    print(f"ask for {needed:.2f}, and the coder writes {n}: {number >> max(0, n - 40):b}…")
    lesson.proves(3, decode(model, number, n, ids[0], len(ids) - 1) == ids and abs(n - needed) <= 2)

    lesson.heading("How sure?")
    lengths = torch.tensor([len(part) - 1 for part in (documents if len(documents) > 1 else pieces)])  # (N,)
    each = torch.stack([part.sum() for part in together.double().split(lengths.tolist())])  # (N,)
    interval, plain = bootstrap(each, lengths, draw), from_tokens(together)
    mean = total / len(together)
    found = [("per token", mean, interval), ("… from single tokens", mean, plain)]
    if floor:
        letters = torch.tensor([len(text) for text in texts])
        excess = each - torch.tensor([parse(text).nats for text in texts])
        above = excess.sum().item() / characters  # nats per character
        found.append(("above the floor", above, bootstrap(excess, letters, draw)))
    print(f"nats of {len(each)} documents    mean     95 % interval")
    for what, ratio, (low, high) in found:
        print(f"{what:22}{ratio:10.4f}     {low:.4f} to {high:.4f}")
    by_documents, by_tokens = simulated(draw)
    held = 0.88 <= by_documents <= 0.98 and by_tokens < 0.8
    lesson.proves(4, held, f"{by_documents:.1%} and {by_tokens:.1%} of {SETS}")

    lesson.heading("Flawless stories")
    exact, plain = exact_intervals(TOLD), plain_intervals(TOLD)
    if floor:
        told = training.tell(model, tokenizer, TOLD, lesson.seed)
        right = sum(ladder.first_mistake(text) is None for text in told)
        low, high = (end[right].item() for end in exact)
        print(f"{right} of {TOLD}, {right / TOLD:.1%}; 95 % interval {low:.1%} to {high:.1%}")
        lesson.measured(flawless=right / TOLD, flawless_interval=[low, high], told=TOLD)
    print(f"if all were: {exact[0][-1]:.1%} to 100.0%, by standard errors {plain[0][-1]:.1%} to 100.0%")
    shares = torch.arange(1, 1000).double() / 1000
    sure, unsure = coverage(exact, TOLD, shares), coverage(plain, TOLD, shares)
    worst = f"at worst {sure.min():.1%}, and {unsure.min():.1%}; at a share of 99 % {unsure[989]:.1%}"
    lesson.proves(5, (sure.min() >= 0.95).item() and (unsure[989] < 0.88).item(), worst)

    lesson.heading("Where in the context?")
    W, places = (
        min(32, max(1, T // 2)),
        torch.cat([torch.arange(len(part) - 1) for part in documents]),
    )  # (S,)
    cut, place, inner = losses(model, documents, W), places % T, places % W  # (S,): read in windows of W
    late = place > inner  # those that have more before them than the window shows
    curves = {
        "from the beginning": by_place(together, place, T),
        f"windows of {W}, cut anywhere": by_place(cut[late], inner[late], W),
        "their tokens, not cut": by_place(together[late], inner[late], W),
    }
    bounds = [bound for bound in (0, 4, 8, 16, 32, 64, 128, 256) if bound <= T]
    print(f"{'nats per token at places':27}" + "".join(f"{f'{a}–{b - 1}':>8}" for a, b in pairwise(bounds)))
    for what, curve in curves.items():
        means = [curve[a:b].nanmean() for a, b in pairwise(bounds) if b <= len(curve)]
        print(f"{what:27}" + "".join(f"{mean:8.3f}" for mean in means))
    more = (cut - together)[late & (inner < 4)].double()
    surprise = more.mean() / (more.std() / math.sqrt(len(more)))
    told = f"{more.mean():.2f} nats more, {surprise:.0f} standard errors"
    held = surprise > 4 and together[place < 16].mean() > together[place >= 16].mean()
    lesson.proves(6, bool(held), told, full_run=True)
    lesson.save(draw_places(curves))
    told = {"nats_per_token": mean, "nats_per_token_interval": interval}
    told |= {"nats_per_character": total / characters, "bits_per_byte": total / size / math.log(2)}
    lesson.measured(corpus=name, floor=floor, **told)


if __name__ == "__main__":
    run(main, data="stories", options=OPTIONS)
