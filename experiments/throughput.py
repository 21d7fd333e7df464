"""Prefill and generation against length: attention with its cache against mixers whose state does not grow.

    python experiments/throughput.py [--quick]

Tokens per second of a whole model: one prefill of `length` tokens, then steps behind it; the bytes of state, and the
peak of memory. On a GPU in bfloat16. The crossover is the length from which on a mixer generates faster than attention.
First, at equal width and depth, 1024 tokens for each of 128 prompts, as the Based paper does. Writes throughput.csv
and .png. Steps are recorded as CUDA graphs; attention's cache has room for the new tokens from the start.
"""
import sys
import time

import lab
import torch
from lab import train
from torch.utils._pytree import tree_leaves

MIXERS = ("attention", "window:window=64", "linear_attention", "short_conv,based", "short_conv,jrt", "mamba", "rwkv4")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def measure(cell):
    flags = {name: value for name, value in cell.items() if name not in ("length", "batch", "new_tokens")}
    args = lab.parsed(flags)
    model = train.build_model(args, args.vocab_size).to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else None).eval()
    ids = torch.randint(0, args.vocab_size, (cell["batch"], cell["length"]), device=DEVICE)
    model.prefill(ids)                                           # warm up
    torch.cuda.reset_peak_memory_stats() if DEVICE == "cuda" else None
    start = now()
    _, states = model.prefill(ids)
    prefill = now() - start
    kept = sum(x.numel() * x.element_size() for x in tree_leaves(states) if torch.is_tensor(x)) // cell["batch"]
    step = train.Decoder(model, states, cell["new_tokens"] + 3)
    del states
    for _ in range(3):                                           # warm up, and record the step as a CUDA graph
        step(ids[:, 0])
    start = now()
    for _ in range(cell["new_tokens"]):
        step(ids[:, 0])
    steps = now() - start
    return {"peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prefill_tokens_per_s": round(ids.numel() / prefill),
            "generated_tokens_per_s": round(cell["batch"] * cell["new_tokens"] / steps),
            "state_bytes": kept}


if __name__ == "__main__":
    args = lab.options(__doc__)
    common = {"n_layers": 2, "d_model": 64} if args.quick else {"n_layers": 6, "d_model": 384, "n_heads": 6}
    lengths = (64, 256) if args.quick else (512, 1024, 2048, 4096, 8192, 16384, 32768)
    size = {"batch": 2, "new_tokens": 8} if args.quick else {"batch": 16, "new_tokens": 64}
    cells = [common | {"mixer": mixer} | {"length": t} | size for mixer in MIXERS for t in lengths]
    if not args.quick:
        large = {"n_layers": 12, "d_model": 1024, "n_heads": 16}
        cells = [large | {"mixer": mixer, "length": 1024, "batch": 128, "new_tokens": 1024}
                 for mixer in ("attention", "based", "linear_attention")] + cells
    rows = lab.sweep(args, "throughput", cells, measure)
    for row in (row for row in rows if row["new_tokens"] == 1024):
        speed, memory = row["generated_tokens_per_s"] / 1000, row["peak_bytes"] / 1e9
        print(f"{row['mixer']:20} {speed:8.2f} tokens/ms, {memory:6.1f} GB at most")
    rows = [row for row in rows if row["new_tokens"] != 1024]
    if not rows:
        sys.exit()
    columns = {"prefill_tokens_per_s": "prefill, tokens/s", "generated_tokens_per_s": "generation, tokens/s",
               "state_bytes": "state, bytes a sequence"}
    fig, axes = lab.figure(15, 4.5, columns=3)
    for ax, (column, title) in zip(axes, columns.items(), strict=True):
        for mixer in dict.fromkeys(row["mixer"] for row in rows):
            points = sorted((row["length"], row[column]) for row in rows if row["mixer"] == mixer)
            ax.plot(*zip(*points, strict=True), "o-", ms=4, label=mixer)
        ax.set(xscale="log", yscale="log", xlabel="length of the prompt", title=title)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(MIXERS), fontsize=8)
    speed = {(row["mixer"], row["length"]): row["generated_tokens_per_s"] for row in rows}
    for mixer in dict.fromkeys(row["mixer"] for row in rows if row["mixer"] != "attention"):
        ahead = [t for t in lengths if speed.get((mixer, t), 0) > speed.get(("attention", t), float("inf"))]
        where = f"from {min(ahead)} tokens on" if ahead else "at no length here"
        print(f"{mixer:20} generates faster than attention {where}")
    lab.save(fig, args.out / "throughput.png")
