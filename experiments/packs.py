"""Many small models trained as one: what a sweep's packs are (lab.py).

A GPU spends a small model's step on launching its kernels. Models that differ in learning rate and seed alone have the
same ones: with one more axis, which vmap gives every operation, they share them. What these kernels do is read and
write much more than compute: with LAB_COMPILE=inductor a step is written down as one list of operations, and
torch.compile makes few kernels of many. That is up to three times as fast, after 10 to 30 seconds for each shape of a
batch; but slower where what is fused is computed again and again (feature maps, SSM kernels).
"""
import argparse
import hashlib
import itertools
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

RECIPE = "--optimizer adamw --beta2 0.95 --lr_end 0.1".split()           # of the experiments, unless they say otherwise
STATE = "theta", "m", "v", "done", "finite"                              # of a pack: what it goes on from
VALIDATION, TEST = -1, -2                                        # the seeds of these sets; training's are from 0 on


def parsed(cell, *flags):
    """train.py's arguments for these flags; one whose value is "" is left out."""
    words = [word for name, value in cell.items() if value != "" for word in (f"--{name}", str(value))]
    return train.parse([*RECIPE, *words, *flags])[0]


def time_is_up():
    return time.time() > float(os.environ.get("LAB_DEADLINE", "inf"))


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
    extras = {k: v.numpy() if torch.is_tensor(v) else v for k, v in extras.items()}
    return ids.int().numpy(), targets.int().numpy(), extras


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
        self.seeds, self.graphs, self.learners, self.memory = seeds, {}, {}, None
        self.file = ROOT / "runs" / "packs" / f"{hashlib.sha256(str(cells).encode()).hexdigest()[:16]}.pt"
        torch.backends.cuda.matmul.allow_tf32 = True
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None            # None: the usual one
        with torch.cuda.stream(self.stream):
            self.stack([train.build_model(args, self.sets[0].vocab_size) for args in self.args])
            self.choose_form()
            self.backend = os.environ.get("LAB_COMPILE") if self.vmap is vmap else None
            self.go_on()

    def stack(self, models):
        """theta (k, p): the parameters of a model in a row; peak and decay, the same: their rates and weight decays."""
        parameters, buffers = stack_module_state(models)
        self.model, self.shapes = models[0], {name: p.shape[1:] for name, p in parameters.items()}
        self.buffers = {name: b.to(self.device) for name, b in buffers.items()}
        self.theta = torch.cat([p.detach().flatten(1) for p in parameters.values()], dim=1).to(self.device)

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
        self.state = self.theta, self.m, self.v, self.done, self.finite

    def choose_form(self):
        """Of each kind of mixer its own choice, or the first form whose operations vmap knows. With --form the models
        are run one after the other: what vmap does not know, a Triton kernel, say, may still be the fastest."""
        self.vmap = vmap
        if self.args[0].form:
            self.vmap = one_after_the_other
            return
        kinds = {type(block.mixer): block.mixer.forms for block in self.model.blocks}
        for forms in itertools.product((None, "scan", "parallel"), repeat=len(kinds)):
            if any(form and form not in known for form, known in zip(forms, kinds.values(), strict=True)):
                continue
            for block in self.model.blocks:
                block.form = dict(zip(kinds, forms, strict=True))[type(block.mixer)]
            theta = self.theta.clone().requires_grad_()
            with suppress(RuntimeError):
                for data in (*self.sets, *self.held_out[TEST]):                  # a longer text may want another form
                    self.logits(data, *data.take(self.seed * 0, self.seed * 0)[::2], theta)
                return
        raise train.BadInput(f"--mixer {self.args[0].mixer}: vmap knows none of its forms; name one with --form")

    def logits(self, data, ids, places, theta=None):
        """ids (k, b, t), places (k, m) or None: for all b t. -> (k, m, v)"""
        def one(theta, buffers, ids, places):
            pieces = theta.split([math.prod(shape) for shape in self.shapes.values()])
            weights = {name: x.view(shape) for (name, shape), x in zip(self.shapes.items(), pieces, strict=True)}
            return functional_call(self.model, (weights, buffers), (ids, data.extras, places))
        along, theta = (0, 0, 0, None if places is None else 0), self.theta if theta is None else theta
        return self.vmap(one, along, randomness="different")(theta, self.buffers, ids, places).flatten(1, -2)

    def step(self, data):
        rows = data.order.index_select(1, data.at)[:, 0][self.seed[:, 0]]                    # (k, b)
        batch = data.take(self.seed, rows)
        kind = str(([x.shape for x in batch if x is not None], data.extras))                 # one for all of its kind
        if kind not in self.learners:
            self.learners[kind] = self.compiled(data, batch)
        self.learners[kind](*self.state, *batch)
        data.at += 1

    def learn(self, data, theta, m, v, done, finite, ids, targets, places=None):
        """The gradient of each model's loss, and an update of the state with it, in place."""
        theta = theta.detach().requires_grad_()
        logits = self.logits(data, ids, places, theta).flatten(0, 1)
        known = places is None or self.backend               # what is asked everywhere, or a compiler, wants no kernel
        nats = (F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none") if known
                else train.cross_entropy(logits, targets.flatten()))
        loss = nats.view_as(targets).sum(dim=1) / (targets != -100).sum(dim=1)               # (k,)
        gradient, = torch.autograd.grad(loss.sum(), theta)
        with torch.no_grad():
            self.update(gradient, theta, m, v, done)
            finite += loss.isfinite()

    def compiled(self, data, batch):
        """learn(), or what LAB_COMPILE makes of it: "inductor", or another backend of torch.compile. vmap and autograd
        are gone by then: make_fx writes down the operations that they ask for."""
        def learn(*state_and_batch):
            return self.learn(data, *state_and_batch)

        if not self.backend:
            return learn
        example = [x.detach().clone() for x in self.state] + [x for x in batch if x is not None]
        try:
            graph = torch.compile(make_fx(learn)(*example), dynamic=False, backend=self.backend)
            graph(*example)
            return lambda *given: graph(*(x for x in given if x is not None))
        except Exception as e:                                               # a thing that the compiler does not know
            print(f"not compiled: {self.args[0].mixer}: {type(e).__name__}: {str(e)[:300]}", flush=True)
            return learn

    def update(self, g, theta, m, v, done):
        """AdamW [Loshchilov and Hutter], each row clipped by its own norm."""
        done += 1
        g = g * (train.MAX_GRAD_NORM / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        m.lerp_(g, 1 - 0.9)
        v.lerp_(g * g, 1 - 0.95)
        lr = self.peak * self.rates.index_select(0, done)
        theta.mul_(1 - lr * self.decay).sub_(lr * (m / (1 - 0.9 ** done)) / ((v / (1 - 0.95 ** done)).sqrt() + 1e-8))

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
        steps, start, begun = self.args[0].steps, 0, self.steps_done()       # begun: those of an earlier process
        for epoch in itertools.count():
            for data in self.sets:
                end = start + data.n // self.args[0].batch_size
                if begun < end:
                    self.shuffle(data, epoch, at=max(0, begun - start))
                for step in range(max(start, begun), end):
                    if step == steps or enough and step % 1000 == 999 and min(self.ask(VALIDATION)[0]) >= enough:
                        return step
                    if step % 20 == 19 and time_is_up():
                        self.put_away()
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

    def steps_done(self):
        """Once the GPU has done what it was told to: it runs behind, and other streams do not wait for this one."""
        if self.stream:
            self.stream.synchronize()
        return self.done.item()

    def put_away(self):
        """When time is up: a file from which the same cells go on."""
        step = self.steps_done()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(zip(STATE, self.state, strict=True)), self.file)
        raise train.BadInput(f"time is up at step {step} of {self.args[0].steps}, for next time see {self.file}")

    def go_on(self):
        if self.file.exists():
            kept = torch.load(self.file, map_location=self.device)
            for name, tensor in zip(STATE, self.state, strict=True):
                tensor.copy_(kept[name])

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
    k = len(cells)
    pack = Pack(cells * 2 if k == 1 and torch.cuda.is_available() else cells)        # alone, BaseConv was far slower
    ended = yield from pack.train(enough)
    pack.file.unlink(missing_ok=True)
    (val, _), (test, each) = pack.ask(VALIDATION), pack.ask(TEST)
    finite = pack.finite.tolist()
    failed = [f"the loss was no number at step {n + 1}" if n < ended else "" for n in finite]
    return [{"val_accuracy": math.nan if failed[i] else round(val[i], 5), "accuracy": math.nan if failed[i] else
             round(test[i], 5)} | ({name: round(a, 5) for name, a in each[i].items()} if len(each[i]) > 1 else {}) |
            {"ended": min(ended, finite[i] + 1), "failed": failed[i]} for i in range(k)]
