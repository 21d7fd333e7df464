"""How many of the layers have to be attention? Loss and recall on code against the share, at equal compute.

    python experiments/hybrids.py [--only "Hyena,attention"] [--jobs 6] [--quick]

Four layers, 128 wide, on the Python code in the folder _inductor of the torch that is installed. Some layers of Hyena
are replaced by attention, evenly spread; besides, two published hybrids: Zoology's (BaseConv, and attention only for
tokens that occurred before) and StripedHyena's (filters that are sums of modes, and attention, in turn). All are
trained with as many floating-point operations as attention in 800 steps of 32 x 512 tokens: what has fewer a token
takes more steps. Writes hybrids.csv, .txt and .png.
"""
import functools
import math
from pathlib import Path

import lab
import torch
from lab import train

H, A, C = "hyena:max_len=512", "attention", "baseconv:taps=512"
MODELS = {                      # the pattern of four layers, and the number of them that are attention
    "Hyena": ([H] * 4, 0), "2 of 4": ([H, A] * 2, 2), "attention": ([A] * 4, 4), "1 of 4": ([H, H, A, H], 1),
    "short convolutions + attention": (["short_conv", A] * 2, 2), "BaseConv": ([C] * 4, 0),
    "Zoology's hybrid": ([C, "repeat_attention"] * 2, 2), "modes": (["modal"] * 4, 0),
    "StripedHyena's": (["modal", A] * 2, 2),
}
LADDER, TARGET = ("Hyena", "1 of 4", "2 of 4", "attention"), "short convolutions + attention"
GAPS = (("1 of 4", "Hyena"), ("2 of 4", "Hyena"), ("Zoology's hybrid", "BaseConv"), ("StripedHyena's", "modes"))
CHOOSING, SEEDS = 100, (0, 1, 2)
SCORES = ("loss", "recall", "recall_share", "repeated", "repeated_share", "rest")
SIZES = ("d_model", "context", "vocab_size", "n_layers", "mixer")


@functools.cache
def size(**flags):
    """Parameters, and operations for a token in training: 6 for each weight of a matrix that meets every token (2
    forward, 4 backward); for attention's scores and sums 6 t d (half of the t x t places are needed, and counted for
    all tokens also where only the repeated ones ask); for a long convolution three FFTs of length 2t each way."""
    args = lab.parsed(flags)
    model, t, d = train.build_model(args, args.vocab_size), args.context, args.d_model
    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    of_filters = sum(n for name, n in weights.items() if ".mixer.layers." in name or name.endswith(".mixer.last"))
    operations = 6 * (sum(weights.values()) - of_filters + model.embed.weight.numel())
    for block in model.blocks:
        kind = type(block.mixer).__name__
        operations += 6 * t * d * ("Attention" in kind)
        operations += 3 * 3 * 5 * math.log2(2 * t) * d * (kind in ("Hyena", "BaseConv", "Modal"))
    return sum(p.numel() for p in model.parameters()), round(operations)


def measure(cell):
    flags = {name: value for name, value in cell.items() if name not in ("model", "share", "text")}
    scores = lab.trained(flags | {"data": Path(torch.__file__).parent / cell["text"]})
    parameters, operations = size(**{name: flags[name] for name in SIZES})
    return {"parameters": parameters, "flops_a_token": operations} | {
        name: round(scores[name], 5) for name in SCORES}


def cells(quick, only=None):
    """Each with as many steps as the operations of attention's steps allow."""
    if quick:
        common = {"d_model": 32, "context": 128, "vocab_size": 512, "n_layers": 4}
        more, models = {"text": "_inductor/kernel", "batch_size": 8, "warmup": 20}, ("Hyena", "2 of 4", "attention")
        steps, lrs, seeds = 150, (3e-3,), (0,)
    else:
        common = {"d_model": 128, "context": 512, "vocab_size": 4096, "n_layers": 4}
        more, models = {"text": "_inductor", "batch_size": 32, "warmup": 100}, MODELS
        steps, lrs, seeds = 800, (1e-3, 3e-3, 9e-3), (CHOOSING, *SEEDS)
    budget, found = steps * size(**common, mixer="attention")[1], []
    for model in only.split(",") if only else models:
        layers, n = MODELS[model]
        flags = common | {"mixer": ",".join(layers)}
        flags |= more | {"steps": round(budget / size(**flags)[1])}
        found += [{"model": model, "share": round(n / 4, 3)} | flags | {"lr": lr, "seed": seed}
                  for seed in seeds for lr in lrs]
    return found


def gap_closed(mean, model, convolution):
    """Of the distance in loss from a convolution to attention behind short convolutions, how much is gone?"""
    return (mean[convolution] - mean[model]) / (mean[convolution] - mean[TARGET])


def panel(ax, results, title):
    """Perplexity against the share of attention, with the smallest and the largest of the seeds."""
    def points(names):
        names = [name for name in names if name in results]
        return [MODELS[name][1] / 4 for name in names], *lab.bars([[math.exp(x) for x in results[n]] for n in names])

    if set(LADDER) & set(results):
        ax.errorbar(*points(LADDER), fmt="o-", capsize=3, label="Hyena and attention")
    for i, (name, marker) in enumerate({"BaseConv": "v", "Zoology's hybrid": "^", "modes": "<", "StripedHyena's": ">",
                                        TARGET: "s"}.items(), 1):
        if name in results:
            ax.errorbar(*points([name]), fmt=marker, capsize=3, ms=8, color=f"C{i}",
                        label="StripedHyena's filters" if name == "modes" else name)
    ax.set(yscale="log", title=title, xlabel="share of the layers that are attention")
    ax.set_xticks([0, 1 / 4, 1 / 2, 1], ["0", "1/4", "1/2", "1"])
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter("{x:.3g}")
    ax.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    args = lab.options(__doc__, only=("these models, a,b,c", MODELS))
    rows = lab.sweep(args, "hybrids", cells(args.quick, args.only), measure, ("model",), "-loss")
    results = {key: {name: value for (name,), value in lab.best(rows, ("model",), key, judge="-loss").items()}
               for key in ("loss", "recall", "rest", "repeated")}
    fig, axes = lab.figure(11, 4.6, columns=3)
    for ax, key, title in zip(axes, results, ("all tokens", "rare bigrams that came before", "all other tokens"),
                              strict=False):
        panel(ax, results[key], title)
    axes[0].set_ylabel("perplexity, held-out code")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    say = lab.reporter(args.out / "hybrids.txt")
    say(f"perplexity on all, on the {100 * rows[0]['recall_share']:.1f}% rare bigrams that came before, on the rest, "
        f"on the {100 * rows[0]['repeated_share']:.0f}% that are any bigram that came before")
    for name in results["loss"]:
        say(f"{name:32}" + "   ".join(lab.spread(*map(math.exp, results[key][name]), ".3g") for key in results))
    mean = {name: value[0] for name, value in results["loss"].items()}
    for model, convolution in GAPS:
        if {model, convolution, TARGET} <= set(mean):
            say(f"of the gap in loss from {convolution} to {TARGET} {model} closes "
                f"{100 * gap_closed(mean, model, convolution):.0f}%")
    lab.save(fig, args.out / "hybrids.png")
