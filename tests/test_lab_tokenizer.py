"""lab.tokenizer: against the naive algorithm, on bytes of all kinds, and on files good and bad."""

import json
import random
import sys
import unicodedata
from itertools import pairwise

from lab import BadInput, tokenizer
from lab.tokenizer import END, PRINTABLE, Tokenizer, split

import pytest

ALPHABETS = ["a", "ab", "ab ", "abc", "ab  \n", "aé ", "ab1'! s", "猫犬 。", "🙂a "]
SCRIPTS = (
    "Grüße, привет, γειά, שלום, नमस्ते, 你好世界, こんにちは, 🙂👩‍🚀; x² + ½ = Ⅷ; naïve cafe\u0301\x1c\x00\r\n"
)
ENGLISH = "the cat sat on the mat, and the other cat sat on that cat; it's theirs\n"


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged, i = [], 0
    while i < len(ids):
        here = tuple(ids[i : i + 2]) == pair
        merged.append(new if here else ids[i])
        i += 2 if here else 1
    return merged


def learn(text: str, most: int) -> list[tuple[int, int]]:
    """As minbpe does it: max() of a dictionary is the first pair of those that occur most often."""
    words, merges = [list(word.encode()) for word in split(text)], []
    while len(merges) < most:
        counts = {}
        for ids in words:
            for pair in pairwise(ids):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        merges.append(max(counts, key=counts.get))
        words = [merge(ids, merges[-1], 255 + len(merges)) for ids in words]
    return merges


def encode(text: str, merges: list[tuple[int, int]]) -> list[int]:
    numbers = []
    for word in split(text):
        ids = list(word.encode())
        while known := [pair for pair in pairwise(ids) if pair in merges]:
            pair = min(known, key=merges.index)
            ids = merge(ids, pair, 256 + merges.index(pair))
        numbers += ids
    return numbers


def some_text(draw: random.Random, longest: int = 60) -> str:
    return "".join(draw.choices(draw.choice(ALPHABETS), k=draw.randint(0, longest)))


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    return Tokenizer.learn(ENGLISH * 3, 300)


def same(ours: Tokenizer, theirs: Tokenizer) -> bool:
    return (ours.tokens, ours.merges, ours.special) == (theirs.tokens, theirs.merges, theirs.special)


# ── Learning and encoding ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_merges_and_tokens_are_the_naive_ones(seed):
    draw = random.Random(seed)
    for _ in range(600):
        text, new, most = some_text(draw), some_text(draw), draw.randint(1, 30)
        merges = learn(text, most)
        own = Tokenizer.learn(text, 257 + most)
        assert own.merges == merges, repr(text)
        assert own.V == len(set(own.tokens)) == 257 + len(merges)  # no token twice
        assert own.encode(new) == encode(new, merges), (text, new)
        assert own.decode(own.encode(new)) == new


def test_ties_go_to_the_first_pair_in_the_text():
    assert Tokenizer.learn("dc ba", 258).merges == [(ord("d"), ord("c"))]
    assert Tokenizer.learn("xy ab ab xy", 258).merges == [(ord("x"), ord("y"))]
    assert Tokenizer.learn("x ab ab xy xy xy", 258).merges == [(ord(" "), ord("x"))]


def test_documents_are_learned_as_one_text_that_no_word_crosses():
    documents = ["the cat", " the cat", "the"]
    assert same(Tokenizer.learn(documents, 270), Tokenizer.learn("the cat1 the cat1the", 270))
    assert Tokenizer.learn(["a", "b", "a", "b"], 300).merges == []
    assert Tokenizer.learn(iter(documents), 270).merges == Tokenizer.learn(documents, 270).merges


def test_sizes():
    assert Tokenizer.learn(ENGLISH, 257).V == 257
    assert Tokenizer.learn(ENGLISH, 270, special=("<a>", "<b>")).special == {"<a>": 268, "<b>": 269}
    assert Tokenizer.learn(ENGLISH, 256, special=()).encode("é") == [0xC3, 0xA9]
    assert Tokenizer.learn("aaa", 1_000).V == 259  # the text has no more pairs
    for V, special in ((256, (END,)), (255, ()), (0, ())):
        with pytest.raises(ValueError, match="too few"):
            Tokenizer.learn(ENGLISH, V, special)


