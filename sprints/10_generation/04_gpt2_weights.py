"""GPT-2's weights: a published checkpoint, read byte by byte into the model that we wrote.

Run:     uv run sprints/10_generation/04_gpt2_weights.py      (5 s on two cores)
Proves:  1. model.safetensors holds what a few lines of numpy find at its offsets, and the lab reads the same:
            in 32, 16 and bfloat16 bits, with masks or without, under the names of old files and of new ones
         2. but for masks and a second copy of one matrix these are VC + TC + L(12C² + 13C) + 2C numbers, and
            the model has as many; for GPT-2 that is 124,439,808
         3. the model's logits are those of the file's own matrices, multiplied as x W + b
         4. the influence matrix of the loaded model is the lower triangle
         5. of matrices left as they are stored the oblong ones are refused for their shape; the square ones
            fit, and the scores are off by over a tenth of their spread
         6. texts are cut as merges.txt says, line by line, and come back whole; what the model writes is the
            same with a cache and without
         7. a checkpoint that is cut short, has a letter changed in its header, says what its data are not, or
            is of a model that lab.gpt is not, is refused in one line; and the good one is not
Shapes:  B texts of T tokens, V different ones; L blocks of width C with H heads of width D = C/H
Writes:  results/10_generation/04_gpt2_weights.png
Note:    notes/04_gpt2_weights.md
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lab import BadInput, download, pretrained, stories
from lab.attention import attend, causal_mask
from lab.generation import Sampler, generate, greedy, top_k
from lab.gpt import GPT
from lab.influence import influence, rows
from lab.lesson import Lesson, run
from lab.tokenizer import PRINTABLE, Tokenizer, split

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]  # under GPT-2's own names
HELP = (
    "a folder; 'random': a small model; without it GPT-2, downloaded to data/gpt2 (550 MB), or else 'random'"
)
OPTIONS = {
    "--weights": {"metavar": "DIR", "help": HELP},
    "--prompt": {"metavar": "TEXT", "default": "Once upon a time", "help": "what to continue"},
}
FILE, PREFIX = "model.safetensors", "transformer."  # of names in newer files
SMALL = {"vocab_size": 320, "n_positions": 96, "n_embd": 24, "n_head": 3, "n_layer": 2}
CONFIG = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5} | SMALL
GPT2, PUBLISHED = (50_257, 1_024, 768, 12), download.FILES[FILE][0]  # V, T, C, L; bytes
KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "u1", "U8": "u1"}  # < is little-endian
MATRICES = ("attn.c_attn", "mlp.c_fc", "mlp.c_proj", "attn.c_proj")  # the last one is square
CUT_FIRST = "attn.c_attn, cut in three"
TEXTS = ("The cat sat on the mat, and the dog by the door.", "It's  3\n\n naïve 你 🙂", "<|endoftext|>")


def packed(w: Weights, kind: str = "F32", prefix: str = "", lies: dict[str, dict] | None = None) -> bytes:
    """A .safetensors file: the length of the header in 8 bytes, the header, the numbers."""
    header, data = {}, b""
    for name, weight in w.items():
        content = weight.to(pretrained.DTYPES[kind]).flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[prefix + name] = {"dtype": kind, "shape": list(weight.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header | (lies or {}), separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


def by_hand(file: Path) -> Weights:
    """Every tensor of a .safetensors file, in 32 bits."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header, found = json.loads(stream.read(length)), {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        shape, begin = entry["shape"], 8 + length + entry["data_offsets"][0]
        numbers = np.fromfile(file, KINDS[entry["dtype"]], math.prod(shape), offset=begin)
        if entry["dtype"] == "BF16":  # the upper half of a number of 32 bits
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        found[name.removeprefix(PREFIX)] = torch.from_numpy(numbers.astype("<f4", copy=False)).view(shape)
    return found


