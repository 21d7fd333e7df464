"""ListOps of the Long Range Arena, small: S4D against attention, a plain linear recurrence, and two that select.

    python experiments/listops.py [--jobs 5] [--quick]

Nested MIN, MAX, MEDIAN and SUM-MOD of digits, the result asked for at the end; 25 to 100 tokens (the benchmark: 500 to
2000). Four layers, 64 wide, 20,000 steps of 32 of 50,000 examples, 10% warm-up. How much of it needs nesting? Dotted:
what is right if whatever stands deeper than so many brackets is left out. Hollow: listops_small.csv, 10,000 steps,
rates 0.001 and 0.003, tested on 1,024 texts; star: only the seed that chooses. Writes listops.csv, .txt and .png.
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
    length, n, steps, seeds, mixers = 100, 50000, 20000, (100, 0, 1, 2), NAMES
    rates = 3e-4, 1e-3, 3e-3
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
    return lab.sweep(args, "listops", cells(args.quick), lab.packed, ("mixer",), "val_accuracy", pack=4,
                     needed=False)


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = run(args)
    results = lab.best(rows, ("mixer",), "accuracy", judge="val_accuracy")
    alone = {name for (name,), seeds in lab.chosen(rows, ("mixer",), "val_accuracy").items() if len(seeds) == 1}
    small = lab.best(lab.read(lab.ROOT / "experiments" / "results" / "listops_small.csv"), ("mixer",), "accuracy")
    say = lab.reporter(args.out / "listops.txt")
    fig, ax = lab.figure(6.5, 4.3)
    for i, name in enumerate(NAMES):
        if (name,) in results:
            ax.errorbar(i, *lab.bars([results[name,]]), fmt="*" if name in alone else "o", ms=11, color="C1", capsize=5,
                        label=f"20,000 steps{', one seed' if name in alone else ''}" if i == 0 else None)
            say(f"20,000 steps: {name:18} {lab.spread(*results[name,])}"
                f"{', only the seed that chooses' if name in alone else ''}")
        if (name,) in small:
            ax.errorbar(i - 0.15, *lab.bars([small[name,]]), fmt="o", color="C0", capsize=5, mfc="white",
                        label="10,000 steps, three seeds" if i == 0 else None)
            say(f"10,000 steps: {name:18} {lab.spread(*small[name,])}")
    ax.set_xticks(range(len(NAMES)), NAMES.values())
    for depth, share in without_nesting(cells(args.quick)[0]["test"].split()[0], 500 if args.quick else 6000).items():
        say(f"leaving out what stands deeper than {depth}: {share:.3f}")
        ax.axhline(share, color="black", lw=0.8, ls=":")
        ax.text(len(NAMES) - 0.5, share, f"depth {depth} alone", fontsize=8, va="bottom", ha="right")
    ax.set(ylabel="accuracy", title="ListOps, up to 100 tokens", xlim=(-0.5, len(NAMES) - 0.5))
    ax.grid(alpha=0.3)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    lab.save(fig, args.out / "listops.png")
