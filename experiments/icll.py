"""In-context language learning: random finite automata, with and without n-gram heads (Akyurek et al. 2024).

    python experiments/icll.py [--jobs 8] [--quick]

Each text comes from an automaton of its own; right is any letter that may come next. A layer of n-gram heads (orders 1
to 3) is set before two layers of a mixer; without it, a third layer of that mixer stands there. Dotted: what counting
reaches, without a model: what followed the last 0 to 3 letters most often? Writes icll.csv and .png.
"""
from collections import Counter, defaultdict

import lab
import torch
from lab import train

MIXERS = ("attention", "linear_attention", "retnet", "gla", "mamba", "short_conv,based", "hyena")


def measure(cell):
    flags = {name: value for name, value in cell.items() if name not in ("model", "ngram")}
    return {"accuracy": lab.trained(flags)["accuracy"]}


def cells(quick):
    common = {"d_model": 64, "batch_size": 32}
    models, lrs, seeds, steps, length = MIXERS, (1e-3, 3e-3), (0, 1, 2), 5000, 256
    if quick:
        models, lrs, seeds, steps, length = MIXERS[:2], (3e-3,), (0,), 60, 96
    layers = {False: lambda m: f"{m.split(',')[-1]},{m}" if "," in m else f"{m},{m},{m}",
              True: lambda m: f"ngram,{m}" if "," in m else f"ngram,{m},{m}"}
    return [common | {"model": m, "ngram": int(ngram), "mixer": layers[ngram](m), "task": f"icll:length={length}",
                      "lr": lr, "seed": seed, "steps": steps}
            for m in models for ngram in (False, True) for seed in seeds for lr in lrs]


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


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "icll", cells(args.quick), measure, ("model", "ngram"), "accuracy")
    results = lab.best(rows, ("model", "ngram"), "accuracy")
    fig, ax = lab.figure(10, 4)
    models = [model for model in MIXERS if (model, 0) in results or (model, 1) in results]
    for (model, ngram), (mean, low, high) in results.items():
        ax.bar(models.index(model) + 0.4 * ngram - 0.2, mean, 0.38, yerr=[[mean - low], [high - mean]], capsize=3,
               color=("C7", "C0")[ngram], label=("three layers", "n-gram heads and two layers")[ngram]
               if model == models[0] else None)
        print(f"{model:18}{'with' if ngram else 'without'} n-gram heads: {mean:.4f} ({low:.4f} to {high:.4f})")
    for order in range(4):
        accuracy = counting(order, rows[0]["task"])
        print(f"counting what followed the last {order} letters: {accuracy:.4f}")
        ax.axhline(accuracy, color="black", lw=0.8, ls=":")
        ax.text(1.005, accuracy, f"last {order}", transform=ax.get_yaxis_transform(), fontsize=7,
                va="bottom" if order == 3 else "top")
    ax.set_xticks(range(len(models)), models)
    ax.set(ylabel="accuracy", ylim=(0.4, 1.05), title="Random automata")
    ax.legend(loc="upper center", ncols=2)
    lab.save(fig, args.out / "icll.png")
