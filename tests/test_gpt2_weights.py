"""lab.pretrained and lab.download: what Hugging Face's library saves is loaded, and nothing that is spoilt.

The comparisons need a package that the course does not: uv run --with transformers pytest -k gpt2_weights
"""

import hashlib
import http.server
import json
import random
import shutil
import threading
from functools import partial
from pathlib import Path

from lab import BadInput, download, pretrained
from lab.generation import generate, greedy
from lab.tokenizer import Tokenizer

import pytest
import torch
from torch import Tensor

#         V, T,  C, H, L
ODD = [(2, 1, 2, 1, 1), (37, 13, 12, 3, 3), (101, 24, 40, 5, 2), (300, 17, 20, 1, 7)]
SMALL = {"V": 37, "T": 13, "C": 6, "H": 3, "L": 1}
FILE = "model.safetensors"


def config(V: int, T: int, C: int, H: int, L: int, **others: object) -> dict:
    sizes = {"vocab_size": V, "n_positions": T, "n_embd": C, "n_head": H, "n_layer": L}
    return sizes | {"model_type": "gpt2", "activation_function": "gelu_new"} | others


def weights(**sizes: int) -> dict[str, Tensor]:
    """All random, those of the norms too, so that none passes for another."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in pretrained.shapes(**sizes).items()}


def packed(tensors: dict[str, Tensor], metadata: dict | None = None) -> bytes:
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    kinds = {dtype: kind for kind, dtype in (pretrained.DTYPES | pretrained.MASKS).items()}
    for name, tensor in tensors.items():
        content = tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        place = {"shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(content)]}
        header[name] = {"dtype": kinds[tensor.dtype], **place}
        data += content
    return sealed(json.dumps(header, separators=(",", ":")).encode(), data)


def sealed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config(**SMALL)), encoding="utf-8")
    (tmp_path / FILE).write_bytes(packed(weights(**SMALL)))
    return tmp_path


def refused(folder: Path, load=pretrained.load_model) -> str:
    """The one line of the refusal."""
    with pytest.raises(BadInput) as fault:
        load(folder)
    line = str(fault.value)
    assert line.isprintable(), repr(line)
    assert len(line) < len(str(folder)) + 200, line
    return line


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ── Hugging Face ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip(
        "transformers", reason="needs transformers: uv run --with transformers pytest"
    )
    library.utils.logging.disable_progress_bar()
    return library


def theirs(transformers, V: int, T: int, C: int, H: int, L: int, **others: object):
    """Hugging Face's GPT-2 with all weights random, those of the norms too."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config(V, T, C, H, L, **others), **ends))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(0.2 * torch.randn_like(weight) + ("ln_" in name and name.endswith("weight")))
    return model.eval()


FORMS = [*((sizes, torch.float32) for sizes in ODD), (ODD[1], torch.float16), (ODD[2], torch.bfloat16)]


@pytest.mark.parametrize(("sizes", "dtype"), FORMS, ids=str)
def test_what_hugging_face_saves_has_the_same_logits(transformers, tmp_path, sizes, dtype):
    model = theirs(transformers, *sizes).to(dtype)
    model.save_pretrained(tmp_path)
    model, ours, V, T = model.float(), pretrained.load_model(tmp_path), *sizes[:2]
    assert {weight.dtype for weight in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        for B, length in ((1, T), (3, max(1, T - 1))):
            ids = torch.randint(V, (B, length))
            torch.testing.assert_close(ours(ids), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", ODD[1:], ids=str)
def test_hugging_face_generates_the_same(transformers, tmp_path, sizes):
    model = theirs(transformers, *sizes)
    model.save_pretrained(tmp_path)
    prompt, most = [1, 0, 2], sizes[1] - 3
    asked = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}
    found = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3), **asked)
    assert generate(pretrained.load_model(tmp_path), [prompt], greedy, most)[0] == found[0, 3:].tolist()


def test_hugging_face_reads_the_same_tensors(transformers, folder):
    read = pytest.importorskip("safetensors.torch").load_file(folder / FILE)
    assert same(pretrained.read(folder / FILE), read)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.randint(SMALL["V"], (2, SMALL["T"]))
    with torch.no_grad():
        torch.testing.assert_close(
            pretrained.load_model(folder)(ids), model(ids).logits, rtol=1e-5, atol=1e-4
        )


VARIANTS = {
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "n_inner": 20,
}


@pytest.mark.parametrize("field", VARIANTS)
def test_variants_that_hugging_face_has_are_refused_by_name(transformers, tmp_path, field):
    theirs(transformers, *ODD[1], **{field: VARIANTS[field]}).save_pretrained(tmp_path)
    assert field in refused(tmp_path)


# ── What is accepted ──────────────────────────────────────────────────────────────────────────────────────


