"""Two facts about recall: a test with one question does not tell convolutions from attention, one with many does; and
who is good at the second is good at recall in text.

    python experiments/recall_demos.py [--jobs 6] [--quick]

Left: 8 pairs of key and value, of 32 or 1024 words, and either one key asked for, at the end (associative_recall), or
every key somewhere (mqar), with as many questions in a batch; two layers 64 wide without MLP. Right: models of two
layers, 128 wide, trained once on mqar (8 pairs in 128 tokens, 8192 words) and once on code (the folder _inductor of the
torch that is installed, 2000 steps of 16 x 512 tokens): the share of right answers beside the loss on rare bigrams that
came before. The learning rate is chosen with a seed that is not in the results. Writes recall_demos.csv and .png.
"""
import math
import statistics
import time
from pathlib import Path

import history
import lab
import torch

CHOOSING, SEEDS = 100, (0, 1, 2)
QUESTIONS = {                                                     # the task, and the texts in a batch
    "one question, 32 words": ("associative_recall:length=17:vocab_size=32", 512),
    "every key asked, 32 words": ("mqar:length=32:n_pairs=8:vocab_size=32", 64),
    "one question, 1024 words": ("associative_recall:length=17:vocab_size=1024", 512),
    "every key asked, 1024 words": ("mqar:length=32:n_pairs=8:vocab_size=1024", 64)}
LAYERS = {"attention": "attention:rope=false:n_positions={t}", "BaseConv": "baseconv:taps={t}", "H3": "h3:head_dim=2",
          "Hyena": "hyena:max_len={t}"}
MODELS = {"attention": "attention", "conv + attention": "short_conv,attention", "window": "short_conv,window:window=16",
          "Based": "short_conv,based", "linear attention": "linear_attention", "RetNet": "retnet", "GLA": "gla",
          "DeltaNet": "deltanet", "Mamba": "mamba", "RWKV-6": "rwkv6", "S4D": "s4d", "H3": "h3", "Hyena": "hyena",
          "BaseConv": "baseconv:taps=512", "LSTM": "lstm"}


@history.known
def measure(cell):
    """The right answers of a task; of text the loss, and the loss on rare bigrams that came before."""
    flags = {name: value for name, value in cell.items() if name not in ("part", "model")}
    start, text = time.perf_counter(), cell["task"] == "text"
    if text:
        flags |= {"data": Path(torch.__file__).parent / ("_inductor" if cell["steps"] > 500 else "_inductor/kernel")}
    scores = lab.trained(flags, enough=None if text else 0.995)
    found = {name: round(scores.get(name, math.nan), 5) for name in ("accuracy", "loss", "recall", "repeated", "rest")}
    return {"score": -found["loss"] if text else found["accuracy"]} | found | {
        "seconds": round(time.perf_counter() - start, 1)}


def cells(quick):
    small = {"n_layers": 2, "mlp": 0, "n_heads": 1, "d_model": 64, "context": 128}
    large = {"n_layers": 2, "mlp": 8 / 3, "n_heads": 4, "d_model": 128, "context": 512}
    lrs, seeds, found = (1e-3, 3e-3), (CHOOSING, *SEEDS), []
    questions, tasks, models = QUESTIONS, ("mqar_128:easy=0.25", "text"), MODELS
    steps, batches = {"questions": 6000, "mqar": 4000, "text": 2000}, {"mqar": 128, "text": 16}
    if quick:
        questions = {"one question, 32 words": ("associative_recall:length=9:vocab_size=32", 256),
                     "every key asked, 32 words": ("mqar:length=16:n_pairs=4:vocab_size=32", 64)}
        small |= {"d_model": 32}
        large |= {"d_model": 32, "context": 128}
        tasks, models = ("mqar:length=16:n_pairs=4:vocab_size=32", "text"), {k: MODELS[k] for k in ("Based", "Hyena")}
        lrs, seeds, steps = (3e-3,), (0,), {"questions": 500, "mqar": 400, "text": 60}
        batches = {"mqar": 64, "text": 8}
    for name, mixer in LAYERS.items():
        for question, (task, batch) in questions.items():
            layer = {"part": question, "model": name, "task": task, "mixer": mixer.format(t=32)}
            found += [layer | small | {"batch_size": batch, "warmup": 100, "lr": lr, "seed": seed,
                                       "steps": steps["questions"]} for seed in seeds for lr in lrs]
    for name, mixer in models.items():
        for task in tasks:
            kind = task.split("_")[0].split(":")[0]
            found += [{"part": "models", "model": name, "task": task, "mixer": mixer} | large |
                      {"batch_size": batches[kind], "warmup": 100, "lr": lr, "seed": seed, "steps": steps[kind]}
                      for seed in seeds for lr in lrs]
    return found


