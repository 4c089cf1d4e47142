"""A story teller: streams a story from any beginning, and says where it goes wrong.

Run:     uv run sprints/10_generation/03_tell_stories.py      (10 s on two cores)
         With --prompt "There was once a t" it tells one story and does nothing else, with --prompt - one for
         each line of its input. On a terminal, without a prompt, it goes on with beginnings that you type:
         Ctrl-C stops a story, Ctrl-D or quit the program. --model FILE takes any checkpoint of sprint 9.
Proves:  1. characters whose bytes come apart arrive whole, however they are cut, by hand and by codecs
         2. what is streamed is what a plain loop writes that reads all of its context again for each token
            and decodes at the end: with every filter, past a full context, from a prompt that is longer or
            ends inside a word; the text begins with the prompt, and nothing is lost or said twice
         3. the same seed tells the same stories in the same order; 20 seeds tell 40 different ones
         4. up to the place where it goes wrong a text is the beginning of flawless stories, which are told,
            and none of them goes on as it does; a thing that is given another name is found in its place
         5. prompts that end at any character of a story are gone on with rightly at 95 % of the places at
            least; where their tokens are taken as they are, at less than 80 %
         6. its stories go 150 characters without a mistake, on average; at temperature 2 not half as far, and
            those of a model that has learned nothing not 5
Shapes:  T tokens of context, V tokens to choose from
Writes:  results/10_generation/03_tell_stories.png
Note:    notes/03_tell_stories.md
"""

import codecs
import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from lab import BadInput, training
from lab.generation import Filter, Sampler, for_writing, generate, stream, temperature, top_k, top_p
from lab.gpt import GPT, initialise
from lab.lesson import Lesson, run, whole_number
from lab.stories import WORDS, Mistake, parse, write
from lab.stream import losses
from lab.tokenizer import END, Tokenizer

import matplotlib.pyplot as plt
import torch
from torch import Tensor

MODEL = Path(__file__).resolve().parents[2] / "results/09_training_pipeline/02_train_gpt.model"
OPTIONS = {
    "--model": {"type": Path, "default": MODEL, "help": "one of sprint 9", "metavar": "FILE"},
    "--prompt": {"help": "a beginning; - for one from each line of input", "metavar": "TEXT"},
    "--temperature": {"type": float, "default": 1.0, "help": "0 takes the likeliest token", "metavar": "N"},
    "--top-k": {"type": whole_number(1), "help": "draw among the K likeliest", "metavar": "K"},
    "--top-p": {"type": float, "default": 1.0, "help": "among the likeliest that come to P", "metavar": "P"},
    "--tokens": {"type": whole_number(1), "default": 300, "help": "to write, at most", "metavar": "N"},
}
Decoder = codecs.getincrementaldecoder("utf-8")  # takes bytes as they come, gives what is whole with them
KNOWN = 1.0  # nats a character: a model to which written stories cost more is not taken to know them
BEGINNING, SCRIPTS = "There was once a c", ("Γεια!", "Привет", "你好吗?", "né 🦉", "👩‍🚀", "नमस्")
TOLD, TEMPERATURES = 60, (0.5, 1.0, 1.5, 2.0)
CONTROLS = {c: 0x2400 + c for c in range(32) if c not in b"\n\t"} | dict.fromkeys(range(0x7F, 0xA0), 0x2421)


class Teller:
    """A model, its tokenizer, and how it draws."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, filters: list[Filter], seed: int) -> None:
        self.model, self.tokenizer, self.filters = for_writing(model), tokenizer, filters
        self.T, self.end = model.settings["T"], tokenizer.special[END]
        self.device, self.draw = model.tokens.weight.device, torch.Generator().manual_seed(seed)

    def begin(self, prompt: str) -> tuple[list[int], bytes]:
        """The tokens of a prompt, but for its last bytes, as many as one token can go on with; and those."""
        ids = [self.end, *self.tokenizer.encode(prompt)]
        for cut in range(max(1, len(ids) - 20), len(ids)):
            rest = self.tokenizer.decode_bytes(ids[cut:])
            if self.going_on(rest).any():
                return ids[:cut], rest
        return ids, b""

    def going_on(self, rest: bytes) -> Tensor:
        """Which tokens begin with these bytes: (V,). The special ones don't, as they are no text."""
        special = self.tokenizer.special.values()
        fits = [token.startswith(rest) and i not in special for i, token in enumerate(self.tokenizer.tokens)]
        return torch.tensor(fits, device=self.device)

    def tell(self, prompt: str, most: int) -> Iterator[tuple[int, str]]:
        """Each token that is written, and the characters behind the prompt that are whole with it."""
        ids, rest = self.begin(prompt)
        ids, fits, decode = ids[-self.T :], self.going_on(rest), Decoder("replace").decode
        first = [lambda logits, now: logits.where(fits | (now.shape[1] > len(ids)), -torch.inf)]
        pick = Sampler(self.draw, [*first, *self.filters])
        for _, tokens in stream(self.model, [ids], pick, self.end, most):
            token = tokens.item()
            piece = b"" if token == self.end else self.tokenizer.tokens[token]
            yield token, decode(piece.removeprefix(rest))
            rest = b""


