"""GPT-2's published weights, downloaded into data/gpt2: all of each file or none of it.

    folder = find()        # data/gpt2, or None where there is no network

Derived in: 10_generation/04_gpt2_weights
"""

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from lab import BadInput

from tqdm import tqdm

DATA = Path(__file__).resolve().parents[2] / "data" / "gpt2"
HUB = "https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"
FILES = {  # of that revision: bytes, SHA-256
    "config.json": (665, "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4"),
    "vocab.json": (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "model.safetensors": (548_105_171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
}
SECONDS = 10  # that the network may be silent


def find(weights: str | None = None) -> Path | None:
    """The folder with the weights; None if they are to be made at random. Prints one line that says which.

    weights    None: data/gpt2 in the repository, downloaded if need be    "random"    a path: that folder

    Nothing is downloaded where HF_HUB_OFFLINE is set: Hugging Face's own programs heed it, too.
    """
    if weights is not None:
        print(f"weights: {weights}")
        return None if weights == "random" else Path(weights)
    if all((DATA / name).exists() for name in FILES):
        print("weights: GPT-2's, in data/gpt2")
        return DATA
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        download()
    except (OSError, HTTPException, ValueError) as error:  # refused, cut off, silent, corrupt; a full disk
        print(f"weights: random, as GPT-2's could not be downloaded ({' '.join(str(error).split())})")
        return None
    print("weights: GPT-2's, downloaded into data/gpt2")
    return DATA


def download() -> None:
    """Whatever of the four files is not there yet. OSError or HTTPException; BadInput after Ctrl-C."""
    DATA.mkdir(parents=True, exist_ok=True)
    done, total = 0, sum(size for size, _ in FILES.values())
    print(
        f"GPT-2: {total / 1e6:.0f} MB from {HUB.split('/')[2]} to data/gpt2, unless there is no network",
        flush=True,
    )
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for name, (size, checksum) in FILES.items():
                if not (DATA / name).exists():
                    fetch(name, size, checksum, bar)
                done += size
                bar.update(done - bar.n)
    except KeyboardInterrupt:
        raise BadInput(
            "stopped by Ctrl-C; the next run goes on from here, --weights random goes without"
        ) from None


def fetch(name: str, size: int, checksum: str, bar: tqdm) -> None:
    """One file: first beside its place, from where an earlier run was stopped; moved there if it is right."""
    part = DATA / f".{name}.part"
    with part.open("ab") as stream:
        there = stream.seek(0, os.SEEK_END)
        if there < size:
            request = Request(HUB + name, headers={"Range": f"bytes={there}-"})
            with urlopen(request, timeout=SECONDS) as answer:
                if answer.status != 206:  # the whole file, from its beginning
                    stream.truncate(there := 0)
                bar.update(there)
                while there < size and (piece := answer.read(2**20)):
                    there += stream.write(piece)
                    bar.update(len(piece))
    if there < size:
        raise OSError(f"the connection ended after {there:,} of {size:,} bytes of {name}")
    with part.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != checksum:
        part.unlink()
        raise OSError(f"{name} arrived damaged")
    os.replace(part, DATA / name)
