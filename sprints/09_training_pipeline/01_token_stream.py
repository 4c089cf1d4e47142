"""A token stream: any text becomes one long file of tokens, read in windows that use each token alike.

Run:     uv run sprints/09_training_pipeline/01_token_stream.py      (17 s on two cores)
Proves:  1. the file written token by token is the lab's; cut at the ENDs and decoded it is the documents
         2. windows gathered at once equal a loop over tokens, past the end of the stream and around a short
            one; a batch runs as many lines of Python with 512 tokens a window as with 8
         3. windows side by side: in each round every token but S % T is a target once, and over the rounds
            every token comes first in a window at some time
         4. starts drawn with replacement: after as many windows a share of 1/e of the tokens was no target
            yet, counts spread like Poisson's, and the tokens at the ends come less than 3/4 as often
         5. pieces of documents equal a loop over tokens: in each round every token is a target once, and
            none is predicted from another document
         6. tokenizer and stream are the same whatever the held-out part says, and no held-out document is
            trained on; windows that are cut first and divided then share over 90 % of the places held out
         7. window k is a pure function of seed and k, in batches of any size, and two processes that take
            turns see each window once; so is piece k
Shapes:  S tokens in the stream; B windows of T tokens
Writes:  results/09_training_pipeline/01_token_stream.png
Note:    notes/01_token_stream.md
"""

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.lesson import Lesson, run
from lab.stream import Pieces, Stream, TokenText, prepare, read
from lab.tokenizer import END, Tokenizer

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

V, T, B, ROUNDS = 1024, 16, 12, 200
COUNTED = 100_003  # places of the stream in which targets are counted; with T = 16, 3 are left over
STUDIED = 200_000  # characters of the text that is divided anew


# ── A file of tokens ──────────────────────────────────────────────────────────────────────────────────────


def write_by_loop(file: Path, documents: list[str], tokenizer: Tokenizer) -> None:
    """Every token as two bytes in the machine's order, and END after each document."""
    with file.open("wb") as out:
        for document in documents:
            for token in [*tokenizer.encode(document), tokenizer.special[END]]:
                out.write(token.to_bytes(2, sys.byteorder))


def texts_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """What stands before each END: (S,)."""
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.special[END]) + 1)
    return [tokenizer.decode(part[:-1]) for part in parts[:-1]]  # nothing comes after the last END


# ── Windows over it ───────────────────────────────────────────────────────────────────────────────────────