def random_checkpoints(folder: Path, seed: int) -> dict[Path, Weights]:
    """A small GPT-2 in a folder, in other forms below it, and what each holds: all random, norms too."""
    draw, w = torch.Generator().manual_seed(seed), {}
    for name, shape in pretrained.shapes(*(SMALL[field] for field in pretrained.SIZES.values())).items():
        w[name] = 0.3 * torch.randn(shape, generator=draw) + ("ln_" in name and name.endswith("weight"))
    old = w | {"h.1.attn.bias": torch.ones(1, 1, 9, 9).tril(), "lm_head.weight": w["wte.weight"]}
    forms = (".", "F32", "", w), ("a", "F32", "", old), ("b", "F16", PREFIX, w), ("c", "BF16", PREFIX, w)
    made = {}
    for form, kind, prefix, held in forms:
        (place := folder / form).mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        (place / FILE).write_bytes(packed(held, kind, prefix))
        made[place] = {name: held[name].to(pretrained.DTYPES[kind]).float() for name in held}
    text = "".join(story.text for story in stories.write(seed, 20_000))
    Tokenizer.learn(text, SMALL["vocab_size"]).save(folder)
    return made


def gpt2(ids: Tensor, w: Weights, H: int) -> Tensor:
    """GPT-2 from the file's own tensors: ids (B, T) -> logits (B, T, V)."""
    wte, wpe = (w[name].to(ids.device, torch.float64) for name in ("wte.weight", "wpe.weight"))

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].to(x) + w[f"{name}.bias"].to(x)  # (B, T, inputs) @ (inputs, outputs)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"].to(x), w[f"{name}.bias"].to(x), eps=1e-5)

    x = wte[ids] + wpe[: ids.shape[1]]  # (B, T, C)
    for l in range(sum(name.endswith("ln_1.weight") for name in w)):
        qkv = linear(norm(x, f"h.{l}.ln_1"), f"h.{l}.attn.c_attn")  # (B, T, 3C)
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))  # (B, H, T, D)
        mixed = attend(q, k, v, causal=True).transpose(1, 2).flatten(2)  # (B, T, H, D) -> (B, T, C)
        x = x + linear(mixed, f"h.{l}.attn.c_proj")
        hidden = linear(norm(x, f"h.{l}.ln_2"), f"h.{l}.mlp.c_fc")  # (B, T, 4C)
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"h.{l}.mlp.c_proj")
    return norm(x, "ln_f") @ wte.T  # (B, T, C) @ (C, V)


def filled(sizes: dict[str, int], w: Weights, mistake: str = "none") -> GPT:
    """lab.gpt.GPT with these weights. A mistake names the matrices that are not turned, or is CUT_FIRST."""
    state = {}
    for name in pretrained.shapes(**sizes):
        weight = w[name]
        if mistake == CUT_FIRST and name.endswith("c_attn.weight"):
            weight = torch.cat(weight.chunk(3, dim=1))  # (C, 3C) -> three of (C, C) -> (3C, C), none turned
        elif ".c_" in name and weight.ndim == 2 and mistake not in name:
            weight = weight.T  # (inputs, outputs) -> (outputs, inputs), as nn.Linear keeps it
        for old, new in pretrained.NAMES.items():
            name = name.replace(old, new)
        thirds = zip(("query", "key", "value"), weight.chunk(3), strict=False)
        state |= {name.replace("*", part): third for part, third in thirds} if "*" in name else {name: weight}
    with torch.device("meta"):  # shapes without numbers: those come now
        model = GPT(**sizes)
    model.load_state_dict(state, assign=True)
    return model


def ids_by_hand(text: str, folder: Path) -> list[int]:
    """Each line of merges.txt in turn joins its pair, wherever it stands in a word."""
    number = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    parts = "\n".join("".join(f" {PRINTABLE[byte]} " for byte in word.encode()) for word in split(text))
    for pair in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]:  # behind a version
        parts = parts.replace(f" {pair.replace(' ', '  ')} ", f" {pair.replace(' ', '')} ")
    return [number[part] for part in parts.split()]


