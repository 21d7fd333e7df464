"""Following a state beyond the lengths of training: which mixer can tell odd from even, keep three things in order, and
count?

    python experiments/state_tracking.py [--jobs 4] [--only parity,swaps] [--mlp 2.67 | --long mamba3] [--quick]

Lesson 02's state_tracking: texts of 40 tokens, the state asked after each token; then asked in tokens 41 to 80, 81 to
160 and 161 to 320 of longer texts, which only who has learned the rule can answer. What a layer can do hangs on the
eigenvalues of the matrix with which it multiplies its state: parity wants one that is not at least 0, counting modulo 3
or 5 one that is not real (Grazzi et al. 2024, theorems 1 and 2), swaps matrices that do not commute. One layer with its
short convolution, no MLP, 32 wide, 600 steps of 32 texts, two rates; DeltaNet also with two layers, where a product of
reflections is a rotation. With --mlp 2.67: 64 wide, 2000 steps of 64 texts, three rates. With --long: these models as
long as Mamba-3's authors train, 10,000 steps of 256 texts of up to 160 tokens (in every epoch first those of 40), 64
wide, three rates. (Grazzi et al.: two layers, 100,000 steps of 1024.) Writes state_tracking.csv, .txt and .png, or
state_tracking_mlp's, or state_tracking_long's.
"""
import lab

MODELS = {"attention": "attention", "gla": "gla", "mamba2": "mamba2", "lightning": "lightning_attention",
          "mlstm": "mlstm", "mamba": "mamba", "deltanet": "deltanet", "rwkv7": "rwkv7",
          "deltanet, beta to 2": "deltanet:beta_max=2", "gated deltanet, beta to 2": "gated_deltanet:beta_max=2",
          "kda, beta to 2": "kda:beta_max=2", "gateloop": "gateloop", "mamba3": "mamba3"}
KINDS = {"parity": "parity", "swaps": "swaps", "count 3": "count:modulo=3", "count 5": "count:modulo=5"}
CHANCE = {"parity": 1 / 2, "swaps": 1 / 6, "count 3": 1 / 3, "count 5": 1 / 5}
REFLECT = "deltanet, beta to 2", "gated deltanet, beta to 2", "kda, beta to 2"       # eigenvalues down to -1
ROTATE = "gateloop", "mamba3"                                                        # complex eigenvalues; they commute
CAN = {"parity": REFLECT + ROTATE, "swaps": REFLECT, "count 3": ROTATE, "count 5": ROTATE}           # in one layer
# Scaled accuracies, 0 for chance, 1 for all right: Grazzi et al. 2024, table 3 (two layers, trained to 40 tokens, asked
# to 256, the best of three) and figure 4 (swaps of five things, one layer without convolution); Mamba-3, table 5 (one
# layer, trained to 160, asked at 256).
PAPER = {"parity": {"attention": 0.022, "mlstm": 0.087, "mamba": 0.0, "deltanet": 0.017, "deltanet, beta to 2": 1.0,
                    "mamba2": 0.009, "gated deltanet, beta to 2": 1.0, "mamba3": 1.0},
         "swaps": {"deltanet, beta to 2": 1.0}}
SPANS = (80, 160, 320)


def asked(kind, after, until):
    return f"state_tracking:kind={KINDS[kind]}:length={after}:test_length={until}"


def tests(kind, n):
    return [f"{asked(kind, until // 2, until)} {n}" for until in SPANS]


def cells(quick, only=None, mlp=None, long=None):
    common = {"d_model": 32, "n_heads": 2, "mlp": 0, "warmup": 50, "batch_size": 32}
    runs = [(kind, name, 1) for kind in KINDS for name in (*REFLECT, *ROTATE, *MODELS)]
    runs += [(kind, REFLECT[0], 2) for kind in ("count 3", "count 5")]
    seeds, rates, steps, n, n_test = (100, 0, 1, 2), (3e-3, 1e-2), 600, 8000, 100
    if mlp:
        common |= {"d_model": 64, "n_heads": 4, "mlp": float(mlp), "warmup": 100, "batch_size": 64}
        rates, steps, n, n_test = (1e-3, 3e-3, 1e-2), 2000, 16000, 250
    lengths = (40, 160) if long else (40,)
    if long:
        runs = [run for run in runs if run[1] in long.split(",") and run[2] == 1]
        common |= {"d_model": 64, "n_heads": 4, "warmup": 200, "batch_size": 256}
        rates, steps = (1e-3, 3e-3, 1e-2), 10000
    if quick:
        runs, seeds, rates, steps = [("parity", name, 1) for name in ("gla", REFLECT[0])], (0,), (1e-2,), 200
    runs = [run for run in dict.fromkeys(runs) if not only or run[0] in only.split(",")]
    return [common | {"model": name, "kind": kind, "n_layers": layers, "mixer": MODELS[name],
                      "task": ", ".join(f"{asked(kind, t, t + 1)} {n}" for t in lengths),
                      "test": ", ".join(tests(kind, n_test)), "lr": lr, "seed": seed, "steps": steps}
            for kind, name, layers in runs for seed in seeds for lr in rates]


