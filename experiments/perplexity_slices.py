"""The talk's table: models of equal size on real text, perplexity overall, on associative recall, and on the rest.

    python experiments/perplexity_slices.py [--jobs 8] [--quick]

A recall token ends a bigram that occurred earlier in the context and at most 10 times in the training text. The share
of the gap to attention that recall explains: (nats on recall - attention's) x (share of recall tokens) / (nats
overall - attention's), capped at 100% (Zoology, section 3). The width is chosen so that all models have about as many
parameters as attention's. Writes perplexity_slices.csv and .png.
"""
import math

import lab
from lab import train

MIXERS = {"attention": "attention", "Based": "short_conv,based", "Mamba": "mamba", "RWKV-6": "rwkv6", "GLA": "gla",
          "RetNet": "retnet", "linear attention": "linear_attention", "window 64": "window:window=64", "Hyena": "hyena",
          "H3": "h3", "BaseConv": "baseconv", "S4D": "s4d"}


def parameters(flags):
    args = lab.parsed(flags)
    return sum(p.numel() for p in train.build_model(args, args.vocab_size).parameters())


def equal_size(flags):
    """The flags with the width, in steps of 32, whose number of parameters is nearest to attention's."""
    target = parameters(flags | {"mixer": "attention"})
    widths = range(max(32, flags["d_model"] - 128), flags["d_model"] + 129, 32)
    return flags | {"d_model": min(widths, key=lambda d: abs(parameters(flags | {"d_model": d}) - target))}


def measure(cell):
    flags = equal_size({name: value for name, value in cell.items() if name != "name"})
    scores = lab.trained(flags)
    return {"width": flags["d_model"], "parameters": parameters(flags)} | {
        name: round(scores[name], 5) for name in ("loss", "recall", "recall_share", "recall_new", "recall_new_share",
                                                  "rest", "bits_per_byte")}


def cells(quick):
    if quick:
        common = {"d_model": 64, "context": 256, "batch_size": 8, "steps": 60, "lr": 3e-3, "seed": 0}
        return [common | {"name": name, "mixer": MIXERS[name]} for name in ("attention", "BaseConv", "Based")]
    common = {"d_model": 256, "n_layers": 6, "context": 1024, "batch_size": 32, "steps": 3000, "warmup": 200}
    return [common | {"name": name, "mixer": mixer, "lr": lr, "seed": seed}
            for seed in (0, 1, 2) for name, mixer in MIXERS.items() for lr in (1e-3, 3e-3)]


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "perplexity_slices", cells(args.quick), measure)
    mean = {}
    for key in ("loss", "recall", "recall_share", "rest"):
        for (name,), (value, *_) in lab.best(rows, ("name",), key, judge="-loss").items():
            mean.setdefault(name, {})[key] = value
    base = mean["attention"]
    print(f"{'model':18}{'overall':>9}{'recall':>9}{'rest':>9}{'% of the gap':>14}")
    for name, m in sorted(mean.items(), key=lambda item: item[1]["loss"]):
        gap = (m["recall"] - base["recall"]) * m["recall_share"] / (m["loss"] - base["loss"]) if m is not base else 0
        share = f"{min(1, gap):14.0%}" if m["loss"] > base["loss"] else f"{'':14}"
        print(f"{name:18}" + "".join(f"{math.exp(m[key]):9.2f}" for key in ("loss", "recall", "rest")) + share)
    fig, axes = lab.figure(13, 4.5, columns=3)
    for ax, key in zip(axes, ("loss", "recall", "rest"), strict=True):
        names = sorted(mean, key=lambda name: mean[name][key])
        ax.barh(names, [math.exp(mean[name][key]) for name in names])
        ax.set_title(f"perplexity, {'overall' if key == 'loss' else key}")
        ax.invert_yaxis()
    lab.save(fig, args.out / "perplexity_slices.png")
