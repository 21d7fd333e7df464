"""The talk's table: models of equal size on real text, perplexity overall, on associative recall, and on the rest.

    python experiments/perplexity_slices.py [--jobs 8] [--quick]

A recall token ends a bigram that occurred earlier in the context and at most 10 times in the training text. The share
of the gap to attention that recall explains: (nats on recall - attention's) x (share of recall tokens) / (nats
overall - attention's), capped at 100% (Zoology, section 3). Attention alone is slow to learn what stands next to what:
the gap is that to attention behind short convolutions, as Based has them. The width is chosen so that all models have
about as many parameters. Three texts: the plays; code, the folder _inductor of the torch that is installed; more code,
all text in torch's folder, for eight times as many tokens, and once more with the paper's own meaning of rare, at most
1250 times. Writes perplexity_slices.csv and .png.
"""
import math
from pathlib import Path

import lab
import torch
from lab import train

BASE = "conv + attention"
MIXERS = {BASE: "short_conv,attention", "Hyena": "hyena", "H3": "h3", "BaseConv": "baseconv", "attention": "attention",
          "Based": "short_conv,based", "Mamba": "mamba", "S4D": "s4d", "linear attention": "linear_attention",
          "GLA": "gla", "RetNet": "retnet", "RWKV-6": "rwkv6", "window 64": "window:window=64"}
GATED = (BASE, "BaseConv", "H3", "Hyena")
TORCH = Path(torch.__file__).parent
TEXTS = {"plays": {}, "code": {"data": TORCH / "_inductor"}, "more code": {"data": TORCH},
         "more code, rare: 1250": {"data": TORCH, "rare": 1250}}
SCORES = ("loss", "recall", "recall_share", "recall_new", "recall_new_share", "rest", "bits_per_byte")


def parameters(flags):
    args = lab.parsed(flags)
    return sum(p.numel() for p in train.build_model(args, args.vocab_size).parameters())


def equal_size(flags):
    """The flags with the width, in steps of 32, whose number of parameters is nearest to attention's."""
    target = parameters(flags | {"mixer": "attention"})
    widths = range(max(32, flags["d_model"] - 128), flags["d_model"] + 129, 32)
    return flags | {"d_model": min(widths, key=lambda d: abs(parameters(flags | {"d_model": d}) - target))}


def measure(cell):
    flags = equal_size({name: value for name, value in cell.items() if name not in ("text", "name")})
    scores = lab.trained(flags | TEXTS[cell["text"]])
    return {"width": flags["d_model"], "parameters": parameters(flags)} | {k: round(scores[k], 5) for k in SCORES}


def cells(quick):
    if quick:
        common = {"text": "plays", "d_model": 64, "context": 256, "batch_size": 8, "steps": 60, "lr": 3e-3, "seed": 0}
        return [common | {"name": name, "mixer": MIXERS[name]} for name in (BASE, "BaseConv", "Based")]
    common = {"d_model": 256, "n_layers": 6, "context": 1024, "batch_size": 4, "warmup": 200}
    runs = [("plays", name, 4, 1200) for name in MIXERS] + [("code", name, 4, 2000) for name in MIXERS]
    runs += [(text, name, 16, 4000) for text in ("more code", "more code, rare: 1250") for name in GATED]
    return [{"text": text} | common | {"batch_size": batch, "steps": steps, "name": name, "mixer": MIXERS[name],
                                       "lr": lr, "seed": seed}
            for text, name, batch, steps in runs for seed in (0, 1, 2) for lr in (1e-3, 3e-3)]


def share_of_gap(m, base):
    """How much of the distance to the loss of base lies on the recall tokens; None for what is not behind it."""
    gap = m["loss"] - base["loss"] if base else 0
    return min(1, (m["recall"] - base["recall"]) * m["recall_share"] / gap) if gap > 0 else None


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "perplexity_slices", cells(args.quick), measure, ("text", "name"), "-loss")
    mean = {}
    for key in ("loss", "recall", "recall_share", "rest"):
        for (text, name), (value, *_) in lab.best(rows, ("text", "name"), key, judge="-loss").items():
            mean.setdefault(text, {}).setdefault(name, {})[key] = value
    heights = [len(models) + 3 for models in mean.values()]                                  # of bars, and a title
    fig, axes = lab.figure(13, 0.27 * sum(heights), rows=len(mean), columns=3, squeeze=False, height_ratios=heights)
    for row, (text, models) in zip(axes, mean.items(), strict=True):
        print(f"{text:22}{'overall':>9}{'recall':>9}{'rest':>9}{'% of the gap':>14}")
        for name, m in sorted(models.items(), key=lambda item: item[1]["loss"]):
            share = share_of_gap(m, models.get(BASE))
            print(f"{name:22}" + "".join(f"{math.exp(m[key]):9.2f}" for key in ("loss", "recall", "rest")) +
                  (f"{share:14.0%}" if share is not None else ""))
        for ax, key in zip(row, ("loss", "recall", "rest"), strict=True):
            names = sorted(models, key=lambda name: models[name][key])
            bars = ax.barh(names, [math.exp(models[name][key]) for name in names])
            ax.bar_label(bars, fmt="%.4g", fontsize=7, padding=2)
            ax.margins(x=0.15)
            ax.set_title(f"{text}: {'overall' if key == 'loss' else 'on ' + key}")
            ax.invert_yaxis()
    fig.suptitle("Perplexity")
    lab.save(fig, args.out / "perplexity_slices.png")
