"""Without a GPU, Triton kernels run in its interpreter; that must be said before triton is imported."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:          # pytest -n: a process for each core, and no threads beside it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))


def watch_memory():
    """In the interpreter a kernel reads and writes wherever its pointers point, as on a GPU, where that may go well for
    months. Here it is an error, unless it lies in the memory of one of the kernel's arguments."""
    from triton.runtime import interpreter as triton

    ranges, prepare, builder = [], triton.GridExecutor._init_args_hst, triton.InterpreterBuilder

    def note(executor, *args):
        arguments, named = prepare(executor, *args)
        leaves = [getattr(x, "base", x) for x in tree_leaves([arguments, named])]       # of descriptors, the tensors
        memory = {x.untyped_storage() for x in leaves if isinstance(x, torch.Tensor)}
        ranges[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in memory]
        return arguments, named

    def watched(access, pointers_at, mask_at=None):
        def checked(builder, *args, **named):
            pointers = args[pointers_at]
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            mask = True if mask_at is None else args[mask_at].data
            touched = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
            inside = np.zeros(touched.shape, bool)
            for start, end in ranges:
                inside |= (touched >= start) & (touched + size <= end)
            if not inside.all():
                raise IndexError(f"{(~inside).sum()} of {inside.size} addresses are of no argument of the kernel")
            return access(builder, *args, **named)
        return checked

    triton.GridExecutor._init_args_hst = note
    for name, *places in (("create_masked_load", 0, 1), ("create_masked_store", 0, 2), ("create_atomic_rmw", 1, 3),
                          ("create_atomic_cas", 0)):
        setattr(builder, name, watched(getattr(builder, name), *places))


if os.environ.get("TRITON_INTERPRET"):
    watch_memory()


def pytest_configure(config):
    """On a GPU most of a test's time is the first case's, which compiles its kernels. pytest -n then leaves all cases
    of a test to one process: several would compile the same at once."""
    if torch.cuda.is_available() and getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        config.option.loadgroup = True                   # a worker is told -n, and not what was made of it
        for item in items:
            if item.path.stem in ("test_kernels", "test_delta_rule"):
                item.add_marker(pytest.mark.xdist_group(item.originalname))


@pytest.fixture(autouse=True)
def products_of_float32_are_exact():
    """What a test asks for that trains in TF32 must not reach the next test, whose tolerances are float32's."""
    yield
    torch.set_float32_matmul_precision("highest")


REFEREES = {}           # of all workers of pytest -n: (mixer, who is referee) -> the largest error


def pytest_sessionfinish(session):
    """What a worker of pytest -n has found, for the process that sums up."""
    referees = sys.modules.get("referees")
    if hasattr(session.config, "workeroutput") and referees:
        session.config.workeroutput["referees"] = [[*key, error] for key, error in referees.ERRORS.items()]
    elif referees:
        REFEREES.update(referees.ERRORS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for *key, largest in getattr(node, "workeroutput", {}).get("referees", []):
        REFEREES[tuple(key)] = max(largest, REFEREES.get(tuple(key), 0.0))


def pytest_terminal_summary(terminalreporter):
    """How many referees the mixers were held to, and how far they were from them at most: see tests/peers."""
    if REFEREES:
        (name, by), largest = max(REFEREES.items(), key=lambda item: item[1])
        exact = [error for error in REFEREES.values() if error <= 1e-9]
        terminalreporter.write_line(
            f"{len(REFEREES)} referees of {len({name for name, _ in REFEREES})} mixers: largest error "
            f"{largest:.1e} ({name}, by {by}); {len(exact)} of them within 1e-9, at most {max(exact, default=0):.1e}")
