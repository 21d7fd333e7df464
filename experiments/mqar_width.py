"""Zoology's Figure 2: accuracy on MQAR against model width, at three lengths. Attention needs a constant width, gated
convolutions a width that grows with the length.

    python experiments/mqar_width.py [--jobs 8] [--quick]

Two layers of one mixer without MLP, Zoology's generator and settings (length 64 to 256, vocabulary 8192); all learning
rates with one seed, the best one with two more. A run ends after 10,000 steps, or when it has solved the task
(accuracy 0.995). Attention has rotary positions, or learned ones, as in the paper. Writes mqar_width.csv and .png.
"""
import lab

LAYERS = {"attention": "attention", "BaseConv": "baseconv", "H3": "h3", "Hyena": "hyena",
          "Based": "short_conv,based:feature_dim=16:window=64",
          "attention, learned positions": "attention:rope=false:n_positions=256"}


def measure(cell):
    flags = {name: value for name, value in cell.items() if name != "layers"}
    return {"accuracy": lab.trained(flags, enough=0.995)["accuracy"]}


def cells(quick):
    common = {"mlp": 0, "warmup": 100, "n_heads": 1}
    if quick:
        return [common | {"layers": name, "mixer": LAYERS[name], "task": "mqar:length=32:vocab_size=64", "d_model": d,
                          "lr": 1e-2, "seed": 0, "steps": 1500, "batch_size": 64}
                for name in ("attention", "BaseConv") for d in (16, 32)]
    return [common | {"layers": name, "mixer": LAYERS[name], "task": f"mqar_{n}:easy=0.25", "d_model": d, "lr": lr,
                      "seed": seed, "steps": 10000, "batch_size": batch}
            for n, batch in ((128, 128), (64, 128), (256, 64)) for d in (64, 128, 256) for seed in (0, 1, 2)
            for lr in (3e-4, 1e-3, 3e-3) for name in LAYERS]


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "mqar_width", cells(args.quick), measure, ("task", "layers", "d_model"), "accuracy")
    results = lab.best(rows, ("task", "layers", "d_model"), "accuracy")
    found = {}
    for task, layers, _ in results:
        found.setdefault(task, set()).add(layers)
    complete = [task for task, layers in found.items() if layers == set.union(*found.values())]
    tasks = sorted(complete, key=lambda task: (len(task), task))
    fig, axes = lab.figure(4.2 * len(tasks), 4, columns=len(tasks), squeeze=False, sharey=True)
    for ax, task in zip(axes[0], tasks, strict=True):
        for i, name in enumerate(LAYERS):
            points = sorted((d, *y) for (t, layers, d), y in results.items() if (t, layers) == (task, name))
            if points:
                d, mean, low, high = zip(*points, strict=True)
                style = {"Based": "o--", "attention, learned positions": "o:"}.get(name, "o-")
                ax.plot(d, mean, style, ms=4, color=f"C{i}", label=name)
                if style != "o:":
                    ax.fill_between(d, low, high, color=f"C{i}", alpha=0.15)
                print(f"{task:22}{name:29}" + "".join(f"  {w}: {m:.3f}" for w, m in zip(d, mean, strict=True)))
        n = task.split(":")[0].removeprefix("mqar_")
        ax.set(xscale="log", xlabel="model width", ylim=(-0.02, 1.02),
               title=f"{n} tokens, {int(n) // 16} pairs" if n.isdigit() else task)
        ax.set_xticks(d, d)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LAYERS), fontsize=8)
    lab.save(fig, args.out / "mqar_width.png")
