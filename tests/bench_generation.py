"""Generation with the lab's cache against two others, side by side in one run; pytest does not collect this.

    uv run --with transformers tests/bench_generation.py            (2 minutes on two cores)

One text, written by the likeliest token on the CPU, with the same random weights: a GPT-2 of 6 layers, width
384, 6 heads, context 256 and 65 tokens, which is nanoGPT's for tinyshakespeare. Ours is
lab.generation.generate, given the copy that for_writing makes of the model; the others are

    no cache       as nanoGPT writes: crop to the context, run all of it through the model, take the last
                   logits; the same model
    Hugging Face   GPT2LMHeadModel.generate() with its cache; left out if transformers is not there

The run ends with status 1 if they do not all write the same tokens, if no cache takes less than 8 times as
long as ours, or Hugging Face no longer. They take turns, so that another program on the machine slows all of
them; a ratio is that of the middle round. `--threads N` sets PyTorch's threads, several of which on a busy
machine mostly wait for each other.
"""

import argparse
import sys
import time
from collections.abc import Callable

from lab.generation import for_writing, generate, greedy
from lab.gpt import GPT

import torch
from torch import nn

SIZES = {"V": 65, "T": 256, "C": 384, "H": 6, "L": 6}
TASKS = {"from one token to a full context": (1, 255), "the last 32 of a full context": (224, 32)}
NEEDED = {"no cache": 8.0, "Hugging Face": 1.0}


@torch.no_grad()
def without_cache(model: GPT, prompt: list[int], most: int) -> list[int]:
    """As nanoGPT's generate() does it, with the likeliest token in place of a drawn one."""
    ids = torch.tensor([prompt])  # (B, T)
    for _ in range(most):
        context = ids[:, -SIZES["T"] :]
        logits = model(context)[:, -1]  # (B, V)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def hugging_face(model: GPT) -> Callable[[list[int], int], list[int]] | None:
    """The same weights in GPT2LMHeadModel, and its generate(); None where there are no transformers."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=SIZES["V"], n_positions=SIZES["T"], n_embd=SIZES["C"], n_layer=SIZES["L"],
            n_head=SIZES["H"], bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip

    def copy(to: nn.Module, *layers: nn.Module) -> None:
        """Weights; a product's are transposed there, and those of query, key and value side by side."""
        weight = torch.cat([layer.weight for layer in layers])
        to.weight.copy_(weight.T if type(to).__name__ == "Conv1D" else weight)
        if getattr(to, "bias", None) is not None:
            to.bias.copy_(torch.cat([layer.bias for layer in layers]))

    with torch.no_grad():
        copy(theirs.transformer.wte, model.tokens)
        copy(theirs.transformer.wpe, model.places)
        copy(theirs.transformer.ln_f, model.norm)
        for to, block in zip(theirs.transformer.h, model.blocks, strict=True):
            attention, work = block.attention.sublayer, block.feed_forward.sublayer
            copy(to.ln_1, block.attention.norm)
            copy(to.attn.c_attn, attention.query, attention.key, attention.value)
            copy(to.attn.c_proj, attention.output)
            copy(to.ln_2, block.feed_forward.norm)
            copy(to.mlp.c_fc, work[0])
            copy(to.mlp.c_proj, work[2])

    def write(prompt: list[int], most: int) -> list[int]:
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": most, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[
            0, len(prompt) :
        ].tolist()

    return write


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = GPT(**SIZES).eval()
    ours = for_writing(model)
    ways = {
        "ours": lambda prompt, most: generate(ours, [prompt], greedy, most)[0],
        "no cache": lambda prompt, most: without_cache(model, prompt, most),
        "Hugging Face": hugging_face(model),
    }
    ways = {name: write for name, write in ways.items() if write}
    print(f"6 layers, width 384, 6 heads, context 256; {options.threads} threads, {options.rounds} rounds")
    failed = False
    for task, (given, most) in TASKS.items():
        prompt = torch.randint(SIZES["V"], (given,)).tolist()
        written = {name: write(prompt, most) for name, write in ways.items()}
        same = all(tokens == written["ours"] for tokens in written.values())
        times = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, write in ways.items():
                start = time.perf_counter()
                write(prompt, most)
                times[name].append(time.perf_counter() - start)
        print(f"\n{task}: {most} tokens{'' if same else '   NOT THE SAME TOKENS'}")
        print(f"  ours          {1_000 * min(times['ours']) / most:7.2f} ms a token")
        failed |= not same
        for name in list(ways)[1:]:
            ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
            ratio = sorted(ratios)[len(ratios) // 2]
            print(f"  {name:12}  {1_000 * min(times[name]) / most:7.2f} ms a token   {ratio:6.2f} times ours")
            failed |= ratio < NEEDED[name]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