def spoilt(folder: Path, w: Weights) -> Iterator[tuple[str, str, bytes]]:
    """What is wrong, with which file of a checkpoint, and what that file then holds."""
    name, wte, bias, good = "h.0.ln_1.bias", w["wte.weight"], w["ln_f.bias"], (folder / FILE).read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for at in (*range(0, start, 97), *range(start, len(good), 4_999)):
        yield "cut short", FILE, good[:at]
    for at in range(8, start, 29):
        yield "a letter changed", FILE, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for text, length in ((b"[" * 9_999, 9_999), (b"[]", 2), (b"", len(good)), (b"", 2**63)):
        yield "another header", FILE, length.to_bytes(8, "little") + text + good[8:]
    for lie in ({"dtype": "I32"}, {"dtype": "F16"}, {"shape": [9]}, {"data_offsets": [0, 96]}):
        yield "another header", FILE, packed(w, lies={name: json.loads(good[8:start])[name] | lie})
    for wrong in ({"h.2.ln_1.bias": bias}, {name: bias[1:]}, {"lm_head.weight": -wte}, {name: bias / 0}):
        yield "tensors of another model", FILE, packed(w | wrong)
    for lie in ({"n_layer": 10**9}, {"layer_norm_epsilon": 1e-6}, {"activation_function": "gelu"}):
        yield "config.json", "config.json", json.dumps(CONFIG | lie).encode()
    for file in ("vocab.json", "merges.txt"):
        yield "the tokenizer", file, (folder / file).read_bytes()[:-9]


def refusal(folder: Path) -> str:
    """The one line with which the lab refuses a checkpoint; nothing if it takes it, or answers otherwise."""
    try:
        pretrained.load(folder)
    except Exception as fault:  # a traceback is no answer
        line = str(fault).replace(str(folder), "")[1:]
        return line if isinstance(fault, BadInput) and "\n" not in line else ""
    return ""


def main(lesson: Lesson) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prove(lesson, Path(folder))


