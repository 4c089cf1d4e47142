"""lab.digits: real IDX files, and whatever happens to a download, nothing that could be mistaken for data."""

import contextlib
import gzip
import hashlib
import http.server
import shutil
import tempfile
import threading
import time
from pathlib import Path

from lab import BadInput, digits

import pytest
import torch
from torchvision.datasets import MNIST

RAW = Path("MNIST", "raw")
FILES = (*digits.IMAGES, *digits.LABELS)


@pytest.fixture(scope="session")
def rendered() -> Path:
    return digits.find("rendered")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder in place of the repository's, and a rendering that takes no time."""
    monkeypatch.setattr(digits, "DATA", tmp_path / "data")
    monkeypatch.setattr(digits, "draw", draw_few)
    return tmp_path / "data"


def draw_few(folder: Path, count: int = 20) -> None:
    raw = folder / RAW
    raw.mkdir(parents=True)
    for name in digits.IMAGES:
        (raw / name).write_bytes(digits._idx(torch.zeros(count, 28, 28, dtype=torch.uint8)))
    for name in digits.LABELS:
        (raw / name).write_bytes(digits._idx((torch.arange(count) % 10).to(torch.uint8)))
    (folder / "SHA256").write_text(digits._digest(folder))


def leftovers(data: Path) -> set[str]:
    return {path.name for path in data.iterdir()} - {"rendered"} if data.exists() else set()


