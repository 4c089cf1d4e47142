"""lab.checkpoint: what was saved is loaded, and nothing else is; a save that fails leaves the last one."""

import io
import os
import struct
from hashlib import sha256
from pathlib import Path

from lab import BadInput, checkpoint

import pytest
import torch

STATE = {
    "weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1], dtype=torch.int64)},
    "half": torch.ones(3, dtype=torch.bfloat16),
    "losses": [1.5, 2.25],
    "name": "Ä",
    "nothing": None,
    "nested": [{"on": True}, (1, 2)],
}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "last.ckpt"


def refused(file: Path, content: bytes, needs: tuple[str, ...] = ()) -> str:
    """Load these bytes: the one line of the refusal."""
    file.write_bytes(content)
    with pytest.raises(BadInput) as fault:
        checkpoint.load(file, needs)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def sealed(content: bytes) -> bytes:
    """With a header that is right: only torch.load can refuse it."""
    return checkpoint.HEADER.pack(checkpoint.MARK, len(content), sha256(content).digest()) + content


def same(ours: object, theirs: object) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    return ours == theirs


def test_round_trip(file):
    checkpoint.save(file, STATE)
    assert same(checkpoint.load(file, needs=("losses", "weights")), STATE)
    assert file.read_bytes() == checkpoint.pack(STATE)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_second_save_replaces_the_first(file):
    for step in range(3):
        checkpoint.save(file, {"step": step})
    assert checkpoint.load(file) == {"step": 2}


def test_missing(file):
    with pytest.raises(BadInput, match=r"cannot read .*last\.ckpt \(No such file"):
        checkpoint.load(file)
    with pytest.raises(BadInput, match="cannot read"):
        checkpoint.load(file.parent)


@pytest.mark.parametrize("content", [b"", b"x", b"Dear reader, " * 20, checkpoint.MARK, b"PK\x03\x04" * 50])
def test_foreign(file, content):
    assert "no checkpoint of this course" in refused(file, content)


def test_plain_torch_file(file):
    stream = io.BytesIO()
    torch.save(STATE, stream)
    assert "no checkpoint" in refused(file, stream.getvalue())


def test_every_flip_and_every_cut(file):
    content = checkpoint.pack({"a": torch.ones(2)})
    for at in range(len(content)):
        refused(file, content[:at])
        refused(file, content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    refused(file, content + b"\0")


def test_something_else(file):
    assert "something else" in refused(file, checkpoint.pack({"step": 1}), needs=("step", "model"))
    assert "something else" in refused(file, sealed(checkpoint.pack([1, 2])[checkpoint.HEADER.size :]))


class Trap:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.mkdir, os.system, eval, exec, open, Path.touch, torch.load])
def test_malicious(file, call):
    """Whoever writes such a file writes the right checksum: it is refused before anything runs."""
    made = file.parent / "made"
    argument = str(made) if call in (os.mkdir, torch.load) else f"open({str(made)!r}, 'w')"
    arguments = {open: (str(made), "w"), Path.touch: (made,), os.system: (f"mkdir {made}",)}
    for state in (Trap(call, *arguments.get(call, (argument,))), {"a": [Trap(call, argument)]}):
        assert "refused by torch.load" in refused(file, checkpoint.pack(state))
    assert not made.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"cos\nsystem\n(S'true'\ntR.", b"\0" * 999])
def test_sealed_rubbish(file, content):
    refused(file, sealed(content))


def test_a_length_that_lies(file):
    content = checkpoint.pack(STATE)
    mark, _, checksum = struct.unpack(">8sQ32s", content[: checkpoint.HEADER.size])
    for length in (0, 2**63):
        refused(file, struct.pack(">8sQ32s", mark, length, checksum) + content[checkpoint.HEADER.size :])


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_save_that_breaks_off(file, monkeypatch, moment):
    """On a full disk the last one stays, nothing is left behind, and the message is one line."""

    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoint.save(file, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, full)
        with pytest.raises(BadInput, match=r"cannot write .*last\.ckpt \(No space left on device\)"):
            checkpoint.save(file, {"step": 2})
    assert checkpoint.load(file) == {"step": 1}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_stopped_by_ctrl_c(file, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    checkpoint.save(file, {"step": 1})
    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(file, {"step": 2})
    assert checkpoint.load(file) == {"step": 1}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_a_killed_process_left_is_overwritten(file):
    (file.parent / f".{file.name}.part").write_bytes(b"half")
    checkpoint.save(file, {"step": 1})
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("folder", ["missing", "a file"])
def test_nowhere_to_write(tmp_path, folder):
    (tmp_path / "a file").touch()
    with pytest.raises(BadInput, match="cannot write"):
        checkpoint.save(tmp_path / folder / "last.ckpt", STATE)