def test_every_form_gives_the_same_model(folder):
    wanted, plain = pretrained.load_model(folder).state_dict(), weights(**SMALL)
    masks = {f"h.{l}.attn.bias": torch.ones(1, 1, 13, 13).tril() for l in range(1)}
    prefixed = {f"transformer.{name}": weight for name, weight in plain.items()}
    for form in (
        plain | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)},
        plain | {name: mask.to(torch.uint8) for name, mask in masks.items()},
        prefixed | {f"transformer.{name}": mask.bool() for name, mask in masks.items()},
        prefixed | {"lm_head.weight": plain["wte.weight"]},
        dict(sorted(plain.items(), reverse=True)),
    ):
        (folder / FILE).write_bytes(packed(form, {"format": "pt"}))
        assert same(pretrained.load_model(folder).state_dict(), wanted)


def test_entries_may_stand_in_another_order_than_their_data(folder):
    content = (folder / FILE).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = dict(sorted(json.loads(content[8:start]).items()))
    wanted = pretrained.load_model(folder).state_dict()
    (folder / FILE).write_bytes(sealed(json.dumps(header).encode() + b"   ", content[start:]))
    assert same(pretrained.load_model(folder).state_dict(), wanted)


def test_sizes(folder):
    with torch.device("meta"):
        gpt2 = pretrained.GPT(V=50_257, T=1_024, C=768, H=12, L=12)
    shapes = pretrained.shapes(V=50_257, T=1_024, C=768, H=12, L=12)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 124_439_808
    state = {}
    for name, shape in shapes.items():
        state |= pretrained.placed(name, torch.empty(shape, device="meta"))
    assert {name: weight.shape for name, weight in state.items()} == {
        name: weight.shape for name, weight in gpt2.state_dict().items()
    }
    assert pretrained.load_model(folder).settings == SMALL | {"dropout": 0.0}


