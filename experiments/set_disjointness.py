"""Just read twice: the order of the data decides how hard recall is for a state of fixed size.

    python experiments/set_disjointness.py [--jobs 8] [--quick]

Which token is in both sets, A read first? Left: without training, a Taylor state that holds A (or, read twice, the
smaller set). Right: trained models, causal, JRT-prompt, JRT-RNN and bidirectional, in both orders. Guessing from the
smaller set gives 1 / its size. Writes set_disjointness.csv and .png.
"""
import importlib

import lab

lesson = importlib.import_module("05_jrt")
MODELS = {"causal": ("jrt", ":prompt=false", ""), "JRT-prompt": ("jrt", ":prompt=false", "jrt_prompt"),
          "JRT-RNN": ("jrt", "", ""), "bidirectional": ("bidirectional", "", "")}


def measure(cell):
    flags = {name: value for name, value in cell.items() if name not in ("model", "first", "second")}
    return {"accuracy": lab.trained(flags)["accuracy"]}


def cells(quick):
    common = {"n_layers": 4, "n_heads": 2, "d_model": 64, "mlp": 0, "batch_size": 64, "warmup": 200}
    sizes, vocab, f, steps, seeds = ((16, 256), (16, 512)), 2048, 8, 20000, (0, 1, 2)
    if quick:
        common |= {"n_layers": 2, "d_model": 32, "batch_size": 32}
        sizes, vocab, f, steps, seeds = ((2, 12),), 64, 4, 300, (0,)
    return [common | {"model": name, "first": a, "second": b, "mixer": f"short_conv,{mixer}:feature_dim={f}",
                      "task": f"set_disjointness:first={a}:second={b}:vocab_size={vocab}:easy=0.5{prompt}",
                      "lr": lr, "seed": seed, "steps": steps, "transform": transform}
            for small, large in sizes for seed in seeds for a, b in ((small, large), (large, small))
            for lr in ((2e-3,) if quick else (1e-3,)) for name, (mixer, prompt, transform) in MODELS.items()]


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "set_disjointness", cells(args.quick), measure)
    results = lab.best(rows, ("model", "first", "second"), "accuracy")
    fig, (left, right) = lab.figure(13, 4.5, columns=2)
    dims = (4, 8, 16) if args.quick else (4, 6, 8, 12, 16, 24)
    features = [1 + f + f * (f + 1) // 2 for f in dims]
    for first, second, readings in ((4, 256, 1), (256, 4, 1), (256, 4, 2)):
        above = [lesson.order_effect(first, second, f, readings, trials=400)[1] for f in dims]
        left.plot(features, above, "o-" if readings == 1 else "s:",
                  label=f"|A| = {first}, |B| = {second}{', read twice' if readings == 2 else ''}")
    left.set(xscale="log", xlabel="features of the state", ylabel="accuracy above chance", title="Nothing trained")
    left.set_xticks(features, features)
    left.minorticks_off()
    left.legend()
    orders = list(dict.fromkeys((first, second) for _, first, second in results))
    for i, (first, second) in enumerate(orders):
        for j, model in enumerate(MODELS):
            if (model, first, second) in results:
                mean, low, high = results[model, first, second]
                right.bar(i + 0.2 * (j - 1.5), mean, 0.18, yerr=[[mean - low], [high - mean]], capsize=3, color=f"C{j}",
                          label=model if i == 0 else None)
                print(f"|A| = {first:4} |B| = {second:4} {model:14} {mean:.3f} ({low:.3f} to {high:.3f})")
    right.axhline(1 / min(min(order) for order in orders), color="gray", ls=":", label="guessing from the smaller set")
    right.set_xticks(range(len(orders)), [f"|A| = {a}, |B| = {b}" for a, b in orders])
    right.set(ylabel="accuracy", title="Trained", ylim=(0, 1.4 * right.get_ylim()[1]))
    right.legend(ncols=2, loc="upper center")
    lab.save(fig, args.out / "set_disjointness.png")
