"""Based's Figure 2: recall against the bytes of state that a mixer really keeps.

    python experiments/recall_vs_state.py [--jobs 8] [--quick]

MQAR with random filler, [short convolution, mixer] without MLP, state sizes dialled by feature dimension, window, state
dimension or width; each learning rate with one seed, the best one with two more. A run ends after 10,000 steps, or when
it has solved the task (accuracy 0.995). Also what Based is without its parts. Writes recall_vs_state.csv and .png.
"""
import lab

FAMILIES = {
    "Taylor": [f"taylor:feature_dim={f}" for f in (8, 4, 12, 16, 24)],
    "elu + 1": [f"linear_attention:feature_dim={f}" for f in (45, 16, 153)],
    "attention": ["attention"],
    "Taylor without convolution": ["taylor"],
    "Based": [f"based:feature_dim={f}:window={w}" for f, w in ((4, 16), (8, 16), (16, 16), (16, 64), (24, 64))],
    "window": [f"window:window={w}" for w in (8, 16, 32, 64)],
    "DeltaNet": ["deltanet"], "GLA": ["gla"],
    "Mamba-2": [f"mamba2:n_state={n}" for n in (16, 64, 128)],
    "Mamba": [f"mamba:n_state={n}" for n in (8, 16, 64)],
    "H3": [f"h3:n_state={n}" for n in (16, 64)], "Hyena": ["hyena"],
}


def measure(cell):
    flags = {name: value for name, value in cell.items() if name not in ("family", "t")}
    return {"state_bytes": lab.state_bytes(flags, cell["t"]), "accuracy": lab.trained(flags, enough=0.995)["accuracy"]}


def cells(quick):
    common = {"mlp": 0, "warmup": 100, "n_heads": 1}
    if quick:
        common |= {"task": "mqar:length=32:n_pairs=8:vocab_size=64:filler=true", "t": 32, "d_model": 32, "steps": 1500,
                   "batch_size": 64}
        return [common | {"family": family, "mixer": f"short_conv,{mixer}", "lr": 1e-2, "seed": 0}
                for family, mixer in (("Based", "based:feature_dim=8:window=4"), ("window", "window:window=4"),
                                      ("attention", "attention"), ("Taylor", "taylor:feature_dim=8"))]
    common |= {"task": "mqar_based_128:easy=0.25", "t": 128, "steps": 10000, "batch_size": 128}
    return [common | {"family": family, "mixer": f"{'taylor' if 'without' in family else 'short_conv'},{mixer}",
                      "d_model": 64, "lr": lr, "seed": seed}
            for family, mixers in FAMILIES.items() for mixer in mixers for seed in (0, 1, 2)
            for lr in (1e-3, 3e-3, 1e-2, 3e-2)]


if __name__ == "__main__":
    args = lab.options(__doc__)
    rows = lab.sweep(args, "recall_vs_state", cells(args.quick), measure, ("family", "mixer"), "accuracy")
    results = lab.best(rows, ("family", "mixer", "state_bytes"), "accuracy")
    fig, ax = lab.figure(8, 5.5)
    for i, family in enumerate(FAMILIES):
        points = sorted((size, *y) for (f, _, size), y in results.items() if f == family)
        if not points:
            continue
        size, mean, low, high = zip(*points, strict=True)
        print(f"{family:26}" + "".join(f"  {n:,} B: {m:.3f}" for n, m in zip(size, mean, strict=True)))
        spread = [[m - lo for m, lo in zip(mean, low, strict=True)], [h - m for m, h in zip(mean, high, strict=True)]]
        ax.errorbar(size, mean, spread, fmt=("o-", "s--")[i // 10], color=f"C{i}", ms=5, capsize=2, label=family)
    ax.set(xscale="log", xlabel="state for each sequence, bytes", ylabel="accuracy", ylim=(-0.02, 1.02),
           title=f"Recall against state: {rows[0]['task']}")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    lab.save(fig, args.out / "recall_vs_state.png")
