"""ListOps of the Long Range Arena, small: S4D against attention and a plain linear recurrence.

    python experiments/listops.py [--jobs 8] [--quick]

Nested MIN, MAX, MEDIAN and SUM-MOD of digits, the result asked for at the end. Four layers. The plain recurrence is
linear attention without decay. Writes listops.csv and .png.
"""
import lab

MIXERS = ("s4d", "attention", "linear_attention", "mamba", "rglru")


def measure(cell):
    return {"accuracy": lab.trained(cell)["accuracy"]}


def cells(quick):
    common = {"d_model": 64, "n_layers": 4, "batch_size": 32}
    if quick:
        common |= {"task": "listops:length=30", "d_model": 32, "n_layers": 2, "batch_size": 16}
        return [common | {"mixer": m, "lr": 3e-3, "seed": 0, "steps": 150} for m in MIXERS[:3]]
    return [common | {"mixer": m, "task": "listops:length=100", "lr": lr, "seed": seed, "steps": 10000}
            for m in MIXERS for seed in (0, 1, 2) for lr in (1e-3, 3e-3)]


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "listops", cells(args.quick), measure, ("mixer",), "accuracy")
    results = lab.best(rows, ("mixer",), "accuracy")
    fig, ax = lab.figure(6, 3.6)
    for i, ((name,), (mean, low, high)) in enumerate(results.items()):
        ax.bar(i, mean, yerr=[[mean - low], [high - mean]], capsize=3)
        print(f"{name:18} {mean:.3f} ({low:.3f} to {high:.3f})")
    ax.set_xticks(range(len(results)), [name for name, in results])
    ax.set(ylabel="accuracy", title="ListOps")
    lab.save(fig, args.out / "listops.png")
