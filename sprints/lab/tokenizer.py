"""Byte-level byte-pair encoding, as in GPT-2, for use: words counted once, pair counts kept up to date.

    tokenizer = Tokenizer.learn(text, 1024)
    ids = tokenizer.encode("any text, or any bytes")     # a list of token numbers
    tokenizer.decode(ids)                                # the text again
    tokenizer.save(folder)                               # GPT-2's vocab.json and merges.txt

Derived in: 08_gpt/01_byte_pair_encoding
"""

import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path

from lab import BadInput
from lab.lesson import read_text, write_whole

CONTROLS = "\x1c\x1d\x1e\x1f"
END = "<|endoftext|>"  # GPT-2's only special token: it stands between documents
Pair = tuple[int, int]


def split(text: str) -> list[str]:
    r"""The words of a text, which no token crosses, as GPT-2 cuts it (Radford et al. 2019, section 2.2).

    "It's 3 o'clock  now" -> "It", "'s", " 3", " o", "'", "clock", " ", " now"; joined, they are the text.

    GPT-2:  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    Python's re knows neither \p{L}, letters, nor \p{N}, numbers. Its \w is both and the underscore; its \d is
    the decimal digits, so the other numbers that the text has (², ½, Ⅷ) are listed. Its \s has four control
    characters that are no white space to GPT-2.
    """
    strange = [c for c in sorted(set(text)) if not c.isascii() or c in CONTROLS]
    numbers = "".join(c for c in strange if unicodedata.category(c) in ("Nl", "No"))
    controls = "".join(c for c in strange if c in CONTROLS)
    letter, number, space = rf"[^\W\d_{numbers}]", rf"[\d{numbers}]", rf"[^\S{controls}]"
    other = rf"(?:[^\s\w{numbers}]|[_{controls}])"
    end = rf"(?!{letter}|{number}|{other})"
    return re.findall(
        rf"'(?:[stmd]|re|ve|ll)| ?{letter}+| ?{number}+| ?{other}+|{space}+{end}|{space}+", text
    )


