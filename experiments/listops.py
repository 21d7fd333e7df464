"""ListOps of the Long Range Arena, small: S4D against attention, a plain linear recurrence, and two that select.

    python experiments/listops.py [--jobs 5] [--quick]

Nested MIN, MAX, MEDIAN and SUM-MOD of digits, the result asked for at the end; 25 to 100 tokens (the benchmark: 500 to
2000). Four layers, 64 wide. How much of it needs nesting? Dotted: what is right if whatever stands deeper than so many
brackets is left out. Writes listops.csv, .txt and .png.
"""
import importlib

import lab
import torch

NAMES = {"s4d": "S4D", "attention": "attention", "linear_attention": "linear attention", "rglru": "RG-LRU",
         "mamba": "Mamba"}
LISTOPS, END, PAD = (getattr(importlib.import_module("03_ssm"), name) for name in ("LISTOPS", "LISTOPS_END",
                                                                                   "LISTOPS_PAD"))


def cells(quick):
    common = {"d_model": 64, "n_layers": 4, "batch_size": 32, "test": "listops:length=100 6000"}
    length, n, steps, rates, seeds, mixers = 100, 50000, 20000, (1e-4, 3e-4, 1e-3), (100, 0, 1, 2), NAMES
    if quick:
        common |= {"d_model": 32, "n_layers": 2, "batch_size": 16, "test": "listops:length=30 500"}
        length, n, steps, rates, seeds, mixers = 30, 1000, 150, (3e-3,), (0,), ("s4d", "attention")
    return [common | {"mixer": mixer, "task": f"listops:length={length} {n}", "lr": lr, "seed": seed, "steps": steps,
                      "warmup": steps // 10, "form": "triton" if mixer == "mamba" else ""}
            for mixer in mixers for seed in seeds for lr in rates]


def value(tokens, depth):
    """The value of an expression whose parts deeper than `depth` brackets are left out; an operator without arguments
    has none."""
    stack = [[]]
    for token in tokens:
        if token in LISTOPS:
            stack.append([token])
        elif token == END:
            op, *arguments = stack.pop()
            if arguments and len(stack) <= depth:
                stack[-1].append(LISTOPS[op](arguments))
        elif token != PAD:
            stack[-1].append(token)
    return stack[0][0] if stack[0] else None


def without_nesting(task, texts=6000):
    """{depth: the share of right answers when what is nested deeper is left out}"""
    ids, targets, _ = lab.train.Task(lab.parsed({"task": task})).batch(texts, torch.Generator().manual_seed(-2))
    pairs = list(zip(ids.tolist(), targets[:, -1].tolist(), strict=True))
    return {depth: sum(value(text, depth) == answer for text, answer in pairs) / texts for depth in (1, 2, 3)}


def run(args):
    return lab.sweep(args, "listops", cells(args.quick), lab.packed, ("mixer",), "val_accuracy", pack=4)


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = run(args)
    results = lab.best(rows, ("mixer",), "accuracy", judge="val_accuracy")
    say = lab.reporter(args.out / "listops.txt")
    fig, ax = lab.figure(6, 3.8)
    for i, ((name,), (mean, low, high)) in enumerate(sorted(results.items(), key=lambda item: item[1])):
        ax.errorbar(i, mean, [[mean - low], [high - mean]], fmt="o", color="C0", capsize=5)
        say(f"{name:18} {mean:.3f} ({low:.3f} to {high:.3f})")
    ax.set_xticks(range(len(results)), [NAMES[name] for _, (name,) in sorted((v, k) for k, v in results.items())])
    for depth, share in without_nesting(rows[0]["test"].split()[0], 500 if args.quick else 6000).items():
        say(f"leaving out what stands deeper than {depth}: {share:.3f}")
        ax.axhline(share, color="black", lw=0.8, ls=":")
        ax.text(len(results) - 0.5, share, f"depth {depth} alone", fontsize=8, va="bottom", ha="right")
    ax.set(ylabel="accuracy", title="ListOps, up to 100 tokens", xlim=(-0.5, len(results) - 0.5))
    ax.grid(alpha=0.3)
    lab.save(fig, args.out / "listops.png")
