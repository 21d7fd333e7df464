"""Just read twice: the order of the data decides how hard recall is for a state of fixed size.

    python experiments/set_disjointness.py [--jobs 8] [--quick]

Which token is in both sets, A read first? Left: without training, a Taylor state that holds A (or, read twice, the
smaller set). Right: models trained on the authors' mixture of sizes, causal, JRT-prompt, JRT-RNN and bidirectional,
asked about the authors' test sizes in both orders. Writes set_disjointness.csv and .png.
"""
import importlib
import statistics

import lab
from lab import train

lesson = importlib.import_module("05_jrt")
MODELS = {"causal": ("jrt", ":prompt=false", ""), "JRT-prompt": ("jrt", ":prompt=false", "jrt_prompt"),
          "JRT-RNN": ("jrt", "", ""), "bidirectional": ("bidirectional", "", "")}
SIZES = ((4, 32), (4, 128), (4, 256), (16, 256), (16, 512), (8, 768))


def measure(cell):
    def ask(model):
        scores, machine = {}, train.Machine()
        model.to(machine.device)
        for a, b in (order for sizes in SIZES[:cell["sizes"]] for order in (sizes, sizes[::-1])):
            args = lab.parsed(flags | {"task": f"set_disjointness:first={a}:second={b}:{task}"})
            scores[f"{a}+{b}"] = round(train.evaluate(model, train.Task(args), args, machine)["accuracy"], 4)
        return scores | {"mean": round(statistics.mean(scores.values()), 4)}

    flags = {name: value for name, value in cell.items() if name not in ("model", "sizes")}
    task = flags["task"].split(":", 1)[1]
    return lab.trained(flags, then=ask)


def cells(quick):
    common = {"n_layers": 4, "n_heads": 2, "d_model": 64, "mlp": 0, "batch_size": 64, "warmup": 200}
    f, steps, seeds, lrs, sizes = 8, 40000, (0, 1, 2), (5e-4, 1e-3), len(SIZES)
    if quick:
        common |= {"n_layers": 2, "d_model": 32, "batch_size": 32}
        f, steps, seeds, lrs, sizes = 4, 300, (0,), (2e-3,), 2
    return [common | {"model": name, "sizes": sizes, "mixer": f"short_conv,{mixer}:feature_dim={f}",
                      "task": f"set_disjointness:vocab_size=2048:mixed=1{prompt}", "lr": lr, "seed": seed,
                      "steps": steps, "transform": transform}
            for seed in seeds for lr in lrs for name, (mixer, prompt, transform) in MODELS.items()]


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "set_disjointness", cells(args.quick), measure, by=("model",), score="mean")
    fig, (left, right) = lab.figure(14, 4.2, columns=2)
    dims = (4, 8, 16) if args.quick else (4, 6, 8, 12, 16, 24)
    features = [1 + f + f * (f + 1) // 2 for f in dims]
    for first, second, readings in ((4, 256, 1), (256, 4, 1), (256, 4, 2)):
        above = [lesson.order_effect(first, second, f, readings, trials=400)[1] for f in dims]
        left.plot(features, above, "o-" if readings == 1 else "s:", ms=4 if readings == 1 else 9, mfc="none",
                  label=f"|A| = {first}, |B| = {second}{', read twice' if readings == 2 else ''}")
    left.set(xscale="log", xlabel="features of the state", ylabel="accuracy above chance", title="Nothing trained")
    left.set_xticks(features, features)
    left.minorticks_off()
    left.legend()
    sizes, x = SIZES[:rows[0]["sizes"]], range(rows[0]["sizes"])
    for i, model in enumerate(MODELS):
        for turned, style in ((1, "o-"), (-1, "s--")):
            pairs = ["+".join(map(str, pair[::turned])) for pair in sizes]
            scores = [lab.best(rows, ("model",), pair, judge="mean").get((model,)) for pair in pairs]
            if None not in scores:
                mean, low, high = zip(*scores, strict=True)
                first = "small" if turned > 0 else "large"
                right.plot(x, mean, style, color=f"C{i}", ms=4, label=f"{model}, the {first} set first")
                right.fill_between(x, low, high, color=f"C{i}", alpha=0.1)
                print(f"{model:14}" + "".join(f"{pair:>10} {m:.3f}" for pair, m in zip(pairs, mean, strict=True)))
    right.set_xticks(x, [f"{a}, {b}" for a, b in sizes])
    right.set(xlabel="sizes of the two sets", ylabel="accuracy", title="Trained", ylim=(0, 1.02))
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    lab.save(fig, args.out / "set_disjointness.png")
