"""What the experiments share: a sweep that goes on where it stopped, and tables that say how they were made.

A script lists its runs as cells, dicts of train.py's flags (or of anything else), and a function that measures one.
Each finished cell is a row of experiments/results/NAME.csv with machine, versions and command; rows that are there
already are not run again. --quick runs a small version on a CPU and writes to runs/quick/ instead.

One seed chooses the learning rate, on a validation set; the other seeds are what is reported, on a test set. Models
that differ in learning rate and seed alone are trained together: see packs.py.
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
from packs import ROOT, TEST, VALIDATION, Examples, Pack, packed, parsed, time_is_up, train  # noqa: F401


def options(doc, argv=None, **more):
    """The flags of every experiment, and more of its own: name="help", or name=("help", the names that a,b may be)."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a small version, for a CPU; writes to runs/quick/")
    p.add_argument("--jobs", type=int, default=1, help="runs (or packs of runs) at the same time (default 1)")
    p.add_argument("--steps", type=int, help="another number of training steps")
    p.add_argument("--cells", type=int, help="only the first so many runs")
    p.add_argument("--minutes", type=float, help="after so many no run is begun, and packs are kept for next time")
    p.add_argument("--draw", action="store_true", help="run nothing: draw what the table has")
    p.add_argument("--out", type=Path, help="folder for table and picture (default experiments/results)")
    known = {name: what[1] for name, what in more.items() if isinstance(what, tuple)}
    for name, what in more.items():
        p.add_argument(f"--{name}", help=what[0] if name in known else what)
    args = p.parse_args(argv)
    for name, names in known.items():
        for given in getattr(args, name).split(",") if getattr(args, name) is not None else ():
            if given not in names:
                p.error(f"--{name}: there is no {given!r}, but {', '.join(names)}")
    for name in ("jobs", "steps", "cells"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.minutes is not None and not args.minutes > 0:
        p.error(f"--minutes must be above 0, not {args.minutes}")
    if args.minutes:
        os.environ["LAB_DEADLINE"] = str(time.time() + 60 * args.minutes)                    # for the processes, too
    args.out = args.out or (ROOT / "runs" / "quick" if args.quick else ROOT / "experiments" / "results")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as e:
        p.error(f"--out {args.out} is no folder to write to: {e.strerror}")
    sys.excepthook = last_words
    return args


def last_words(kind, e, trace):
    """Ctrl-C ends a sweep with one line, and no trace of where it was."""
    if kind is KeyboardInterrupt:
        print("interrupted: what is finished is kept, and the same command goes on from there", file=sys.stderr)
    else:
        sys.__excepthook__(kind, e, trace)


def grid(**axes):
    """Every combination: grid(lr=[1, 2], seed=[0, 1]) -> four dicts."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__, "command": " ".join(["python", *sys.argv])}


def state_bytes(cell, t):
    """What the model of these flags keeps for each sequence after t tokens, in bytes of float32."""
    return 4 * sum(block.mixer.state_size(t) for block in train.build_model(parsed(cell), 8).blocks)


# ----------------------------------------------------------------------------------------------------------- one model


def trained(cell, then=None, enough=None):
    """The scores at the end of `python train.py` with the cell's flags, and the step at which it "ended"; with `then`,
    what it returns for the model. enough: the accuracy at which the training ends early, looked at every 1000 steps."""
    with tempfile.TemporaryDirectory() as folder:
        often = ("--eval_every", "1000", "--enough", str(enough)) if enough else ("--eval_every", str(10 ** 9))
        args = parsed(cell, "--out", f"{folder}/run", "--n_tokens", "0", *often)
        args.capture = torch.cuda.is_available()
        try:
            scores = train.train(args, say=lambda *_, **__: None)
        except train.BadInput as e:
            if not args.capture or "--capture" not in str(e):
                raise
            args.capture, args.out = False, f"{folder}/as_usual"                             # it cannot be recorded
            scores = train.train(args, say=lambda *_, **__: None)
        checkpoint = train.load_checkpoint(args.out)
        if then is None:
            return scores | {"ended": checkpoint["step"]}
        model = train.build_model(args, len(checkpoint["model"]["embed.weight"]))
        train.load_weights(model, checkpoint, args.out)
        return then(model.eval())


# --------------------------------------------------------------------------------------------------------------- tables


def read_text(path):
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read(path):
    return [{name: number(value) for name, value in row.items()} for row in read_text(path)]


def add_row(path, row, cell):
    """A row at the end. A result may be a new column; what names the run, cell, may not."""
    before = read_text(path)
    names = list(dict.fromkeys([*(before[0] if before else ()), *row]))
    if before and not set(cell) <= set(before[0]):
        sys.exit(f"{path} has other columns than these runs: move it away, or name another folder with --out")
    if not before or names != list(before[0]):
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, names)
            writer.writeheader()
            writer.writerows(before)
    with open(path, "a", newline="") as f:
        csv.DictWriter(f, names).writerow(row)


def number(text):
    try:
        return float(text) if set(text) & set(".en") else int(text)
    except ValueError:
        return text


# ---------------------------------------------------------------------------------------------------------------- sweep


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
    """(cell, result, seconds) as they are finished; several at a time in processes of their own, over all GPUs. due():
    what can be measured now. The result of a run that cannot be finished is the error."""
    threads, spawn, running = max(1, torch.get_num_threads() // jobs), multiprocessing.get_context("spawn"), {}
    with ProcessPoolExecutor(jobs, spawn, take_a_gpu, (spawn.Value("i", 0),)) if jobs > 1 else Here() as pool:
        while True:
            for cell in [cell for cell in due() if cell not in running.values()][:jobs - len(running)]:
                running[pool.submit(attempt, measure, cell, threads if jobs > 1 else None)] = cell
            if not running:
                return
            share = len(running)                                                             # of the machine
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result, seconds = future.result()
                yield running.pop(future), result, seconds / share


def attempt(measure, cell, threads=None):
    """The result, or the error, which leaves the other runs, and the seconds that it took."""
    if threads:
        torch.set_num_threads(threads)
    start = time.perf_counter()
    try:
        result = measure(cell)
    except Exception as e:
        result = failure(e)
    return result, time.perf_counter() - start


def failure(e):
    """A new error, for e holds on to the model that failed."""
    return train.BadInput(str(e) if isinstance(e, train.BadInput) else f"{type(e).__name__}: {e}")


def side_by_side(measure, due, jobs, size):
    """The same for packs, of up to `size` cells that differ in learning rate and seed: some steps of each in turn, all
    in this process. A GPU runs what comes from one process at the same time, of several processes one at a time."""
    running, mark = [], time.perf_counter()                      # [cells, the generator, its seconds]
    while True:
        busy, packs = [cell for cells, *_ in running for cell in cells], {}
        for cell in (cell for cell in due() if cell not in busy):
            packs.setdefault(str({k: v for k, v in cell.items() if k not in ("lr", "seed")}), []).append(cell)
        free = [cells[i:i + size] for cells in packs.values() for i in range(0, len(cells), size)]
        running += [[cells, measure(cells), 0.0] for cells in free[:jobs - len(running)]]
        if not running:
            return
        ended = []
        while not ended:
            for job in running:
                try:
                    next(job[1])
                except StopIteration as e:
                    ended.append((job, e.value))
                except Exception as e:
                    ended.append((job, [failure(e)] * len(job[0])))
            mark, before = time.perf_counter(), mark
            for job in running:
                job[2] += (mark - before) / len(running)
        for (cells, _, seconds), results in ended:
            yield from ((cell, result, seconds / len(cells)) for cell, result in zip(cells, results, strict=True))
        running = [job for job in running if all(job is not done for done, _ in ended)]


def sweep(args, name, cells, measure, by=None, score=None, pack=1, enough=math.inf, needed=True):
    """Measure the cells that NAME.csv does not have yet, in their order, a row each as soon as it is there. Returns the
    cells' rows.

    by: names of columns. Among the rows that are equal in them the first cell's seed chooses ("use" is then "choose"):
    it tries all learning rates, and those beyond the grid as long as the best is at its edge and has less than
    `enough`. The other seeds are trained with the one that had the best score (-score: the smallest).
    pack: measure is given lists of up to so many cells that differ in learning rate and seed alone, see packed().
    needed: without a row there is nothing to draw."""
    path, failed = args.out / f"{name}.csv", set()
    cells = [cell | ({"steps": args.steps} if args.steps and "steps" in cell else {}) for cell in cells[:args.cells]]
    chooser, groups = cells[0].get("seed"), {}
    for cell in cells:
        groups.setdefault(kind(cell, cells[0]), []).append(cell)

    def rows():
        return [row for row in read(path) if kind(row, cells[0]) in groups] if by else [
            row for row in read(path) if key(row, cells[0]) in {key(cell, cells[0]) for cell in cells}]

    def plan():
        """What can be measured now, and how many more wait for it."""
        have, ready, waiting = rows(), [], 0
        done = {key(row, cells[0]) for row in have} | failed
        if not by:
            return [cell for cell in cells if key(cell, cells[0]) not in done], 0
        for name, group in groups.items():
            tries = [cell for cell in group if cell["seed"] == chooser]
            others = list(dict.fromkeys(cell["seed"] for cell in group if cell["seed"] != chooser))
            todo = [cell for cell in tries if key(cell, cells[0]) not in done]
            found = {row["lr"]: worth(row, score) for row in have
                     if kind(row, cells[0]) == name and row["seed"] == chooser}
            if not todo and found:
                best = best_rate(found)
                beyond = None if found[best] >= enough or len(found) >= len(tries) + 4 else next_rate(found, best)
                due = [tries[0] | {"lr": beyond}] if beyond else [tries[0] | {"lr": best, "seed": x} for x in others]
                todo, others = [c for c in due if key(c, cells[0]) not in done], others if beyond else []
            ready, waiting = ready + todo, waiting + len(others) * bool(todo)
        return ready, waiting

    def due():
        return [] if time_is_up() else plan()[0]

    def ahead():
        ready, waiting = plan()
        return len(ready) + waiting

    start, where, n = time.perf_counter(), machine(), 0
    results = in_turn(measure, due, args.jobs) if pack == 1 else side_by_side(measure, due, args.jobs, pack)
    for cell, result, seconds in () if args.draw else results:
        n, said = n + 1, "  ".join(f"{k}={v}" for k, v in cell.items())
        if isinstance(result, Exception) and "loss" not in str(result):
            failed.add(key(cell, cells[0]))
            print(f"{n}/{n + ahead()}, no result: {result}   {said}", flush=True)
            continue
        result = {"failed": str(result)} if isinstance(result, Exception) else result
        use = {"use": "choose" if cell["seed"] == chooser else "report"} if by else {}
        add_row(path, cell | use | result | {"seconds": round(seconds, 1)} | where, cell)
        left = int((time.perf_counter() - start) / n * ahead())
        said += "  " + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items())
        print(f"{n}/{n + ahead()}, {left // 60}:{left % 60:02d} left   {said}", flush=True)
    if not rows() and needed:
        sys.exit(f"{path} has no rows of these runs: there is nothing to draw")
    if ahead():
        print(f"{len(rows())} runs are in {path}, {ahead()} are still to be done")
    seconds = [row["seconds"] for row in rows() if row.get("seconds", "") != ""]
    if seconds:
        print(f"{len(seconds)} runs took {sum(seconds) / 60:.1f} minutes of {rows()[0]['machine']}")
    return rows()


def key(row, cell):
    return tuple(str(number(str(row.get(name)))) for name in cell)


def kind(row, cell):
    """A run without its learning rate and seed."""
    return key(row, [name for name in cell if name not in ("lr", "seed")])


def worth(row, score):
    """Larger is better; what is no number is worse than any."""
    value = row.get(score.strip("-"), math.nan)
    return -math.inf if value == "" or math.isnan(value) else -value if score[0] == "-" else value


def best_rate(found):
    """found: {rate: worth}. Of equally good ones rather one that is not at the edge, rather a small one."""
    return max(found, key=lambda lr: (found[lr], min(found) < lr < max(found), -lr))


def next_rate(found, best):
    """The rate beyond the best, if it is the first or the last of several, as far from it as its neighbour is."""
    rates = sorted(found)
    if len(rates) < 2 or rates[0] < best < rates[-1] or found[best] == -math.inf:
        return None
    near = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / near:.2g}")


def chosen(rows, by, score, over="lr"):
    """{values of `by`: the rows that are reported}: those of the other seeds at the rate that the first had chosen by
    score (-score: the smallest). Where no column "use" says who chose, those at the value of `over` with the best mean
    of score, among those that were tried with most seeds."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return {name: settled(group, score, over) for name, group in groups.items()}


def settled(rows, score, over):
    tries = {row[over]: worth(row, score) for row in rows if row.get("use") == "choose"}
    if tries:
        best = best_rate(tries)
        return [row for row in rows if row[over] == best and row["use"] == "report"] or [
            row for row in rows if row[over] == best]
    settings = {}
    for row in rows:
        settings.setdefault(row[over], []).append(row)
    return max(settings.values(), key=lambda seeds: (len(seeds), statistics.mean(worth(row, score) for row in seeds)))


def best(rows, by, score, judge=None):
    """{values of `by`: (mean, smallest, largest) of score over the seeds}, at the learning rate that judge chose
    (default: score). A judge that starts with - is better when smaller. What has been tried with one seed only, where
    other things have with several, is left out: of an interrupted sweep."""
    groups = {name: [row[score] for row in seeds if row[score] != ""]
              for name, seeds in chosen(rows, by, judge or score).items()}
    least = min(2, max(map(len, groups.values()), default=0))
    return {name: (statistics.mean(scores), min(scores), max(scores))
            for name, scores in groups.items() if len(scores) >= max(1, least)}


# ------------------------------------------------------------------------------------------------------------- pictures


def figure(*size, rows=1, columns=1, **settings):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **settings)


def reporter(path):
    """A print() that also writes to the file: what is said of a table is kept beside it, and READMEs quote that."""
    path.write_text("")

    def say(line):
        print(line)
        with open(path, "a") as f:
            f.write(line.rstrip() + "\n")
    return say


def spread(mean, low, high, form=".3f"):
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def bars(points):
    """(mean, low, high) of several points -> the means, and what errorbar() wants."""
    mean, low, high = zip(*points, strict=True)
    return mean, [[m - x for m, x in zip(mean, low, strict=True)], [x - m for m, x in zip(mean, high, strict=True)]]


def save(fig, path):
    fig.savefig(path, dpi=90)
    print(f"wrote {path}")
