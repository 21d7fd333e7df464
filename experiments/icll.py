"""In-context language learning: random finite automata, with and without n-gram heads (Akyurek et al. 2024).

    python experiments/icll.py [--jobs 8] [--quick]

Each text comes from an automaton of its own; right is any letter that may come next. A layer of n-gram heads (orders 1
to 3) is set before two layers of a mixer; without it, a third layer of that mixer stands there. Writes icll.csv, .png.
"""
import lab

MIXERS = ("attention", "linear_attention", "retnet", "gla", "mamba", "short_conv,based", "hyena")


def measure(cell):
    flags = {name: value for name, value in cell.items() if name not in ("model", "ngram")}
    return {"accuracy": lab.trained(flags)["accuracy"]}


def cells(quick):
    common = {"d_model": 64, "batch_size": 32}
    models, lrs, seeds, steps, length = MIXERS, (1e-3, 3e-3), (0, 1, 2), 5000, 256
    if quick:
        models, lrs, seeds, steps, length = MIXERS[:2], (3e-3,), (0,), 60, 96
    layers = {False: lambda m: f"{m.split(',')[-1]},{m}" if "," in m else f"{m},{m},{m}",
              True: lambda m: f"ngram,{m}" if "," in m else f"ngram,{m},{m}"}
    return [common | {"model": m, "ngram": int(ngram), "mixer": layers[ngram](m), "task": f"icll:length={length}",
                      "lr": lr, "seed": seed, "steps": steps}
            for m in models for ngram in (False, True) for seed in seeds for lr in lrs]


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "icll", cells(args.quick), measure, ("model", "ngram"), "accuracy")
    results = lab.best(rows, ("model", "ngram"), "accuracy")
    fig, ax = lab.figure(10, 4)
    models = [model for model in MIXERS if (model, 0) in results or (model, 1) in results]
    for (model, ngram), (mean, low, high) in results.items():
        ax.bar(models.index(model) + 0.4 * ngram - 0.2, mean, 0.38, yerr=[[mean - low], [high - mean]], capsize=3,
               color=("C7", "C0")[ngram], label=("three layers", "n-gram heads and two layers")[ngram]
               if model == models[0] else None)
        print(f"{model:18}{'with' if ngram else 'without'} n-gram heads: {mean:.4f} ({low:.4f} to {high:.4f})")
    ax.set_xticks(range(len(models)), models)
    ax.set(ylabel="accuracy", ylim=(min(low for _, low, _ in results.values()) - 0.03, 1.08), title="Random automata")
    ax.legend(loc="upper center", ncols=2)
    lab.save(fig, args.out / "icll.png")
