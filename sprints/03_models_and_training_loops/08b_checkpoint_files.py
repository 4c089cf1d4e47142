"""Checkpoint files: written whole or not at all, checked before use, and never run as a program.

Run:     uv run sprints/03_models_and_training_loops/08b_checkpoint_files.py      (4 s on two cores)
Proves:  1. a write that breaks off leaves the last checkpoint as it was; written in place, that is lost
         2. a file with one bit changed in any byte, or cut short anywhere, is refused
         3. files that are no checkpoint, or that of another run, are refused, each in one line
         4. the newest good checkpoint is used, and the bad ones stay as they are
         5. a pickle that would run code is refused before any of it runs
         6. the finished form, lab.checkpoint, packs the same bytes and refuses every one of these files
Shapes:  F features, C classes
Note:    notes/08b_checkpoint_files.md
"""

import contextlib
import io
import os
import struct
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from lab import BadInput, checkpoint
from lab.lesson import Lesson, run

import torch
from torch import nn

F, C = 20, 10
HEADER, MARK = struct.Struct(">8sQ32s"), b"tensors1"  # a mark, then the length and the SHA-256 of the content


def pack(state: object) -> bytes:
    """A checkpoint: the header, then what torch.save writes."""
    stream = io.BytesIO()
    torch.save(state, stream)
    content = stream.getvalue()
    return HEADER.pack(MARK, len(content), sha256(content).digest()) + content


