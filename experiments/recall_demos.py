"""Two facts about recall: one question does not tell convolutions from attention, many questions do; and who is good at
the second is good at recall in text.

    python experiments/recall_demos.py [--part one|many|models] [--only "H3,Mamba"] [--jobs 6] [--quick]

4 pairs of 31 keys and 32 values, two layers 64 wide. Left: one key asked for, at the end (associative_recall, 9
tokens), or every key somewhere (mqar, 32 tokens), with as many questions in a batch; 3,000 steps of new texts. Right:
the second test beside the loss on rare bigrams that came before, in code: that of perplexity_slices.py, whose table is
read, the same mixers in larger models. 2,000 steps of 24,500 texts for each seed; the windows are of 4 tokens here, as
those of 64 among 1024 are there. Writes recall_demos.csv, .txt and .png.
"""
import statistics

import history
import lab

CHOOSING, SEEDS = 100, (0, 1, 2)
ONE, MANY = "one key, at the end", "every key, somewhere"
TASKS = {ONE: ("associative_recall:length=9:vocab_size=64", 256),                    # and the texts in a batch
         MANY: ("mqar:length=32:n_pairs=4:vocab_size=64", 64)}
MODELS = {"conv + attention": "short_conv,attention", "BaseConv": "baseconv:taps=32", "Hyena": "hyena:max_len=32",
          "attention": "attention", "Based": "short_conv,based:window=4", "linear attention": "linear_attention",
          "RetNet": "retnet", "GLA": "gla", "Mamba": "mamba", "S4D": "s4d", "H3": "h3", "RWKV-6": "rwkv6",
          "window 64": "window:window=4", "LSTM": "lstm"}
BOTH = ("conv + attention", "BaseConv", "Hyena")


def measure(cells):
    """Runs of new texts one by one, as train.py does them; those of fixed texts as a pack."""
    if cells[0]["texts"] != "new":
        return (yield from lab.packed(cells))
    results = []
    for cell in cells:
        scores = lab.trained({name: value for name, value in cell.items() if name not in NAMES}, enough=0.995)
        accuracy = round(scores["accuracy"], 5)
        results.append({"val_accuracy": accuracy, "accuracy": accuracy, "ended": scores["ended"], "failed": ""})
        yield
    return results


NAMES = ("texts", "question", "model", "test")


def cells(quick, part=None, only=None):
    common, lrs, seeds = {"n_layers": 2, "d_model": 64, "warmup": 100}, (3e-3, 1e-2), (CHOOSING, *SEEDS)
    steps, n, models, both = (3000, 2000), 24500, MODELS, BOTH
    if quick:
        common |= {"d_model": 32, "warmup": 50}
        lrs, seeds, steps, n = (1e-2,), (0,), (400, 400), 4000
        models, both = ("conv + attention", "BaseConv", "Based"), ("conv + attention", "BaseConv")
    models, both = ([name for name in names if not only or name in only.split(",")] for names in (models, both))
    new = [{"texts": "new", "question": question, "model": model, "mixer": MODELS[model], "task": task, "test": "",
            "batch_size": batch} | common | {"steps": steps[0], "lr": lr, "seed": seed}
           for model in both for question, (task, batch) in TASKS.items()
           if part in (None, {ONE: "one", MANY: "many"}[question]) for seed in seeds for lr in lrs]
    task, batch = TASKS[MANY]
    fixed = [{"texts": n, "question": MANY, "model": model, "mixer": MODELS[model], "task": f"{task} {n}",
              "test": f"{task} 2000", "batch_size": batch} | common | {"steps": steps[1], "lr": lr, "seed": seed}
             for model in models if part in (None, "models") for seed in seeds
             for lr in (1e-3, *lrs)[-3 if len(seeds) > 1 else -1:]]
    return new + fixed


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
    for i, question in enumerate(TASKS):
        found = [(j, accuracy["new", question, model]) for j, model in enumerate(BOTH)
                 if ("new", question, model) in accuracy]
        if found:
            ax.errorbar([j + 0.2 * i - 0.1 for j, _ in found], *lab.bars([value for _, value in found]), fmt="os"[i],
                        ms=9, capsize=4, label=question)
    ax.axhline(1 / 4, color="black", lw=0.8, ls=":", label="naming any of the four values")
    ax.set_xticks(range(len(BOTH)), [name.replace(" + ", " +\n") for name in BOTH])
    ax.set(ylim=(-0.03, 1.03), xlim=(-0.5, len(BOTH) - 0.5), ylabel="share of right answers",
           title="4 pairs, and what is asked")
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
    args = lab.options(__doc__, part="one, many or models: only these", only="these models, a,b,c")
    by, score, todo = ("texts", "question", "model"), "val_accuracy", cells(args.quick, args.part, args.only)
    with history.known():
        rows = lab.sweep(args, "recall_demos", todo, measure, by, score, pack=4, enough=0.99)
    accuracy, say = lab.best(rows, by, "accuracy", judge=score), lab.reporter(args.out / "recall_demos.txt")
    for (texts, question, name), value in accuracy.items():
        if texts == "new":
            say(f"{question:22}{name:18}{lab.spread(*value)} right")
    fixed = {name: value for (texts, _, name), value in accuracy.items() if texts != "new"}
    points = {name: (fixed[name], nats) for name, nats in recall_in_text().items() if name in fixed}
    for name, value in fixed.items():
        nats = f"   in code {lab.spread(*points[name][1], '.2f')} nats" if name in points else ""
        say(f"fixed texts: {name:18}{lab.spread(*value)} right{nats}")
    if len(points) > 2:
        x, y = ([pair[i][0] for pair in points.values()] for i in (0, 1))
        say(f"{len(points)} models: rank correlation of right answers and nats {spearman(x, y):.2f}")
    fig, (left, right) = lab.figure(11, 4.8, columns=2, width_ratios=(2, 3))
    draw_questions(left, accuracy)
    draw_models(right, points)
    lab.save(fig, args.out / "recall_demos.png")