def plainly(teller: Teller, prompt: str, seed: int, most: int) -> tuple[list[int], str]:
    """Prompt and story by a loop that keeps nothing but the tokens, and decodes at the end."""
    (ids, rest), new = teller.begin(prompt), []
    pick = Sampler(torch.Generator().manual_seed(seed), teller.filters)
    start = max(0, len(ids) - teller.T)
    while len(new) < most and teller.end not in new:
        while len(ids) + len(new) - start > teller.T:  # full: the context is begun anew with its last half
            start += teller.T // 2 + 1
        context = torch.tensor([[*ids, *new][start:]], device=teller.device)  # (1, T)
        logits = teller.model(context)[:, -1]  # (1, V)
        if not new:
            for i, token in enumerate(teller.tokenizer.tokens):
                logits[0, i] -= 0 if token[: len(rest)] == rest and i != teller.end else torch.inf
        new.append(pick(logits, context).item())
    raw = teller.tokenizer.decode_bytes(i for i in (*ids, *new) if i != teller.end)
    return new, codecs.utf_8_decode(raw, "replace", False)[0]  # False: a character may lack its last bytes


def by_hand(pieces: Iterable[bytes]) -> Iterator[str]:
    """What Decoder does: bytes that are no whole character yet wait for the others."""
    waiting = b""
    for piece in pieces:
        waiting += piece
        yield (text := waiting.decode(errors="ignore"))
        waiting = waiting[len(text.encode()) :]


def ways_to_cut(raw: bytes) -> Iterator[list[bytes]]:
    """All 2ⁿ⁻¹ of them for n bytes."""
    for way in range(2 ** (len(raw) - 1)):
        cuts = [0, *(i for i in range(1, len(raw)) if way >> (i - 1) & 1), len(raw)]
        yield [raw[a:b] for a, b in pairwise(cuts)]


def first_mistake(text: str) -> Mistake | None:
    try:
        parse(text)
    except Mistake as mistake:
        return mistake


def go_on(text: str, draw: random.Random) -> str | None:
    """A flawless story that begins so, if there is one: what can come next is added until it is whole."""
    while mistake := first_mistake(text):
        if mistake.position < len(text):
            return None
        text += draw.choice(mistake.expected)
    return text


def verdict(text: str, ended: bool, prompt: str = "") -> str:
    """What is to be said of a story, in a line or two."""
    if not (mistake := first_mistake(text)):
        return f"flawless, all {len(text)} characters"
    place, found = mistake.position, str(mistake).partition(": ")[2]
    if place == len(text) and not ended:
        return f"no mistake so far, in {place} characters; it has not come to its end"
    where, right = " in its prompt" * (place < len(prompt)), " ".join(text[:place].split())[-75:]
    return f"goes wrong{where} at character {place} of {len(text)}: {found}\n  right so far: …{right}"


def show(teller: Teller, prompt: str, most: int, judge: bool) -> None:
    """A story as it is written, and what is to be said of it."""
    text = prompt = prompt.encode(errors="replace").decode()  # what is no UTF-8 becomes a question mark
    if (length := len(teller.begin(prompt)[0])) > teller.T:
        print(f"(a prompt of {length} tokens, of which the model reads the last {teller.T})")
    print(text.translate(CONTROLS), end="", flush=True)
    for token, piece in teller.tell(prompt, most):
        print(piece.translate(CONTROLS), end="", flush=True)
        text, ended = text + piece, token == teller.end
    print(("" if text.endswith("\n") else "\n") + (verdict(text, ended, prompt) if judge else ""))


