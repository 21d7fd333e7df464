"""The talk's table: models of equal size on real text, perplexity overall, on associative recall, and on the rest.

    python experiments/perplexity_slices.py [--jobs 8] [--quick]

A recall token ends a bigram that occurred earlier in the context and at most 10 times in the training text. The share
of the gap to attention that recall explains: (nats on recall - attention's) x (share of recall tokens) / (nats
overall - attention's), capped at 100% (Zoology, section 3). Attention alone is slow to learn what stands next to what:
the gap is that to attention behind short convolutions, as Based has them. The width is chosen so that all models have
about as many parameters. Three texts: the plays; code, the folder _inductor of the torch that is installed; more code,
all text in torch's folder, for eight times as many tokens, and once more with the paper's own meaning of rare, at most
1250 times. The share depends on that threshold: it is drawn against it. Writes perplexity_slices.csv, .txt and .png.
"""
import math
import statistics
from pathlib import Path

import lab
import torch
from lab import train

BASE = "conv + attention"
PAPER = {"long convolution": 40, "H3": 66, "Hyena": 98, "mean of 17 models": 82}                 # per cent of the gap
MIXERS = {BASE: "short_conv,attention", "Hyena": "hyena", "H3": "h3", "BaseConv": "baseconv", "attention": "attention",
          "Based": "short_conv,based", "Mamba": "mamba", "S4D": "s4d", "linear attention": "linear_attention",
          "GLA": "gla", "RetNet": "retnet", "RWKV-6": "rwkv6", "window 64": "window:window=64"}
GATED = (BASE, "BaseConv", "H3", "Hyena")
TORCH = Path(torch.__file__).parent
TITLES = {"plays": "the plays", "code": "code", "more code": "ten times the code",
          "more code, rare: 1250": "the same, rare: up to 1250 times"}
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


def share_of_gap(row, base, slice_="recall"):
    """How much of the distance to the loss of base lies on the tokens of the slice; None for what is not behind it."""
    gap = row["loss"] - base["loss"]
    return min(1, (row[slice_] - base[slice_]) * row[slice_ + "_share"] / gap) if gap > 0 else None


def shares(rows, bases, slice_="recall"):
    """Of the same seeds: (mean, smallest, largest)."""
    values = [share_of_gap(row, base, slice_) for row in rows for base in bases if row["seed"] == base["seed"]]
    return (statistics.mean(values), min(values), max(values)) if values and None not in values else None


def shares_by_threshold(found):
    """{name: [(threshold, % of the tokens, (mean, low, high) of the % of the gap)]} on the most code."""
    rare = {0: ("more code", "recall_new"), 10: ("more code", "recall"), 1250: ("more code, rare: 1250", "recall")}
    return {name: [(limit, 100 * found[text, name][0][part + "_share"],
                    [100 * share for share in shares(found[text, name], found[text, BASE], part)])
                   for limit, (text, part) in rare.items()] for name in GATED[1:]}


def dots(ax, models, title):
    """Perplexity overall, on recall and on the rest, a row for each model, smallest to largest of the seeds."""
    names = sorted(models, key=lambda name: -models[name]["loss"][0])
    for key, colour in (("loss", "black"), ("recall", "C3"), ("rest", "C0")):
        mean, ends = lab.bars([[math.exp(x) for x in models[name][key]] for name in names])
        ax.errorbar(mean, range(len(names)), xerr=ends, fmt="o", ms=4, color=colour, capsize=2,
                    label={"loss": "all tokens"}.get(key, f"on {key}"))
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", title=title)
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "perplexity_slices", cells(args.quick), measure, ("text", "name"), "-loss")
    say = lab.reporter(args.out / "perplexity_slices.txt")
    found, models = lab.chosen(rows, ("text", "name"), "-loss"), {}
    for key in ("loss", "recall", "rest"):
        for (text, name), value in lab.best(rows, ("text", "name"), key, judge="-loss").items():
            models.setdefault(text, {}).setdefault(name, {})[key] = value
    texts = [text for text in models if text != "more code, rare: 1250"]
    fig, axes = lab.figure(11, 4 * math.ceil((len(texts) + 1) / 2), rows=math.ceil((len(texts) + 1) / 2), columns=2)
    axes = axes.flatten()
    for ax, text in zip(axes, texts, strict=False):
        dots(ax, models[text], f"{TITLES[text]}: perplexity")
    axes[0].legend(fontsize=8, loc="center")
    for text, of_text in models.items():
        recall = 100 * found[text, BASE][0]["recall_share"]
        say(f"{TITLES[text]}: {recall:.1f}% of the tokens are recall; perplexity overall, on recall, on the rest; gap")
        for name, scores in sorted(of_text.items(), key=lambda item: item[1]["loss"]):
            share = shares(found[text, name], found[text, BASE]) if name != BASE else None
            say(f"{name:18}" + "".join(f"{lab.spread(*map(math.exp, scores[key]), '.4g'):>28}" for key in scores) +
                ("{:8.0%} ({:.0%} to {:.0%})".format(*share) if share else ""))
    ax = axes[-1]
    for name, points in shares_by_threshold(found).items() if len(texts) == 3 else ():
        _, tokens, of_gap = zip(*points, strict=True)
        ax.errorbar(tokens, *lab.bars(of_gap), fmt="o-", capsize=3, label=name)
        for limit, n, share in points:
            say(f"rare: up to {limit:4} times, {n:.1f}% of the tokens: {name} {lab.spread(*share, '.0f')}% of the gap")
            if name == "H3":
                ax.annotate(f"up to {limit} times", (n, share[0]), xytext=(-6, 6), textcoords="offset points",
                            ha="right", fontsize=8)
    for name, share in PAPER.items():
        ax.plot(6.4, share, "D", color="gray", ms=5)
        ax.annotate(f"paper: {name}", (6.4, share), xytext=(-6, -3), textcoords="offset points", fontsize=8,
                    color="gray", ha="right")
    ax.set(xscale="log", xlabel="% of the tokens that are recall", xlim=(0.4, 60), ylim=(0, 104),
           xticks=(1, 2, 5, 10, 30), xticklabels=(1, 2, 5, 10, 30),
           title=f"{TITLES['more code']}: % of the gap that is recall")
    ax.minorticks_off()
    if len(texts) == 3:
        ax.legend(fontsize=8, loc="lower right")
    lab.save(fig, args.out / "perplexity_slices.png")
