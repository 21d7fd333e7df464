"""The talk's complexity table, measured: time and state against length for every mixer and form, with exponents fitted.

    python experiments/scaling.py [--quick]

Forward passes of one layer at growing lengths; the exponent p of time ~ t^p is fitted to the longer half of them. The
lengths end where the next one might take more than two seconds. Writes scaling.csv and .png.
"""
import math
import time

import lab
import torch
from lab import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


if __name__ == "__main__":
    args = lab.options(__doc__)
    lengths = (64, 128, 256) if args.quick else tuple(2 ** i for i in range(7, 16 if DEVICE == "cuda" else 13))
    known = train.from_lessons("MIXERS")
    chosen = ("attention", "linear_attention", "s4d", "based") if args.quick else known
    cells = [{"mixer": name, "form": form, "d_model": 128, "lengths": lengths}
             for name in chosen for form in known[name].forms if form != "triton" or DEVICE == "cuda"]
    rows = lab.sweep(args, "scaling", cells, measure)
    fig, (left, right) = lab.figure(14, 5.5, columns=2)
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
        print(f"{row['mixer']:18}{row['form']:11}{exponent}")
    lab.save(fig, args.out / "scaling.png")