def test_it_can_be_trained(folder):
    model = pretrained.load_model(folder)
    model(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    assert all(weight.grad is not None and weight.is_contiguous() for weight in model.parameters())


# ── What is refused ───────────────────────────────────────────────────────────────────────────────────────


def test_every_cut(folder):
    content = (folder / FILE).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in (*range(start + 9), *range(start, len(content), 97), len(content) - 1):
        (folder / FILE).write_bytes(content[:at])
        refused(folder)
    (folder / FILE).write_bytes(content + b"\0")
    assert "1 bytes of data belong to no tensor" in refused(folder)


def answer(folder: Path) -> str | dict[str, Tensor]:
    """The model's weights, or the one line of the refusal."""
    try:
        return pretrained.load_model(folder).state_dict()
    except BadInput as fault:
        return str(fault)


def test_every_letter_of_the_header(folder):
    content, draw = (folder / FILE).read_bytes(), random.Random(0)
    for at in range(8 + int.from_bytes(content[:8], "little")):
        flip = draw.randrange(1, 256)
        (folder / FILE).write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
        assert isinstance(told := answer(folder), str), f"byte {at} changed by {flip}"
        assert told.isprintable()


def test_headers_with_a_piece_too_few_or_too_many(folder):
    content, draw = (folder / FILE).read_bytes(), random.Random(0)
    start, wanted = 8 + int.from_bytes(content[:8], "little"), answer(folder)
    for _ in range(200):
        a, b = sorted(draw.sample(range(8, start), 2))
        for header in (content[8:a] + content[b:start], content[8:b] + content[a:start], draw.randbytes(b)):
            (folder / FILE).write_bytes(sealed(header, content[start:]))
            told = answer(folder)  # a field that stands twice, and says the same, changes nothing
            assert told.isprintable() if isinstance(told, str) else same(told, wanted)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS = {
    "nothing": b"",
    "not JSON": b"{",
    "no text": b"\xff\xfe{\0}\0",
    "a list": b"[]",
    "a number": b"7",
    "nested without end": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a whole number of many digits": b'{"a":' + b"9" * 5_000 + b"}",
    "NaN": b'{"a":NaN}',
    "an entry that is a text": b'{"a":"F32"}',
    "an entry that is null": b'{"a":null}',
    "metadata alone": b'{"__metadata__":{}}',
    **{
        f"{field} {value}": json.dumps({"a": ENTRY | {field: value}}).encode()
        for field, values in {
            "dtype": ("F64", "I8", "f32", "", None, 32, ["F32"], {}),
            "shape": (4, None, "22", [4.0], [-2, -2], [True, 4], [2, 3], [[2, 2]], [10**18, 0], [2**64] * 4),
            "data_offsets": (16, None, [0], [0, 8, 16], [16, 0], [0, 17], [-16, 0], [0, 10**30], ["0", "16"]),
        }.items()
        for value in values
    },
    "a field is missing": b'{"a":{"dtype":"F32","shape":[2,2]}}',
    "overlap": json.dumps({"a": ENTRY, "b": ENTRY}).encode(),
    "a gap": json.dumps({"a": ENTRY | {"shape": [2], "data_offsets": [8, 16]}}).encode(),
    "the same name twice": b'{"a":' + json.dumps(ENTRY | {"shape": [2], "data_offsets": [0, 8]}).encode()
    + b',"a":' + json.dumps(ENTRY | {"shape": [2], "data_offsets": [8, 16]}).encode() + b"}",
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_headers(tmp_path, header):
    file = tmp_path / FILE
    file.write_bytes(sealed(HEADERS[header], bytes(16)))
    refused(file, pretrained.read)


def test_a_good_header(tmp_path):
    (tmp_path / FILE).write_bytes(sealed(json.dumps({"a": ENTRY}).encode(), bytes(16)))
    assert torch.equal(pretrained.read(tmp_path / FILE)["a"], torch.zeros(2, 2))


@pytest.mark.parametrize("length", [0, 1, 17, 2**20, 2**31, 2**32 + 2, 2**63, 2**64 - 1])
def test_lengths_of_the_header_that_lie(tmp_path, length):
    (tmp_path / FILE).write_bytes(length.to_bytes(8, "little") + sealed(b'{"a":1}', bytes(16))[8:])
    refused(tmp_path / FILE, pretrained.read)


def test_a_header_of_many_megabytes_is_not_read(tmp_path):
    with (tmp_path / FILE).open("wb") as stream:
        stream.write((2**30).to_bytes(8, "little"))
        stream.truncate(2**31)  # takes no room on the disk
    assert "header of 1,073,741,824" in refused(tmp_path / FILE, pretrained.read)


def test_tensors_of_something_else(folder):
    plain = weights(**SMALL)
    name, bias = "h.0.mlp.c_proj.weight", plain["ln_f.bias"]
    for wrong, told in {
        "lacks": ({key: value for key, value in plain.items() if key != name} | {"x": bias}, f"lacks {name}"),
        "none": ({}, "0 tensors under 0 names"),
        "more blocks": (plain | {"h.1.ln_1.bias": bias}, "h.1.ln_1.bias"),
        "line break": (plain | {"a\nb\x1b[31m": bias}, r"a\nb\x1b[31m"),
        "turned": (plain | {name: plain[name].T}, "config.json means (24, 6)"),
        "flat": (plain | {name: plain[name].flatten()}, "config.json means (24, 6)"),
        "whole": (plain | {"ln_f.bias": torch.zeros(12, dtype=torch.uint8)}, "torch.uint8"),
        "twice": (plain | {"transformer.ln_f.bias": bias}, "16 tensors under 17 names"),
        "scores": (
            plain | {"lm_head.weight": plain["wte.weight"] + 1e-6},
            "lm_head.weight is not wte.weight",
        ),
        "half": (plain | {"lm_head.weight": plain["wte.weight"].half()}, "lm_head.weight is not wte.weight"),
        "NaN": (plain | {name: plain[name] * torch.nan}, f"{name} has numbers that are not finite"),
        "inf": (plain | {name: plain[name] / 0}, f"{name} has numbers that are not finite"),
    }.values():
        (folder / FILE).write_bytes(packed(wrong))
        assert told in refused(folder)


@pytest.mark.parametrize("field", ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer"])
def test_sizes_that_are_none(folder, field):
    for value in (0, -1, 2.0, "12", None, True, [], {}, 10**9, 10**30, 7, 2):
        (folder / "config.json").write_text(json.dumps(config(**SMALL) | {field: value}), encoding="utf-8")
        if (field, value) == ("n_head", 2) and type(value) is int:
            pretrained.load_model(folder)  # no shape tells how many heads there are
        else:
            refused(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config(**SMALL).items() if k != field}))
    assert f"{field} is None" in refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b" ", b"{", b"[1]", b"7", b"\xff", b"[" * 100_000, b'{"a":' + b"9" * 5_000 + b"}"]
)
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text)
    assert "config.json" in refused(folder)


def test_a_config_with_a_letter_changed(folder):
    """It is refused, or changed nothing: a space, or the name of a field that need not be there."""
    content, wanted = (folder / "config.json").read_bytes(), answer(folder)
    for at in range(len(content)):
        for flip in (1, 2, 64):
            (folder / "config.json").write_bytes(
                content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
            )
            told = answer(folder)
            assert told.isprintable() if isinstance(told, str) else same(told, wanted)


@pytest.mark.parametrize("name", ["config.json", FILE])
def test_missing(folder, name):
    (folder / name).unlink()
    assert refused(folder).endswith(f"{name} (No such file or directory)")
    (folder / name).mkdir()
    assert "cannot read" in refused(folder)


