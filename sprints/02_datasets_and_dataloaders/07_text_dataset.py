"""Text as a dataset: characters become numbers, and windows over them become inputs and targets.

Run:     uv run sprints/02_datasets_and_dataloaders/07_text_dataset.py      (8 s on two cores)
Proves:  1. decoding what was encoded gives back the text, to the last character; the lab encodes alike
         2. a character outside the vocabulary is refused, never taken for another one
         3. the target of position t is the input of position t + 1, the next character of the text
         4. the dataset's windows equal those of a loop, of unfold and of the lab, at every length and stride
         5. cutting the text keeps every position on one side of the split; cutting the windows shares T
         6. a padded batch and its mask equal what pad_sequence makes of the lines
         7. the masked mean loss and its gradient equal a loop over the lines and PyTorch's ignore_index
Shapes:  S characters, V different ones; N windows or B lines of T positions
Writes:  results/02_datasets_and_dataloaders/07_text_dataset.png
Note:    notes/07_text_dataset.md
"""

import tempfile
from pathlib import Path

from lab import BadInput, corpus
from lab.lesson import Lesson, read_text, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

T, B, LONGEST = 8, 4, 28  # positions in a window; lines in a batch, longer ones cut off at LONGEST characters
STUDIED = 10_000  # windows are taken one by one here, so only over the beginning of a long text
TEXT = (
    "The kite went up on Sunday, / over the café, / past seven gulls and a bell. / The boy held on. /  / "
    "At noon the string ran out, / the kite grew small, / a comma in the sky, / a full stop. / "
    "On Friday it came back by post / from Åre, / with a stamp on its tail. / "
).replace(" / ", "\n")


def encode(text: str, vocabulary: str) -> Tensor:
    """S characters -> (S,) whole numbers: the place of each in the vocabulary. KeyError if it has none."""
    numbers = {character: number for number, character in enumerate(vocabulary)}
    return torch.tensor([numbers[character] for character in text])


def decode(ids: Tensor, vocabulary: str) -> str:
    return "".join(vocabulary[number] for number in ids.tolist())


class Windows(Dataset):
    """Windows of T positions over a text (S,), one every `stride`. "abcde", T = 3: abc -> bcd, bcd -> cde."""

    def __init__(self, ids: Tensor, T: int, stride: int = 1) -> None:
        self.ids, self.T, self.stride = ids, T, stride

    def __len__(self) -> int:
        return (len(self.ids) - self.T - 1) // self.stride + 1  # the last target must still be in the text

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = range(len(self))[index] * self.stride  # range knows negative indices, and raises IndexError
        return self.ids[start : start + self.T], self.ids[start + 1 : start + 1 + self.T]  # (T,), (T,)


def windows_by_loop(ids: list[int], T: int, stride: int) -> Tensor:
    """Every window, character by character, for as long as there is a last target: (N, 2, T)."""
    starts = [start for start in range(0, len(ids), stride) if start + T < len(ids)]
    return torch.tensor(
        [[[ids[start + shift + t] for t in range(T)] for shift in (0, 1)] for start in starts]
    )


def stacked(windows: Dataset) -> Tensor:
    """Every window of a dataset, its inputs and its targets: (N, 2, T)."""
    return torch.stack([torch.stack(pair) for pair in windows])


