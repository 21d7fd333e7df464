"""In-context language learning: random finite automata, with and without n-gram heads (Akyurek et al. 2024).

    python experiments/icll.py [--jobs 8] [--quick]

Each text comes from an automaton of its own; right is any letter that may come next. A layer of n-gram heads (orders 1
to 3) is set before two layers of a mixer; without it, a third layer of that mixer stands there. The authors' rate and
budget: 0.0005 with 10% warm-up, 30,000 steps of 32 texts (of 40,000 for each seed), 128 wide, dropout 0.1 of the
embedding. Nothing is chosen. Hollow: icll_small.csv, 64 wide, 5,000 steps, rates 0.001 and 0.003. Dotted: what counting
reaches, without a model: what followed the last 0 to 3 letters most often? Writes icll.csv, .txt and .png.
"""
from collections import Counter, defaultdict

import lab
import torch
from lab import train

MIXERS = {"attention": "attention", "mamba": "Mamba", "linear_attention": "linear attention", "retnet": "RetNet",
          "short_conv,based": "Based", "gla": "GLA", "hyena": "Hyena"}


def cells(quick):
    common = {"d_model": 128, "batch_size": 32, "dropout": 0.1, "test": "icll:length=256 1000"}
    models, lr, seeds, steps, task = MIXERS, 5e-4, (0, 1, 2), 30000, "icll:length=256 40000"
    if quick:
        common |= {"d_model": 64, "test": "icll:length=96 200"}
        models, lr, seeds, steps, task = ("attention", "linear_attention"), 3e-3, (0,), 60, "icll:length=96 2000"
    layers = {False: lambda m: f"{m.split(',')[-1]},{m}" if "," in m else f"{m},{m},{m}",
              True: lambda m: f"ngram,{m}" if "," in m else f"ngram,{m},{m}"}
    return [common | {"model": m, "ngram": int(ngram), "mixer": layers[ngram](m), "task": task, "lr": lr, "seed": seed,
                      "steps": steps, "warmup": steps // 10}
            for m in models for ngram in (False, True) for seed in seeds]


def run(args):
    return lab.sweep(args, "icll", cells(args.quick), lab.packed, pack=3, needed=False)


def counting(order, task, texts=128):
    """The accuracy of the letter that most often followed the longest end of the text, of at most `order` letters, that
    was there before."""
    function, options = train.look_up(task, "task", train.from_lessons("TASKS"))
    ids, targets, extras = function(texts, torch.Generator().manual_seed(0), **options)
    right, asked, separator = 0, (targets != -100).sum().item(), extras["valid"].shape[-1] - 1
    for text, target, valid in zip(ids.tolist(), targets.tolist(), extras["valid"].tolist(), strict=True):
        followers = defaultdict(Counter)
        for i, letter in enumerate(text):
            for n in range(min(i, order) + 1):
                followers[tuple(text[i - n:i])][letter] += letter != separator
            ends = (tuple(text[i + 1 - n:i + 1]) for n in range(min(i + 1, order), -1, -1))
            seen = next((followers[end] for end in ends if end in followers and +followers[end]), Counter([0]))
            right += target[i] != -100 and valid[i][seen.most_common(1)[0][0]]
    return right / asked


def draw(ax, results, models, filled, say, title):
    for (model, ngram), accuracy in results.items():
        label = f"{('three layers', 'n-gram heads and two layers')[ngram]}: {title}" if model == models[0] else None
        ax.errorbar(models.index(model) + 0.3 * ngram + 0.08 * filled - 0.2, *lab.bars([accuracy]), capsize=4, ms=7,
                    fmt="os"[ngram], color=("C1", "C0")[ngram], mfc=None if filled else "white",
                    label=label)
        say(f"{title}: {model:18}{'with' if ngram else 'without'} n-gram heads {lab.spread(*accuracy, '.4f')}")


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = run(args)
    say = lab.reporter(args.out / "icll.txt")
    small = lab.read(lab.ROOT / "experiments" / "results" / "icll_small.csv")
    fig, ax = lab.figure(9, 4.4)
    models = list(MIXERS)
    draw(ax, lab.best(rows, ("model", "ngram"), "accuracy"), models, True, say, "30,000 steps")
    draw(ax, lab.best(small, ("model", "ngram"), "accuracy"), models, False, say, "5,000 steps, 64 wide")
    for order in range(4):
        accuracy = counting(order, cells(args.quick)[0]["test"].split()[0])
        say(f"counting what followed the last {order} letters: {accuracy:.4f}")
        ax.axhline(accuracy, color="black", lw=0.8, ls=":")
        ax.text(len(models) - 0.45, accuracy, f"the last {order} letters counted", fontsize=9, ha="right",
                va="bottom" if order == 3 else "top")
    ax.set_xticks(range(len(models)), [MIXERS[model] for model in models])
    ax.set(ylabel="accuracy", title="Random automata", xlim=(-0.5, len(models) - 0.4))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    lab.save(fig, args.out / "icll.png")
