"""What the experiments share: a sweep that goes on where it stopped, and tables that say how they were made.

A script lists its runs as cells, dicts of train.py's flags (or of anything else), and a function that measures one.
Each finished cell is a row of experiments/results/NAME.csv with machine, versions and command; rows that are there
already are not run again. --quick runs a small version on a CPU and writes to runs/quick/ instead.
"""
import argparse
import csv
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402


def options(doc, argv=None, **more):
    """The flags of every experiment, and more of its own: name="help"."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a small version, for a CPU; writes to runs/quick/")
    p.add_argument("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    p.add_argument("--steps", type=int, help="another number of training steps")
    p.add_argument("--cells", type=int, help="only the first so many runs")
    p.add_argument("--out", type=Path, help="folder for table and picture (default experiments/results)")
    for name, text in more.items():
        p.add_argument(f"--{name}", help=text)
    args = p.parse_args(argv)
    for name in ("jobs", "steps", "cells"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    args.out = args.out or (ROOT / "runs" / "quick" if args.quick else ROOT / "experiments" / "results")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def grid(**axes):
    """Every combination: grid(lr=[1, 2], seed=[0, 1]) -> four dicts."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__, "command": " ".join(["python", *sys.argv])}


def parsed(cell, *flags):
    return train.parse([*(word for name, value in cell.items() for word in (f"--{name}", str(value))), *flags])[0]


def trained(cell, then=None):
    """The scores at the end of `python train.py` with the cell's flags; with `then`, what it returns for the model."""
    with tempfile.TemporaryDirectory() as folder:
        args = parsed(cell, "--out", f"{folder}/run", "--n_tokens", "1", "--eval_every", str(10 ** 9))
        args.capture = torch.cuda.is_available()
        try:
            scores = train.train(args, say=lambda *_, **__: None)
        except train.BadInput as e:
            if not args.capture or "--capture" not in str(e):
                raise
            args.capture, args.out = False, f"{folder}/as_usual"                             # it cannot be recorded
            scores = train.train(args, say=lambda *_, **__: None)
        if then is None:
            return scores
        checkpoint = train.load_checkpoint(args.out)
        model = train.build_model(args, len(checkpoint["model"]["embed.weight"]))
        train.load_weights(model, checkpoint, args.out)
        return then(model.eval())


def state_bytes(cell, t):
    """What the model of these flags keeps for each sequence after t tokens, in bytes of float32."""
    return 4 * sum(block.mixer.state_size(t) for block in train.build_model(parsed(cell), 8).blocks)


def read(path):
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return [{name: number(value) for name, value in row.items()} for row in csv.DictReader(f)]


def number(text):
    try:
        return float(text) if set(text) & set(".en") else int(text)
    except ValueError:
        return text


def one(measure, cell, threads):
    torch.set_num_threads(threads)
    return measure(cell)


def in_turn(measure, cells, jobs):
    """(cell, result) as they are finished; several at a time in processes of their own."""
    if jobs == 1:
        yield from ((cell, measure(cell)) for cell in cells)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(one, measure, cell, threads): cell for cell in cells}
        yield from ((running[future], future.result()) for future in as_completed(running))


def sweep(args, name, cells, measure):
    """Measure the cells that NAME.csv does not have yet, a row each as soon as it is there. Returns the cells' rows."""
    def key(row):
        return tuple(str(number(str(row.get(name)))) for name in cells[0])

    path, where = args.out / f"{name}.csv", machine()
    cells = [cell | ({"steps": args.steps} if args.steps and "steps" in cell else {}) for cell in cells[:args.cells]]
    done = {key(row) for row in read(path)}
    todo, start = [cell for cell in cells if key(cell) not in done], time.perf_counter()
    for i, (cell, result) in enumerate(in_turn(measure, todo, args.jobs), 1):
        row, new = cell | result | where, not path.exists()
        with open(path, "a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        left = int((time.perf_counter() - start) / i * (len(todo) - i))
        said = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in (cell | result).items())
        print(f"{i}/{len(todo)}, {left // 60}:{left % 60:02d} left   {said}", flush=True)
    wanted = {key(cell) for cell in cells}
    return [row for row in read(path) if key(row) in wanted]


def best(rows, by, score, over="lr", judge=None):
    """{values of `by`: (mean, smallest, largest) of score over the seeds}, at the value of `over` with the best mean of
    judge (default: score). A judge that starts with - is better when smaller."""
    judge, groups, result = judge or score, {}, {}
    sign, judge = (-1, judge[1:]) if judge[0] == "-" else (1, judge)
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), {}).setdefault(row[over], []).append(row)
    for name, settings in groups.items():
        chosen = max(settings.values(), key=lambda seeds: sign * statistics.mean(row[judge] for row in seeds))
        scores = [row[score] for row in chosen]
        result[name] = statistics.mean(scores), min(scores), max(scores)
    return result


def figure(*size, rows=1, columns=1, **settings):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)


def save(fig, path):
    fig.savefig(path, dpi=90)
    print(f"wrote {path}")