def converse(tell: Callable[[str], None]) -> None:
    """A story for each line of input, until there are no more or one says quit."""
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if typed := sys.stdin.isatty():
        print("\nHow does it begin? (an empty line: as it likes; Ctrl-C stops a story, Ctrl-D or quit ends)")
    with contextlib.suppress(EOFError):
        for prompt in iter(partial(input, "> " * typed), "quit"):
            try:
                tell(prompt)
            except KeyboardInterrupt:
                if not typed:
                    raise
                print("\n(stopped)")


def streaming(lesson: Lesson, teller: Teller) -> None:
    """Claims 1 to 3."""
    lesson.heading("Bytes as they come")
    broken, held = [], True
    for text in SCRIPTS:
        in_tokens = [teller.tokenizer.tokens[i] for i in teller.tokenizer.encode(text)]
        for pieces in (in_tokens, *ways_to_cut(text.encode())):
            arrived = list(by_hand(pieces))
            held &= arrived == list(map(Decoder("replace").decode, pieces)) and "".join(arrived) == text
            broken.append("".join(piece.decode(errors="replace") for piece in pieces) != text)
        print(f"{len(text)} characters, {len(text.encode()):2} bytes, {len(in_tokens):2} tokens   {text}")
    print(f"cut in {len(broken):,} ways; {sum(broken):,} come out broken if each piece is decoded alone")
    lesson.proves(1, held)
    lesson.heading("Streamed, and written plainly")
    torch.manual_seed(lesson.seed)
    tiny, raw = GPT(V=257, T=12, C=16, H=2, L=2), Tokenizer.learn("", 257)  # single bytes, and the end
    initialise(tiny, std=0.3)  # large weights, so that it has likes and dislikes
    tiny, exact = (copy.deepcopy(m).to(lesson.float64_device, torch.float64) for m in (tiny, teller.model))
    tests = [(exact, teller.tokenizer, ""), (exact, teller.tokenizer, BEGINNING), (tiny, raw, "<")]
    tests.append((tiny, raw, BEGINNING + "".join(SCRIPTS)))
    ours, plain, told, several = [], [], [], 0
    for filters in ([], [temperature(0.7)], [top_k(5)], [top_p(0.9)], [temperature(2), top_k(9), top_p(0.8)]):
        for model, tokenizer, prompt in tests:
            one = Teller(model, tokenizer, filters, lesson.seed)
            written, pieces = zip(*one.tell(prompt, 40), strict=True)
            several += sum("\x7f" < c != "\ufffd" for c in "".join(pieces))
            ours.append(([*written], prompt + "".join(pieces)))
            plain.append(plainly(one, prompt, lesson.seed, 40))
    lesson.proves(2, ours == plain and not teller.going_on(b"<")[teller.end], f"{several} divided characters")
    for seed in (lesson.seed, *range(lesson.seed, lesson.seed + 20)):
        one = Teller(tiny, raw, [], seed)
        told += [str(list(one.tell(BEGINNING, 20))) for _ in range(2)]
    lesson.proves(3, told[:2] == told[2:4] and len({*told}) == 40)