class Tokenizer:
    """
    tokens    the bytes of each token; its number is its place here. V of them
    merges    pairs of numbers, in the order in which they were learned
    special   tokens that stand for no bytes of a text, and their numbers; encode() never gives one
    """

    def __init__(self, tokens: list[bytes], merges: list[Pair], special: dict[str, int]) -> None:
        self.tokens, self.merges, self.special = tokens, merges, special
        number = {token: i for i, token in enumerate(tokens) if i not in special.values()}
        self._byte = [number[bytes([byte])] for byte in range(256)]
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._made = [number[tokens[a] + tokens[b]] for a, b in merges]
        self._known = _Words(self._encode_word)

    @property
    def V(self) -> int:
        return len(self.tokens)

    # ── Learning ──────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def learn(cls, text: str | Iterable[str], V: int, special: Iterable[str] = (END,)) -> "Tokenizer":
        """V tokens: 256 bytes, what the pairs that occur most often merge into, and the special ones.

        The text may come in documents, which no word crosses.

        Of pairs that occur equally often the first in the text is merged (as in minbpe). There are fewer
        tokens where the text has no more pairs. ValueError if V has no room for the bytes.
        """
        special = list(special)
        if len(special) + 256 > V:
            raise ValueError(f"{V} tokens are too few: 256 bytes and {len(special)} special ones are needed")
        tokens = [bytes([byte]) for byte in range(256)]
        documents = [text] if isinstance(text, str) else text
        merges = _learn(Counter(chain.from_iterable(map(split, documents))), tokens, V - len(special))
        numbers = {name: len(tokens) + i for i, name in enumerate(special)}
        return cls(tokens + [name.encode() for name in special], merges, numbers)

    # ── Use ───────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, text: str | bytes) -> list[int]:
        """The numbers of a text, or of any bytes. ValueError for a str that has no UTF-8 (half a surrogate).

        Text that reads like a special token is text: "<|endoftext|>" becomes several plain tokens.
        """
        if isinstance(text, str):
            text.encode()  # raises what the docstring says
        else:
            text = text.decode(errors="surrogateescape")
        known = self._known
        return [number for word in split(text) for number in known[word]]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What the tokens stand for, exactly; special ones read as their names."""
        tokens = self.tokens
        return b"".join([tokens[number] for number in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text; where tokens were cut in the middle of a character stands �."""
        return self.decode_bytes(ids).decode(errors="replace")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Merge the pair that was learned first, leftmost first, until no pair is known.

        Pairs wait in a heap, so that a word of a million bytes takes n log n steps and not n².
        """
        ids = [self._byte[byte] for byte in word.encode(errors="surrogateescape")]
        rank, n = self._rank, len(ids)
        heap = [(rank[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in rank]
        if not heap:
            return tuple(ids)
        heapq.heapify(heap)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        while heap:
            merge, i = heapq.heappop(heap)
            j = after[i]
            if j == n or ids[i] < 0 or (ids[i], ids[j]) != self.merges[merge]:
                continue  # one of the two has become part of another token since
            ids[i], ids[j] = self._made[merge], -1
            after[i] = k = after[j]
            if k < n:
                before[k] = i
                if (new := rank.get((ids[i], ids[k]))) is not None:
                    heapq.heappush(heap, (new, i))
            if (h := before[i]) >= 0 and (new := rank.get((ids[h], ids[i]))) is not None:
                heapq.heappush(heap, (new, h))
        return tuple([number for number in ids if number >= 0])

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, folder: Path) -> None:
        """GPT-2's two files: vocab.json (token -> number) and merges.txt (a pair a line). BadInput."""
        names = [_printable(token) for token in self.tokens]
        for name, number in self.special.items():
            names[number] = name
        vocabulary = {name: number for number, name in enumerate(names)}
        merges = ["#version: 0.2", *(f"{names[a]} {names[b]}" for a, b in self.merges)]
        write_whole(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
        write_whole(folder / "merges.txt", ("\n".join(merges) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """From vocab.json and merges.txt, GPT-2's own or ours. BadInput if they are missing or foreign."""
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        try:
            number = json.loads(read_text(vocab))
        except ValueError as error:
            raise BadInput(f"{vocab} is not JSON ({error})") from error
        if not isinstance(number, dict) or sorted(map(str, number.values())) != sorted(
            map(str, range(len(number)))
        ):
            raise BadInput(f"{vocab} does not number its tokens 0, 1, 2 …")
        lines = read_text(merges).removesuffix("\n").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version") :]]
        plain = set(PRINTABLE.values()) | {"".join(pair) for pair in pairs}
        for pair in pairs:
            if len(pair) != 2 or not plain.issuperset(pair):
                raise BadInput(f"{merges}: {' '.join(pair)!r} is no pair of tokens")
        if missing := plain - number.keys():
            raise BadInput(f"{vocab} lacks {len(missing)} of the tokens that {merges.name} makes")
        byte = {printable: bytes([value]) for value, printable in PRINTABLE.items()}
        names = sorted(number, key=number.__getitem__)
        tokens = [b"".join(byte[c] for c in name) if name in plain else name.encode() for name in names]
        special = {name: number[name] for name in names if name not in plain}
        return cls(tokens, [(number[a], number[b]) for a, b in pairs], special)


def _printable_bytes() -> dict[int, str]:
    """GPT-2 writes each byte as one visible character: Latin-1 where that is one, else U+0100 and on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


PRINTABLE = _printable_bytes()


def _printable(token: bytes) -> str:
    return "".join(PRINTABLE[byte] for byte in token)


class _Words(dict):
    """word -> its numbers, worked out when it is first asked for."""

    def __init__(self, encode) -> None:
        self._encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        self[word] = numbers = self._encode(word)
        return numbers


def _learn(words: Counter, tokens: list[bytes], V: int) -> list[Pair]:
    """Append merged tokens until there are V; return the merges.

    The trick is to do only what changes: each different word is kept once, with how often it occurs; `where`
    says which words hold a pair; a heap knows the best pair. A pair's count only falls once it is in the
    heap, so that an entry that is out of date is found when it comes up, put right, and put back.
    """
    parts, times = [list(word.encode(errors="surrogateescape")) for word in words], list(words.values())
    count: dict[Pair, int] = defaultdict(int)
    where: dict[Pair, list[int]] = defaultdict(list)

    def add(pair: Pair, w: int) -> None:
        count[pair] += times[w]
        if where[pair][-1:] != [w]:
            where[pair].append(w)

    for w, ids in enumerate(parts):
        for pair in pairwise(ids):
            add(pair, w)

    def entry(pair: Pair) -> tuple:
        """The heap's smallest is the pair that occurs most often, and of several the first in the text."""
        a, b = pair
        for w in where[pair]:  # ascending; words that have lost the pair are skipped
            ids = parts[w]
            for i in range(len(ids) - 1):
                if ids[i] == a and ids[i + 1] == b:
                    return -count[pair], w, sum(len(tokens[j]) for j in ids[:i]), pair
        return 0, 0, 0, pair

    heap, merges = [entry(pair) for pair in count], []
    heapq.heapify(heap)
    number = {token: i for i, token in enumerate(tokens)}
    while heap and len(tokens) < V:
        best = heap[0]
        pair = best[-1]
        if (now := entry(pair)) != best:
            if now[0]:
                heapq.heapreplace(heap, now)
            else:
                heapq.heappop(heap)
            continue
        heapq.heappop(heap)
        merges.append(pair)
        a, b = pair
        new = number.setdefault(tokens[a] + tokens[b], len(tokens))
        if new == len(tokens):
            tokens.append(tokens[a] + tokens[b])
        changed = set()
        for w in where.pop(pair):
            ids, joined, i = parts[w], [], 0
            while i < len(ids):
                if ids[i] != a or ids[i + 1 : i + 2] != [b]:
                    joined.append(ids[i])
                    i += 1
                    continue
                if joined:
                    left = joined[-1]
                    count[left, a] -= times[w]
                    add((left, new), w)
                    changed.add((left, new))
                if i + 2 < len(ids):
                    right = ids[i + 2]
                    count[b, right] -= times[w]
                    add((new, right), w)
                    changed.add((new, right))
                joined.append(new)
                i += 2
            parts[w] = joined
        del count[pair]
        for pair in changed:
            if count[pair]:
                heapq.heappush(heap, entry(pair))
    return merges