def ranks(x):
    """1 for the smallest, ...; equal numbers share the mean of their ranks."""
    return [sum(b < a for b in x) + (1 + sum(b == a for b in x)) / 2 for a in x]


def spearman(x, y):
    """The correlation of the ranks: 1 if y orders the models as x does, -1 if the other way round."""
    return statistics.correlation(ranks(x), ranks(y)) if len(set(x)) > 1 < len(set(y)) else math.nan


def draw_questions(ax, accuracy):
    """For each model a point a kind of question, with the range of the seeds."""
    for i, part in enumerate(QUESTIONS):
        found = [(j, *accuracy[part, name]) for j, name in enumerate(LAYERS) if (part, name) in accuracy]
        if found:
            j, mean, low, high = zip(*found, strict=True)
            spread = [[m - x for m, x in zip(mean, low, strict=True)], [x - m for m, x in zip(mean, high, strict=True)]]
            ax.errorbar([n + 0.15 * i - 0.225 for n in j], mean, spread, fmt="os"[i % 2], ms=7, capsize=4,
                        color=f"C{i % 2}", mfc=(None, "white")[i // 2], label=part)
    ax.set_xticks(range(len(LAYERS)), LAYERS)
    ax.set(ylim=(-0.03, 1.03), ylabel="share of right answers", title="One question, or many")
    ax.grid(alpha=0.3, axis="y")


def draw_models(ax, points):
    """points: {model: (accuracy, recall)}, each (mean, smallest, largest)."""
    for name, (accuracy, recall) in points.items():
        (x, *xs), (y, *ys) = accuracy, recall
        ax.errorbar(x, y, [[y - ys[0]], [ys[1] - y]], [[x - xs[0]], [xs[1] - x]], fmt="o", capsize=2)
        ax.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=9)
    ax.set(xlabel="share of right answers in mqar", ylabel="nats on rare bigrams that came before",
           title="The test beside recall in text", xlim=(-0.05, 1.2))
    ax.invert_yaxis()
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "recall_demos", cells(args.quick), measure, ("part", "model", "task"), "score")
    rows = [row for row in rows if row["seed"] != CHOOSING] or rows
    by = ("part", "model", "task")
    found = {key: {name: value for name, value in lab.best(some, by, key, judge="score").items()}
             for key in ("accuracy", "recall")
             for some in [[row for row in rows if not math.isnan(row[key])]] if some}
    accuracy = {key[:2]: value for key, value in found.get("accuracy", {}).items()}
    recall = {key[1]: value for key, value in found.get("recall", {}).items()}
    points = {name: (accuracy["models", name], recall[name]) for name in MODELS
              if ("models", name) in accuracy and name in recall}
    fig, (left, right) = lab.figure(11, 4.8, columns=2, width_ratios=(2, 3))
    draw_questions(left, accuracy)
    n_pairs = 8 if not args.quick else 4
    left.axhline(1 / n_pairs, color="black", lw=0.8, ls=":", label="naming any of the values")
    left.legend(fontsize=9)
    draw_models(right, points)
    for (part, name), (mean, low, high) in accuracy.items():
        print(f"{part:18}{name:20}{mean:.3f} ({low:.3f} to {high:.3f})" + (
            "   recall in text, nats: {:.3f} ({:.3f} to {:.3f})".format(*recall[name])
            if part == "models" and name in recall else ""))
    if len(points) > 2:
        x, y = ([pair[i][0] for pair in points.values()] for i in (0, 1))
        print(f"{len(points)} models, rank correlation of accuracy and nats: {spearman(x, y):.2f}")
    lab.save(fig, args.out / "recall_demos.png")