def prove(lesson: Lesson, small: Path) -> None:
    """All claims: about the checkpoint that is asked for, and about small ones that are made in a folder."""
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device
    made = random_checkpoints(small, lesson.seed)
    folder = download.find(lesson.options.weights) or small
    if folder == small:
        torch.set_num_threads(1)  # so small that threads would only wait for each other
    model, tokenizer = pretrained.load(folder)
    sizes = {letter: model.settings[letter] for letter in "VTCHL"}
    V, T, C, H, L = sizes.values()

    lesson.heading(FILE)
    with (folder / FILE).open("rb") as stream:
        length, begins = stream.read(8), stream.read(67).decode()
        print(f"{length.hex(' ')}: {int.from_bytes(length, 'little'):,} bytes of header, {begins} …")
    files = {place: by_hand(place / FILE) for place in (folder, *made)}
    ours = [files[place][name] for place in made for name in made[place]]
    theirs = [weight for held in made.values() for weight in held.values()]
    for place, w in files.items():
        read = {name.removeprefix(PREFIX): weight for name, weight in pretrained.read(place / FILE).items()}
        ours += [len(read), *(read[name].float() for name in w)]
        theirs += [len(w), *w.values()]
    lesson.proves_equal(1, ours, theirs, tolerance=0)

    lesson.heading("How many numbers")
    beside = ".attn.bias", ".masked_bias", "lm_head.weight"
    counts = [sum(weight.numel() for name, weight in files[folder].items() if not name.endswith(beside))]
    counts.append(sum(weight.numel() for weight in model.parameters()))
    formula = [V * C + T * C + L * (12 * C**2 + 13 * C) + 2 * C for V, T, C, L in ((V, T, C, L), GPT2)]
    print(
        "in the file {:,}, in the model {:,}, by formula {:,}; for GPT-2 {:,}".format(*counts, *formula),
        end="",
    )
    print(f", with 12 masks {4 * (formula[1] + 12 * 1_024**2):,} of its {PUBLISHED:,} bytes")
    lesson.proves_equal(2, [*counts, 124_439_808], [formula[0], *formula])

    lesson.heading("Logits: of the model, and by the file's own matrices")
    x, W = torch.tensor([1, 2]), torch.tensor([[1, 2], [3, 4]])
    by_w, with_w, turned = (y.tolist() for y in (x @ W, F.linear(x, W), F.linear(x, W.T)))
    print(f"x W {by_w}; nn.Linear with W {with_w}, with W turned {turned}")
    ours, theirs = [], []
    for place, w in files.items():
        loaded = (model if place == folder else pretrained.load_model(place)).to(device, torch.float64)
        ids = torch.randint(loaded.settings["V"], (2, 9), generator=draw).to(device)
        ours.append(loaded(ids))
        theirs.append(gpt2(ids, w, loaded.settings["H"]))
    print(
        f"the last token's first, by the model {ours[0][0, -1, 0]:+.9f}, by hand {theirs[0][0, -1, 0]:+.9f}"
    )
    lesson.proves_equal(3, ours, theirs)
    looks = influence(model, torch.randperm(V, generator=draw)[None, :5].to(device))
    print("     ".join(rows(looks)))
    lesson.proves_equal(4, looks, causal_mask(5).long())

    lesson.heading("Matrices left as they are stored")
    w, text, scores, off = files[folder], torch.tensor([tokenizer.encode(TEXTS[0])[:T]]), {}, {}
    right = gpt2(text, w, H)  # (1, T, V)
    spread = (right - right.mean(-1, keepdim=True)).norm()
    for mistake in (*MATRICES, CUT_FIRST, "none"):
        try:
            scores[mistake] = filled(sizes, w, mistake)(text).detach()
        except RuntimeError as error:
            print(f"{mistake:26} {'size mismatch' if 'size mismatch' in str(error) else 'fails'}")
        else:
            off[mistake] = ((scores[mistake] - right).norm() / spread).item()
            loss = F.cross_entropy(scores[mistake][0, :-1], text[0, 1:])
            print(f"{mistake:26} fits, scores off by {off[mistake]:6.1%}, {loss:5.2f} nats a token")
    fit = [*off] == [MATRICES[-1], CUT_FIRST, "none"]
    lesson.proves(5, fit and off.pop("none") < 1e-3 and min(off.values()) > 0.1)

    lesson.heading("Tokens, and what is written")
    ours, theirs, most = [], [], min(24, T // 4)
    for text in TEXTS:
        ours += [ids := tokenizer.encode(text), [*tokenizer.decode(ids).encode()]]
        theirs += [ids_by_hand(text, folder), [*text.encode()]]
    prompt = tokenizer.encode(lesson.options.prompt.encode(errors="surrogateescape")) or [V - 1]
    prompt = prompt[most - T :]  # the end of a long one, which leaves places for more
    ours += generate(model, [prompt], greedy, most)
    slow = list(prompt)
    while len(slow) < len(prompt) + most:  # all is read again for each token
        slow.append(model(torch.tensor([slow], device=device))[0, -1].argmax().item())
    theirs.append(slow[len(prompt) :])
    lesson.proves_equal(6, ours, theirs)
    drawn = generate(model.to(lesson.device, torch.float32), [prompt], Sampler(draw, [top_k(40)]), most)
    print("The weights are random, and so is what they write:" if folder == small else "The model goes on:")
    for how, ids in (("likeliest", ours[-1]), ("drawn", *drawn)):
        print(f"{how:9} {tokenizer.decode(prompt)!r} {tokenizer.decode(ids)!r}")

    lesson.heading("Spoilt checkpoints that are refused")
    told = {}
    for what, file, content in spoilt(small, made[small]):
        good = (small / file).read_bytes()
        (small / file).write_bytes(content)
        told.setdefault(what, []).append(refusal(small))
        (small / file).write_bytes(good)
    for what, lines in told.items():
        print(f"{what:24} {sum(map(bool, lines)):2} of {len(lines):2}: {lines[-1][:79]}")
    lesson.proves(7, all(map(all, told.values())) and not refusal(small))

    figure, panels = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained", sharex=True, sharey=True)
    for panel, mistake in zip(panels, off, strict=True):
        both = torch.stack([scores[mistake], scores["none"]], dim=-1)  # (1, T, V, 2)
        panel.plot(right[0, -1, :500], both[0, -1, :500], ".", markersize=3)
        panel.set(title=mistake, xlabel="right score")
    panels[0].set_ylabel("score of the last token")
    figure.suptitle("A square matrix left as it is stored: all shapes fit, no score is right", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, options=OPTIONS)
