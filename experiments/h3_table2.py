"""H3's Table 2: induction heads and associative recall, by S4D, GSS, H3 and attention.

    python experiments/h3_table2.py [--jobs 8] [--quick]

The paper's settings: two layers, 32 wide; associative recall with 10 tokens, length 20, induction heads with 20 tokens,
length 30 (random: 25% and 5%); 5,000 examples, 200 times over in batches of 32, rate 0.0005 with 10% warm-up, the loss
on all tokens. Nothing is chosen: three seeds of weights and examples, tested on 2,000 others; "ended" is where a run
was cut off. Hollow: h3_table2_small.csv, 10,000 steps of fresh examples, the best of three rates. Dotted: what the most
frequent value of the text reaches. Writes h3_table2.csv, .txt and .png.
"""
import lab
import torch
from lab import train

# accuracy in per cent, induction heads and associative recall
PAPER = {"attention": (100.0, 100.0), "h3": (100.0, 99.8), "gss": (6.8, 78.0), "s4d": (35.6, 86.0)}
NAMES = {"attention": "attention", "h3": "H3", "gss": "GSS", "s4d": "S4D"}
TASKS = {"h3_induction": "induction heads", "h3_recall": "associative recall"}


def cells(quick):
    common = {"d_model": 32, "batch_size": 32, "weight_decay": 0.1, "dropout": 0.1}
    n, steps, lr, seeds, mixers = 5000, 31200, 5e-4, (0, 1, 2), PAPER
    if quick:
        n, steps, lr, seeds, mixers = 640, 1200, 3e-3, (0,), ("attention", "h3", "s4d")
    return [common | {"mixer": mixer, "task": f"{task} {n}", "test": f"{task} 2000", "lr": lr, "steps": steps,
                      "warmup": steps // 10, "seed": seed} for task in TASKS for mixer in mixers for seed in seeds]


def most_frequent_value():
    """The accuracy, %, of naming the value that stands most often in the text: recall without looking at the key."""
    ids, targets = train.from_lessons("TASKS")["h3_recall"](4096, torch.Generator().manual_seed(0))
    return 100 * (ids[:, 1::2].mode(dim=1).values == targets[:, -1]).double().mean().item()


def run(args):
    return lab.sweep(args, "h3_table2", cells(args.quick), lab.packed, pack=3)


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = run(args)
    small = lab.read(lab.ROOT / "experiments" / "results" / "h3_table2_small.csv")
    results, small = (lab.best(table, ("task", "mixer"), "accuracy") for table in (rows, small))
    results = {(task.split()[0], mixer): accuracy for (task, mixer), accuracy in results.items()}
    guess = {"h3_induction": 5.0, "h3_recall": most_frequent_value()}
    say = lab.reporter(args.out / "h3_table2.txt")
    fig, axes = lab.figure(9, 3.8, columns=2, sharey=True)
    ended = [row["ended"] for row in rows]
    steps = f"{rows[0]['steps']:,} steps"
    if min(ended) < rows[0]["steps"]:
        steps = f"{min(ended):,} to {max(ended):,} of {steps}"
    for ax, (task, title), column in zip(axes, TASKS.items(), (0, 1), strict=True):
        for i, (mixer, paper) in enumerate(PAPER.items()):
            ax.plot(i - 0.2, paper[column], "D", color="gray", label="paper" if i == 0 else None)
            for x, found, look, label in ((0, results, {}, steps), (0.2, small, {"mfc": "white"}, "fresh examples")):
                if (task, mixer) in found:
                    accuracy = [100 * y for y in found[task, mixer]]
                    ax.errorbar(i + x, *lab.bars([accuracy]), fmt="o", color="C0", capsize=4,
                                label=label if i == 0 else None, **look)
                    say(f"{label}: {task:14}{mixer:11} {lab.spread(*accuracy, '.1f')}, the paper {paper[column]:.1f}")
        ax.axhline(guess[task], color="black", lw=0.8, ls=":")
        ax.text(-0.4, guess[task] + 1, ("guessing", "naming the most frequent value")[column], fontsize=8)
        ax.set_xticks(range(len(PAPER)), NAMES.values())
        ax.set(title=title, ylim=(0, 104), xlim=(-0.5, 3.5))
        ax.grid(alpha=0.3)
    say(f"the most frequent value is right in {guess['h3_recall']:.1f}%")
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend(loc="lower center")
    lab.save(fig, args.out / "h3_table2.png")
