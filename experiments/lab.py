"""What the experiments share: a sweep that goes on where it stopped, and tables that say how they were made.

A script lists its runs as cells, dicts of train.py's flags (or of anything else), and a function that measures one.
Each finished cell is a row of experiments/results/NAME.csv with machine, versions and command; rows that are there
already are not run again. --quick runs a small version on a CPU and writes to runs/quick/ instead.
"""
import argparse
import csv
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
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
    p.add_argument("--draw", action="store_true", help="run nothing: draw what the table has")
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


def trained(cell, then=None, enough=None):
    """The scores at the end of `python train.py` with the cell's flags; with `then`, what it returns for the model.
    enough: the accuracy at which the training ends early, looked at every 1000 steps."""
    with tempfile.TemporaryDirectory() as folder:
        often = ("--eval_every", "1000", "--enough", str(enough)) if enough else ("--eval_every", str(10 ** 9))
        args = parsed(cell, "--out", f"{folder}/run", "--n_tokens", "1", *often)
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


def add_row(path, row):
    if path.exists() and list(read(path)[0]) != list(row):
        sys.exit(f"{path} has other columns than these runs: move it away, or name another folder with --out")
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, row)
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def number(text):
    try:
        return float(text) if set(text) & set(".en") else int(text)
    except ValueError:
        return text


def take_a_gpu(taken):
    """A process of a sweep takes the next GPU in turn, as one of torchrun's would."""
    with taken.get_lock():
        os.environ["LOCAL_RANK"] = str(taken.value % max(1, torch.cuda.device_count()))
        taken.value += 1


class Here(Executor):
    """Does at once, in this process, what it is given."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def in_turn(measure, due, jobs):
    """(cell, result) as they are finished; several at a time in processes of their own, over all GPUs. due(): what can
    be measured now. The result of a run that cannot be finished (the loss is no number, say) is the error."""
    threads, spawn, running = max(1, torch.get_num_threads() // jobs), multiprocessing.get_context("spawn"), {}
    with ProcessPoolExecutor(jobs, spawn, take_a_gpu, (spawn.Value("i", 0),)) if jobs > 1 else Here() as pool:
        while True:
            for cell in [cell for cell in due() if cell not in running.values()][:jobs - len(running)]:
                running[pool.submit(attempt, measure, cell, threads if jobs > 1 else None)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def attempt(measure, cell, threads=None):
    if threads:
        torch.set_num_threads(threads)
    try:
        return measure(cell)
    except (train.BadInput, torch.cuda.OutOfMemoryError) as e:
        return train.BadInput(str(e))                            # a new one: e holds on to the model that failed


def sweep(args, name, cells, measure, by=None, score=None):
    """Measure the cells that NAME.csv does not have yet, in their order, a row each as soon as it is there. Returns the
    cells' rows.

    With `by`, names of columns: all learning rates are tried with the first seed; with the other seeds, the one that
    had the best score (-score: the smallest) among the rows that are equal in these columns."""
    def key(row):
        return tuple(str(number(str(row.get(name)))) for name in cells[0])

    def group(row):
        return tuple(row[name] for name in by)

    def rows():
        return [row for row in read(path) if key(row) in wanted]

    def plan():
        """What can be measured now; how many runs of other seeds wait for the learning rates of the first."""
        done = {key(row) for row in read(path)} | failed
        todo = [cell for cell in cells if key(cell) not in done]
        if not by:
            return todo, 0
        first = [cell for cell in todo if cell["seed"] == cells[0]["seed"]]
        tried, have = {group(cell) for cell in cells} - {group(cell) for cell in first}, rows()
        found = chosen([row for row in have if row["seed"] == cells[0]["seed"]], by, score).items()
        rates = {name: best[0]["lr"] for name, best in found if name in tried}
        waiting = {(group(cell), cell["seed"]) for cell in todo if group(cell) not in tried}
        waiting -= {(group(row), row["seed"]) for row in [*have, *first]}
        return [cell for cell in todo if cell in first or cell["lr"] == rates.get(group(cell))], len(waiting)

    def ahead():
        ready, waiting = plan()
        return len(ready) + waiting

    path, failed = args.out / f"{name}.csv", set()
    cells = [cell | ({"steps": args.steps} if args.steps and "steps" in cell else {}) for cell in cells[:args.cells]]
    wanted = {key(cell) for cell in cells}
    start, where = time.perf_counter(), machine()
    for i, (cell, result) in enumerate([] if args.draw else in_turn(measure, lambda: plan()[0], args.jobs), 1):
        said = "  ".join(f"{k}={v}" for k, v in cell.items())
        if isinstance(result, Exception):
            failed.add(key(cell))
            print(f"{i}/{i + ahead()}, no result: {result}   {said}", flush=True)
            continue
        add_row(path, cell | result | where)
        more = ahead()
        left = int((time.perf_counter() - start) / i * more)
        said += "  " + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items())
        print(f"{i}/{i + more}, {left // 60}:{left % 60:02d} left   {said}", flush=True)
    if not rows():
        sys.exit(f"{path} has no rows of these runs: there is nothing to draw")
    if ahead():
        print(f"{len(rows())} runs are in {path}, {ahead()} are still to be done")
    return rows()


def chosen(rows, by, score, over="lr"):
    """{values of `by`: the rows at the value of `over` with the best mean of score (-score: the smallest), among those
    that were tried with most seeds}."""
    groups, sign = {}, -1 if score[0] == "-" else 1
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), {}).setdefault(row[over], []).append(row)
    def worth(seeds):
        mean = sign * statistics.mean(row[score.strip("-")] for row in seeds)
        return len(seeds), -math.inf if math.isnan(mean) else mean
    return {name: max(settings.values(), key=worth) for name, settings in groups.items()}


def best(rows, by, score, judge=None):
    """{values of `by`: (mean, smallest, largest) of score over the seeds}, at the learning rate with the best mean of
    judge (default: score). A judge that starts with - is better when smaller. What has been tried with one seed only,
    where other things have with several, is left out: of an interrupted sweep."""
    groups = {name: [row[score] for row in seeds] for name, seeds in chosen(rows, by, judge or score).items()}
    least = min(2, max(map(len, groups.values())))
    return {name: (statistics.mean(scores), min(scores), max(scores))
            for name, scores in groups.items() if len(scores) >= least}


def figure(*size, rows=1, columns=1, **settings):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)


def save(fig, path):
    fig.savefig(path, dpi=90)
    print(f"wrote {path}")