def pad(lines: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """B ragged lines -> inputs, targets and mask (True: a real character), each (B, T) with T the longest."""
    lengths = torch.tensor([len(line) - 1 for line in lines])
    mask = torch.arange(lengths.max()) < lengths[:, None]  # (T,) and (B, 1) -> (B, T)
    inputs, targets = torch.zeros(2, *mask.shape, dtype=torch.long)  # (B, T) each
    inputs[mask] = torch.cat([line[:-1] for line in lines])
    targets[mask] = torch.cat([line[1:] for line in lines])
    return inputs, targets, mask


def loss_by_loop(logits: Tensor, lines: list[Tensor]) -> Tensor:
    """The mean of −log p over the characters of all lines, which nobody padded: (B, T, V) -> ()."""
    pairs = [(b, t, line[t + 1]) for b, line in enumerate(lines) for t in range(len(line) - 1)]
    return sum(-logits[b, t].log_softmax(0)[target] for b, t, target in pairs) / len(pairs)


def main(lesson: Lesson) -> None:
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "kite.txt")
        own.write_text(TEXT, encoding="utf-8")
        text = read_text(lesson.data or str(own))
    if len(text) < (needed := 10 * (T + 1)):  # a tenth is held out: at least one window and its last target
        raise BadInput(f"--data: a text of {len(text)} characters is too short, {needed} are needed")

    lesson.heading("Characters and numbers")
    vocabulary = "".join(sorted({"\n", *text}))
    ids, V = encode(text, vocabulary), len(vocabulary)
    print(f"{len(text):,} characters in {len(text.encode()):,} bytes, V = {V} different ones")
    print(f"{text[:T]!r} -> {ids[:T].tolist()}")
    lesson.proves(1, decode(ids, vocabulary) == text and ids.equal(corpus.encode(text, vocabulary)))
    stranger = next(character for character in map(chr, range(32, 0xD800)) if character not in vocabulary)
    try:
        answer = encode(stranger, vocabulary)
    except KeyError as error:
        answer = error
    lesson.proves(2, isinstance(answer, KeyError), f"{stranger!r} gave {answer!r}")

    lesson.heading(f"Windows over {min(len(ids), STUDIED):,} characters")
    ids, places = ids[:STUDIED], torch.arange(len(ids))[:STUDIED]
    before, after = (repr(decode(part, vocabulary)) for part in Windows(ids, T)[-1])
    print(f"the last of {len(Windows(ids, T)):,} windows: {before} -> {after}")
    whole = stacked(Windows(places, T))  # windows over 0 … S−1 tell which positions of the text they hold
    inputs, targets = whole.unbind(1)  # (N, 2, T) -> (N, T), (N, T)
    lesson.proves_equal(3, [targets[:, :-1], targets], [inputs[:, 1:], inputs + 1])
    sizes = (1, 1), (5, 3), (T, 1), (T, T)  # lengths and strides
    ours = [stacked(Windows(ids, *size)) for size in sizes]
    slow = [windows_by_loop(ids.tolist(), *size) for size in sizes]
    # (S,) -> (N, length + 1) -> (N, 2, length): views of the same memory, nothing is copied
    views = [ids.unfold(0, length + 1, stride).unfold(1, length, 1) for length, stride in sizes]
    lab = [corpus.windows(ids, t, torch.arange(0, len(ids) - t, stride)) for t, stride in sizes]
    lab = [torch.stack(pair, dim=1) for pair in lab]  # (N, length), (N, length) -> (N, 2, length)
    lesson.proves_equal(4, [ours] * 3, [slow, views, lab])

    lesson.heading("A held-out tenth")
    cut_windows = whole.tensor_split([len(whole) * 9 // 10])
    cut_text = [stacked(Windows(part, T)) for part in places.tensor_split([len(places) * 9 // 10])]
    shared = []
    for name, (train, held) in (("text", cut_text), ("windows", cut_windows)):
        shared.append(len({*train.flatten().tolist()} & {*held.flatten().tolist()}))
        print(f"cut the {name:8}{len(train):5} + {len(held):4} windows, {shared[-1]} positions on both sides")
    lesson.proves(5, shared == [0, T])

    lesson.heading("Ragged lines")
    lines = [encode(f"\n{line[:LONGEST]}\n", vocabulary) for line in text.split("\n") if line.strip()][:B]
    inputs, targets, mask = next(iter(DataLoader(lines, batch_size=B, collate_fn=pad)))
    print(f"{len(lines)} lines -> {tuple(mask.shape)}: {mask.sum()} characters, {(~mask).sum()} of padding")
    parts = [line[:-1] for line in lines], [line[1:] for line in lines], [line[1:] >= 0 for line in lines]
    lesson.proves_equal(6, [inputs, targets, mask], [pad_sequence(part, batch_first=True) for part in parts])
    draw = torch.Generator().manual_seed(lesson.seed)
    logits = torch.randn(*mask.shape, V, generator=draw, dtype=torch.float64)  # (B, T, V)
    logits[..., 0] += 4  # this model nearly always says number 0, which is what the padding holds
    logits, targets, mask = (x.to(lesson.float64_device) for x in (logits, targets, mask))
    flat = logits.requires_grad_().flatten(0, 1)  # (B, T, V) -> (B·T, V)
    losses = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (B, T, V) -> (B, T)
    masked = (losses * mask).sum() / mask.sum()
    ignored = F.cross_entropy(flat, targets.masked_fill(~mask, -100).flatten(), ignore_index=-100)
    print(f"mean loss {masked:.4f}, with the padding counted {losses.mean():.4f}")
    means = masked, loss_by_loop(logits, lines), ignored
    ours, *theirs = [[mean, *torch.autograd.grad(mean, logits, retain_graph=True)] for mean in means]
    lesson.proves_equal(7, [ours, ours], theirs)

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    # the marks that the figure's typeface has
    marks = ["↵" if c == "\n" else c if c.isprintable() and c < "\u0530" else "·" for c in vocabulary]
    rows = torch.stack([inputs, targets.cpu()], dim=1).flatten(0, 1)  # (B, 2, T) -> (2B, T)
    for row, real in enumerate(mask.sum(1).repeat_interleave(2).tolist()):  # (B, T) -> (B,) -> (2B,)
        y = 1.25 * row - row % 2 / 4
        axes.barh(y, real, left=-0.5, color=f"C{row % 2}", alpha=0.6, height=0.9)
        axes.barh(y, mask.shape[1] - real, left=real - 0.5, color="0.9", height=0.9)
        for t, mark in enumerate(decode(rows[row, :real], marks)):
            axes.text(t, y, mark, ha="center", va="center_baseline", fontsize=9)
    axes.set(xlabel="position t", yticks=[], ylim=axes.get_ylim()[::-1], xlim=(-0.5, mask.shape[1] - 0.5))
    axes.set_title("Each target (orange) is the next input (blue); the padding (grey) is masked")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, data="text")