def measure(cells):
    results = yield from lab.packed(cells)
    for cell, result in zip(cells, results, strict=True):
        for spec, until in zip(cell["test"].split(", "), SPANS, strict=True):
            result[f"to {until}"] = result.pop(spec)
    return results


def label(name, layers):
    return name + (", 2 layers" if layers == 2 else "")


def print_table(say, results, until):
    """Accuracy in the second half of texts of so many tokens: the mean of three seeds (the lowest to the highest)."""
    kinds = [kind for kind in KINDS if any(key[0] == kind for key in results)]
    say(f"| tokens {until // 2 + 1} to {until} | {' | '.join(kinds)} |\n{'|---' * (1 + len(kinds))}|")
    for run in dict.fromkeys(key[1:] for key in results):
        found = [results.get((kind, *run)) for kind in kinds]
        say(f"| {label(*run)} | {' | '.join('' if y is None else lab.spread(*y) for y in found)} |")


def published(kind, name):
    """The accuracy that a paper has for this mixer, from its scaled one."""
    scaled = PAPER.get(kind, {}).get(name)
    return None if scaled is None else CHANCE[kind] + scaled * (1 - CHANCE[kind])


def draw(args, name, rows):
    by = ("kind", "model", "n_layers")
    spans = {}
    for until in SPANS:
        results = lab.best(rows, by, f"to {until}", judge="val_accuracy")
        spans[until] = {key: results[key] for key in sorted(results, key=lambda key: (
            key[2], list(MODELS).index(key[1])))}
    say, results = lab.reporter(args.out / f"{name}.txt"), spans[SPANS[-1]]
    for until in (SPANS[0], SPANS[-1]):
        print_table(say, spans[until], until)
    runs = list(dict.fromkeys(key[1:] for key in results))
    kinds = [kind for kind in KINDS if any(key[0] == kind for key in results)]
    fig, axes = lab.figure(3 + 3 * len(kinds), 1.2 + 0.34 * len(runs), columns=len(kinds), sharey=True, squeeze=False)
    for ax, kind in zip(axes[0], kinds, strict=True):
        for y, run in enumerate(runs):
            if run[1] == 1 and run[0] in CAN[kind]:
                ax.axhspan(y - 0.5, y + 0.5, color="C2", alpha=0.12, lw=0)
            for until, size, colour in zip(SPANS, (4, 6, 9), ("C0", "C4", "C3"), strict=True):
                if (kind, *run) in spans[until]:
                    mean, low, high = spans[until][kind, *run]
                    ax.plot([low, high], [y, y], "-", color=colour, lw=1)
                    ax.plot(mean, y, "o", color=colour, ms=size, mfc="none",
                            label=f"tokens {until // 2 + 1} to {until}" if y == 0 else None)
            if run[1] == 1 and published(kind, run[0]) is not None:
                ax.plot(published(kind, run[0]), y, "D", color="gray", ms=5, zorder=0)
        ax.axvline(CHANCE[kind], ls=":", color="gray", lw=1)
        ax.set(title=kind, xlabel="accuracy", xlim=(0, 1.05), ylim=(len(runs) - 0.5, -0.5))
    axes[0, 0].set_yticks(range(len(runs)), [label(*run) for run in runs])
    axes[0, 0].legend(fontsize=8, loc="lower left")
    trained_on = "up to 160" if args.long else "40"
    fig.suptitle(f"Trained on {trained_on} tokens, asked further on. Green: the eigenvalues of one layer allow it.\n"
                 "Grey diamonds: the papers' numbers. Dotted: chance", fontsize=10)
    lab.save(fig, args.out / f"{name}.png")


if __name__ == "__main__":
    args = lab.options(__doc__, only=("these kinds, a,b", KINDS),
                       mlp="larger models, with an MLP of this width, for a GPU",
                       long=("these models, a,b, trained for longer and on longer texts, for a GPU", MODELS))
    if args.mlp and not args.mlp.replace(".", "", 1).isdigit():
        raise SystemExit(f"--mlp {args.mlp}: a number is needed")
    name = "state_tracking" + ("_mlp" if args.mlp else "_long" if args.long else "")
    due = cells(args.quick, args.only, args.mlp, args.long)
    rows = lab.sweep(args, name, due, measure, ("kind", "model", "n_layers"), "val_accuracy", pack=4, enough=0)
    draw(args, name, rows)