def test_no_text(english):
    for nothing in ("", [], ["", ""]):
        assert Tokenizer.learn(nothing, 300).tokens == [*(bytes([byte]) for byte in range(256)), END.encode()]
    assert english.encode("") == english.encode(b"") == []
    assert (english.decode([]), english.decode_bytes([])) == ("", b"")


def operations(work, text: str) -> int:
    """How many lines of lab.tokenizer are run for a text."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return trace if frame.f_code.co_filename == tokenizer.__file__ else None

    sys.settrace(trace)
    try:
        work(text)
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("signs", ["a", "ACGT"])
def test_a_long_word_takes_little_longer_than_many_short_ones(signs):
    draw = random.Random(0)
    short, long = ("".join(draw.choices(signs, k=length)) for length in (1_000, 4_000))
    own = Tokenizer.learn(short, 300)
    for work in (lambda text: Tokenizer.learn(text, 300), own.encode):
        assert operations(work, long) < 6 * operations(work, short)  # n² would be 16 times


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_words():
    words = ["It", "'s", " 3", " o", "'", "clock", " ", " now"]
    assert split("It's 3 o'clock  now") == words
    assert split("we'll  \n\n x\t y ") == ["we", "'ll", "  \n\n", " x", "\t", " y", " "]
    assert split("'sup 'S it'S") == ["'s", "up", " '", "S", " it", "'", "S"]
    assert split("a_b x²½ Ⅷ٣") == ["a", "_", "b", " x", "²½", " Ⅷ٣"]
    assert split("猫。cafe\u0301\x1c\x85\xa0!") == ["猫", "。", "cafe", "\u0301\x1c", "\x85", "\xa0", "!"]
    assert split(" ") == [" "]


def test_every_character_is_of_its_kind():
    """A letter goes on after a letter, a number after a number, anything else visible after "!"."""
    category = {chr(number): unicodedata.category(chr(number)) for number in range(0x20000)}
    some = [c for c in category if category[c] not in ("Cn", "Co", "Lo") or ord(c) % 50 == 0]
    space = {c for c in some if category[c] in ("Zs", "Zl", "Zp")} | set("\t\n\v\f\r\x85")
    for kind, before in (("L", "b"), ("N", "1"), ("", "!")):
        joined = {word[1] for word in split("".join(f"\n{before}{c}" for c in some)) if len(word) == 2}
        wanted = {c for c in some if (category[c][0] if category[c][0] in "LN" else "") == kind}
        assert joined == wanted - space, kind


def test_words_are_the_text():
    draw = random.Random(0)
    pieces = [
        "'",
        "'ll",
        "s",
        "a",
        "é",
        "1",
        "²",
        "_",
        " ",
        "  ",
        "\n",
        "\t",
        "\xa0",
        "\x1c",
        "猫",
        "🙂",
        "\udcff",
    ]
    for _ in range(2_000):
        text = "".join(draw.choices(pieces, k=12))
        assert "".join(split(text)) == text
        assert "" not in split(text)


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_any_bytes_come_back(english):
    draw = random.Random(0)
    for lump in [bytes([byte]) for byte in range(256)] + [
        draw.randbytes(length % 50) for length in range(2_000)
    ]:
        assert english.decode_bytes(english.encode(lump)) == lump
    whole = SCRIPTS.encode()
    for cut in range(len(whole)):
        lump = whole[cut : cut + 30]
        assert english.decode_bytes(english.encode(lump)) == lump
        assert english.decode(english.encode(lump)) == lump.decode(errors="replace")


def test_text_and_its_bytes_are_the_same_tokens(english):
    for text in (SCRIPTS, ENGLISH, END, "\x00\x1c", "\ufeffa"):
        assert english.encode(text) == english.encode(text.encode())
        assert english.decode(english.encode(text)) == text


def test_other_scripts_are_learned_too():
    own = Tokenizer.learn("猫が好きです。犬も好きです。" * 5, 300)
    assert "好きです".encode() in own.tokens
    assert own.decode(own.encode("犬が好きです。")) == "犬が好きです。"
    assert "�" in own.decode(own.encode("鳥")[:1])  # the first byte of three


def test_half_a_surrogate_is_no_text(english):
    for text in ("\ud800", "a\udfffb", "\udc80", "\ude42\ud83d"):
        for refuse in (english.encode, lambda text: Tokenizer.learn(text, 300)):
            with pytest.raises(ValueError, match="surrogates not allowed"):
                refuse(text)


# ── Special tokens ────────────────────────────────────────────────────────────────────────────────────────


def test_special_tokens_are_not_smuggled_in():
    draw = random.Random(0)
    names = (END, "<|pad|>", " the", "\n")  # two of them are words that are learned, or a byte
    own = Tokenizer.learn(ENGLISH * 3, 300, special=names)
    first = own.V - len(names)
    assert own.special == {name: first + place for place, name in enumerate(names)}
    pieces = [*names, END[:5], END[5:], "the", " ", "<|", "a", "é"]
    for text in [*names, *("".join(draw.choices(pieces, k=8)) for _ in range(1_000))]:
        ids = own.encode(text)
        assert max(ids) < first
        assert own.decode(ids) == text
        assert own.encode(text.encode()) == ids
    assert own.decode([*own.encode("a"), own.special[END], *own.encode("b")]) == f"a{END}b"


def test_a_name_that_files_could_not_tell_from_a_token():
    for name in ("the", "Ġthe", "a", "Ġ"):
        with pytest.raises(ValueError, match="special tokens"):
            Tokenizer.learn("the the the the", 300, special=(name,))


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text", ["", ENGLISH * 3, SCRIPTS, "#version: 0.2 #version: 0.2", "\r\n\r\n\u2028 \xa0 a\xada"]
)
@pytest.mark.parametrize("special", [(), (END,), (" the", "<猫>", '"\\')])
def test_saved_and_loaded(tmp_path, text, special):
    own = Tokenizer.learn(text, 320, special)
    own.save(tmp_path)
    assert same(Tokenizer.load(tmp_path), own)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]


def test_the_table_of_bytes_is_gpt2s():
    assert [PRINTABLE[byte] for byte in b"! ~\n\x00"] == ["!", "Ġ", "~", "Ċ", "Ā"]
    assert [PRINTABLE[byte] for byte in b"\x7f\xa0\xa1\xac\xad\xae\xff"] == [
        "ġ",
        "ł",
        "¡",
        "¬",
        "Ń",
        "®",
        "ÿ",
    ]
    assert len(set(PRINTABLE.values())) == 256
    assert not any(c.isspace() or not c.isprintable() for c in PRINTABLE.values())


@pytest.fixture
def gpt2(tmp_path):
    """A small tokenizer in GPT-2's own layout: bytes in the order of its table, END last."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    names = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    pairs = ["Ġ t", "h e", "Ġt he", "c a", "Ġ ca", "Ġca t"]
    names += [pair.replace(" ", "") for pair in pairs] + [END]
    (tmp_path / "vocab.json").write_text(
        json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8"
    )
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    return tmp_path


