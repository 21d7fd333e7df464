"""A step as one CUDA graph: of generation, and of training. Where the launches of a step's kernels take longer than
their work, as with small models and short batches, one launch instead of hundreds is what makes it fast.

A graph replays the same kernels on the same addresses: sizes may not change, what changes from step to step must be a
tensor, and nothing may wait for the GPU. Where that does not hold, the steps are done as usual.
"""
from contextlib import suppress

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


class CannotRecord(RuntimeError):
    """A step that does what a CUDA graph cannot hold."""


class Decoder:
    """model.step for n_tokens tokens, with the states kept here; caches that would grow get room for them at once
    (mixer.reserve), unless they are too many for the mixer: then it stops after its last. On a GPU, where the launches
    of a step's kernels take longer than their work, it becomes a CUDA graph as soon as a step has left every size as it
    was and there is room for another. Called with ids_t: (b,), returns the logits: (b, v), which the next call may
    overwrite. ValueError after n_tokens."""

    def __init__(self, model, states, n_tokens):
        self.model, self.graph, self.tried, self.n_tokens, self.left = model, None, False, n_tokens, n_tokens
        self.states = list(states)
        for i, mixer in enumerate(block.mixer for block in model.blocks):
            with suppress(ValueError):
                self.states[i] = mixer.reserve(states[i], n_tokens) if hasattr(mixer, "reserve") else states[i]

    def __call__(self, ids_t):
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"this Decoder has room for {self.n_tokens} tokens")
        if self.graph:
            self.ids.copy_(ids_t)
            self.graph.replay()
            return self.logits
        before, structure = tree_flatten(self.states)
        logits, self.states = self.model.step(ids_t, self.states)
        leaves, after = tree_flatten(self.states)
        if ids_t.is_cuda and self.left and not self.tried and structure == after and all(
                not torch.is_tensor(x) or x.is_cuda and x.shape == y.shape
                for x, y in zip(leaves, before, strict=True)):
            self.record(ids_t)
        return logits

    def own(self, ids_t):
        """Keep copies of the states, for step_in_place. What counts the tokens is a tensor from here on."""
        leaves, self.structure = tree_flatten(self.states)
        self.kept = None                                             # those of the trial, before there are others
        self.ids, self.kept = ids_t.clone(), [torch.as_tensor(x, device=ids_t.device).clone() for x in leaves]

    def step_in_place(self):
        """The logits after self.ids; the states after it are where those before it were."""
        logits, after = self.model.step(self.ids, tree_unflatten(self.kept, self.structure))
        mine = {x.untyped_storage().data_ptr() for x in self.kept}
        pairs = [(old, new) for old, new in zip(self.kept, tree_flatten(after)[0], strict=True) if new is not old]
        pairs = [(old, new.clone() if new.untyped_storage().data_ptr() in mine else new) for old, new in pairs]
        for old, new in pairs:
            old.copy_(new)
        return logits

    def record(self, ids_t):
        """Try it first: a step that waits for the GPU, to look at a number, cannot be recorded and is done as usual."""
        self.tried, mode = True, torch.cuda.get_sync_debug_mode()
        try:
            self.own(ids_t)
            torch.cuda.set_sync_debug_mode("error")
            self.step_in_place()
        except (RuntimeError, TypeError, AttributeError):
            self.kept = None
            return
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        self.own(ids_t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.step_in_place()
        self.graph, self.states = graph, None


class Captured:
    """update(model, optimizer, parts, machine) as a CUDA graph. For each shape of a batch the first step is done as
    usual and the second is recorded; from then on the batch is copied to where the recorded one lay, and the graph runs
    again. This is done for the first 8 shapes: where hardly two batches ask the same number of tokens, nothing is won.
    CannotRecord for a step that no graph can hold."""

    def __init__(self, optimizer, device, update):
        for group in optimizer.param_groups:                           # what changes from step to step must be a tensor
            group["lr"], group["capturable"] = torch.tensor(float(group["lr"]), device=device), True
        self.graphs, self.update = {}, update

    def __call__(self, model, optimizer, parts, machine):
        leaves, structure = tree_flatten(parts)
        key = str(structure), *(tuple(x.shape) if torch.is_tensor(x) else x for x in leaves)
        if key not in self.graphs:
            if len(self.graphs) < 8:
                self.graphs[key] = None
            return self.update(model, optimizer, parts, machine)
        if self.graphs[key] is None:
            kept, graph = [x.clone() if torch.is_tensor(x) else x for x in leaves], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    loss = self.update(model, optimizer, tree_unflatten(kept, structure), machine)
            except RuntimeError as e:
                raise CannotRecord(f"a step of this model on this task cannot be recorded, leave --capture away: "
                                   f"{str(e).splitlines()[0]}") from e
            self.graphs[key] = graph, kept, loss
        graph, kept, loss = self.graphs[key]
        for old, new in zip(kept, leaves, strict=True):
            if torch.is_tensor(new):
                old.copy_(new)
        graph.replay()
        return loss.clone()
