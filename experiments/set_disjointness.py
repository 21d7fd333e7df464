"""Just read twice: the order of the data decides how hard recall is for a state of fixed size.

    python experiments/set_disjointness.py [--jobs 3] [--quick]

Which token is in both sets? Left: without training, a Taylor state that holds the first set (or, read twice, the
smaller one). Middle: the authors' settings, 36 wide, f = 4: four layers, a short convolution and the Taylor map in
turns, 20,000 examples of each of six pairs of sizes in either order, 48 epochs in batches of 128 (90,000 steps),
dropout 0.1 of the embedding, four rates (theirs: 0.0001 to 0.0008) and beyond; how much better a model is with the
small set first than with the large one. Right: set_disjointness_small.csv, 64 wide, f = 8, 40,000 steps of 64, rates
0.0005 and 0.001. Writes set_disjointness.csv, .txt and .png.
"""
import importlib
import statistics

import lab

lesson = importlib.import_module("05_jrt")
MODELS = {"causal": ("jrt", ":prompt=false", ""), "JRT-RNN": ("jrt", "", ""),
          "JRT-prompt": ("jrt", ":prompt=false", "jrt_prompt")}
TRAIN = ((4, 16), (8, 32), (16, 64), (4, 128), (4, 256), (16, 256))
TEST = ((1, 32), (4, 32), (4, 128), (4, 256), (16, 256), (4, 512), (16, 512), (4, 768), (8, 768), (16, 768))
SMALL = ((4, 32), (4, 128), (4, 256), (16, 256), (16, 512), (8, 768))


def task(a, b, prompt, n):
    return f"set_disjointness:vocab_size=2048:first={a}:second={b}{prompt} {n}"


def both_orders(sizes):
    return [order for pair in sizes for order in (pair, pair[::-1])]


def cells(quick):
    common = {"n_layers": 4, "n_heads": 2, "d_model": 36, "mlp": 0, "batch_size": 128, "warmup": 1000, "dropout": 0.1}
    f, steps, seeds, n, train_on, test_on = 4, 90000, (100, 0, 1, 2), (20000, 500), TRAIN, TEST
    lrs = 4e-4, 8e-4, 1.6e-3, 3.2e-3
    if quick:
        common |= {"n_layers": 2, "d_model": 32, "batch_size": 32, "warmup": 100}
        steps, seeds, lrs, n, train_on, test_on = 300, (0,), (2e-3,), (1000, 100), TRAIN[:2], TEST[1:3]
    return [common | {"model": name, "mixer": f"short_conv,{mixer}:feature_dim={f}", "transform": transform,
                      "task": ", ".join(task(*order, prompt, n[0]) for order in both_orders(train_on)),
                      "test": ", ".join(task(*order, prompt, n[1]) for order in both_orders(test_on)),
                      "lr": lr, "seed": seed, "steps": steps}
            for name, (mixer, prompt, transform) in MODELS.items() for seed in seeds for lr in lrs]


def run(args):
    return lab.sweep(args, "set_disjointness", cells(args.quick), lab.packed, ("model",), "val_accuracy", pack=4,
                     needed=False)


def scores(rows):
    """{model: {(a, b): accuracy of each reported seed}}"""
    found = lab.chosen(rows, ("model",), "val_accuracy")
    sizes = [(a, b) for a, b in both_orders(TEST) if any(f"first={a}:second={b}" in name for name in rows[0])]
    n = rows[0]["test"].split()[1].strip(",")
    return {model: {(a, b): [row[task(a, b, MODELS[model][1], n)] for row in of_model] for a, b in sizes}
            for (model,), of_model in found.items()}


def small_scores(rows):
    return {model: {(a, b): [row[f"{a}+{b}"] for row in seeds] for a, b in both_orders(SMALL)}
            for (model,), seeds in lab.chosen(rows, ("model",), "mean").items()}


def draw(ax, found, say, title):
    """The small set first less the large one first, for each pair of sizes."""
    for i, (model, of_model) in enumerate(found.items()):
        pairs = [(a, b) for a, b in of_model if a < b]
        gains = [[x - y for x, y in zip(of_model[pair], of_model[pair[::-1]], strict=True)] for pair in pairs]
        mean, ends = lab.bars([(statistics.mean(g), min(g), max(g)) for g in gains])
        ax.errorbar([j + 0.15 * (i - 1) for j in range(len(pairs))], mean, ends, fmt="o", capsize=3, label=model)
        for pair, gain in zip(pairs, gains, strict=True):
            first, second = (lab.spread(statistics.mean(x), min(x), max(x))
                             for x in (of_model[pair], of_model[pair[::-1]]))
            say(f"{title}, {model}: {pair[0]} then {pair[1]} {first}, {pair[1]} then {pair[0]} {second}, "
                f"difference {statistics.mean(gain):+.3f} ({min(gain):+.3f} to {max(gain):+.3f})")
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks(range(len(pairs)), [f"{a}, {b}" for a, b in pairs], rotation=30)
    ax.set(xlabel="sizes of the two sets", ylabel="gain, small set first", title=title, ylim=(-0.4, 0.4))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def draw_untrained(ax, dims, say):
    features = [1 + f + f * (f + 1) // 2 for f in dims]
    for first, second, readings in ((4, 256, 1), (256, 4, 1), (256, 4, 2)):
        above = [lesson.order_effect(first, second, f, readings, trials=400)[1] for f in dims]
        label = f"{first}, then {second}{', read twice' if readings == 2 else ''}"
        ax.plot(features, above, ("o-", "s:")[readings - 1], ms=(4, 9)[readings - 1], mfc="none", label=label)
        pairs = zip(features, above, strict=True)
        say(f"nothing trained, {label}: " + ", ".join(f"{n} features {x:.3f}" for n, x in pairs))
    ax.set(xscale="log", xlabel="features of the state", ylabel="accuracy above chance", title="nothing trained")
    ax.set_xticks(features, features)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = run(args)
    say = lab.reporter(args.out / "set_disjointness.txt")
    fig, axes = lab.figure(14 if rows else 9.5, 4.2, columns=3 if rows else 2)
    draw_untrained(axes[0], (4, 8, 16) if args.quick else (4, 6, 8, 12, 16, 24), say)
    if rows:
        draw(axes[1], scores(rows), say, "36 wide, f = 4: small set first, the gain")
    small = lab.read(lab.ROOT / "experiments" / "results" / "set_disjointness_small.csv")
    draw(axes[-1], small_scores(small), say, "64 wide, f = 8, fewer steps")
    for row in (row for row in small if row["model"] == "JRT-RNN" and row["seed"] == 0):
        say(f"64 wide, JRT-RNN, rate {row['lr']}, one seed: 16 then 256 {row['16+256']:.3f}, 256 then 16 "
            f"{row['256+16']:.3f}")
    lab.save(fig, args.out / "set_disjointness.png")