def start_of(k: int, S: int, length: int, seed: int) -> int:
    """Where window k begins. A round's windows lie side by side from a place of its own, in any order."""
    per_round = max(1, S // length)
    round_, number = divmod(k, per_round)
    draw = np.random.default_rng([seed, round_])
    shift, order = draw.integers(S), draw.permutation(per_round)
    return int(shift + length * order[number]) % S


def windows_by_loop(tokens: np.ndarray, length: int, starts: list[int]) -> tuple[Tensor, Tensor]:
    """The windows that begin there, and their targets, token by token: (B, length) each."""
    S = len(tokens)  # after the last token comes the first
    rows = [[int(tokens[(start + t) % S]) for t in range(length + 1)] for start in starts]
    ids = torch.tensor(rows)  # (B, length + 1)
    return ids[:, :-1], ids[:, 1:]


def lines_run(function: Callable, *arguments: object) -> int:
    """How many lines of Python a call runs, those of the functions that it calls included."""
    lines = 0

    def trace(frame, event: str, _) -> Callable:
        nonlocal lines
        lines += event == "line"
        return trace

    sys.settrace(trace)
    function(*arguments)
    sys.settrace(None)
    return lines


def count_side_by_side(seed: int) -> tuple[Tensor, Tensor]:
    """How often each place is a target, by round, and how often the first of its window, in all rounds."""
    stream = Stream(np.arange(COUNTED), T, seed)  # the tokens are their own places, to be counted
    rounds, first = [], torch.zeros(COUNTED, dtype=torch.long)
    for round_ in range(ROUNDS):
        _, targets = stream.batch(round_ * stream.per_round, stream.per_round)  # (S // T, T)
        rounds.append(targets.flatten().bincount(minlength=COUNTED).byte())
        first += targets[:, 0].bincount(minlength=COUNTED)
    return torch.stack(rounds), first  # (ROUNDS, S), (S,)


def count_random_starts(seed: int) -> Tensor:
    """How often each place is a target of as many windows, all of which begin anywhere: (ROUNDS, S)."""
    draw, rounds = torch.Generator().manual_seed(seed), []
    for _ in range(ROUNDS):
        starts = torch.randint(COUNTED - T, (COUNTED // T, 1), generator=draw)
        targets = starts + torch.arange(1, T + 1)  # (S // T, T)
        rounds.append(targets.flatten().bincount(minlength=COUNTED).byte())
    return torch.stack(rounds)


class Turns(IterableDataset):
    """Windows number first … last - 1 of a file of tokens, shared by the workers of a DataLoader."""

    def __init__(self, file: Path, seed: int, first: int, last: int) -> None:
        self.file, self.seed, self.first, self.last = file, seed, first, last

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        stream = Stream(np.memmap(self.file, dtype=np.uint16, mode="r"), T, self.seed)
        worker = get_worker_info()
        for k in range(self.first + worker.id, self.last, worker.num_workers):
            yield k, stream.batch(k, 1)[0][0]  # (T,)


def pieces_by_loop(tokens: np.ndarray, end: int, length: int, seed: int, round_: int) -> list[list[int]]:
    """A round's pieces in their order, each after the token that stands before it."""
    pieces, before, document, draw = [], end, [], np.random.default_rng([seed, round_])
    for token in tokens.tolist():
        document.append(token)
        if token == end:
            cut = length if len(document) <= length else int(draw.integers(1, length + 1))
            while document:
                pieces.append([before, *document[:cut]])
                before, document, cut = pieces[-1][-1], document[cut:], length
    return [pieces[number] for number in draw.permutation(len(pieces))]


def unpadded(inputs: Tensor, targets: Tensor) -> list[list[int]]:
    """The same out of a batch of the lab's: (B, T'), (B, T')."""
    pairs = zip(inputs, targets, strict=True)
    return [[*row[target >= 0].tolist(), target[target >= 0][-1].item()] for row, target in pairs]


# ── A part that is held out ───────────────────────────────────────────────────────────────────────────────


def divide(text: str, folder: Path) -> TokenText:
    """A text in a file, as the lab divides it: its last tenth is held out."""
    folder.mkdir()
    (folder / "text").write_text(text, encoding="utf-8", newline="")
    return prepare(str(folder / "text"), 0, V, folder)


def shared(seed: int) -> tuple[float, float]:
    """The share of held-out places that are trained on: windows divided, and places divided before."""
    places, tenth = torch.arange(COUNTED), COUNTED // 10
    windows = places.unfold(0, T, 1)  # (S - T + 1, T): one from every place
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    early, late = (part.unfold(0, T, 1) for part in places.split([COUNTED - tenth, tenth]))
    pairs = (windows[:tenth], windows[tenth:]), (late, early)  # held out, training
    return tuple(torch.isin(held.unique(), train.unique()).double().mean().item() for held, train in pairs)


def draw_counts(ours: Tensor, theirs: Tensor) -> Figure:
    """How often tokens are a target in 8 rounds, and by how far from the beginning: (ROUNDS, S) twice."""
    figure, (bars, edge) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    times = torch.arange(20)
    for counts, name, width in ((theirs, "random starts", 0.8), (ours, "side by side", 0.3)):
        share = counts[:8].sum(0).bincount(minlength=20)[:20] / COUNTED
        bars.bar(times, share, width, label=name)
        edge.plot(range(1, 41), counts[:, 1:41].float().mean(0))  # place 0 is nobody's target at random
    poisson = [math.exp(-8) * 8**n / math.factorial(n) for n in times.tolist()]
    bars.plot(times, poisson, "k.", label="Poisson, mean 8")
    bars.set(xlabel="times a target in 8 rounds", ylabel="share of the tokens", xticks=range(0, 20, 4))
    figure.legend(loc="outside lower left", ncols=3, fontsize="small")
    edge.set(xlabel="place in the stream", ylabel="times a target in a round", ylim=(0, 1.2))
    figure.suptitle("Random starts leave tokens out, and the ends most of all", size="medium")
    return figure


def main(lesson: Lesson) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: it is still mapped
        show(lesson, Path(folder))


def show(lesson: Lesson, folder: Path) -> None:
    lesson.heading("A text as a file of tokens")
    name, train, held_out, _ = read(lesson.data, lesson.seed)
    text = prepare(lesson.data, lesson.seed, V, folder)
    tokenizer, S, end = text.tokenizer, len(text.train), text.tokenizer.special[END]
    print(f"{name}: {sum(map(len, train)):,} characters for training in {len(train):,} documents")
    size = (folder / "train.tokens").stat().st_size
    print(f"{S:,} tokens of V = {tokenizer.V:,} in a file of {size:,} bytes")
    begins = text.train[:7].tolist()
    print(f"first {begins}, which is {[tokenizer.decode([token]) for token in begins]}")
    write_by_loop(folder / "by loop", train, tokenizer)
    same = (folder / "by loop").read_bytes() == (folder / "train.tokens").read_bytes()
    lesson.proves(1, same and texts_of(text.train, tokenizer) == train)

    lesson.heading("Windows")
    ours, slow = [], []
    for size, length, count in ((S, 1, 5), (S, T, B), (S, 64, 3), (100, T, 20), (5, T, 3)):
        tokens, stream = text.train[:size], Stream(text.train[:size], length, lesson.seed)
        starts = [stream.starts(k // stream.per_round)[k % stream.per_round] for k in range(count)]
        ours += stream.batch(0, count)
        slow += windows_by_loop(tokens, length, starts)
    print(f"Python for {B} windows     gathered at once               in a loop")
    lines = {}
    for length in (8, 512):
        stream, lines[length], told = Stream(text.train, length, lesson.seed), [], ""
        starts = stream.starts(0)[:B].tolist()
        for function, *arguments in ((stream.batch, 0, B), (windows_by_loop, text.train, length, starts)):
            lines[length].append(lines_run(function, *arguments))
            began = time.perf_counter()
            function(*arguments)
            told += f"{lines[length][-1]:9,} lines {1_000 * (time.perf_counter() - began):5.2f} ms"
        print(f"T = {length:<12}{told}")
    lesson.proves_equal(2, [*ours, lines[512][0]], [*slow, lines[8][0]])

    lesson.heading(f"How often is each token a target? {ROUNDS} rounds over {COUNTED:,} tokens, T = {T}")
    (ours, first), theirs = count_side_by_side(lesson.seed), count_random_starts(lesson.seed)
    print("                not in a round   twice or more   variance / mean   the ends, to the mean")
    unseen, spread, ends = [], [], []
    for name, counts in (("side by side", ours), ("random starts", theirs)):
        total, twice = counts.sum(0).double(), (counts > 1).double().mean()  # (S,), ()
        unseen.append((counts == 0).double().mean().item())
        spread.append((total.var() / total.mean()).item())
        ends.append((torch.cat([total[:T], total[-T:]]).mean() / total.mean()).item())
        print(f"{name:15}{unseen[-1]:15.3%}{twice:16.1%}{spread[-1]:18.3f}{ends[-1]:24.2f}")
    held = (ours <= 1).all() and ((ours == 0).sum(1) == COUNTED % T).all() and first.min() > 0
    lesson.proves(3, held.item(), f"first of its window {first.min()} to {first.max()} times")
    held = abs(unseen[1] - math.exp(-1)) < 0.01 and 0.8 < spread[1] < 1.2 and ends[1] < 0.75
    lesson.proves(4, held, f"1/e is {math.exp(-1):.1%}")
    lesson.save(draw_counts(ours, theirs))

    lesson.heading("Documents in pieces")
    part, ours, slow = text.train[:20_000].copy(), [], []
    part[-1] = end  # the last document is cut off, and ends there
    for length in (T, 64, 256):
        stream = Pieces(part, end, length, lesson.seed)
        inputs, targets = stream.batch(0, len(stream.round(0)))  # (pieces, T')
        ours, slow = (
            ours + unpadded(inputs, targets),
            slow + pieces_by_loop(part, end, length, lesson.seed, 0),
        )
    ranges = stream.round(0)[stream.round(0)[:, 0].argsort()]  # (pieces, 2): they lie end to end
    whole = [0, *ranges[:, 1]] == [*ranges[:, 0], len(part)]
    alone = not ((inputs[:, 1:] == end) & (targets[:, 1:] >= 0)).any()
    begun, real = (inputs[:, :1] == end).expand_as(targets), targets >= 0
    windows = Stream(part, 256, lesson.seed)
    lost = (windows.batch(0, windows.per_round)[0] == end).cumsum(1) == 0  # (S // T, T)
    print("T = 256          targets without the beginning of their document   padding")
    print(f"windows          {lost.double().mean():47.1%}{0:10.1%}")
    print(f"pieces           {(~begun)[real].double().mean():47.1%}{(~real).double().mean():10.1%}")
    lesson.proves(5, ours == slow and whole and alone, f"{len(ours):,} pieces")

    lesson.heading("Held out")
    whole = "".join([*train, *held_out])[:STUDIED]
    cut = len(whole) * 9 // 10
    ways = whole, whole[:cut] + whole[cut:][::-1]  # what is held out stands backwards in the second
    one, two = (divide(way, folder / name) for way, name in zip(ways, ("as it is", "backwards"), strict=True))
    same = one.tokenizer.tokens == two.tokenizer.tokens and np.array_equal(one.train, two.train)
    other = not torch.equal(one.held_out[0], two.held_out[0])
    new = [{*two.tokenizer.tokens} - {*one.tokenizer.tokens}]
    new.append({*Tokenizer.learn(ways[1], V).tokens} - {*Tokenizer.learn(ways[0], V).tokens})
    careless, careful = shared(lesson.seed)
    print("                                                     text divided first   not so")
    print(f"other tokens, if the held-out tenth stood backwards {len(new[0]):19}{len(new[1]):9}")
    print(f"held-out places that are trained on {careful:35.1%}{careless:9.1%}")
    held = same and other and not {*train} & {*held_out} and careful == 0 and careless > 0.9
    lesson.proves(6, held)

    lesson.heading("The position is one number")
    k = max(0, S // T - B)  # half of the windows from here on belong to the next round
    starts = [start_of(number, S, T, lesson.seed) for number in range(k, k + 2 * B)]
    print(f"windows {k:,}, {k + 1:,}, {k + 2:,} … begin at {', '.join(map(str, starts[:3]))} …")
    anew = [Stream(text.train, T, lesson.seed).batch(first, 8)[0] for first in (k, k + 8, k + 16)]
    turns = Turns(folder / "train.tokens", lesson.seed, k, k + 2 * B)
    numbers, in_turn = zip(*DataLoader(turns, batch_size=None, num_workers=2), strict=True)
    print(f"two processes that take turns read {numbers[::2][:3]} … and {numbers[1::2][:3]} …")
    slow = windows_by_loop(text.train, T, starts)[0]  # (2B, T)
    ours, theirs = [torch.cat(anew), torch.stack(in_turn)], [slow, slow]
    rounds = [pieces_by_loop(part, end, T, lesson.seed, round_) for round_ in (0, 1)]
    k = len(rounds[0]) - 5
    for first, size in ((k, B), (k + B, 1)):
        ours += map(torch.tensor, unpadded(*Pieces(part, end, T, lesson.seed).batch(first, size)))
    theirs += map(torch.tensor, [*rounds[0], *rounds[1]][k : k + B + 1])
    lesson.proves_equal(7, [*numbers, *ours], [*range(numbers[0], numbers[0] + 2 * B), *theirs])


if __name__ == "__main__":
    run(main, data="stories")
