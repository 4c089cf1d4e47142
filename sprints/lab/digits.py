"""MNIST, or a stand-in for it: 28×28 images of handwritten (or rendered) digits, in MNIST's own file format.

    root = find(lesson.data)                       # prints one line that says which digits these are
    train = torchvision.datasets.MNIST(root, train=True)
    images, labels = tensors(root, train=True, device=lesson.device)  # or all at once

Without a network there is no MNIST to download. Then digits are drawn from the typefaces that ship with
matplotlib, each one slanted, scaled, shifted, thickened, distorted and made noisy at random: 12,000 for
training and 2,000 for testing, the test set in typefaces that the training set never shows.

Derived in: –
"""

import contextlib
import hashlib
import io
import math
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from lab import BadInput

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.datasets import MNIST

DATA = Path(__file__).resolve().parents[2] / "data"
VERSION = 1  # of the rendered digits: a new number makes every cache draw them again

TRAINING_FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    *("cmr10", "cmb10", "cmss10", "cmti10"),
    *("STIXGeneral", "STIXGeneralBolIta"),
)
TEST_FACES = (
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmtt10",
)

IMAGES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")


def find(data: str | None = None) -> Path:
    """The folder to hand to torchvision.datasets.MNIST. Prints one line that says what is in it.

    data  None: MNIST from data/ in the repository, else downloaded into it, else rendered digits
          "rendered": rendered digits          a path: the folder that holds MNIST/raw/…
    Raises BadInput if the named folder holds no MNIST, or a damaged one.
    """
    if data == "rendered":
        return _report(_rendered(DATA), "rendered digits")
    if data is not None:
        if fault := _fault(Path(data)):
            raise BadInput(f"--data {data}: {fault}")
        return _report(Path(data), "MNIST" if is_mnist(Path(data)) else "digits")
    if _fault(DATA) is None:
        return _report(DATA, "MNIST")
    try:
        _download(DATA)
    except Exception as error:  # whatever the network did: refused, cut off, corrupt, timed out
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return _report(_rendered(DATA), f"rendered digits, as MNIST could not be downloaded ({reason})")
    return _report(DATA, "MNIST, downloaded")


