"""What the experiments share: a sweep that goes on where it stopped, and tables that say how they were made.

A script lists its runs as cells, dicts of train.py's flags (or of anything else), and a function that measures one.
Each finished cell is a row of experiments/results/NAME.csv with machine, versions and command; rows that are there
already are not run again. --quick runs a small version on a CPU and writes to runs/quick/ instead.

One seed chooses the learning rate, on a validation set; the other seeds are what is reported, on a test set. Models
that differ in learning rate and seed alone are trained together: see Pack.
"""
import argparse
import csv
import hashlib
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402


def options(doc, argv=None, **more):
    """The flags of every experiment, and more of its own: name="help"."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a small version, for a CPU; writes to runs/quick/")
    p.add_argument("--jobs", type=int, default=1, help="runs (or packs of runs) at the same time (default 1)")
    p.add_argument("--steps", type=int, help="another number of training steps")
    p.add_argument("--cells", type=int, help="only the first so many runs")
    p.add_argument("--minutes", type=float, help="after so many no run is begun, and packs are kept for next time")
    p.add_argument("--draw", action="store_true", help="run nothing: draw what the table has")
    p.add_argument("--out", type=Path, help="folder for table and picture (default experiments/results)")
    for name, text in more.items():
        p.add_argument(f"--{name}", help=text)
    args = p.parse_args(argv)
    for name in ("jobs", "steps", "cells"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.minutes:
        os.environ["LAB_DEADLINE"] = str(time.time() + 60 * args.minutes)                    # for the processes, too
    args.out = args.out or (ROOT / "runs" / "quick" if args.quick else ROOT / "experiments" / "results")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def time_is_up():
    return time.time() > float(os.environ.get("LAB_DEADLINE", "inf"))


def grid(**axes):
    """Every combination: grid(lr=[1, 2], seed=[0, 1]) -> four dicts."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"machine": name, "torch": torch.__version__, "command": " ".join(["python", *sys.argv])}


def parsed(cell, *flags):
    """train.py's arguments for these flags; one whose value is "" is left out."""
    words = [word for name, value in cell.items() if value != "" for word in (f"--{name}", str(value))]
    return train.parse([*words, *flags])[0]


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


# ------------------------------------------------------------------------------------------------- many models at once


VALIDATION, TEST = -1, -2                                        # the seeds of these sets; training's are from 0 on


def seeded(seed, n):
    return torch.Generator().manual_seed((seed * 2654435761 + n) % 2 ** 31)


def some(task, transform, seed, start, n):
    """n examples, as arrays: ids and targets (n, t), and what else the task says of each of them, or of all. Seeds
    below 0: to be held out."""
    data = train.Task(parsed({"task": task} | ({"transform": transform} if transform else {})))
    generator = seeded(seed, start)
    batch = data.batch(n, generator, 0.0) if seed >= 0 else data.transform(data.examples(n, generator))
    ids, targets, extras = batch
    extras = {k: v for k, v in extras.items() if k != "weights" and (k != "valid" or seed < 0)}      # for tests only
    return ids.numpy(), targets.numpy(), {k: v.numpy() if torch.is_tensor(v) else v for k, v in extras.items()}


