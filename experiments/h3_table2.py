"""H3's Table 2: induction heads and associative recall, by S4D, GSS, H3 and attention.

    python experiments/h3_table2.py [--jobs 8] [--quick]

Two layers, 32 wide; associative recall with 10 tokens, length 20, induction heads with 20 tokens, length 30 (random,
the paper says: 25% and 5%). Fresh examples at every step, in training the loss on all tokens, as in the paper; a run
ends after 10,000 steps or at an accuracy of 0.999. Dotted: what the most frequent value of the text reaches. Writes
h3_table2.csv and .png.
"""
import lab
import torch
from lab import train

# accuracy in per cent, induction heads and associative recall
PAPER = {"attention": (100.0, 100.0), "h3": (100.0, 99.8), "gss": (6.8, 78.0), "s4d": (35.6, 86.0)}
TASKS = ("h3_induction", "h3_recall")


def measure(cell):
    return {"accuracy": lab.trained(cell, enough=0.999)["accuracy"]}


def cells(quick):
    common = {"d_model": 32, "batch_size": 32, "weight_decay": 0.1}
    if quick:
        return [common | {"mixer": mixer, "task": task, "lr": 3e-3, "steps": 1200, "seed": 0}
                for task in TASKS for mixer in ("attention", "h3", "s4d")]
    return [common | {"mixer": mixer, "task": task, "lr": lr, "steps": 10000, "seed": seed}
            for seed in (0, 1, 2) for task in TASKS for mixer in PAPER for lr in (5e-4, 2e-3, 5e-3)]


def most_frequent_value():
    """The accuracy, %, of naming the value that stands most often in the text: recall without looking at the key."""
    ids, targets = train.from_lessons("TASKS")["h3_recall"](4096, torch.Generator().manual_seed(0))
    return 100 * (ids[:, 1::2].mode(dim=1).values == targets[:, -1]).double().mean().item()


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "h3_table2", cells(args.quick), measure, ("task", "mixer"), "accuracy")
    results = lab.best(rows, ("task", "mixer"), "accuracy")
    fig, axes = lab.figure(9, 3.6, columns=2, sharey=True)
    for ax, task, column in zip(axes, TASKS, (0, 1), strict=True):
        for i, name in enumerate(PAPER):
            mean, low, high = results.get((task, name), (0.0, 0.0, 0.0))
            ax.bar(i - 0.2, PAPER[name][column], 0.38, color="lightgray", label="paper" if i == 0 else None)
            ax.bar(i + 0.2, 100 * mean, 0.38, yerr=[[100 * (mean - low)], [100 * (high - mean)]], color="C0", capsize=3,
                   label="here" if i == 0 else None)
            if (task, name) in results:
                print(f"{task:14}{name:11} paper {PAPER[name][column]:5.1f}   here {100 * mean:5.1f} "
                      f"({100 * low:.1f} to {100 * high:.1f})")
        ax.set_xticks(range(len(PAPER)), PAPER)
        ax.set(title=task, ylabel="accuracy, %")
    guess = most_frequent_value()
    axes[1].axhline(guess, color="black", lw=0.8, ls=":")
    print(f"the most frequent value is right in {guess:.1f}%")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    lab.save(fig, args.out / "h3_table2.png")
