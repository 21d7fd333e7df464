"""Two facts about recall: one question does not tell convolutions from attention, many questions do; and who is good at
the second is good at recall in text.

    python experiments/recall_demos.py [--only "Hyena,BaseConv"] [--jobs 6] [--quick]

Left: 4, 8 or 16 pairs of 31 keys and 32 values; one key asked for, at the end (associative_recall), or every key
somewhere (mqar, 8 tokens a pair), with as many questions in a batch; two layers 64 wide, 3,000 steps, 100,000 texts a
seed. Right, from two tables that are there: mqar with 32 pairs in 128 tokens, each mixer behind a short convolution
(recall_vs_state_small.csv), beside the loss of larger models of code on rare bigrams that came before
(perplexity_slices.csv; attention and Based have the short convolution there, too, the others not). Writes
recall_demos.csv, .txt and .png.
"""
import statistics

import lab

CHOOSING, SEEDS = 100, (0, 1, 2)
ONE, MANY = "one key, at the end", "every key, somewhere"
TASKS = {ONE: lambda n: f"associative_recall:length={2 * n + 1}:vocab_size=64",
         MANY: lambda n: f"mqar:length={8 * n}:n_pairs={n}:vocab_size=64"}
PAIRS = (4, 8, 16)
MODELS = {"conv + attention": "short_conv,attention", "BaseConv": "baseconv:taps=128", "Hyena": "hyena:max_len=128"}
BESIDE = {"conv + attention": "attention", "Based": "based:feature_dim=16:window=64", "window 64": "window:window=64",
          "linear attention": "linear_attention:feature_dim=45", "GLA": "gla", "Mamba": "mamba:n_state=16",
          "H3": "h3:n_state=64", "Hyena": "hyena", "RetNet": "retnet", "BaseConv": "baseconv:taps=128"}


def measure(cells):
    return lab.packed(cells, enough=0.995)


def cells(quick, only=None):
    common = {"n_layers": 2, "d_model": 64, "warmup": 100, "steps": 3000}
    lrs, seeds, pairs, models, n = (1e-3, 3e-3, 1e-2), (CHOOSING, *SEEDS), PAIRS, MODELS, (100000, 2000)
    if quick:
        common |= {"d_model": 32, "warmup": 50, "steps": 400}
        lrs, seeds, pairs, models, n = (1e-2,), (0,), PAIRS[:1], list(MODELS)[:2], (8000, 500)
    return [{"question": question, "pairs": k, "model": model, "mixer": MODELS[model],
             "task": f"{task(k)} {n[0]}", "test": f"{task(k)} {n[1]}", "batch_size": 64 * (k if question == ONE else 1)}
            | common | {"lr": lr, "seed": seed} for k in pairs for model in (only.split(",") if only else models)
            for question, task in TASKS.items() for seed in seeds for lr in lrs]


def beside_text():
    """{model: (right answers on mqar, nats on rare bigrams in code)}, each (mean, smallest, largest)."""
    results = lab.ROOT / "experiments" / "results"
    mqar = lab.best(lab.read(results / "recall_vs_state_small.csv"), ("mixer",), "accuracy")
    code = [row for row in lab.read(results / "perplexity_slices.csv") if row["text"] == "code"]
    nats = lab.best(code, ("name",), "recall", judge="-loss")
    return {name: (mqar[f"short_conv,{mixer}",], nats[name,]) for name, mixer in BESIDE.items()}


def ranks(x):
    """1 for the smallest, ...; equal numbers share the mean of their ranks."""
    return [sum(b < a for b in x) + (1 + sum(b == a for b in x)) / 2 for a in x]


def spearman(x, y):
    """The correlation of the ranks: 1 if y orders the models as x does, -1 if the other way round."""
    return statistics.correlation(ranks(x), ranks(y))


def draw_questions(ax, accuracy, tried):
    """A line a model and a kind of question, with the range of the seeds; hollow: only the seed that chooses."""
    for question, style in zip(TASKS, ("o-", "s--"), strict=True):
        for i, model in enumerate(MODELS):
            found = sorted((k, value) for (q, name, k), value in accuracy.items() if (q, name) == (question, model))
            if found:
                ax.errorbar([k for k, _ in found], *lab.bars([value for _, value in found]), fmt=style, color=f"C{i}",
                            ms=7, capsize=4, label=f"{model}: {question}")
            alone = [(k, value) for (q, name, k), value in tried.items() if (q, name) == (question, model)]
            if alone:
                ax.plot(*zip(*alone, strict=True), style[0], color=f"C{i}", ms=7, mfc="white",
                        label=None if found else f"{model}: {question}")
    ax.plot(PAIRS, [1 / k for k in PAIRS], ":", color="black", lw=1, label="naming any of the values")
    ax.set(ylim=(-0.03, 1.03), xscale="log", xlabel="pairs", ylabel="share of right answers",
           title="How many are asked for?")
    ax.set_xticks(PAIRS, PAIRS)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def draw_models(ax, points):
    """points: {model: (accuracy, recall)}, each (mean, smallest, largest)."""
    for name, ((x, *xs), (y, *ys)) in points.items():
        ax.errorbar(x, y, [[y - ys[0]], [ys[1] - y]], [[x - xs[0]], [xs[1] - x]], fmt="o", capsize=2)
        ax.annotate(name, (x, y), textcoords="offset points", fontsize=9,
                    xytext=(-6 if x > 0.7 or name == "RetNet" else 6, -11 if name == "H3" else 5),
                    ha="right" if x > 0.7 or name == "RetNet" else "left")
    ax.set(xlabel="right answers on mqar, 32 pairs", ylabel="nats on rare bigrams that came before, in code",
           title="The test beside recall in text", xlim=(-0.04, 1.04))
    ax.invert_yaxis()
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    args, by = lab.options(__doc__, only=("these models, a,b,c", MODELS)), ("question", "model", "pairs")
    todo = cells(args.quick, args.only)
    rows = lab.sweep(args, "recall_demos", todo, measure, by, "val_accuracy", pack=3, enough=0.99)
    accuracy = lab.best(rows, by, "accuracy", judge="val_accuracy")
    say, points = lab.reporter(args.out / "recall_demos.txt"), beside_text()
    for (question, name, k), value in accuracy.items():
        say(f"{k:3} pairs, {question:22}{name:18}{lab.spread(*value)} right")
    found = lab.chosen(rows, by, "val_accuracy")
    tried = {key: seeds[0]["accuracy"] for key, seeds in found.items() if key not in accuracy}
    for (question, name, k), value in tried.items():
        say(f"{k:3} pairs, {question:22}{name:18}{value:.3f} right, only the seed that chooses")
    for name, (right, nats) in points.items():
        say(f"mqar, 32 pairs: {name:18}{lab.spread(*right)} right, in code {lab.spread(*nats, '.2f')} nats")
    for without in (None, "linear attention"):
        x, y = ([pair[i][0] for name, pair in points.items() if name != without] for i in (0, 1))
        say(f"{len(x)} models: rank correlation of right answers and nats {spearman(x, y):.2f}")
    fig, (left, right) = lab.figure(11, 5.4, columns=2)
    draw_questions(left, accuracy, tried)
    draw_models(right, points)
    lab.save(fig, args.out / "recall_demos.png")
