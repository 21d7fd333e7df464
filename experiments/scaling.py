"""The talk's complexity table, measured: time and state against length for every mixer and form, with exponents fitted;
and the length from which Hyena is faster than attention.

    python experiments/scaling.py [--only crossing] [--quick]

Forward passes of one layer at growing lengths; the exponent p of time ~ t^p is fitted to the longer half of them. The
lengths end where the next one might take more than two seconds. Writes scaling.csv, .txt and .png. The crossing: the
same number of tokens in fewer and longer texts through a layer of Hyena and three attentions, the t x t matrix written
out, lesson 01's tiles, and PyTorch's own function; five measurements of each. Writes crossing.csv, .txt and .png.
"""
import importlib
import math
import statistics
import time

import lab
import torch
import torch.nn.functional as F
from lab import train

lesson01 = importlib.import_module("01_attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
SLOW = 2.0


def seconds(mixer, form, t, d_model, extras):
    x = torch.randn(1, t, d_model, device=DEVICE, dtype=next(mixer.parameters()).dtype)
    reads = {name: extras[name][:, :t] for name in getattr(mixer, "reads", ()) if name in extras}

    def once():
        start = time.perf_counter()
        mixer(x, form, **reads)
        torch.cuda.synchronize() if DEVICE == "cuda" else None
        return time.perf_counter() - start
    first = once()
    return first if first > 0.5 else sorted(once() for _ in range(5))[2]


def measure(cell):
    torch.manual_seed(0)
    make = train.from_lessons("MIXERS")[cell["mixer"]]
    longest = {"max_len": max(cell["lengths"])} if "max_len" in train.options_of(make) else {}
    dtype = torch.bfloat16 if cell["form"] == "triton" else torch.float32                    # what the kernels are for
    mixer, times = make(cell["d_model"], **longest).to(DEVICE, dtype), {}
    extras = {"ids": torch.randint(0, 500, (1, max(cell["lengths"])), device=DEVICE)}
    with torch.no_grad():
        for t in cell["lengths"]:
            times[t] = seconds(mixer, cell["form"], t, cell["d_model"], extras)
            if 4 * times[t] > SLOW:
                break
    half = list(times.items())[len(times) // 2 - 1:] if len(times) > 2 else list(times.items())
    (t0, s0), (t1, s1) = half[0], half[-1]
    return {"exponent": math.log(s1 / s0) / math.log(t1 / t0) if t1 > t0 else math.nan,
            "ms": " ".join(f"{t}:{1e3 * s:.3g}" for t, s in times.items()),
            "state_floats": " ".join(f"{t}:{mixer.state_size(t)}" for t in cell["lengths"])}


class PyTorchs(lesson01.Attention):
    """The layer of lesson 01 around PyTorch's own attention."""

    def forward(self, x, form=None):
        return self.output(F.scaled_dot_product_attention(*self.project(x), is_causal=True), x)


LAYERS = {"attention, written out": (lesson01.Attention, "parallel"),
          "attention in tiles (lesson 01)": (lesson01.Attention, "triton" if GPU else "chunked"),
          "attention, PyTorch's own": (PyTorchs, None),
          "Hyena": (train.from_lessons("MIXERS")["hyena"], "triton" if GPU else "conv")}


def crossing(cell):
    """Milliseconds for all tokens, forward and with the backward pass: the middle of five, the fastest, the slowest."""
    torch.manual_seed(0)
    make, form = LAYERS[cell["layer"]]
    t, d = cell["length"], cell["d_model"]
    more = {"max_len": t} if "max_len" in train.options_of(make) else {"n_heads": d // 64}
    layer = make(d, **more).to(DEVICE, torch.bfloat16 if GPU else torch.float32)
    x = torch.randn(cell["tokens"] // t, t, d, device=DEVICE, dtype=layer.out.weight.dtype, requires_grad=True)

    def forward():
        with torch.no_grad():
            layer(x, form)

    def both():
        layer(x, form).sum().backward()

    found = {}
    for name, run in {"forward": forward, "both": both}.items():
        times = [milliseconds(run) for _ in range(6)][1:]                                    # the first one compiles
        found |= {f"{name}_ms": statistics.median(times), f"{name}_least": min(times), f"{name}_most": max(times)}
    return {key: round(ms, 4) for key, ms in found.items()}


def milliseconds(run):
    torch.cuda.synchronize() if GPU else None
    start = time.perf_counter()
    run()
    torch.cuda.synchronize() if GPU else None
    return 1e3 * (time.perf_counter() - start)


def crosses(ours, theirs):
    """The length from which ours is faster than theirs, on a straight line between the logarithms of two lengths;
    {length: ms} each. None if it is slower at the longest."""
    lengths = sorted(set(ours) & set(theirs))
    ahead = [math.log(theirs[t] / ours[t]) for t in lengths]
    if not lengths or ahead[-1] <= 0:
        return None
    behind = [i for i, x in enumerate(ahead) if x <= 0]
    if not behind:
        return lengths[0]
    i = behind[-1]
    share = ahead[i] / (ahead[i] - ahead[i + 1])
    return round(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)


def crossing_rows(args):
    """Drawn elsewhere than measured: whatever the table has."""
    if args.draw:
        return lab.read(args.out / "crossing.csv")
    lengths = (128, 256, 512) if args.quick else tuple(2 ** i for i in range(9, 17 if GPU else 14))
    tokens, width = (512, 64) if args.quick else (2 ** 16, 768) if GPU else (2 ** 13, 256)
    return lab.sweep(args, "crossing", [{"layer": name, "length": t, "tokens": tokens, "d_model": width}
                                        for t in lengths for name in LAYERS
                                        if name != "attention, written out" or t <= 2048 or not GPU], crossing)


def draw_crossing(args):
    rows = crossing_rows(args)
    if not rows:
        return
    say = lab.reporter(args.out / "crossing.txt")
    lengths = sorted({row["length"] for row in rows})
    fig, axes = lab.figure(11, 4.8, columns=2, sharey=True)
    for ax, key, title in zip(axes, ("forward", "both"), ("forward", "forward and backward"), strict=True):
        times = {name: {row["length"]: row[f"{key}_ms"] for row in rows if row["layer"] == name} for name in LAYERS}
        hyena = times["Hyena"]
        for name in LAYERS:
            found = [row for row in rows if row["layer"] == name]
            if found:
                points = lab.bars([[row[f"{key}_{x}"] for x in ("ms", "least", "most")] for row in found])
                ax.errorbar([row["length"] for row in found], *points, fmt="s-" if name == "Hyena" else "o-", capsize=2,
                            ms=4, label=name)
        for name in (name for name in LAYERS if name != "Hyena" and hyena):
            where = crosses(hyena, times[name])
            say(f"{title}: Hyena is faster than {name} from {where or 'no'} tokens on; its time is " + ", ".join(
                f"{hyena[t] / times[name][t]:.2f} of that at {t}" for t in (2048, 8192, 65536) if t in times[name]))
            if where and where > lengths[0]:
                ax.axvline(where, color="gray", lw=0.8, ls=":")
                ax.text(where, 0.99, f" {where:,}", transform=ax.get_xaxis_transform(), va="top", fontsize=8,
                        rotation=90)
        if 8192 in times["attention, PyTorch's own"]:
            ax.plot(8192, times["attention, PyTorch's own"][8192] / 2, "D", color="gray", mfc="none",
                    label="paper, at 8k: half of FlashAttention's time")
        ax.set(xscale="log", yscale="log", xlabel="length of a text", title=title)
        ax.set_xticks(lengths, [f"{t // 1024}k" if t >= 1024 else t for t in lengths])
        ax.set_yticks([2, 5, 10, 20, 50], [2, 5, 10, 20, 50])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"ms for {rows[0]['tokens']:,} tokens, {rows[0]['d_model']} wide")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    lab.save(fig, args.out / "crossing.png")


def scaling_rows(args):
    """Drawn elsewhere than measured: whatever the table has."""
    if args.draw:
        return lab.read(args.out / "scaling.csv")
    lengths = (64, 128, 256) if args.quick else tuple(2 ** i for i in range(7, 16 if GPU else 13))
    known = train.from_lessons("MIXERS")
    chosen = ("attention", "linear_attention", "s4d", "based") if args.quick else known
    return lab.sweep(args, "scaling", [{"mixer": name, "form": form, "d_model": 128, "lengths": lengths}
                                       for name in chosen for form in known[name].forms if form != "triton" or GPU],
                     measure)


def draw_scaling(args):
    rows, known = scaling_rows(args), train.from_lessons("MIXERS")
    if not rows:
        return
    lengths = sorted({int(t) for row in rows for t in str(row["lengths"]).strip("()").split(",") if t.strip()})
    say = lab.reporter(args.out / "scaling.txt")
    fig, (left, right) = lab.figure(12, 5, columns=2)
    shown = ("attention", "window", "linear_attention", "based", "mamba", "s4d", "hyena", "rwkv4")
    for i, name in enumerate(name for name in shown if any(row["mixer"] == name for row in rows)):
        for row in (row for row in rows if row["mixer"] == name and row["form"] in (known[name].forms[0], "parallel")):
            t, ms = zip(*(map(float, pair.split(":")) for pair in row["ms"].split()), strict=True)
            left.plot(t, ms, ":" if row["form"] == "parallel" else "o-", ms=3, color=f"C{i}",
                      label=None if row["form"] == "parallel" else f"{name}, {row['form']}: t^{row['exponent']:.2f}")
        row = next(row for row in rows if row["mixer"] == name)
        t, size = zip(*(map(float, pair.split(":")) for pair in row["state_floats"].split()), strict=True)
        right.plot(t, size, "o-", ms=3, color=f"C{i}", label=name)
    left.set(xscale="log", yscale="log", xlabel="length", ylabel="ms",
             title="Forward of one layer (dotted: the t x t matrix)")
    right.set(xscale="log", yscale="log", xlabel="length", ylabel="floats", title="State for each sequence")
    for ax in (left, right):
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    for row in rows:
        exponent = "too slow for two lengths" if math.isnan(row["exponent"]) else f"t^{row['exponent']:.2f}"
        say(f"{row['mixer']:18}{row['form']:11}{exponent}")
    lab.save(fig, args.out / "scaling.png")


if __name__ == "__main__":
    args = lab.options(__doc__, only="scaling or crossing: only this table")
    if args.only not in (None, "scaling", "crossing"):
        raise SystemExit(f"--only {args.only}: scaling or crossing")
    for name, draw in {"scaling": draw_scaling, "crossing": draw_crossing}.items():
        if args.only in (None, name):
            draw(args)