def unpack(file: bytes, config: dict) -> dict:
    """The state in a checkpoint. BadInput if it is not whole, not plain data, or not of this run."""
    if len(file) < HEADER.size or not file.startswith(MARK):
        raise BadInput("is no checkpoint of this course")
    (_, length, checksum), content = HEADER.unpack(file[: HEADER.size]), file[HEADER.size :]
    if len(content) != length:
        raise BadInput(f"is not whole: {len(content):,} bytes of {length:,}")
    if sha256(content).digest() != checksum:
        raise BadInput("is damaged: its checksum is not the one noted in it")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # torch.load has a dozen ways to say no
        raise BadInput(f"is refused by torch.load ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("config") != config:
        raise BadInput("is of another run, with another configuration")
    return state


def newest(folder: Path, config: dict) -> dict | None:
    """The state in the newest good checkpoint, and one line about each newer one that is no good."""
    for file in sorted(folder.glob("*.ckpt"), reverse=True):
        try:
            return unpack(file.read_bytes(), config)
        except BadInput as fault:
            print(f"{file.name} {fault}")
    return None


def write_in_place(file: Path, pieces: Iterable[bytes]) -> None:
    """The obvious way: what was there is gone before the first new byte is written."""
    with file.open("wb") as stream:
        stream.writelines(pieces)


def write(file: Path, pieces: Iterable[bytes]) -> None:
    """Beside its place first, then moved there, which the system does wholly or not at all."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        stream.writelines(pieces)
        stream.flush()
        os.fsync(stream.fileno())  # onto the disk before the move, in case the power fails
    os.replace(part, file)


def breaks_off(content: bytes, share: float) -> Iterable[bytes]:
    """Part of the content, then an error, as from a full disk."""
    yield content[: int(share * len(content))]
    raise OSError("no space left on device")


def flipped(file: bytes, at: int) -> bytes:
    """The file with one bit of one byte changed."""
    return file[:at] + bytes([file[at] ^ 1]) + file[at + 1 :]


def refusal(file: bytes, config: dict) -> str:
    """Why unpack refuses these bytes; nothing if it takes them."""
    try:
        unpack(file, config)
    except BadInput as fault:
        return str(fault)
    return ""


def lab_refusal(content: bytes, file: Path) -> str:
    """Why lab.checkpoint refuses these bytes in a file; nothing if it takes them."""
    file.write_bytes(content)
    try:
        checkpoint.load(file, needs=("config", "step", "model"))
    except BadInput as fault:
        return str(fault).removeprefix(f"{file} ")
    return ""


class Trap:
    """Is pickled as a call of os.mkdir, which unpickling then makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def main(lesson: Lesson) -> None:
    torch.manual_seed(lesson.seed)
    config, model = {"seed": lesson.seed, "features": F}, nn.Linear(F, C).to(lesson.device)
    states = [{"config": config, "step": step, "model": model.state_dict()} for step in (100, 200)]
    old, new = map(pack, states)

    lesson.heading("A write that breaks off")
    with tempfile.TemporaryDirectory() as folder:
        file, found = Path(folder, "last.ckpt"), {write_in_place: [], write: []}
        for share in (0, 0.001, 0.5, 0.999):
            for how, left in found.items():
                write(file, [old])
                with contextlib.suppress(OSError):
                    how(file, breaks_off(new, share))
                left.append(file.read_bytes())
                told = refusal(left[-1], config) or "is good"
                print(f"after {share:5.1%}  {how.__name__:14}  the checkpoint {told}")
    lost = all(refusal(left, config) for left in found[write_in_place])
    lesson.proves(1, lost and found[write] == [old] * 4, "4 places each")

    lesson.heading("Damage")
    flips = [flipped(new, at) for at in range(len(new))]
    cuts = [new[:at] for at in range(len(new))]
    plain, weight = new[HEADER.size :], model.weight.detach().cpu()
    bad = flipped(plain, plain.index(weight.numpy().tobytes()) + 3)  # in the exponent of the first weight
    taken = torch.load(io.BytesIO(bad), weights_only=True)["model"]["weight"].cpu()
    print(f"one bit changed: torch.load reads {weight[0, 0]:.4f} as {taken[0, 0]:.4f}, without a word")
    refused = sum(bool(refusal(file, config)) for file in flips + cuts)
    lesson.proves(2, refused == 2 * len(new), f"{refused:,} of {2 * len(new):,} files")

    lesson.heading("Files from elsewhere")
    foreign = {
        "a letter": b"Dear reader,",
        "nothing": b"",
        "a file of torch.save": plain,
        "another seed's": pack({"config": config | {"seed": lesson.seed + 1}}),
    }
    answers = [refusal(content, config) for content in foreign.values()]
    for what, answer in zip(foreign, answers, strict=True):
        print(f"{what:21} {answer}")
    lesson.proves(3, all(answers) and not any("\n" in answer for answer in answers), f"{len(foreign)} files")

    lesson.heading("Going back to the last good one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contents = {100: old, 200: new, 300: flips[-1], 400: cuts[-1], 500: plain}
        for step, content in contents.items():
            write(folder / f"step-{step:06}.ckpt", [content])
        used = newest(folder, config)["step"]
        print(f"step-{used:06}.ckpt is good")
        stay = [file.read_bytes() for file in sorted(folder.iterdir())] == list(contents.values())
    lesson.proves(4, used == 200 and stay, "three refused, the fourth used")

    lesson.heading("A pickle that runs code")
    with tempfile.TemporaryDirectory() as name:
        traps = [Path(name, how) for how in ("weights_only=False", "weights_only=True")]
        careless, careful = (pack({"config": config, "model": Trap(trap)}) for trap in traps)
        torch.load(io.BytesIO(careless[HEADER.size :]), weights_only=False)
        answer = refusal(careful, config)
        made = [trap.exists() for trap in traps]
        for trap in traps:
            print(f"{trap.name:18}   folder made: {trap.exists()}")
        print(f"the file {answer}")
    lesson.proves(5, made == [True, False] and bool(answer), "and by plain pickle it runs")

    lesson.heading("The finished form, lab.checkpoint")
    with tempfile.TemporaryDirectory() as name:
        file, trap = Path(name, "last.ckpt"), Path(name, "trap")
        malicious = pack({"config": config, "step": 0, "model": Trap(trap)})
        bad = [*flips, *cuts, *foreign.values(), malicious]
        refused = sum(bool(lab_refusal(content, file)) for content in bad)
        print(f"the malicious file {lab_refusal(malicious, file)}; folder made: {trap.exists()}")
        checkpoint.save(file, states[1])
        same = file.read_bytes() == new
    held = same and refused == len(bad) and not trap.exists()
    lesson.proves(6, held, f"{refused:,} of {len(bad):,} files")


if __name__ == "__main__":
    run(main)
