"""Every causal mixer in the default model and on the default text, as many steps: the table of docs/mixers.md.

    python experiments/mixers_table.py [--only a,b,c] [--jobs 8] [--quick]

Three learning rates each, one seed. Writes mixers_table.csv and prints the best learning rate's row of each mixer.
"""
import lab
from lab import train


def measure(cell):
    scores = lab.trained(cell)
    args = lab.parsed(cell)
    mixer = train.build_model(args, args.vocab_size).blocks[0].mixer
    return {"forms": " ".join(mixer.forms), "mixer_parameters": sum(p.numel() for p in mixer.parameters()),
            "state_1k": mixer.state_size(1024), "bits_per_byte": round(scores["bits_per_byte"], 4),
            "recall_nats": round(scores["recall"], 3), "rest_nats": round(scores["rest"], 3)}


if __name__ == "__main__":
    known = train.from_lessons("MIXERS")
    args = lab.options(__doc__, only=("these mixers, a,b,c", known))
    names = args.only.split(",") if args.only else [name for name in known if known[name].causal]
    if args.quick:
        cells = [{"mixer": name, "d_model": 32, "lr": 3e-3, "steps": 20, "seed": 0} for name in names[:3]]
    else:
        cells = lab.grid(mixer=names, lr=[1.5e-3, 3e-3, 6e-3], steps=[1000], seed=[0])
    best = {}
    for row in sorted(lab.sweep(args, "mixers_table", cells, measure), key=lambda row: row["bits_per_byte"]):
        best.setdefault(row["mixer"], row)
    print("| mixer | parameters of the mixer | floats of state at t = 1024 | bits per byte |\n|---|---|---|---|")
    for row in best.values():
        print(f"| `{row['mixer']}` | {row['mixer_parameters']:,} | {row['state_1k']:,} | {row['bits_per_byte']:.3f} |")
