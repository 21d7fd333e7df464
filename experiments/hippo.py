"""HiPPO: what n numbers remember of a signal, and the kernels of every parameterisation before and after training.

    python experiments/hippo.py [--quick]

Left: root mean square error with which LegS's n coefficients give back 2,000 steps of smooth signals (mean over seeds).
Right: three channels' kernels of a layer as it starts, and after training on the plays. Writes hippo.csv and .png.
"""
import importlib

import lab
import torch
from lab import train

lesson = importlib.import_module("03_ssm")
KERNELS = ("s4d", "s4d_legs", "s4", "lssl", "dss", "lru", "ema", "sgconv", "hyena", "modal")


def measure(cell):
    u = lesson.smooth_signal(cell["t"], cell["seed"])
    back = lesson.reconstruct(lesson.hippo_online(u, cell["n"]), cell["t"])
    return {"rmse": (back - u).square().mean().sqrt().item()}


def kernels(name, steps, taps=128):
    """The first layer's kernels, (3, taps), as it starts and as train.py leaves it."""
    cell = {"mixer": name, "steps": steps, "n_layers": 2, "d_model": 32 if steps < 50 else 128}
    args = lab.parsed(cell)

    def take(model):
        with torch.no_grad():
            return lesson.at_least_float32(model.blocks[0].mixer.kernel(taps)[:3, 1:])     # without the first tap
    return take(train.build_model(args, args.vocab_size)), lab.trained(cell, then=take)


if __name__ == "__main__":
    args = lab.options(__doc__)
    sizes, seeds = ((8, 32), (0,)) if args.quick else ((4, 8, 16, 32, 64, 128, 256), (0, 1, 2))
    rows = lab.sweep(args, "hippo", lab.grid(n=sizes, t=[400 if args.quick else 2000], seed=seeds), measure)
    names = KERNELS[:2] if args.quick else KERNELS
    fig, axes = lab.figure(2.2 * (len(names) + 2), 5, rows=2, columns=len(names) + 2)
    for ax in axes[:, :2].flat:
        ax.remove()
    ax = fig.add_subplot(axes[0, 0].get_gridspec()[:, :2])
    errors = {n: [row["rmse"] for row in rows if row["n"] == n] for n in sorted({row["n"] for row in rows})}
    ax.plot(list(errors), [sum(e) / len(e) for e in errors.values()], "o-")
    ax.set(xscale="log", yscale="log", xlabel="n", ylabel="RMSE (signal: standard deviation 1)", title="HiPPO-LegS")
    ax.grid(alpha=0.3, which="both")
    print("n: RMSE   " + "   ".join(f"{n}: {sum(e) / len(e):.4f}" for n, e in errors.items()))
    for column, name in enumerate(names, 2):
        for row, (K, when) in enumerate(zip(kernels(name, args.steps or (5 if args.quick else 500)),
                                            ("at first", "trained"), strict=True)):
            axes[row, column].plot(K.T.numpy(), lw=0.8)
            axes[row, column].set_title(f"{name}, {when}", fontsize=9)
            axes[row, column].tick_params(labelsize=6)
        print(f"kernels of {name}", flush=True)
    lab.save(fig, args.out / "hippo.png")
