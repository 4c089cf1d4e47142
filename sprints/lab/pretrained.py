"""GPT-2 as it is published: a folder in Hugging Face's layout, read into lab.gpt.GPT.

    model, tokenizer = load(folder)       # BadInput, in one line, if the folder is not what it should be

config.json               the model's sizes, and which variant of GPT-2 it is
model.safetensors         its weights: how long the header is, the header (JSON), then nothing but numbers
vocab.json, merges.txt    its tokens

Derived in: 10_generation/04_gpt2_weights
"""

import json
import math
import os
from pathlib import Path
from typing import BinaryIO

from lab import BadInput
from lab.gpt import GPT
from lab.lesson import read_text
from lab.tokenizer import Tokenizer

import numpy as np
import torch
from torch import Tensor

SIZES = {"V": "vocab_size", "T": "n_positions", "C": "n_embd", "H": "n_head", "L": "n_layer"}
ABLE = {  # what lab.gpt does; the first is what a config.json means that does not say
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names for the form by tanh
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MASKS = {"BOOL": torch.bool, "U8": torch.uint8}  # in which older files keep the causal mask
LONGEST = 2**20  # bytes of a header; GPT-2 XL's has about 60,000
NAMES = {  # GPT-2's -> the lab's, where c_attn is three
    "wte.": "tokens.", "wpe.": "places.", "ln_f.": "norm.", "h.": "blocks.",
    "ln_1.": "attention.norm.", "attn.c_attn.": "attention.sublayer.*.",
    "attn.c_proj.": "attention.sublayer.output.", "ln_2.": "feed_forward.norm.",
    "mlp.c_fc.": "feed_forward.sublayer.0.", "mlp.c_proj.": "feed_forward.sublayer.2.",
}  # fmt: skip


def load(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model, in float32 on the CPU, and its tokenizer. BadInput for what is missing, damaged, foreign."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    if model.settings["V"] != (V := tokenizer.V):
        raise BadInput(f"{folder / 'vocab.json'} has {V} tokens, config.json's vocab_size is another")
    if lost := [name for name in tokenizer.special if not name.startswith("<")]:  # special ones are <…>
        raise BadInput(f"{folder / 'merges.txt'} makes no {quoted(lost[0])}, which is in vocab.json")
    return model, tokenizer


def load_model(folder: Path) -> GPT:
    """From config.json and model.safetensors."""
    sizes, file = read_config(folder / "config.json"), folder / "model.safetensors"
    found = read(file)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
    if len(weights) < max(needed := 12 * sizes["L"] + 4, len(found)):  # asked before so many names are made
        raise BadInput(f"{file} has {len(weights)} tensors under {len(found)} names; n_layer means {needed}")
    state, wte = {}, weights.get("wte.weight")
    for name, shape in shapes(**sizes).items():
        state |= placed(name, checked(weights.pop(name, None), name, shape, file))
    scores = weights.pop("lm_head.weight", wte)
    if scores.dtype != wte.dtype or not torch.equal(scores, wte):
        raise BadInput(f"{file}: lm_head.weight is not wte.weight, and lab.gpt has one matrix for both")
    masks = {f"h.{l}.attn.{mask}" for l in range(sizes["L"]) for mask in ("bias", "masked_bias")}
    if others := weights.keys() - masks:
        raise BadInput(f"{file} has {len(others)} tensors that GPT-2 has not, such as {quoted(min(others))}")
    with torch.device("meta"):  # shapes without numbers: those are there already
        model = GPT(**sizes)
    model.load_state_dict(state, assign=True)
    return model


def read_config(file: Path) -> dict[str, int]:
    """The arguments of GPT(…). BadInput, with the name of the field, for what lab.gpt cannot do."""
    try:
        config = json.loads(read_text(str(file)))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not JSON") from error
    if not isinstance(config, dict):
        raise BadInput(f"{file} is no list of settings")
    for field, able in ABLE.items():
        if (value := config.get(field, able[0])) not in able:
            raise BadInput(f"{file}: {field} is {quoted(value)}, lab.gpt can do only {able[0]!r}")
    sizes = {letter: config.get(field) for letter, field in SIZES.items()}
    for letter, size in sizes.items():
        if type(size) is not int or not 0 < size < 2**31:
            raise BadInput(f"{file}: {SIZES[letter]} is {quoted(size)}, which is no size")
    if sizes["C"] % sizes["H"]:
        raise BadInput(f"{file}: n_head is {sizes['H']}, which does not divide n_embd, {sizes['C']}")
    if config.get("n_inner") not in (None, 4 * sizes["C"]):
        raise BadInput(f"{file}: n_inner is {quoted(config['n_inner'])}, lab.gpt can do only 4 × n_embd")
    return sizes


# ── model.safetensors ─────────────────────────────────────────────────────────────────────────────────────


def read(file: Path) -> dict[str, Tensor]:
    """Every tensor in a .safetensors file, in the file's order. BadInput unless each byte is of just one.

    What the header says is checked before it is used; no more memory is asked for than the file is long.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(LONGEST, size - 8):
                raise BadInput(f"{file} is cut short or foreign: {size:,} bytes, a header of {length:,}")
            places = described(file, stream.read(length), size - 8 - length)
            return {name: tensor(stream, *place) for name, place in places.items()}
    except OSError as error:
        raise BadInput(f"cannot read {file} ({error.strerror})") from error


def described(file: Path, header: bytes, room: int) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """Dtype, shape and bytes of each tensor, in the order in which they lie in `room` bytes of data."""
    try:
        entries = json.loads(header.decode())
        entries.pop("__metadata__", None)
        found = [(name, e["dtype"], e["shape"], e["data_offsets"]) for name, e in entries.items()]
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise BadInput(f"{file}: its header is no list of tensors in JSON") from error
    for name, kind, shape, offsets in found:
        if kind not in [*DTYPES, *MASKS]:
            raise BadInput(f"{file}: {quoted(name)} has dtype {quoted(kind)}, known are {', '.join(DTYPES)}")
        if not whole(shape, room, most=4) or not whole(offsets, room, most=2) or len(offsets) < 2:
            raise BadInput(f"{file}: {quoted(name)} has no shape, or no place in {room:,} bytes of data")
    places, taken = {}, 0
    for name, kind, shape, (begin, end) in sorted(found, key=lambda entry: entry[3]):
        dtype = (DTYPES | MASKS)[kind]
        if begin != taken or end - begin != math.prod(shape) * dtype.itemsize:
            raise BadInput(f"{file}: {quoted(name)} is {shape} in {kind}, bytes {taken} to {end} are not")
        places[name], taken = (dtype, shape, end - begin), end
    if taken < room:
        raise BadInput(f"{file}: {room - taken:,} bytes of data belong to no tensor")
    return places


def whole(numbers: object, largest: int, most: int) -> bool:
    """Whether this is a list of at most `most` whole numbers from 0 to `largest`."""
    few = numbers if isinstance(numbers, list) and len(numbers) <= most else [None]
    return all(type(n) is int and 0 <= n <= largest for n in few)


def tensor(stream: BinaryIO, dtype: torch.dtype, shape: list[int], length: int) -> Tensor:
    """The next one in the stream; its numbers are little-endian, as they are in memory."""
    content = np.empty(length, dtype=np.uint8)
    if stream.readinto(content) < length:
        raise BadInput(f"{stream.name} became shorter while it was read")
    return torch.from_numpy(content).view(dtype).view(shape)


# ── GPT-2's weights ───────────────────────────────────────────────────────────────────────────────────────


def shapes(V: int, T: int, C: int, H: int, L: int) -> dict[str, tuple[int, ...]]:
    """What GPT-2 consists of. Its matrices are (inputs, outputs), the other way round than in nn.Linear."""
    found = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    inner = {
        "ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
        "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C),
    }  # fmt: skip
    for l in range(L):
        for name, shape in inner.items():
            found |= {f"h.{l}.{name}.weight": shape, f"h.{l}.{name}.bias": shape[-1:]}
    return found


def placed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """One of GPT-2's weights as lab.gpt.GPT keeps it: matrices of linear layers turned, c_attn in three."""
    if ".c_" in name and weight.ndim == 2:
        weight = weight.T  # (inputs, outputs) -> (outputs, inputs)
    for old, new in NAMES.items():
        name = name.replace(old, new)
    thirds = zip(("query", "key", "value"), weight.chunk(3), strict=True) if "*" in name else [("", weight)]
    return {name.replace("*", part): third.contiguous() for part, third in thirds}


def checked(weight: Tensor | None, name: str, shape: tuple[int, ...], file: Path) -> Tensor:
    """The same in float32, in which every number of 16 bits stays what it is."""
    if weight is None:
        raise BadInput(f"{file} lacks {name}")
    if weight.shape != shape or not weight.is_floating_point():
        raise BadInput(f"{file}: {name} is {(*weight.shape,)} in {weight.dtype}, config.json means {shape}")
    if not weight.isfinite().all():
        raise BadInput(f"{file}: {name} has numbers that are not finite")
    return weight.float()


def quoted(something: object) -> str:
    """In one line, and not a long one, whatever a file says."""
    return repr(something)[:40]