def measuring(lesson: Lesson, teller: Teller, told: dict[str, list[str]]) -> None:
    """Claim 4, about any texts, and 5 and 6, about a model that knows the stories."""
    lesson.heading("Where a story goes wrong: its thing is given another name at last")
    draw, held, changed = random.Random(lesson.seed), True, []
    for story in write(lesson.seed, 20_000):
        thing, other = story.facts["thing"], draw.choice(WORDS["junk"])
        place = story.text.rindex(f" {thing}") + 1
        changed.append(story.text[:place] + other + story.text[place + len(thing) :])
        held &= place <= getattr(first_mistake(changed[-1]), "position", -1) <= place + len(other)
    print(verdict(changed[0], ended=True))
    for text in (*changed, *told["1.0"][:20], *told["2.0"][:20]):
        place = mistake.position if (mistake := first_mistake(text)) else len(text)
        story = go_on(text[:place], draw)
        held &= story is not None and (place == len(text) or not story.startswith(text[: place + 1]))
    lesson.proves(4, held)
    lesson.heading("How well are prompts gone on with, and how far do stories go?")
    right, stories = [[], []], [story.text for story in write(lesson.seed, 1_000)]
    for prompt in (text[:end] for text in stories for end in range(1, len(text), 7)):
        as_it_is = [teller.end, *teller.tokenizer.encode(prompt)], b""
        for way, (ids, rest) in enumerate((teller.begin(prompt), as_it_is)):
            logits = teller.model(torch.tensor([ids[-teller.T :]], device=teller.device))[0, -1]  # (V,)
            best = logits.where(teller.going_on(rest), -torch.inf).argmax().item()
            text = prompt + teller.tokenizer.decode([best])[len(rest) :]
            right[way].append(not (mistake := first_mistake(text)) or mistake.position == len(text))
    ours, plain = (sum(found) / len(found) for found in right)
    lesson.proves(5, ours >= 0.95 and plain < 0.8, f"{ours:.1%} and {plain:.1%}", full_run=True)
    (figure, axes), far = plt.subplots(figsize=(6, 3.4), layout="constrained"), {}
    print("temperature   characters before the first mistake   right up to the answers   flawless")
    for name, texts in told.items():
        found = [first_mistake(text) for text in texts]
        right = [text[: m.position] if m else text for text, m in zip(texts, found, strict=True)]
        far[name], answers = sum(map(len, right)) / TOLD, sum("\n" in text for text in right)
        print(f"{name:11} {far[name]:16.0f} {answers:31} {found.count(None):17} of {TOLD}")
        axes.plot([sum(not m or m.position > c for m in found) / TOLD for c in range(600)], label=name)
    held = far["1.0"] >= 150 and far["2.0"] < far["1.0"] / 2 and far["untrained"] < 5
    lesson.proves(6, held, full_run=True)
    axes.set(xlabel="characters", ylabel="stories without a mistake so far")
    axes.set_title(f"Stories at temperature 1 go {far['1.0']:.0f} characters without a mistake, on average")
    axes.legend(title="temperature")
    if not lesson.short:
        lesson.save(figure)


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    o = lesson.options
    if not (0 <= o.temperature <= 100 and 0 <= o.top_p <= 1):
        raise BadInput("--temperature is a number from 0 to 100, --top-p one from 0 to 1")
    model, tokenizer, _ = training.load_model(o.model, lesson.device)
    warm = temperature(o.temperature) if o.temperature > 1e-3 else top_k(1)
    filters = [warm, top_k(o.top_k or tokenizer.V), top_p(o.top_p)]
    teller, known = Teller(model, tokenizer, filters, lesson.seed), write("known", 5_000)
    documents = [torch.tensor([teller.end, *tokenizer.encode(story.text)]) for story in known]
    nats = losses(model, documents, teller.T).sum().item() / sum(len(story.text) for story in known)
    print(f"{o.model.name}: V = {tokenizer.V:,}, T = {teller.T}; stories cost it {nats:.3f} nats a character")
    if not nats < torch.inf:
        raise BadInput(f"{o.model} holds weights that are no numbers")
    if not (judge := nats <= KNOWN):
        print("so it does not know them, and what it tells is not judged")
        lesson.needs = "a model of stories"
    tell = partial(show, teller, most=o.tokens, judge=judge)
    if o.prompt is not None:
        converse(tell) if o.prompt == "-" else tell(o.prompt)
        sys.exit()
    streaming(lesson, teller)
    torch.manual_seed(lesson.seed)
    fresh, told = GPT(**model.settings).to(lesson.device).eval(), {}
    for name, T in (*((f"{T:.1f}", T) for T in TEMPERATURES), ("untrained", 1.0)):
        pick = Sampler(torch.Generator().manual_seed(lesson.seed), [temperature(T)])
        net = fresh if name == "untrained" else model
        texts = generate(net, [[teller.end]] * TOLD, pick, 250, teller.end)
        told[name] = [tokenizer.decode(i for i in ids if i != teller.end) for ids in texts]
    measuring(lesson, teller, told)
    lesson.heading("Told")
    tell(BEGINNING if judge else "")
    if sys.stdin is not None and sys.stdin.isatty():
        converse(tell)


if __name__ == "__main__":
    run(main, options=OPTIONS)