@cache
def made(task, transform, n, seed):
    """n examples of a task, by 500: kept for the next pack. Many are made by several cores."""
    starts = range(0, n, 500)
    parts = [(task, transform, seed, start, min(500, n - start)) for start in starts]
    if len(parts) < 50 or os.cpu_count() < 4:
        return [some(*part) for part in parts]
    with ProcessPoolExecutor(min(8, os.cpu_count() // 2), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(some, *zip(*parts, strict=True)))


class Examples:
    """n examples of a task for each of the seeds, kept on the device: ids and targets (seed, n, t), as train.Task makes
    them; places (seed, n, asked), where something is asked, if all examples ask equally often (else None)."""

    def __init__(self, spec, seeds, device, args):
        self.spec, (task, n) = spec.strip(), spec.split()
        self.n, self.vocab_size = int(n), train.Task(argparse.Namespace(**vars(args) | {"task": task})).vocab_size
        batches = [batch for seed in seeds for batch in made(task, args.transform, self.n, seed)]

        def kept(arrays, dtype=torch.int32):
            return torch.from_numpy(np.concatenate(arrays)).unflatten(0, (len(seeds), self.n)).to(device, dtype)

        self.ids, self.targets = (kept([batch[i] for batch in batches]) for i in (0, 1))
        extras = batches[0][2]
        self.valid = kept([batch[2]["valid"] for batch in batches], torch.bool) if "valid" in extras else None
        self.extras = {name: value for name, value in extras.items() if not isinstance(value, np.ndarray)}
        asked = self.targets != -100
        equal = len(asked.sum(dim=2).unique()) == 1
        self.places = asked.nonzero()[:, 2].view(len(seeds), self.n, -1) if equal else None

    def take(self, seed, rows):
        """Of the examples (seed, rows), both (k, b): ids (k, b, t), the targets that are asked (k, m), and where these
        stand in the flattened ids, (k, m); or all targets, and None."""
        ids, targets = self.ids[seed, rows].long(), self.targets[seed, rows].long()
        if self.places is None:
            return ids, targets.flatten(1), None
        places, starts = self.places[seed, rows], torch.arange(0, ids[0].numel(), ids.shape[2], device=ids.device)
        return ids, targets.gather(2, places).flatten(1), (places + starts[:, None]).flatten(1)


def one_after_the_other(function, along, randomness):
    """What vmap does, without vmap."""
    def all_of_them(theta, buffers, ids, places):
        return torch.stack([function(row, {name: b[i] for name, b in buffers.items()}, ids[i],
                                     places if places is None else places[i]) for i, row in enumerate(theta)])
    return all_of_them


class Pack:
    """k models that differ in learning rate and seed alone, trained as one: their parameters are the rows of a matrix,
    and vmap gives every operation one more axis, so that small models cost hardly more than a single one. On a GPU a
    step is a CUDA graph. The recipe is train.py's (AdamW, warm-up, cosine, clipped gradients), in float32 (matrix
    products on a GPU: TF32).

    A cell's task is "TASK N", or several with commas between: N fixed examples (others for each seed), seen again and
    again, in every epoch those of the first task first. "test", the same, is what is asked at the end."""

    def __init__(self, cells, device=None):
        flags, self.device = vars(train.parse([])[0]), train.Machine(device).device
        self.args = [parsed({k: v for k, v in c.items() if k in flags} | {"task": c["task"].split()[0]}) for c in cells]
        seeds, train_on = sorted({c["seed"] for c in cells}), cells[0]["task"]
        self.sets = [Examples(spec, seeds, self.device, self.args[0]) for spec in train_on.split(",")]
        self.held_out = {part: [Examples(spec, [part], self.device, self.args[0])
                                for spec in cells[0].get("test", train_on).split(",")] for part in (VALIDATION, TEST)}
        self.seed = torch.tensor([[seeds.index(c["seed"])] for c in cells], device=self.device)              # (k, 1)
        self.seeds, self.graphs, self.memory, self.kept = seeds, {}, None, ("theta", "m", "v", "done", "finite")
        self.file = ROOT / "runs" / "packs" / f"{hashlib.sha256(str(cells).encode()).hexdigest()[:16]}.pt"
        torch.backends.cuda.matmul.allow_tf32 = True
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None            # None: the usual one
        with torch.cuda.stream(self.stream):
            self.stack([train.build_model(args, self.sets[0].vocab_size) for args in self.args])
            self.choose_form()
            self.go_on()

    def stack(self, models):
        """theta (k, p): the parameters of a model in a row; peak and decay, the same: their rates and weight decays."""
        parameters, buffers = stack_module_state(models)
        self.model, self.shapes = models[0], {name: p.shape[1:] for name, p in parameters.items()}
        self.buffers = {name: b.to(self.device) for name, b in buffers.items()}
        self.theta = torch.cat([p.detach().flatten(1) for p in parameters.values()], dim=1).to(self.device)
        self.theta.requires_grad_()

        def of_group(name):
            rows = []
            for model, args in zip(models, self.args, strict=True):
                groups = train.optimizer_for(model, args).param_groups
                value = {p: group[name] for group in groups for p in group["params"]}
                rows.append(torch.cat([torch.full((p.numel(),), value[p]) for p in model.parameters()]))
            return torch.stack(rows).to(self.device)

        self.peak, self.decay = of_group("peak_lr"), of_group("weight_decay")
        self.m, self.v = torch.zeros_like(self.peak), torch.zeros_like(self.peak)
        self.done, self.finite = (torch.zeros(n, dtype=torch.long, device=self.device) for n in (1, len(models)))
        self.rates = torch.tensor([train.schedule(i, self.args[0]) for i in range(self.args[0].steps + 1)],
                                  device=self.device)

    def choose_form(self):
        """The mixers' own choice, or the first form whose operations vmap knows. With --form the models are run one
        after the other: what vmap does not know, a Triton kernel, say, may still be the fastest."""
        self.vmap = vmap
        if self.args[0].form:
            self.vmap = one_after_the_other
            return
        for form in (None, "scan", "parallel"):
            for block in self.model.blocks:
                block.form = form if form in block.mixer.forms else None
            with suppress(RuntimeError):
                for data in (*self.sets, *self.held_out[TEST]):                  # a longer text may want another form
                    self.logits(data, *data.take(self.seed * 0, self.seed * 0)[::2])
                return
        raise train.BadInput(f"--mixer {self.args[0].mixer}: vmap knows none of its forms; name one with --form")

    def logits(self, data, ids, places):
        """ids (k, b, t), places (k, m) or None: for all b t. -> (k, m, v)"""
        def one(theta, buffers, ids, places):
            pieces = theta.split([math.prod(shape) for shape in self.shapes.values()])
            weights = {name: x.view(shape) for (name, shape), x in zip(self.shapes.items(), pieces, strict=True)}
            return functional_call(self.model, (weights, buffers), (ids, data.extras, places))
        along = 0, 0, 0, None if places is None else 0
        return self.vmap(one, along, randomness="different")(self.theta, self.buffers, ids, places).flatten(1, -2)

    def step(self, data):
        rows = data.order.index_select(1, data.at)[:, 0][self.seed[:, 0]]                    # (k, b)
        ids, targets, places = data.take(self.seed, rows)
        logits = self.logits(data, ids, places).flatten(0, 1)
        nats = (F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none") if places is None
                else train.cross_entropy(logits, targets.flatten()))
        loss = nats.view_as(targets).sum(dim=1) / (targets != -100).sum(dim=1)               # (k,)
        gradient, = torch.autograd.grad(loss.sum(), self.theta)
        with torch.no_grad():
            self.update(gradient)
            self.finite += loss.isfinite()
            data.at += 1

    def update(self, g):
        """AdamW [Loshchilov and Hutter], each row clipped by its own norm."""
        self.done += 1
        g = g * (train.MAX_GRAD_NORM / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        self.m.lerp_(g, 1 - 0.9)
        self.v.lerp_(g * g, 1 - 0.95)
        m, v = self.m / (1 - 0.9 ** self.done), self.v / (1 - 0.95 ** self.done)
        lr = self.peak * self.rates.index_select(0, self.done)
        self.theta.mul_(1 - lr * self.decay).sub_(lr * m / (v.sqrt() + 1e-8))

    def advance(self, data):
        """A step; on a GPU the first is done as usual, the second is recorded, if it can be, and then replayed."""
        with torch.cuda.stream(self.stream):
            if self.stream and self.graphs.get(data, "new") is None:
                self.graphs[data] = self.recorded(data)
            if self.graphs.setdefault(data):
                self.graphs[data].replay()
            else:
                self.step(data)

    def recorded(self, data):
        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError):                             # a step that no graph can hold
            with torch.cuda.graph(graph, pool=self.memory):
                self.step(data)
            self.memory = graph.pool()
            return graph
        return False

    def train(self, enough=None):
        """To the last step, or until all models have the accuracy `enough`, looked at every 1000 steps. A generator,
        to be trained in turn with others; at the end it returns the step."""
        steps, start, begun = self.args[0].steps, 0, self.done.item()        # begun: those of an earlier process
        for epoch in itertools.count():
            for data in self.sets:
                end = start + data.n // self.args[0].batch_size
                if begun < end:
                    self.shuffle(data, epoch, at=max(0, begun - start))
                for step in range(max(start, begun), end):
                    if step == steps or enough and step % 1000 == 999 and min(self.ask(VALIDATION)[0]) >= enough:
                        return step
                    if step % 20 == 19 and time_is_up():
                        self.put_away(step)
                    self.advance(data)
                    if step % 10 == 0:
                        yield
                start = end

    def shuffle(self, data, epoch, at):
        """The examples of each seed in a new order: (seeds, batches, b), the next batch being number `at`."""
        size = self.args[0].batch_size
        mixed = [torch.randperm(data.n, generator=seeded(seed, epoch)) for seed in self.seeds]
        with torch.cuda.stream(self.stream):
            order = torch.stack(mixed)[:, :data.n // size * size].unflatten(1, (-1, size)).to(self.device)
            first = not hasattr(data, "order")                               # later in the same place: a graph reads it
            data.order = order if first else data.order.copy_(order)
            data.at = (torch.zeros_like(self.done) if first else data.at).fill_(at)

    def put_away(self, step):
        """When time is up: a file from which the same cells go on."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: getattr(self, name).detach() for name in self.kept}, self.file)
        raise train.BadInput(f"time is up at step {step} of {self.args[0].steps}, for next time see {self.file}")

    def go_on(self):
        if self.file.exists():
            for name, tensor in torch.load(self.file, map_location=self.device).items():
                getattr(self, name).detach().copy_(tensor)

    @torch.no_grad()
    def accuracy(self, data):
        """(k,): the share of right answers in a set that is the same for all models."""
        self.model.eval()
        right, asked, k = 0, 0, len(self.seed)
        t, each = data.ids.shape[2], (data.ids if data.places is None else data.places).shape[2]
        size = max(1, min(2 ** 27 // (k * each * data.vocab_size), 2 ** 16 // (k * t)))      # so that it fits
        for rows in torch.arange(data.n, device=self.device).split(size):
            ids, targets, places = data.take(self.seed * 0, rows.expand(k, -1))
            answer, counts = self.logits(data, ids, places).argmax(dim=-1), targets != -100
            hit = answer == targets
            if data.valid is not None:
                hit = data.valid[0, rows].flatten(0, 1).expand(k, -1, -1).gather(2, answer[..., None])[..., 0]
            right, asked = right + (hit & counts).sum(dim=1), asked + counts.sum(dim=1)
        self.model.train()
        return right / asked

    def ask(self, part):
        """The mean accuracy of each model over the tests, and those on each."""
        with torch.cuda.stream(self.stream):
            each = torch.stack([self.accuracy(data) for data in self.held_out[part]]).cpu().double()
        return each.mean(dim=0).tolist(), [dict(zip((x.spec for x in self.held_out[part]), a, strict=True))
                                           for a in each.T.tolist()]


def packed(cells, enough=None):
    """What became of each cell of a pack: accuracies on the validation and the test set (and on each of several tests),
    the step at which it ended, and whether its loss was finite until then. A generator, as Pack.train is."""
    pack, k = Pack(cells), len(cells)
    ended = yield from pack.train(enough)
    pack.file.unlink(missing_ok=True)
    (val, _), (test, each) = pack.ask(VALIDATION), pack.ask(TEST)
    finite = pack.finite.tolist()
    failed = [f"the loss was no number at step {n + 1}" if n < ended else "" for n in finite]
    return [{"val_accuracy": math.nan if failed[i] else round(val[i], 5), "accuracy": math.nan if failed[i] else
             round(test[i], 5)} | ({name: round(a, 5) for name, a in each[i].items()} if len(each[i]) > 1 else {}) |
            {"ended": min(ended, finite[i] + 1), "failed": failed[i]} for i in range(k)]


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
