"""Every causal mixer in the default model and on the default text, the same number of steps: the README's table.

    python experiments/mixers_table.py [--steps N] [--lr LR] [--only a,b,c]

Writes experiments/results/mixers_table.csv, a row a mixer and learning rate; rows that are there already are kept, so
an interrupted run goes on, and a new mixer adds its row. Prints the best learning rate's row of each mixer.
"""
import argparse
import csv
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "mixers_table.csv"


def read():
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as f:
        return list(csv.DictReader(f))


def measure(name, steps, lr):
    with tempfile.TemporaryDirectory() as out:
        args, _ = train.parse(["--mixer", name, "--steps", str(steps), "--lr", str(lr), "--out", out + "/run",
                               "--eval_every", str(steps)])
        scores = train.train(args, say=lambda *_, **__: None)
        model = train.build_model(args, args.vocab_size)
    mixer = model.blocks[0].mixer
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"mixer": name, "lr": lr, "steps": steps, "forms": " ".join(mixer.forms),
            "mixer_parameters": sum(p.numel() for p in mixer.parameters()),
            "state_1k": mixer.state_size(1024), "bits_per_byte": round(scores["bits_per_byte"], 4),
            "recall_nats": round(scores["recall"], 3), "rest_nats": round(scores["rest"], 3), "seed": args.seed,
            "machine": device, "torch": torch.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3])
    parser.add_argument("--only", help="these mixers, a,b,c")
    options = parser.parse_args()
    known = train.from_lessons("MIXERS")
    names = options.only.split(",") if options.only else [name for name in known if known[name].causal]
    for name in names:
        for lr in options.lr:
            done = {(row["mixer"], float(row["lr"]), int(row["steps"])) for row in read()}
            if (name, lr, options.steps) in done:
                continue
            row = measure(name, options.steps, lr)
            new = not RESULTS.exists()
            with open(RESULTS, "a", newline="") as f:
                writer = csv.DictWriter(f, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(name, lr, row["bits_per_byte"], flush=True)
    best = {}
    for row in sorted(read(), key=lambda row: float(row["bits_per_byte"])):
        best.setdefault(row["mixer"], row)
    print("| mixer | parameters of the mixer | floats of state at t = 1024 | bits per byte |\n|---|---|---|---|")
    for row in best.values():
        print(f"| `{row['mixer']}` | {int(row['mixer_parameters']):,} | {int(row['state_1k']):,} | "
              f"{float(row['bits_per_byte']):.3f} |")