def tensors(root: Path, *, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images of one of the two sets, (N, 1, 28, 28) from 0 to 1, and their labels (N,), on the device."""
    digits = MNIST(root, train=train)
    return digits.data[:, None].to(device) / 255, digits.targets.to(device)


def is_mnist(root: Path) -> bool:
    """Whether these are MNIST's own 60,000 training images rather than rendered or other digits."""
    return _read_header(root / "MNIST" / "raw" / IMAGES[0])[0] == 60_000


def _report(root: Path, what: str) -> Path:
    counts = [_read_header(root / "MNIST" / "raw" / name)[0] for name in IMAGES]
    print(f"digits: {what}; {counts[0]:,} for training, {counts[1]:,} for testing")
    return root


# ── Checking ──────────────────────────────────────────────────────────────────────────────────────────────


def _read_header(file: Path) -> tuple[int, ...]:
    """The dimensions in the header of an IDX file of bytes. ValueError if it is none, or not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        magic = stream.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 3:
            raise ValueError(f"{file.name} is not an IDX file of bytes")
        dimensions = tuple(int.from_bytes(stream.read(4), "big") for _ in range(magic[3]))
    expected = 4 + 4 * magic[3] + math.prod(dimensions)
    if size != expected:
        raise ValueError(
            f"{file.name} is {'truncated' if size < expected else 'damaged'}: "
            f"{size:,} bytes, its header asks for {expected:,}"
        )
    return dimensions


def _fault(root: Path) -> str | None:
    """What keeps torchvision from reading MNIST in this folder; None if nothing does."""
    raw = root / "MNIST" / "raw"
    try:
        for images, labels in zip(IMAGES, LABELS, strict=True):
            shape, (count,) = _read_header(raw / images), _read_header(raw / labels)
            if shape != (count, 28, 28) or count == 0:
                return f"{images} has shape {shape} for {count:,} labels"
            if max((raw / labels).read_bytes()[8:]) > 9:
                return f"{labels} holds a label above 9"
    except OSError as error:
        return f"no MNIST there: MNIST/raw/{Path(error.filename).name} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


# ── Downloading ───────────────────────────────────────────────────────────────────────────────────────────


def _download(root: Path) -> None:
    """MNIST into root/MNIST, by torchvision, checked, all or nothing."""
    with _scratch(root) as scratch, _patience(seconds=10), _quiet_unless_terminal():
        MNIST(scratch, download=True)
        if fault := _fault(scratch):
            raise ValueError(fault)
        for archive in (scratch / "MNIST" / "raw").glob("*.gz"):
            archive.unlink()
        _put(scratch / "MNIST", root / "MNIST")


@contextlib.contextmanager
def _scratch(root: Path):
    """A folder beside the target, so that moving out of it is one step; gone afterwards whatever happens."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=root, prefix=".part-", ignore_cleanup_errors=True)
    except OSError as error:
        raise BadInput(f"cannot write to {root} ({error.strerror}); name a folder with --data") from error
    with folder as name:
        yield Path(name)


def _put(folder: Path, target: Path) -> None:
    """Move a finished folder into place, over a damaged one too."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(folder, target)


@contextlib.contextmanager
def _patience(seconds: float):
    """torchvision waits for ever on a network that swallows packets; we do not."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _quiet_unless_terminal():
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


# ── Rendering ─────────────────────────────────────────────────────────────────────────────────────────────


def _rendered(root: Path) -> Path:
    """root/rendered, drawn if it is not there yet or not as it was drawn."""
    folder = root / "rendered"
    if not _as_drawn(folder):
        with _scratch(root) as scratch:
            draw(scratch / "rendered")
            if not _as_drawn(folder):  # another process may have drawn them meanwhile
                _put(scratch / "rendered", folder)
    return folder


def _as_drawn(folder: Path) -> bool:
    try:
        return (folder / "SHA256").read_text() == _digest(folder)
    except OSError:
        return False


def _digest(folder: Path) -> str:
    """One checksum over the version and all four files."""
    checksum = hashlib.sha256(f"rendered digits {VERSION}".encode())
    for name in (*IMAGES, *LABELS):
        checksum.update((folder / "MNIST" / "raw" / name).read_bytes())
    return checksum.hexdigest()


def draw(folder: Path) -> None:
    """Write rendered digits as the four IDX files of MNIST into folder/MNIST/raw."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for images, labels, faces, count, seed in zip(
        IMAGES, LABELS, (TRAINING_FACES, TEST_FACES), (12_000, 2_000), (1, 2), strict=True
    ):
        x, y = render(faces, count, torch.Generator().manual_seed(seed))
        (raw / images).write_bytes(_idx(x))
        (raw / labels).write_bytes(_idx(y))
    (folder / "SHA256").write_text(_digest(folder))


def _idx(values: Tensor) -> bytes:
    """MNIST's file format: two zeros, 8 for bytes, the number of dimensions, their sizes, the values."""
    return (
        bytes((0, 0, 8, values.dim()))
        + np.array(values.shape, dtype=">u4").tobytes()
        + values.numpy().tobytes()
    )


def render(faces: tuple[str, ...], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` digits in these typefaces, each class equally often: (N, 28, 28) and (N,), both uint8."""
    strokes = (0, 1, 2, 4)
    glyphs = torch.stack(
        [_glyph(face, digit, stroke) for face in faces for stroke in strokes for digit in range(10)]
    )
    glyphs = glyphs.view(len(faces) * len(strokes), 10, 1, *glyphs.shape[-2:])
    labels = torch.arange(count) % 10
    labels = labels[torch.randperm(count, generator=generator)]
    images = [
        _disturb(glyphs[torch.randint(len(glyphs), (len(part),), generator=generator), part], generator)
        for part in labels.split(1_000)
    ]
    return torch.cat(images), labels.to(torch.uint8)


def _glyph(face: str, digit: int, stroke: int) -> Tensor:
    """One digit, 80 pixels high, in the middle of 112×112: (112, 112), 0 background to 1 ink."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"), 108)
    box = font.getbbox(str(digit), stroke_width=stroke)
    image = Image.new("L", (box[2] - box[0], box[3] - box[1]))
    ImageDraw.Draw(image).text(
        (-box[0], -box[1]), str(digit), fill=255, font=font, stroke_width=stroke, stroke_fill=255
    )
    image = image.resize((round(image.width * 80 / image.height), 80), Image.Resampling.LANCZOS)
    canvas = Image.new("L", (112, 112))
    canvas.paste(image, ((112 - image.width) // 2, 16))
    return torch.from_numpy(np.array(canvas, dtype=np.float32)) / 255


def _disturb(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Slant, scale, turn, shift, bend, blur and sprinkle: (N, 1, 112, 112) -> (N, 28, 28) uint8."""
    n = len(glyphs)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, slant = uniform(-0.2, 0.2), uniform(-0.25, 0.35)
    wide, high = uniform(0.8, 1.25), uniform(0.9, 1.2)
    rows = torch.stack(
        [
            torch.stack([wide * angle.cos(), wide * (slant - angle.sin()), uniform(-0.12, 0.12)], -1),
            torch.stack([high * angle.sin(), high * angle.cos(), uniform(-0.12, 0.12)], -1),
        ],
        dim=1,
    )  # (N, 2, 3): output coordinates -> coordinates in the glyph
    grid = F.affine_grid(rows, [n, 1, 56, 56], align_corners=False)  # (N, 56, 56, 2)
    bend = torch.randn(n, 2, 5, 5, generator=generator) * 0.05  # elastic: a smooth random field
    grid = grid + F.interpolate(bend, size=(56, 56), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    ink = F.avg_pool2d(F.grid_sample(glyphs, grid, align_corners=False), 2)[:, 0]  # (N, 28, 28)
    ink = (ink * uniform(1.0, 1.5)[:, None, None]).clamp(0, 1)
    noise = torch.rand(n, 28, 28, generator=generator) * 0.12
    ink = torch.where(ink > 0.02, ink - noise, torch.where(noise > 0.118, noise, 0.0))
    return (ink.clamp(0, 1) * 255).round().to(torch.uint8)
