"""Two facts about recall: one question does not tell convolutions from attention, many questions do; and who is good at
the second is good at recall in text.

    python experiments/recall_demos.py [--part one|many] [--only "Hyena,BaseConv"] [--jobs 2] [--quick]

Left: 4 pairs of 31 keys and 32 values; one key asked for, at the end (associative_recall, 9 tokens), or every key
somewhere (mqar, 32 tokens), with as many questions in a batch; two layers 64 wide, 3,000 steps of new texts. Right,
from two tables that are there: mqar with 32 pairs in 128 tokens, each mixer behind a short convolution
(recall_vs_state_small.csv), beside the loss of larger models of code on rare bigrams that came before
(perplexity_slices.csv; attention and Based have the short convolution there, too, the others not). Writes
recall_demos.csv, .txt and .png.
"""
import statistics

import lab

CHOOSING, SEEDS = 100, (0, 1, 2)
ONE, MANY = "one key, at the end", "every key, somewhere"
TASKS = {ONE: ("associative_recall:length=9:vocab_size=64", 256),                    # and the texts in a batch
         MANY: ("mqar:length=32:n_pairs=4:vocab_size=64", 64)}
MODELS = {"conv + attention": "short_conv,attention", "BaseConv": "baseconv:taps=32", "Hyena": "hyena:max_len=32"}
BESIDE = {"conv + attention": "attention", "Based": "based:feature_dim=16:window=64", "window 64": "window:window=64",
          "linear attention": "linear_attention:feature_dim=45", "GLA": "gla", "Mamba": "mamba:n_state=16",
          "H3": "h3:n_state=64", "Hyena": "hyena"}


def measure(cell):
    flags = {name: value for name, value in cell.items() if name not in ("question", "model")}
    scores = lab.trained(flags, enough=0.995)
    return {"accuracy": round(scores["accuracy"], 5), "ended": scores["ended"]}


def cells(quick, part=None, only=None):
    common, lrs, seeds = {"n_layers": 2, "d_model": 64, "warmup": 100, "steps": 3000}, (3e-3, 1e-2), (CHOOSING, *SEEDS)
    models = MODELS
    if quick:
        common |= {"d_model": 32, "warmup": 50, "steps": 400}
        models, lrs, seeds = list(MODELS)[:2], (1e-2,), (0,)
    return [{"question": question, "model": model, "mixer": MODELS[model], "task": task, "batch_size": batch} | common |
            {"lr": lr, "seed": seed} for model in models if not only or model in only.split(",")
            for question, (task, batch) in TASKS.items() if part in (None, {ONE: "one", MANY: "many"}[question])
            for seed in seeds for lr in lrs]


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


def draw_questions(ax, accuracy):
    """For each model a point a kind of question, with the range of the seeds."""
    for i, question in enumerate(TASKS):
        found = [(j, accuracy[question, model]) for j, model in enumerate(MODELS) if (question, model) in accuracy]
        if found:
            ax.errorbar([j + 0.2 * i - 0.1 for j, _ in found], *lab.bars([value for _, value in found]), fmt="os"[i],
                        ms=9, capsize=4, label=question)
    names = [name for name in MODELS if any(name == model for _, model in accuracy)]
    ax.axhline(1 / 4, color="black", lw=0.8, ls=":", label="naming any of the four values")
    ax.set_xticks([list(MODELS).index(name) for name in names], [name.replace(" + ", " +\n") for name in names])
    ax.set(ylim=(-0.03, 1.03), ylabel="share of right answers", title="4 pairs, and what is asked")
    ax.margins(x=0.3)
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize=9, loc="lower left")


def draw_models(ax, points):
    """points: {model: (accuracy, recall)}, each (mean, smallest, largest)."""
    for name, ((x, *xs), (y, *ys)) in points.items():
        ax.errorbar(x, y, [[y - ys[0]], [ys[1] - y]], [[x - xs[0]], [xs[1] - x]], fmt="o", capsize=2)
        ax.annotate(name, (x, y), textcoords="offset points", fontsize=9,
                    xytext=(-6 if x > 0.7 else 6, -11 if name == "H3" else 5),
                    ha="right" if x > 0.7 else "left")
    ax.set(xlabel="right answers on mqar, 32 pairs", ylabel="nats on rare bigrams that came before, in code",
           title="The test beside recall in text", xlim=(-0.04, 1.04))
    ax.invert_yaxis()
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    args, by = lab.options(__doc__, part="one or many: only this", only="these models, a,b,c"), ("question", "model")
    todo = cells(args.quick, args.part, args.only)
    rows = lab.sweep(args, "recall_demos", todo, measure, by, "accuracy", enough=0.99)
    accuracy, say, points = lab.best(rows, by, "accuracy"), lab.reporter(args.out / "recall_demos.txt"), beside_text()
    for (question, name), value in accuracy.items():
        say(f"{question:22}{name:18}{lab.spread(*value)} right")
    for name, (right, nats) in points.items():
        say(f"mqar, 32 pairs: {name:18}{lab.spread(*right)} right, in code {lab.spread(*nats, '.2f')} nats")
    for without in (None, "linear attention"):
        x, y = ([pair[i][0] for name, pair in points.items() if name != without] for i in (0, 1))
        say(f"{len(x)} models: rank correlation of right answers and nats {spearman(x, y):.2f}")
    fig, (left, right) = lab.figure(11, 4.8, columns=2, width_ratios=(2, 3))
    draw_questions(left, accuracy)
    draw_models(right, points)
    lab.save(fig, args.out / "recall_demos.png")
