"""Following a state beyond the lengths of training: which mixer can tell odd from even, count, and keep three things
in order?

    python experiments/state_tracking.py [--jobs 4] [--quick]

Lesson 02's state_tracking: texts of 40 tokens, the state asked after each token; then asked in tokens 41 to 80, 81 to
160 and 161 to 320 of longer texts, which only who has learned the rule can answer. What a layer can do hangs on the
eigenvalues of the matrix with which it multiplies its state: parity wants one that is not at least 0, counting modulo 3
or 5 one that is not real (Grazzi et al. 2024, theorems 1 and 2), swaps matrices that do not commute. One layer with its
MLP, and where a theorem names two, two. Four rates from 0.0003 to 0.01; one seed chooses, three others are reported.
The published numbers (grey) are of parity and of modular arithmetic: scaled accuracies, here as accuracies. Writes
state_tracking.csv, .txt and .png.
"""
import lab

MODELS = {"attention": "attention", "mamba": "mamba", "mamba2": "mamba2", "gla": "gla",
          "lightning": "lightning_attention", "mlstm": "mlstm", "deltanet": "deltanet", "rwkv7": "rwkv7",
          "deltanet, beta to 2": "deltanet:beta_max=2", "gated deltanet, beta to 2": "gated_deltanet:beta_max=2",
          "kda, beta to 2": "kda:beta_max=2", "gateloop": "gateloop", "mamba3": "mamba3"}
KINDS = {"parity": "parity", "swaps": "swaps", "count 3": "count:modulo=3", "count 5": "count:modulo=5"}
CHANCE = {"parity": 1 / 2, "swaps": 1 / 6, "count 3": 1 / 3, "count 5": 1 / 5}
REFLECT = "deltanet, beta to 2", "gated deltanet, beta to 2", "kda, beta to 2"       # eigenvalues down to -1
ROTATE = "gateloop", "mamba3"                                                        # complex eigenvalues; they commute
CAN = {"parity": REFLECT + ROTATE, "swaps": REFLECT, "count 3": ROTATE, "count 5": ROTATE}
# Grazzi et al. 2024, table 3 (two layers, lengths to 256, best of 3) and figure 4; Mamba-3, table 5 (one layer).
PAPER = {"parity": {"attention": 0.022, "mlstm": 0.087, "mamba": 0.0, "deltanet": 0.017, "deltanet, beta to 2": 1.0,
                    "mamba2": 0.009, "gated deltanet, beta to 2": 1.0, "mamba3": 1.0},
         "swaps": {"deltanet, beta to 2": 1.0}}
SPANS = (80, 160, 320)


def asked(kind, after, until):
    return f"state_tracking:kind={KINDS[kind]}:length={after}:test_length={until}"


def tests(kind, n):
    return [f"{asked(kind, until // 2, until)} {n}" for until in SPANS]


def cells(quick):
    known = lab.train.from_lessons("MIXERS")
    models = {name: spec for name, spec in MODELS.items() if spec.split(":")[0] in known}
    common = {"d_model": 64, "warmup": 100, "batch_size": 128}
    pairs = [(kind, name, 1) for kind in KINDS for name in models]
    pairs += [(kind, name, 2) for kind in ("count 3", "count 5") for name in ("deltanet, beta to 2", "rwkv7")]
    seeds, rates, steps, n, n_test = (100, 0, 1, 2), (3e-4, 1e-3, 3e-3, 1e-2), 2000, 24000, 1000
    if quick:
        common |= {"d_model": 32, "batch_size": 32}
        pairs = [("parity", name, 1) for name in ("gla", "deltanet, beta to 2")]
        seeds, rates, steps, n, n_test = (0,), (1e-2,), 200, 2000, 50
    return [common | {"model": name, "kind": kind, "n_layers": layers, "mixer": models[name],
                      "task": f"{asked(kind, 40, 41)} {n}", "test": ", ".join(tests(kind, n_test)), "lr": lr,
                      "seed": seed, "steps": steps}
            for kind, name, layers in pairs for seed in seeds for lr in rates]


def measure(cells):
    results = yield from lab.packed(cells, enough=0.9995)
    for result in results:
        for spec, until in zip(cells[0]["test"].split(", "), SPANS, strict=True):
            result[f"to {until}"] = result.pop(spec)
    return results


def published(kind, name):
    """The accuracy that a paper has for this mixer, from its scaled one: 0 is chance, 1 all right."""
    scaled = PAPER.get(kind, {}).get(name)
    return None if scaled is None else CHANCE[kind] + scaled * (1 - CHANCE[kind])


def print_table(say, results):
    names = dict.fromkeys((name, layers) for _, name, layers in results)
    say(f"| mixer | layers | {' | '.join(KINDS)} |\n{'|---' * (2 + len(KINDS))}|")
    for name, layers in names:
        found = [results.get((kind, name, layers)) for kind in KINDS]
        found = ["" if y is None else lab.spread(*y) for y in found]
        say(f"| {name} | {layers} | {' | '.join(found)} |")


def draw(args, rows):
    by = ("kind", "model", "n_layers")
    spans = {until: lab.best(rows, by, f"to {until}", judge="val_accuracy") for until in SPANS}
    print_table(lab.reporter(args.out / "state_tracking.txt"), spans[SPANS[-1]])
    labels = list(dict.fromkeys((name, layers) for _, name, layers in spans[SPANS[-1]]))
    labels.sort(key=lambda label: (label[1], list(MODELS).index(label[0])))
    fig, axes = lab.figure(15, 0.6 + 0.36 * len(labels), columns=len(KINDS), sharey=True, squeeze=False)
    for ax, kind in zip(axes[0], KINDS, strict=True):
        for y, (name, layers) in enumerate(labels):
            able = layers == 1 and name in CAN[kind]
            ax.axhspan(y - 0.5, y + 0.5, color="C2" if able else "white", alpha=0.12, lw=0)
            for until, size, colour in zip(SPANS, (4, 6, 9), ("C0", "C4", "C3"), strict=True):
                if (kind, name, layers) in spans[until]:
                    mean, low, high = spans[until][kind, name, layers]
                    ax.plot([low, high], [y, y], "-", color=colour, lw=1)
                    ax.plot(mean, y, "o", color=colour, ms=size, mfc="none",
                            label=f"tokens {until // 2 + 1} to {until}" if y == 0 else None)
            if layers == 1 and published(kind, name) is not None:
                ax.plot(published(kind, name), y, "D", color="gray", ms=5, zorder=0)
        ax.axvline(CHANCE[kind], ls=":", color="gray", lw=1)
        ax.set(title=kind, xlabel="accuracy", xlim=(0, 1.05), ylim=(len(labels) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(labels)), [name + (", 2 layers" if layers == 2 else "") for name, layers in labels])
    axes[0, 0].legend(fontsize=8, loc="lower left")
    fig.suptitle("Trained on 40 tokens, asked further on. Green: the eigenvalues of one layer allow it. Grey diamonds: "
                 "the papers' numbers. Dotted: chance", fontsize=10)
    lab.save(fig, args.out / "state_tracking.png")


if __name__ == "__main__":
    args = lab.options(__doc__)
    draw(args, lab.sweep(args, "state_tracking", cells(args.quick), measure, ("kind", "model", "n_layers"),
                         "val_accuracy", pack=4, enough=0))
