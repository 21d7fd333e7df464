"""Prefill and generation against length: attention with its cache against mixers whose state does not grow.

    python experiments/throughput.py [--quick]

Tokens per second of a whole model: one prefill of `length` tokens, then steps behind it; the bytes of state, and the
peak of memory. On a GPU in bfloat16. The crossover is the length from which on a mixer generates faster than attention.
Writes throughput.csv, .txt and .png. Steps are recorded as CUDA graphs; attention's cache has room for the new tokens
from the start.

--large yes: the Based paper's comparison, in its pattern of layers at 360M and at 1.3B parameters: 128 tokens behind
1472 for each of 128 prompts (in the mean behind 1536, as 1024 behind 1024 are), three times, beside what the memory's
bandwidth allows: a step reads all weights and all states. Writes throughput_large.csv, .txt and .png.
"""
import statistics
import time

import lab
import torch
from lab import train
from torch.utils._pytree import tree_leaves

NAMES = {"attention": "attention", "window:window=64": "window 64", "linear_attention": "linear attention",
         "short_conv,based": "Based", "short_conv,jrt": "JRT-RNN", "mamba": "Mamba", "rwkv4": "RWKV-4"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 3


def based_layers(n, linear):
    """n layers: the Taylor map in those named, a window in the next ones, short convolutions in all others."""
    mixers = {i: "taylor" for i in linear} | {i + 1: "window:window=128" for i in linear}
    return ",".join(mixers.get(i, "short_conv") for i in range(n))


# the Based paper's two sizes, and what it reports: tokens a millisecond, prefill of 4096 and generation
LARGE = {"360M": {"n_layers": 27, "d_model": 1024, "n_heads": 16},
         "1.3B": {"n_layers": 36, "d_model": 1792, "n_heads": 16}}
LAYERS = {"360M": {"Based": based_layers(27, (1, 6, 11, 16, 21)), "attention": "attention"},
          "1.3B": {"Based": based_layers(36, (1, 6, 11, 16, 21, 27, 33)), "attention": "attention"}}
PAPER = {("360M", "attention"): (207.8, 23.8), ("360M", "Based"): (514.6, 47.2), ("1.3B", "attention"): (103.5, 0.99),
         ("1.3B", "Based"): (161.7, 24.28)}


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth():
    """Bytes a second of a large copy, read and written."""
    x = torch.empty(2 ** 28 if DEVICE == "cuda" else 2 ** 22, dtype=torch.float32, device=DEVICE)
    y, seconds = torch.empty_like(x), []
    for _ in range(8):
        start = now()
        y.copy_(x)
        seconds.append(now() - start)
    return 8 * x.numel() / min(seconds)


@torch.no_grad()
def measure(cell):
    own = ("length", "batch", "new_tokens", "size", "name")
    args = lab.parsed({name: value for name, value in cell.items() if name not in own})
    with torch.device(DEVICE):
        model = train.build_model(args, args.vocab_size, DEVICE).to(torch.bfloat16 if DEVICE == "cuda" else None).eval()
        ids = torch.randint(0, args.vocab_size, (cell["batch"], cell["length"]))
    model.prefill(ids)                                           # warm up
    torch.cuda.reset_peak_memory_stats() if DEVICE == "cuda" else None
    prefills, generations = [], []
    for _ in range(ROUNDS):
        states = step = None                                     # one at a time
        start = now()
        states = model.prefill(ids)[1]
        prefills.append(ids.numel() / (now() - start))
        kept = sum(x.numel() * x.element_size() for x in tree_leaves(states) if torch.is_tensor(x))
        step = train.Decoder(model, states, cell["new_tokens"] + 3)
        del states
        for _ in range(3):                                       # warm up, and record the step as a CUDA graph
            step(ids[:, 0])
        start = now()
        for _ in range(cell["new_tokens"]):
            step(ids[:, 0])
        generations.append(cell["batch"] * cell["new_tokens"] / (now() - start))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    growth = (model.blocks[0].mixer.state_size(cell["length"] + cell["new_tokens"]) /
              model.blocks[0].mixer.state_size(cell["length"]) + 1) / 2                      # on the way to the last
    read = weights + kept * (growth if "," not in cell["mixer"] else 1)
    return {"peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prefill_tokens_per_s": round(statistics.median(prefills)),
            "generated_tokens_per_s": round(statistics.median(generations)),
            "generated_slowest": round(min(generations)), "generated_fastest": round(max(generations)),
            "bound_tokens_per_s": round(cell["batch"] * bandwidth() / read), "state_bytes": kept // cell["batch"]}


def large(args):
    """The paper's comparison, a line for each model."""
    common = {"vocab_size": 50304, "length": 1472, "batch": 128, "new_tokens": 128}
    if args.quick:
        common = {"vocab_size": 512, "length": 16, "batch": 2, "new_tokens": 4}
    cells = [{"size": size, "name": name, "mixer": LAYERS[size][name]} | common | flags |
             ({"d_model": 64, "n_heads": 2} if args.quick else {})
             for size, flags in LARGE.items() for name in LAYERS[size]]
    say = lab.reporter(args.out / "throughput_large.txt")
    rows = lab.sweep(args, "throughput_large", cells, measure)
    for row in rows:
        generated, slowest, fastest, bound, prefill = (row[name] / 1000 for name in (
            "generated_tokens_per_s", "generated_slowest", "generated_fastest", "bound_tokens_per_s",
            "prefill_tokens_per_s"))
        say(f"{row['size']} {row['name']:10} {row['parameters'] / 1e6:6.0f}M parameters: generation "
            f"{lab.spread(generated, slowest, fastest, '.2f')} tokens/ms, bandwidth allows {bound:.1f}, prefill "
            f"{prefill:.0f}, peak {row['peak_bytes'] / 1e9:.1f} GB; paper: {PAPER[row['size'], row['name']][1]}")
    for size in LARGE:
        speed = {row["name"]: row["generated_tokens_per_s"] for row in rows if row["size"] == size}
        if len(speed) == 2:
            paper = PAPER[size, "Based"][1] / PAPER[size, "attention"][1]
            say(f"{size}: Based generates {speed['Based'] / speed['attention']:.1f} times as fast as attention; paper: "
                f"{paper:.1f}")
    draw_large(args, rows)


def draw_large(args, rows):
    """Tokens a millisecond of each model, with the slowest and the fastest time, what bandwidth allows, the paper's."""
    fig, ax = lab.figure(8, 3.2)
    per_ms = [[row[key] / 1000 for row in rows] for key in (
        "generated_tokens_per_s", "generated_slowest", "generated_fastest", "bound_tokens_per_s")]
    mean, ends = lab.bars(zip(*per_ms[:3], strict=True))
    ax.plot(per_ms[3], range(len(rows)), "|", color="black", ms=18, mew=2, label="as fast as memory is read")
    ax.errorbar(mean, range(len(rows)), xerr=ends, fmt="o", ms=7, capsize=4, label="measured")
    ax.plot([PAPER[row["size"], row["name"]][1] for row in rows], range(len(rows)), "D", color="gray", mfc="none",
            label="the paper (one H100)")
    for i, x in enumerate(mean):
        ax.annotate(f"{x:.1f}", (x, i), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [f"{row['name']}, {row['size']}" for row in rows])
    ax.set(xscale="log", ylim=(len(rows) - 0.5, -0.7), xlabel="generated tokens a millisecond, 128 texts of 1536")
    ax.grid(alpha=0.3, axis="x")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    lab.save(fig, args.out / "throughput_large.png")


if __name__ == "__main__":
    args = lab.options(__doc__, large="yes: the paper's two sizes instead")
    if args.large:
        raise SystemExit(large(args))
    common = {"n_layers": 2, "d_model": 64} if args.quick else {"n_layers": 6, "d_model": 384, "n_heads": 6}
    lengths = (64, 256) if args.quick else (512, 1024, 2048, 4096, 8192, 16384, 32768)
    size = {"batch": 2, "new_tokens": 8} if args.quick else {"batch": 16, "new_tokens": 64}
    cells = [common | {"mixer": mixer} | {"length": t} | size for mixer in NAMES for t in lengths]
    rows = lab.sweep(args, "throughput", cells, measure)
    say = lab.reporter(args.out / "throughput.txt")
    columns = {"prefill_tokens_per_s": "prefill, tokens/s", "generated_tokens_per_s": "generation, tokens/s",
               "state_bytes": "state, bytes a sequence"}
    fig, axes = lab.figure(13, 4.4, columns=3)
    for ax, (column, title) in zip(axes, columns.items(), strict=True):
        for mixer in dict.fromkeys(row["mixer"] for row in rows):
            points = sorted((row["length"], row[column]) for row in rows if row["mixer"] == mixer)
            if column.startswith("prefill") and mixer == "rwkv4":                # a scan in PyTorch: of another order
                continue
            ax.plot(*zip(*points, strict=True), "o-", ms=4, label=NAMES[mixer])
            say(f"{title}: {NAMES[mixer]} " + ", ".join(f"{t}: {value:,}" for t, value in points))
        ax.set(xscale="log", yscale="log", xlabel="length of the prompt", title=title)
        ax.grid(alpha=0.3)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES), fontsize=9)
    speed = {(row["mixer"], row["length"]): row["generated_tokens_per_s"] for row in rows}
    for mixer in dict.fromkeys(row["mixer"] for row in rows if row["mixer"] != "attention"):
        ahead = [t for t in lengths if speed.get((mixer, t), 0) > speed.get(("attention", t), float("inf"))]
        where = f"from {min(ahead)} tokens on" if ahead else "at no length here"
        say(f"{NAMES[mixer]} generates faster than attention {where}")
    larger = {row["mixer"]: row for row in lab.read(args.out / "throughput.csv") if row["new_tokens"] == 1024}
    for mixer, row in larger.items():
        rate, base = row["generated_tokens_per_s"], larger["attention"]["generated_tokens_per_s"]
        say(f"{row['parameters'] / 1e6:.0f}M parameters, 128 x 1024 tokens: {mixer} {rate / 1000:.1f} tokens/ms, "
            f"{rate / base:.1f} times attention's, at most {row['peak_bytes'] / 1e9:.1f} GB")
    lab.save(fig, args.out / "throughput.png")