def test_gpt2s_layout(gpt2):
    own = Tokenizer.load(gpt2)
    assert own.encode("! a\n") == [0, 220, 64, 198]  # as GPT-2's own files have them
    assert own.encode(" the cat") == [258, 261]
    assert own.encode("the cat") == [83, 257, 261]
    assert (own.V, own.special) == (263, {END: 262})
    assert own.decode_bytes(range(256)) == bytes(
        [*range(33, 127), *range(161, 173), *range(174, 256)]
    ) + bytes([*range(33), *range(127, 161), 173])
    before = [(gpt2 / name).read_bytes() for name in ("vocab.json", "merges.txt")]
    own.save(gpt2)
    assert [(gpt2 / name).read_bytes() for name in ("vocab.json", "merges.txt")] == before


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("heading", ["#version: 0.2\n", ""])
@pytest.mark.parametrize("end", ["\n", ""])
def test_other_ways_to_write_merges(gpt2, newline, heading, end):
    own = Tokenizer.load(gpt2)
    lines = (gpt2 / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    (gpt2 / "merges.txt").write_bytes((heading + "\n".join(lines) + end).replace("\n", newline).encode())
    assert same(Tokenizer.load(gpt2), own)


def vocabulary(change):
    """The file vocab.json after a change of what it says."""

    def damage(content: str) -> str:
        number = json.loads(content)
        return json.dumps(change(number) or number)

    return damage


VOCAB = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: "",
    "of another kind": lambda content: "<html></html>",
    "deep": lambda content: "[" * 100_000,
    "a list": vocabulary(list),
    "a number": lambda content: "7",
    "null": lambda content: "null",
    "nothing in it": lambda content: "{}",
    "numbers as text": vocabulary(lambda number: {name: str(i) for name, i in number.items()}),
    "fractions": vocabulary(lambda number: {name: float(i) for name, i in number.items()}),
    "truths": vocabulary(lambda number: number | {"!": False, '"': True}),
    "a number twice": vocabulary(lambda number: number | {"Ġthe": 3}),
    "a number too high": vocabulary(lambda number: number | {"Ġthe": 1_000}),
    "a number below 0": vocabulary(lambda number: {name: i - 1 for name, i in number.items()}),
    "a list for a number": vocabulary(lambda number: number | {"Ġthe": [3]}),
    "a byte is missing": vocabulary(lambda number: number | {"é": number.pop("Ġ")}),
    "a token is missing": vocabulary(lambda number: number | {"dog": number.pop("Ġthe")}),
}
MERGES = {
    "empty": lambda content: "",
    "of another kind": lambda content: "<html>\n<body>",
    "a line cut off": lambda content: content[:-3],
    "one part": lambda content: content + "the\n",
    "three parts": lambda content: content + "t h e\n",
    "an empty part": lambda content: content + "t \n",
    "empty parts": lambda content: content + " \n→ \n",
    "an empty line": lambda content: content + "\n\nh a\n",
    "a part that nothing makes": lambda content: content + "do g\n",
    "a character that is no byte": lambda content: content + "猫 a\n",
    "a merge that the vocabulary lacks": lambda content: content + "d o\n",
    "a special token": lambda content: content + f"a {END}\n",
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param("vocab.json", damage, id=f"vocab-{what}") for what, damage in VOCAB.items()]
    + [pytest.param("merges.txt", damage, id=f"merges-{what}") for what, damage in MERGES.items()],
)
def test_damaged_files(gpt2, name, damage):
    file = gpt2 / name
    file.write_bytes(damage(file.read_text(encoding="utf-8")).encode())
    with pytest.raises(BadInput) as refused:
        Tokenizer.load(gpt2)
    assert len(str(refused.value).splitlines()) == 1
    assert str(gpt2) in str(refused.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_and_unreadable_files(gpt2, name):
    (gpt2 / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        Tokenizer.load(gpt2)
    (gpt2 / name).unlink()
    with pytest.raises(BadInput, match="cannot read"):
        Tokenizer.load(gpt2)
    (gpt2 / name).mkdir()
    with pytest.raises(BadInput, match="cannot read"):
        Tokenizer.load(gpt2)
    with pytest.raises(BadInput, match="cannot read"):
        Tokenizer.load(gpt2 / "nowhere")


def test_a_name_that_has_no_utf8(gpt2):
    number = json.loads((gpt2 / "vocab.json").read_text(encoding="utf-8"))
    (gpt2 / "vocab.json").write_text(json.dumps(number | {"\ud800": len(number)}), encoding="utf-8")
    own = Tokenizer.load(gpt2)
    assert own.special == {END: 262, "\ud800": 263}
    own.save(gpt2)
    assert same(Tokenizer.load(gpt2), own)


def test_a_folder_that_cannot_be_written(english, tmp_path):
    with pytest.raises(BadInput, match="cannot write"):
        english.save(tmp_path / "nowhere")