class TestRendered:
    def test_torchvision_reads_them(self, rendered):
        for train, count in ((True, 12_000), (False, 2_000)):
            dataset = MNIST(rendered, train=train)
            assert dataset.data.shape == (count, 28, 28)
            assert dataset.targets.bincount().tolist() == [count // 10] * 10
            assert 0.05 < dataset.data.float().mean() / 255 < 0.3  # mostly background, like MNIST
            assert dataset.data.amax() == 255

    def test_each_image_is_its_own(self, rendered):
        images = MNIST(rendered, train=True).data
        assert len(images.flatten(1).unique(dim=0)) == len(images)

    def test_other_typefaces_in_the_test_set(self):
        assert not set(digits.TRAINING_FACES) & set(digits.TEST_FACES)

    def test_the_labels_are_true(self, rendered):
        """A nearest-mean classifier, trained on one set, recognises the other typefaces far above chance."""
        train, test = MNIST(rendered, train=True), MNIST(rendered, train=False)
        x, y = train.data.flatten(1).float(), train.targets
        means = torch.stack([x[y == digit].mean(0) for digit in range(10)])
        guesses = torch.cdist(test.data.flatten(1).float(), means).argmin(1)
        assert (guesses == test.targets).float().mean() > 0.6

    def test_the_same_seed_draws_the_same(self):
        first, second = (
            digits.render(digits.TEST_FACES, 30, torch.Generator().manual_seed(seed)) for seed in (5, 5)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_drawn_once(self, data, monkeypatch):
        digits.find("rendered")
        monkeypatch.setattr(digits, "draw", None)
        assert digits.find("rendered") == data / "rendered"

    @pytest.mark.parametrize("name", FILES)
    def test_a_damaged_cache_is_drawn_again(self, data, name):
        file = digits.find("rendered") / RAW / name
        whole = file.read_bytes()
        for damage in (whole[:-1], whole[:-1] + b"\7", b""):
            file.write_bytes(damage)
            digits.find("rendered")
            assert file.read_bytes() == whole
        file.unlink()
        digits.find("rendered")
        assert file.read_bytes() == whole

    def test_a_data_folder_that_cannot_be_written(self, data):
        data.write_text("a file")
        with pytest.raises(BadInput, match="cannot write to"):
            digits.find("rendered")


class TestNamedFolder:
    @pytest.fixture
    def named(self, tmp_path) -> Path:
        draw_few(tmp_path / "named")
        return tmp_path / "named"

    def test_used(self, named, capsys):
        assert digits.find(str(named)) == named
        assert capsys.readouterr().out == "digits: digits; 20 for training, 20 for testing\n"

    def test_empty_folder(self, tmp_path):
        with pytest.raises(
            BadInput, match="no MNIST there: MNIST/raw/train-images-idx3-ubyte cannot be read"
        ):
            digits.find(str(tmp_path))

    @pytest.mark.parametrize("name", FILES)
    def test_each_file_missing_truncated_or_foreign(self, named, name):
        file = named / RAW / name
        whole = file.read_bytes()
        for content, says in (
            (whole[:-5], f"{name} is truncated"),
            (whole[:6], f"{name} is truncated"),
            (b"", f"{name} is not an IDX file"),
            (whole + b"\0", f"{name} is damaged"),
            (b"<html>403</html>", f"{name} is not an IDX file"),
        ):
            file.write_bytes(content)
            with pytest.raises(BadInput, match=says):
                digits.find(str(named))
        file.unlink()
        with pytest.raises(BadInput, match=f"{name} cannot be read"):
            digits.find(str(named))

    def test_labels_that_do_not_fit(self, named):
        for count, says in ((19, "for 19 labels"), (20, "label above 9")):
            labels = torch.full((count,), 10, dtype=torch.uint8)
            (named / RAW / digits.LABELS[0]).write_bytes(digits._idx(labels))
            with pytest.raises(BadInput, match=says):
                digits.find(str(named))


# ── Downloads, from a server on this machine that misbehaves ──────────────────────────────────────────────


@contextlib.contextmanager
def mirror(monkeypatch, answer):
    """MNIST's download pages on 127.0.0.1; `answer(handler, body)` sends what it likes."""
    archives = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        draw_few(folder / "source")
        for name in FILES:
            archives[f"{name}.gz"] = gzip.compress((folder / "source" / RAW / name).read_bytes())

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.end_headers()

            def do_GET(self):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    answer(self, archives[self.path.lstrip("/")])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        resources = [(name, hashlib.md5(body).hexdigest()) for name, body in archives.items()]
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(MNIST, "resources", resources)
        for proxy in ("http_proxy", "https_proxy"):
            monkeypatch.delenv(proxy, raising=False)
        yield
        server.shutdown()
        server.server_close()


def whole(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def refused(handler, body):
    handler.send_error(403)


def cut_off(handler, body):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def corrupt(handler, body):
    whole(handler, bytes(byte ^ 1 for byte in body))


def silent(handler, body):
    time.sleep(2)


def last_file_cut_off(handler, body):
    (cut_off if "t10k-labels" in handler.path else whole)(handler, body)


class TestDownload:
    def test_whole(self, data, monkeypatch, capsys):
        with mirror(monkeypatch, whole):
            assert digits.find() == data
        assert leftovers(data) == {"MNIST"}
        assert {file.name for file in (data / RAW).iterdir()} == set(FILES)
        assert len(MNIST(data, train=False)) == 20
        told = capsys.readouterr()
        assert told.out == "digits: MNIST, downloaded; 20 for training, 20 for testing\n"
        assert told.err == ""

    def test_only_once(self, data, monkeypatch):
        with mirror(monkeypatch, whole):
            digits.find()
        with mirror(monkeypatch, refused):
            assert digits.find() == data

    @pytest.mark.parametrize("answer", [refused, cut_off, corrupt, silent, last_file_cut_off])
    def test_gone_wrong(self, data, monkeypatch, capsys, answer):
        patience = digits._patience
        monkeypatch.setattr(digits, "_patience", lambda seconds: patience(0.5))
        with mirror(monkeypatch, answer):
            assert digits.find() == data / "rendered"
        told = capsys.readouterr()
        assert told.out.startswith("digits: rendered digits, as MNIST could not be downloaded (")
        assert told.err == ""
        assert not leftovers(data)
        with mirror(monkeypatch, whole):  # and the next run, with a good network, is none the worse
            assert digits.find() == data

    def test_nobody_there(self, data, monkeypatch):
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
        assert digits.find() == data / "rendered"
        assert not leftovers(data)

    def test_interrupted(self, data, monkeypatch):
        def ctrl_c(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(digits, "MNIST", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            digits.find()
        assert not leftovers(data)

    def test_a_damaged_download_of_old_is_replaced(self, data, monkeypatch):
        with mirror(monkeypatch, whole):
            digits.find()
            (data / RAW / FILES[0]).write_bytes(b"\0\0")
            assert digits.find() == data
            assert digits._fault(data) is None
        (data / RAW / FILES[0]).write_bytes(b"\0\0")
        with mirror(monkeypatch, refused):
            assert digits.find() == data / "rendered"
        shutil.rmtree(data)


@pytest.mark.parametrize("train", [True, False])
def test_tensors_are_what_torchvision_reads(rendered, train):
    images, labels = digits.tensors(rendered, train=train, device=torch.device("cpu"))
    theirs = MNIST(rendered, train=train)
    assert images.shape == (len(theirs), 1, 28, 28)
    assert images.dtype == torch.float32
    assert torch.equal((images[:, 0] * 255).round().byte(), theirs.data)
    assert images.max() <= 1
    assert torch.equal(labels, theirs.targets)
    assert not digits.is_mnist(rendered)
