"""Two facts about recall: one question does not tell convolutions from attention, many questions do; and who is good at
the second is good at recall in text.

    python experiments/recall_demos.py [--only "H3,Mamba"] [--jobs 6] [--quick]

4 pairs of 31 keys and 32 values. Left: one key asked for, at the end (associative_recall, 9 tokens), or every key
somewhere (mqar, 32 tokens), with as many questions in a batch. Right: the second test beside the loss on rare bigrams
that came before, in code: that of perplexity_slices.py, whose table is read, the same mixers in larger models. Two
layers 64 wide, 1,500 steps; the windows are of 4 tokens here, as those of 64 among 1024 are there. 20,000 texts
for each seed. Writes recall_demos.csv, .txt and .png.
"""
import statistics

import history
import lab

CHOOSING, SEEDS = 100, (0, 1, 2)
ONE, MANY = "one key, at the end", "every key, somewhere"
QUESTIONS = {                                                                # the task, and the texts in a batch
    ONE: ("associative_recall:length=9:vocab_size=64", 256), MANY: ("mqar:length=32:n_pairs=4:vocab_size=64", 64)}
MODELS = {"BaseConv": "baseconv:taps=32", "conv + attention": "short_conv,attention", "Hyena": "hyena:max_len=32",
          "H3": "h3", "attention": "attention", "Based": "short_conv,based:window=4", "GLA": "gla", "Mamba": "mamba",
          "RetNet": "retnet", "linear attention": "linear_attention", "S4D": "s4d", "RWKV-6": "rwkv6",
          "window 64": "window:window=4", "LSTM": "lstm"}
BOTH = ("conv + attention", "BaseConv", "Hyena", "H3")


def cells(quick, only=None):
    common = {"n_layers": 2, "d_model": 64, "warmup": 100, "steps": 1500}
    models, lrs, seeds, n = MODELS, (1e-3, 3e-3, 1e-2), (CHOOSING, *SEEDS), 20000
    if quick:
        common |= {"d_model": 32, "warmup": 50, "steps": 400}
        models, lrs, seeds, n = ("conv + attention", "BaseConv", "Based"), (1e-2,), (0,), 4000
    return [{"question": question, "model": model, "mixer": MODELS[model], "task": f"{task} {n}",
             "test": f"{task} {n // 10}", "batch_size": batch} | common | {"lr": lr, "seed": seed}
            for model in (only.split(",") if only else models) for question, (task, batch) in QUESTIONS.items()
            if model in BOTH or question == MANY for seed in seeds for lr in lrs]


def recall_in_text():
    """Of perplexity_slices.csv, code: {model: (mean, smallest, largest) of the nats on rare bigrams seen before}"""
    rows = [row for row in lab.read(lab.ROOT / "experiments" / "results" / "perplexity_slices.csv")
            if row["text"] == "code"]
    return {name: value for (name,), value in lab.best(rows, ("name",), "recall", judge="-loss").items()}


def ranks(x):
    """1 for the smallest, ...; equal numbers share the mean of their ranks."""
    return [sum(b < a for b in x) + (1 + sum(b == a for b in x)) / 2 for a in x]


def spearman(x, y):
    """The correlation of the ranks: 1 if y orders the models as x does, -1 if the other way round."""
    return statistics.correlation(ranks(x), ranks(y))


def draw_questions(ax, accuracy):
    """For each model a point a kind of question, with the range of the seeds."""
    for i, question in enumerate(QUESTIONS):
        for j, model in enumerate(BOTH):
            if (question, model) in accuracy:
                mean, low, high = accuracy[question, model]
                ax.errorbar(j + 0.2 * i - 0.1, mean, [[mean - low], [high - mean]], fmt="os"[i], ms=9, capsize=4,
                            color=f"C{i}", label=question if model == BOTH[0] else None)
    ax.axhline(1 / 4, color="black", lw=0.8, ls=":", label="naming any of the four values")
    ax.set_xticks(range(len(BOTH)), [name.replace(" + ", " +\n") for name in BOTH])
    ax.set(ylim=(-0.03, 1.03), ylabel="share of right answers", title="4 pairs, and what is asked")
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize=9, loc="lower left")


def draw_models(ax, points):
    """points: {model: (accuracy, recall)}, each (mean, smallest, largest)."""
    for name, ((x, *xs), (y, *ys)) in points.items():
        ax.errorbar(x, y, [[y - ys[0]], [ys[1] - y]], [[x - xs[0]], [xs[1] - x]], fmt="o", capsize=2)
        ax.annotate(name, (x, y), textcoords="offset points", xytext=(-6, 5) if x > 0.7 else (6, 5), fontsize=9,
                    ha="right" if x > 0.7 else "left")
    ax.axvline(1 / 4, color="black", lw=0.8, ls=":")
    ax.set(xlabel="right answers where every key is asked", ylabel="nats on rare bigrams that came before, in code",
           title="The test beside recall in text", xlim=(-0.03, 1.03))
    ax.invert_yaxis()
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    args, by = lab.options(__doc__, only="these models, a,b,c"), ("question", "model")
    with history.known():
        rows = lab.sweep(args, "recall_demos", cells(args.quick, args.only), lab.packed, by, "val_accuracy", pack=4,
                         enough=0.99)
    accuracy = lab.best(rows, by, "accuracy", judge="val_accuracy")
    points = {name: (accuracy[MANY, name], nats) for name, nats in recall_in_text().items() if (MANY, name) in accuracy}
    say = lab.reporter(args.out / "recall_demos.txt")
    for (question, name), value in accuracy.items():
        nats = f"   in code {lab.spread(*points[name][1], '.2f')} nats" if question == MANY and name in points else ""
        say(f"{question:22}{name:18}{lab.spread(*value)} right{nats}")
    if len(points) > 2:
        x, y = ([pair[i][0] for pair in points.values()] for i in (0, 1))
        say(f"{len(points)} models: rank correlation of right answers and nats {spearman(x, y):.2f}")
    fig, (left, right) = lab.figure(11, 4.8, columns=2, width_ratios=(2, 3))
    draw_questions(left, accuracy)
    draw_models(right, points)
    lab.save(fig, args.out / "recall_demos.png")
