"""Files for what a training knows: written whole or not at all, checked before use, never run as a program.

    save(file, {"step": 100, "model": model.state_dict()})
    state = load(file)                                   # BadInput, in one line, if it is not what was saved

Derived in: 03_models_and_training_loops/08b_checkpoint_files
"""

import contextlib
import io
import os
import struct
import warnings
from hashlib import sha256
from pathlib import Path

from lab import BadInput

import torch

HEADER, MARK = struct.Struct(">8sQ32s"), b"tensors1"  # a mark, then the length and the SHA-256 of the content


def pack(state: dict) -> bytes:
    """The header, then what torch.save writes: tensors and plain data only."""
    stream = io.BytesIO()
    torch.save(state, stream)
    content = stream.getvalue()
    return HEADER.pack(MARK, len(content), sha256(content).digest()) + content


def save(file: Path, state: dict) -> None:
    """BadInput if it cannot be written; what was there before is then still there.

    A process that is killed meanwhile leaves a part behind, which nobody reads and the next save overwrites.
    """
    content, part = pack(state), file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # onto the disk before the move, in case the power fails
        os.replace(part, file)
    except OSError as error:
        raise BadInput(f"cannot write {file} ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def load(file: Path, needs: tuple[str, ...] = ()) -> dict:
    """The state, on the CPU. BadInput if the file is missing, foreign, damaged, or lacks one of `needs`."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {file} ({error.strerror})") from error
    if len(content) < HEADER.size or not content.startswith(MARK):
        raise BadInput(f"{file} is no checkpoint of this course")
    (_, length, checksum), content = HEADER.unpack(content[: HEADER.size]), content[HEADER.size :]
    if len(content) != length or sha256(content).digest() != checksum:
        raise BadInput(f"{file} is damaged: it is not what was once written to it")
    try:
        with warnings.catch_warnings(action="ignore"):  # the one line is enough
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has a dozen ways to say no
        raise BadInput(f"{file} is refused by torch.load ({type(error).__name__})") from error
    if not isinstance(state, dict) or not state.keys() >= set(needs):
        raise BadInput(f"{file} is a checkpoint of something else")
    return state
