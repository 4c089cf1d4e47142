"""How fast lab.tokenizer is, beside two others, as ratios from one run.

    uv run --with tokenizers --with tiktoken tests/bench_tokenizer.py [TEXT] [--merges N]

TEXT is a UTF-8 file, of which the first million characters are taken; without it, 1 MB of the course's
stories. The others are minbpe's RegexTokenizer (its published algorithm, below, on the words of
lab.tokenizer.split) and Hugging Face's `tokenizers`, on one thread; for encoding also tiktoken. All learn
1,024 tokens.

minbpe takes minutes: it is stopped after N merges, 20 unless told, and the rest is extrapolated (--merges
767 for all). A merge takes it as long as there are tokens to walk over, and how many there are at each merge
is known, as the merges are; so the seconds of the N merges are multiplied by the tokens walked over in all
merges and divided by those of the N. That is rather too little: a word of one token takes time, too.

Times are CPU seconds of this process, the best of five (one for minbpe). pytest does not collect this file.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from lab import stories
from lab.lesson import read_text, whole_number
from lab.tokenizer import END, Tokenizer, split

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

V, CHARACTERS = 1_024, 1_000_000
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def seconds(work: Callable[[], object], times: int = 5) -> tuple[float, object]:
    """The CPU seconds of the fastest of several runs, and what the last returned."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def minbpe(text: str, most: int) -> list[tuple[int, int]]:
    """RegexTokenizer.train of github.com/karpathy/minbpe: count all pairs, merge one, begin again."""

    def get_stats(ids, counts):
        for pair in zip(ids, ids[1:]):  # noqa: B905, RUF007
            counts[pair] = counts.get(pair, 0) + 1

    def merge(ids, pair, new):
        merged, i = [], 0
        while i < len(ids):
            if ids[i] == pair[0] and i < len(ids) - 1 and ids[i + 1] == pair[1]:
                merged.append(new)
                i += 2
            else:
                merged.append(ids[i])
                i += 1
        return merged

    chunks, merges = [list(word.encode()) for word in split(text)], []
    for new in range(256, 256 + most):
        stats = {}
        for ids in chunks:
            get_stats(ids, stats)
        if not stats:
            break
        pair = max(stats, key=stats.get)
        chunks = [merge(ids, pair, new) for ids in chunks]
        merges.append(pair)
    return merges


def tokens_at_each_merge(text: str, merges: list[tuple[int, int]]) -> list[int]:
    """How many tokens the text has before each merge. One character stands for each token."""
    letter = [chr(0x10000 + number) for number in range(256 + len(merges))]
    words = split(text)
    line = " ".join("".join(letter[byte] for byte in word.encode()) for word in words)
    counts = []
    for new, (a, b) in enumerate(merges, 256):
        counts.append(len(line) - len(words) + 1)
        line = line.replace(letter[a] + letter[b], letter[new])
    return counts


def hugging_face(model: models.BPE) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    return theirs


def hugging_face_learns(text: str) -> tokenizers.Tokenizer:
    theirs = hugging_face(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kind = {"vocab_size": V, "special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    theirs.train_from_iterator([text], trainers.BpeTrainer(**kind))
    return theirs


def check(holds: bool, what: str) -> None:
    print(f"{'yes' if holds else 'NO '}  {what}")
    if not holds:
        sys.exit(1)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("text", nargs="?", metavar="TEXT")
    options.add_argument("--merges", type=whole_number(1), default=20, metavar="N")
    told = options.parse_args()
    text = read_text(told.text) if told.text else "".join(s.text for s in stories.write(0, CHARACTERS))
    text = text[:CHARACTERS]
    size = len(text.encode()) / 1e6
    print(f"{told.text or 'stories'}: {len(text):,} characters, {size:.2f} MB, {V:,} tokens to learn\n")

    ours, own = seconds(lambda: Tokenizer.learn(text, V))
    hf, theirs = seconds(lambda: hugging_face_learns(text))
    naive, merges = seconds(lambda: minbpe(text, min(told.merges, len(own.merges))), times=1)
    walked = tokens_at_each_merge(text, own.merges)
    whole = naive * sum(walked) / sum(walked[: len(merges)])
    how = "all of them" if len(merges) == len(own.merges) else "extrapolated to all of them"
    print(f"learning  lab          {ours:9.3f} s")
    print(f"          tokenizers   {hf:9.3f} s   the lab takes {ours / hf:.2f} times as long")
    print(f"          minbpe       {whole:9.3f} s   the lab is {whole / ours:,.0f} times as fast")
    print(f"          ({len(merges)} merges took {naive:.2f} s, {how})\n")

    with tempfile.TemporaryDirectory() as folder:
        own.save(Path(folder))
        same = hugging_face(models.BPE.from_file(f"{folder}/vocab.json", f"{folder}/merges.txt"))
        theirs.model.save(folder)
        loaded = Tokenizer.load(Path(folder))
    ranks = {token: number for number, token in enumerate(own.tokens) if number not in own.special.values()}
    tik = tiktoken.Encoding("own", pat_str=GPT2, mergeable_ranks=ranks, special_tokens=own.special)
    cold, ids = seconds(lambda: Tokenizer(own.tokens, own.merges, own.special).encode(text))
    warm, _ = seconds(lambda: own.encode(text))
    hf, hf_ids = seconds(lambda: same.encode(text).ids)
    tk, tk_ids = seconds(lambda: tik.encode_ordinary(text))
    for name, took in (("lab, new", cold), ("lab, again", warm), ("tokenizers", hf), ("tiktoken", tk)):
        start = "encoding" if took == cold else ""
        print(f"{start:9} {name:10}   {size / took:9.1f} MB/s   {took / cold:5.2f} times the lab's time")
    print()
    check(merges == own.merges[: len(merges)], "minbpe's merges are the lab's")
    check(hf_ids == ids, "tokenizers reads the lab's files and gives the same tokens")
    check(tk_ids == ids, "tiktoken gives the same tokens")
    check(
        loaded.encode(text) == theirs.encode(text).ids,
        "the lab reads the files of tokenizers and gives the same tokens",
    )
    check(own.decode(ids) == text, "the text comes back")


if __name__ == "__main__":
    main()
