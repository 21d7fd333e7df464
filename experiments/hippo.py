"""HiPPO: what n numbers remember of a signal; and the kernels of ten parameterisations before and after training.

    python experiments/hippo.py [--quick] [--draw]

hippo.png: 2,000 steps of a smooth signal, and what LegS's n coefficients give back of it; the root mean square error
over signals. hippo_kernels.png: three channels' kernels of a first layer as it starts, and after training on the plays.
Writes hippo.csv and .txt, hippo_kernels.npz and the two pictures.
"""
import importlib
import statistics

import lab
import numpy as np
import torch
from lab import train

lesson = importlib.import_module("03_ssm")
KERNELS = {"s4d": "S4D", "s4d_legs": "S4D, LegS", "s4": "S4", "lssl": "LSSL", "dss": "DSS", "lru": "LRU",
           "ema": "EMA (MEGA)", "sgconv": "SGConv", "hyena": "Hyena", "modal": "modes (StripedHyena)"}


def measure(cell):
    u = lesson.smooth_signal(cell["t"], cell["seed"])
    back = lesson.reconstruct(lesson.hippo_online(u, cell["n"]), cell["t"])
    return {"rmse": (back - u).square().mean().sqrt().item()}


def kernels(name, steps, taps=128):
    """The first layer's kernels, (3, taps - 1), as it starts and as train.py leaves it; without the first tap."""
    cell = {"mixer": name, "steps": steps, "n_layers": 2, "d_model": 32 if steps < 50 else 128}
    args = lab.parsed(cell)

    def take(model):
        with torch.no_grad():
            return lesson.at_least_float32(model.blocks[0].mixer.kernel(taps)[:3, 1:]).numpy()
    return take(train.build_model(args, args.vocab_size)), lab.trained(cell, then=take)


def draw_memory(args, rows):
    """Left the signal and what comes back, right the error against n."""
    errors = {n: [row["rmse"] for row in rows if row["n"] == n] for n in sorted({row["n"] for row in rows})}
    fig, (left, right) = lab.figure(11, 4, columns=2, width_ratios=(3, 2))
    u = lesson.smooth_signal(rows[0]["t"], 0)
    left.plot(u.numpy(), color="black", lw=2.5, alpha=0.4, label="the signal")
    for n in [n for n in (8, 32, 128) if n in errors]:
        left.plot(lesson.reconstruct(lesson.hippo_online(u, n), len(u)).numpy(), lw=1.2, label=f"back from {n} numbers")
    left.set(xlabel="step", title="One pass, a state of n numbers, and the whole past from it")
    left.legend(fontsize=9, ncols=2)
    points = [(statistics.mean(e), min(e), max(e)) for e in errors.values()]
    right.errorbar(list(errors), *lab.bars(points), fmt="o-", capsize=4)
    right.set(xscale="log", yscale="log", xlabel="n", ylabel="error (the signal: 1)", title="The more, the better")
    right.set_xticks(list(errors), list(errors))
    right.minorticks_off()
    right.grid(alpha=0.3)
    say = lab.reporter(args.out / "hippo.txt")
    for n, point in zip(errors, points, strict=True):
        say(f"n = {n:3}: root mean square error {lab.spread(*point, '.4f')}")
    lab.save(fig, args.out / "hippo.png")


def draw_kernels(path, kept):
    """For each parameterisation the kernels of three channels: dotted as they start, and trained."""
    columns = min(5, len(kept["names"]))
    fig, axes = lab.figure(2.4 * columns, 2.4 * -(-len(kept["names"]) // columns) + 0.6, columns=columns, squeeze=False,
                           rows=-(-len(kept["names"]) // columns), sharex=True)
    for ax, name, before, after in zip(axes.flat, kept["names"], kept["before"], kept["after"], strict=True):
        for i, (first, then) in enumerate(zip(before, after, strict=True)):
            ax.plot(first, ":", color=f"C{i}", lw=1.2)
            ax.plot(then, color=f"C{i}", lw=1.2)
        ax.set_title(KERNELS[name], fontsize=12)
        ax.tick_params(labelsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("steps back")
    fig.suptitle("Three channels of a first layer: dotted as it starts, drawn through after training on the plays")
    lab.save(fig, path)


if __name__ == "__main__":
    args = lab.options(__doc__)
    sizes, seeds = ((8, 32), (0,)) if args.quick else ((4, 8, 16, 32, 64, 128, 256), (0, 1, 2))
    rows = lab.sweep(args, "hippo", lab.grid(n=sizes, t=[400 if args.quick else 2000], seed=seeds), measure)
    draw_memory(args, rows)
    path = args.out / "hippo_kernels.npz"
    if not args.draw:
        names = list(KERNELS)[:2] if args.quick else list(KERNELS)
        found = []
        for name in names:
            found.append(kernels(name, args.steps or (5 if args.quick else 500)))
            print(f"kernels of {KERNELS[name]}", flush=True)
        np.savez_compressed(path, names=names, before=[b for b, _ in found], after=[a for _, a in found],
                            machine=str(lab.machine()))
    if path.exists():
        draw_kernels(path.with_suffix(".png"), np.load(path))