def test_the_tokenizer(folder):
    tokenizer = Tokenizer.learn("the cat sat on the mat " * 9, 262)
    sizes = SMALL | {"V": tokenizer.V}
    (folder / "config.json").write_text(json.dumps(config(**sizes)), encoding="utf-8")
    (folder / FILE).write_bytes(packed(weights(**sizes)))
    assert "cannot read" in refused(folder, pretrained.load)
    tokenizer.save(folder)
    model, found = pretrained.load(folder)
    assert (model.settings["V"], found.tokens, found.special) == (262, tokenizer.tokens, tokenizer.special)
    for name in ("vocab.json", "merges.txt"):
        content = (folder / name).read_bytes()
        for at in range(0, len(content) - 1, 1 + len(content) // 300):
            (folder / name).write_bytes(content[:at])
            refused(folder, pretrained.load)
        (folder / name).write_bytes(content)
    Tokenizer.learn("the cat sat on the mat " * 9, 261).save(folder)
    assert "vocab.json has 261 tokens" in refused(folder, pretrained.load)


# ── Downloading ───────────────────────────────────────────────────────────────────────────────────────────


CONTENT = {
    "config.json": b"{}",
    "vocab.json": b"v" * 99,
    "merges.txt": b"m" * 999,
    FILE: b"0123456789" * 300_000,
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends the files of a folder; from the byte that is asked for on, where ranges are set."""

    ranges, most, asked = True, None, []

    def do_GET(self) -> None:
        name, begin = self.path.strip("/"), int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.asked.append((name, begin))
        content = (Path(self.directory) / name).read_bytes()
        self.send_response(206 if self.ranges else 200)
        content = content[begin:] if self.ranges else content
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.most])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that has the files: its handler."""
    served = tmp_path / "served"
    served.mkdir()
    for name, content in CONTENT.items():
        (served / name).write_bytes(content)
    handler = type("Handler", (Handler,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()}
    monkeypatch.setattr(download, "DATA", tmp_path / "data" / "gpt2")
    monkeypatch.setattr(download, "HUB", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(download, "FILES", files)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def there() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in download.DATA.iterdir()}


def test_download(hub, capsys):
    assert download.find() == download.DATA
    assert there() == CONTENT
    told = capsys.readouterr()
    assert "3 MB" in told.out
    assert told.out.endswith("weights: GPT-2's, downloaded into data/gpt2\n")
    assert not told.err
    assert download.find() == download.DATA  # and now without the network
    assert len(hub.asked) == 4


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_is_cut_off_is_continued(hub, ranges, capsys):
    hub.most = 1_000_000
    assert download.find() is None
    assert "the connection ended after 1,000,000 of 3,000,000 bytes" in capsys.readouterr().out
    assert there().keys() == CONTENT.keys() - {FILE} | {f".{FILE}.part"}
    hub.most, hub.ranges = None, ranges
    assert download.find() == download.DATA
    assert there() == CONTENT
    assert hub.asked[3:] == [(FILE, 0), (FILE, 1_000_000)]


def test_what_arrives_damaged_is_not_kept(hub, capsys):
    sizes = dict(download.FILES)
    download.FILES[FILE] = (3_000_000, "0" * 64)
    assert download.find() is None
    assert f"{FILE} arrived damaged" in capsys.readouterr().out
    assert there().keys() == CONTENT.keys() - {FILE}
    download.FILES.update(sizes)
    assert download.find() == download.DATA


def test_what_is_too_long_is_not_read_to_its_end(hub):
    download.FILES[FILE] = (10, hashlib.sha256(b"0123456789").hexdigest())
    assert download.find() is None
    assert not (download.DATA / FILE).exists()


def test_ctrl_c(hub, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hashlib, "file_digest", stop)
    with pytest.raises(BadInput, match="stopped by Ctrl-C; the next run goes on"):
        download.find()
    monkeypatch.undo()


@pytest.mark.parametrize("value", ["1", "true", "ON", "Yes"])
def test_offline(hub, monkeypatch, capsys, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert download.find() is None
    assert capsys.readouterr().out == (
        "weights: random, as GPT-2's could not be downloaded (HF_HUB_OFFLINE is set)\n"
    )
    assert not hub.asked


def test_no_network(hub, monkeypatch, capsys):
    monkeypatch.setattr(download, "HUB", "http://127.0.0.1:9/")
    assert download.find() is None
    assert "could not be downloaded (" in capsys.readouterr().out.splitlines()[-1]


def test_not_found(hub, monkeypatch, capsys):
    (Path(download.DATA).parents[1] / "served" / "vocab.json").unlink()
    assert download.find() is None
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_is_asked_for(hub, capsys):
    assert download.find("random") is None
    assert download.find("some/folder") == Path("some/folder")
    assert not hub.asked


def test_the_disk_is_full(hub, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil.os, "replace", full)
    assert download.find() is None
    assert "No space left on device" in capsys.readouterr().out
