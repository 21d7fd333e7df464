"""The training script: it learns, goes on where it stopped, spreads over processes, refuses bad input in one line."""
import csv
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
import torch
from torch.utils._pytree import tree_flatten

import train

SMALL = """--d_model 32 --n_heads 2 --context 32 --batch_size 8 --tokenizer byte --n_tokens 5
           --warmup 5 --device cpu""".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")


@pytest.fixture
def text(tmp_path):
    """A small file of real text: half a play."""
    path = tmp_path / "play.txt"
    path.write_text(train.corpus_files()[0].read_text()[:50000])
    return str(path)


def losses(folder):
    with open(folder / "log.csv") as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


def refusal(argv, capsys):
    """The one line with which train.py refuses."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("train.py: "), error
    return error


# ----------------------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("mixer", ["attention", "window:window=8,attention", "ngram,window"])
def test_the_loss_falls_on_real_text(mixer, text, tmp_path, capsys):
    scores = train.main([*SMALL, "--mixer", mixer, "--data", text, "--steps", "60", "--out", str(tmp_path / "run"),
                         "--lr", "0.01", "--eval_every", "30"])
    curve = losses(tmp_path / "run")
    assert len(curve) == 60 and np.mean(curve[-5:]) < 0.65 * curve[0] and scores["bits_per_byte"] < 4.8
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("bits per byte", "associative recall", "tokens/s", "left"))
    for name in ("checkpoint.pt", "config.json", "log.csv", "loss.png", "sample.txt"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name


@pytest.mark.parametrize("task", ["induction:length=32:vocab_size=32", "icll:length=64"])
def test_tasks_train(task, tmp_path):
    args, _ = train.parse([*SMALL, "--task", task, "--steps", "5", "--out", str(tmp_path / "run")])
    scores = train.train(args)
    assert 0 <= scores["accuracy"] <= 1 and scores["loss"] < 10


def test_enough_ends_the_training(tmp_path, monkeypatch):
    """At the first evaluation that reaches it."""
    held_out = iter((0.2, 0.5, 0.8, 0.9, 0.1))
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"loss": 1.0, "accuracy": next(held_out)})
    flags = ["--task", "induction:length=16:vocab_size=8", "--steps", "50", "--eval_every", "10", "--enough", "0.8"]
    args, _ = train.parse([*SMALL, *flags, "--out", str(tmp_path / "run")])
    assert train.train(args, say=lambda *_, **__: None)["accuracy"] == 0.9                     # of all that is held out
    assert train.load_checkpoint(args.out)["step"] == 30


def test_sampling_continues_what_training_would_see(text, tmp_path, capsys):
    """prefill and step give, token by token, the logits of forward."""
    args, _ = train.parse([*SMALL, "--data", text, "--mixer", "window:window=4,ngram"])
    model = train.build_model(args, 256).double().eval()
    ids = torch.randint(0, 256, (2, 20))
    logits, states = model.prefill(ids[:, :12])
    parts = [logits]
    for i in range(12, 20):
        logits, states = model.step(ids[:, i], states)
        parts.append(logits[:, None])
    assert (torch.cat(parts, 1) - model(ids)).abs().max() < 1e-9
    greedy = list(train.generate(model, ids[:1], 8, temperature=0.0))
    again = ids[:1]
    for token in greedy:
        assert model(again)[0, -1].argmax() == token
        again = torch.cat([again, torch.tensor([[token]])], 1)
    assert set(train.generate(model, ids[:1], 20, top_k=1)) <= set(range(256))


def test_sample_writes_on_from_a_checkpoint_alone(text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--steps", "3", "--tokenizer", "bpe", "--vocab_size", "300"])
    (tmp_path / "play.txt").unlink()
    capsys.readouterr()
    train.main(["--sample", "O Romeo", "--n_tokens", "7"])
    first = capsys.readouterr().out
    train.main(["--sample", "O Romeo", "--n_tokens", "7", "--resume", str(tmp_path / "runs" / "text-short_conv+based")])
    assert first.startswith("O Romeo") and len(first) > 9 and capsys.readouterr().out == first


# ---------------------------------------------------------------------------------------------------------------- text


def test_tokenizers_give_back_the_text(text):
    play = open(text).read()
    for flags in (["--tokenizer", "byte"], ["--tokenizer", "bpe", "--vocab_size", "400"]):
        data = train.Text(train.parse([*SMALL, *flags, "--data", text])[0])
        assert data.tokenizer.decode(data.train.tolist()) + data.tokenizer.decode(data.val.tolist()) == play
        assert 0.88 < len(data.tokenizer.decode(data.train.tolist())) / len(play) < 0.92
        held_out = torch.from_numpy(data.val.astype(np.int64))
        assert data.token_bytes[held_out].sum() == len(play[int(0.9 * len(play)):].encode())
        assert data.train.dtype == np.uint16 and isinstance(data.train, np.memmap)


def test_the_split_holds_out_whole_plays():
    files = train.corpus_files()
    parts = train.split_text(files)
    held = [f for f, _, _ in parts["val"]]
    assert held == files[9::10] and len(held) == 3 and not set(held) & {f for f, _, _ in parts["train"]}


def test_a_folder_is_read_without_what_is_no_text(tmp_path):
    folder = tmp_path / "notes"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "a.md").write_text("some text")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.py").write_text("print('more')")
    (folder / "c.png").write_bytes(b"\x89PNG\0\0\xff\xfe")
    (folder / "empty.txt").touch()
    assert [f.name for f in train.text_files(folder)] == ["a.md", "b.py"]


def test_recall_slice_by_hand(text):
    data = train.Text(train.parse([*SMALL, "--data", text])[0])
    data.bigrams = np.array([1 * 256 + 2, 2 * 256 + 1]), np.array([7, 30])
    row = torch.tensor([[1, 2, 1, 2, 5, 6, 5, 6, 1]])
    seen, count = data.bigram_statistics(row[:, :-1], row[:, 1:])
    assert seen[0].tolist() == [False, False, True, False, False, False, True, False]
    assert count[0].tolist() == [7, 30, 7, 0, 0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------- resuming, processes


def test_the_recall_slice_is_rare_and_seen(text):
    data = train.Text(train.parse([*SMALL, "--data", text])[0])
    data.bigrams = np.array([1 * 256 + 2, 3 * 256 + 4, 5 * 256 + 6]), np.array([10, 11, 1])
    row = torch.tensor([[1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 7, 8]])
    ids, targets = row[:, :-1], row[:, 1:]
    got = {name: count for name, _, count in data.scores((ids, targets, {}), None, torch.zeros(13), True)}
    assert got["recall"] == 2 and got["recall_new"] == 1 and got["rest"] == 11      # 1 2 again, 7 8 again
    assert got["repeated"] == 3                                                      # and 3 4
    data.rare = train.Text(train.parse([*SMALL, "--data", text, "--rare", "11"])[0]).rare
    got = {name: count for name, _, count in data.scores((ids, targets, {}), None, torch.zeros(13), True)}
    assert got["recall"] == 3 and got["rest"] == 10


def test_a_finished_run_says_more_about_itself(text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--steps", "2", "--out", str(tmp_path / "run")])
    assert "at most 10 times" in capsys.readouterr().out
    train.main(["--resume", str(tmp_path / "run"), "--rare", "20"])
    assert "at most 20 times" in capsys.readouterr().out


def test_resuming_is_exact(text, tmp_path):
    common = [*SMALL, "--data", text, "--eval_every", "6"]
    train.main([*common, "--steps", "18", "--out", str(tmp_path / "whole")])
    train.main([*common, "--steps", "18", "--out", str(tmp_path / "cut")])
    checkpoint = train.load_checkpoint(tmp_path / "cut")
    assert checkpoint["step"] == 18
    args, _ = train.parse([*common, "--steps", "18", "--out", str(tmp_path / "stopped")])
    args.eval_every, stop_at = 6, 12
    real_save = train.save

    def save_and_die(folder, args, step, *rest):
        real_save(folder, args, step, *rest)
        if step == stop_at:
            raise KeyboardInterrupt
    train.save = save_and_die
    try:
        with pytest.raises(KeyboardInterrupt):
            train.train(args)
    finally:
        train.save = real_save
    train.main(["--resume", str(tmp_path / "stopped"), "--device", "cpu"])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_killed_run_goes_on_exactly(tmp_path):
    """SIGKILL at a random moment after the first checkpoint, in processes of their own."""
    command = [sys.executable, str(train.ROOT / "train.py"), *SMALL, "--steps", "40", "--eval_every", "5"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    with subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "killed" / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.random())
        process.send_signal(signal.SIGKILL)
    assert train.load_checkpoint(tmp_path / "killed")["step"] % 5 == 0
    resumed = [*command[:2], "--resume", str(tmp_path / "killed"), "--device", "cpu"]
    subprocess.run(resumed, check=True, capture_output=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "killed")) == 40


def test_a_checkpoint_is_old_or_new_but_never_half(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train.write_atomically(path, lambda f: f.write(b"old"))

    def die_halfway(f):
        f.write(b"ne")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train.write_atomically(path, die_halfway)
    assert path.read_bytes() == b"old"


def test_two_processes_give_the_losses_of_one(tmp_path):
    flags = [*SMALL, "--steps", "8", "--eval_every", "100"]
    train_py = str(train.ROOT / "train.py")
    subprocess.run([sys.executable, train_py, *flags, "--accumulate", "2", "--out", str(tmp_path / "one")], check=True,
                   capture_output=True)
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
           "--rdzv_endpoint=localhost:0", train_py, *flags, "--out", str(tmp_path / "two")]
    done = subprocess.run(two, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=0, atol=1e-5)


def test_accumulation_changes_nothing(text, tmp_path):
    for parts in ("1", "4"):
        train.main([*SMALL, "--data", text, "--steps", "6", "--accumulate", parts, "--out", str(tmp_path / parts)])
    assert np.allclose(losses(tmp_path / "1"), losses(tmp_path / "4"), rtol=0, atol=1e-5)


def test_parameters_may_bring_their_own_learning_rate():
    model = torch.nn.Linear(3, 3)
    model.weight.optim = {"lr": 1e-3, "weight_decay": 0.0}
    args, _ = train.parse(["--lr", "0.01", "--weight_decay", "0.2"])
    groups = {g["lr"]: g for g in train.optimizer_for(model, args).param_groups}
    assert groups[1e-3]["params"] == [model.weight] and groups[1e-3]["weight_decay"] == 0
    assert groups[0.01]["params"] == [model.bias] and groups[0.01]["weight_decay"] == 0


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, message", [
    ("--data /no/such/file", "no such file"), ("--mixer atention", "did you mean attention"),
    ("--task indction", "did you mean induction"), ("--mixer window:windw=3", "no option 'windw'; it has .*window"),
    ("--mixer window:window=0", "window must be at least 1"), ("--mixer window:window=2.5", "must be int"),
    ("--mixer attention:rope=3", "must be bool"), ("--mixer cosformer:M=9", "M = 9"), ("--task text:length=3", "text"),
    ("--lr nan", "--lr must be above 0"), ("--seed -1", "--seed"), ("--top_k -1", "--top_k"), ("--mlp -1", "--mlp"),
    ("--device meta", "--device meta"), ("--task induction --data README.md", "makes its own data"),
    ("--d_model 30 --n_heads 4", "30 is not a multiple of n_heads 4"), ("--mixer linformer", "not causal"),
    ("--n_layers 1", "pattern of 2 layers"), ("--mixer jamba --n_layers 4", "pattern of 8 layers"),
    ("--batch_size 7 --accumulate 2", "7 is not a multiple"), ("--steps 0", "--steps must be at least 1"),
    ("--steps many", "invalid int value"), ("--nonsense 3", "unrecognized arguments"), ("--device cuda:99", "cuda:99"),
    ("--task induction:length=3", "length"), ("--vocab_size 100", "257"), ("--resume /no/run", "has no checkpoint"),
    ("--sample hello", "there is no run"), ("--out /proc/no/folder", "cannot write"),
    ("--form scan", "--form scan: .* has .*parallel"), ("--capture --device cpu", "--capture is for one GPU"),
    ("--tokenizer gpt3", "invalid choice"), ("--enough 0.9", "text has none"), ("--rare -1", "--rare"),
    ("--task induction --enough 2", "at most 1")])
def test_bad_flags_are_refused(flags, message, capsys, tmp_path):
    assert re.search(message, refusal([*SMALL, "--steps", "1", *flags.split()], capsys))


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not.*text"), (bytes(range(128, 256)) * 9, "not UTF-8"),
    (b"too short", "shorter than --context 32"), (b"text and \0 bytes" * 99, "NUL")])
def test_bad_text_is_refused(content, message, capsys, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert re.search(message, refusal([*SMALL, "--data", path, "--out", tmp_path / "run"], capsys))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_text_is_refused(capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG\0")
    assert "no text" in refusal([*SMALL, "--data", tmp_path / "pictures"], capsys)


def test_options_are_read_as_what_they_are():
    assert train.look_up("attention: rope = false", "mixer", train.from_lessons("MIXERS"))[1] == {"rope": False}
    assert train.look_up("performer:m=8", "mixer", train.from_lessons("MIXERS"))[1] == {"m": 8}


def test_no_seed_trains_on_what_is_held_out():
    task = train.Task(train.parse(["--task", "induction"])[0])
    held_out = next(iter(task.held_out(2)))[0]
    for seed in (0, 1, 256):
        for step in (0, 1, 2):
            assert not torch.equal(task.batch(2, torch.Generator().manual_seed(seed * 2 ** 32 + step))[0], held_out)


def test_a_run_goes_on_with_the_same_text_only(text, capsys, tmp_path):
    bpe = [*SMALL, "--tokenizer", "bpe", "--vocab_size", "300"]
    train.main([*bpe, "--data", text, "--steps", "2", "--out", str(tmp_path / "run")])
    moved = tmp_path / "elsewhere.txt"
    moved.write_text(open(text).read())
    (tmp_path / "play.txt").write_text("another text " * 5000)
    capsys.readouterr()
    assert "not the text" in refusal(["--resume", tmp_path / "run", "--steps", "4"], capsys)
    assert "lies behind" in refusal(["--resume", tmp_path / "run", "--steps", "1"], capsys)
    assert "writes to" in refusal(["--resume", tmp_path / "run", "--out", tmp_path / "other"], capsys)
    train.main(["--resume", str(tmp_path / "run"), "--data", str(moved), "--steps", "4", "--device", "cpu"])
    assert len(losses(tmp_path / "run")) == 4
    train.main(["--resume", str(tmp_path / "run" / "checkpoint.pt"), "--sample", "O", "--seed", "5", "--n_tokens", "3"])


def test_sampling_stops_in_words_at_a_largest_length(text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--mixer", "cosformer:M=40", "--steps", "1", "--out", str(tmp_path / "run")])
    train.main(["--resume", str(tmp_path / "run"), "--sample", "O", "--n_tokens", "60"])
    assert "[stopped: position 41" in capsys.readouterr().out


def test_a_run_is_not_written_over(text, capsys, tmp_path):
    flags = [*SMALL, "--data", text, "--steps", "2", "--out", tmp_path / "run"]
    train.main([str(f) for f in flags])
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert "holds a run" in refusal(flags, capsys)
    assert "--d_model 32: it cannot go on with 64" in refusal(["--resume", tmp_path / "run", "--d_model", "64"], capsys)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    train.main([str(f) for f in flags[:-2]])             # without --out each run gets a folder of its own
    train.main([str(f) for f in flags[:-2]])
    assert sorted(p.name for p in train.RUNS.iterdir()) == ["text-short_conv+based", "text-short_conv+based-2"]


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"not a checkpoint" * 99])
def test_a_damaged_checkpoint_is_refused_and_kept(damage, text, capsys, tmp_path):
    train.main([*SMALL, "--data", text, "--steps", "2", "--out", str(tmp_path / "run")])
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    capsys.readouterr()
    assert "damaged" in refusal(["--resume", tmp_path / "run"], capsys)
    assert path.read_bytes() == before


def test_a_foreign_checkpoint_is_refused(text, capsys, tmp_path):
    train.main([*SMALL, "--data", text, "--steps", "2", "--out", str(tmp_path / "run")])
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint["model"], path)
    capsys.readouterr()
    assert "not from train.py" in refusal(["--resume", tmp_path / "run"], capsys)
    checkpoint["model"]["embed.weight"] = torch.zeros(256, 5)
    torch.save(checkpoint, path)
    assert "does not fit" in refusal(["--resume", tmp_path / "run"], capsys)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(text, capsys, tmp_path, monkeypatch):
    real_step, steps = train.train_step, []

    def step(*arguments):
        steps.append(1)
        loss = real_step(*arguments)
        return loss * torch.nan if len(steps) == 8 else loss
    monkeypatch.setattr(train, "train_step", step)
    flags = [*SMALL, "--data", text, "--steps", "20", "--eval_every", "3", "--out", tmp_path / "run"]
    assert "nan at step 8" in refusal(flags, capsys)
    assert train.load_checkpoint(tmp_path / "run")["step"] == 6


def test_gpt2_without_a_network_is_refused(text, capsys, monkeypatch):
    def offline(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert "downloaded" in refusal([*SMALL, "--tokenizer", "gpt2", "--data", text], capsys)


def test_the_exit_code_of_the_script_is_2():
    command = [sys.executable, str(train.ROOT / "train.py"), "--mixer", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_the_loss_and_its_gradient_are_torchs():
    """ask() gives nats, weights and logits where something is asked, and nowhere else."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 7, 11)).requires_grad_()
    ids, targets = torch.zeros(3, 7).long(), torch.randint(0, 11, (3, 7)).masked_fill(torch.rand(3, 7) < 0.3, -100)
    weights = torch.rand(3, 7)
    machine = train.Machine("cpu")
    nats, w, _ = train.ask(lambda ids, extras, asked: logits.flatten(0, 1)[asked], (ids, targets, {"weights": weights}),
                           machine)
    assert len(nats) == (targets != -100).sum() and torch.equal(w, weights[targets != -100])
    grad, = torch.autograd.grad((nats * w).sum(), logits)
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    assert torch.allclose(nats, theirs[targets != -100], atol=1e-6)
    assert torch.allclose(grad, torch.autograd.grad((theirs * weights).sum(), logits)[0], atol=1e-6)


def test_the_gradient_of_the_loss_is_rounded_once():
    """To the precision of the logits, as it leaves."""
    logits, targets, w = torch.randn(5, 9).bfloat16(), torch.arange(5), torch.rand(5)
    def gradient(x):
        x.requires_grad_()
        return torch.autograd.grad((train.CrossEntropy.apply(x, targets) * w).sum(), x)[0]
    assert torch.equal(gradient(logits), gradient(logits.float().detach()).bfloat16())


def test_a_model_asked_somewhere_answers_as_everywhere():
    args, _ = train.parse(["--d_model", "16"])
    model, ids = train.build_model(args, 50), torch.randint(0, 50, (2, 9))
    asked = torch.tensor([0, 5, 17])
    assert torch.allclose(model(ids, None, asked), model(ids).flatten(0, 1)[asked], atol=1e-6)


def test_a_task_is_told_how_far_the_training_is():
    args, _ = train.parse(["--task", "mqar:length=32:n_pairs=8:vocab_size=64:easy=0.25"])
    data, seed = train.Task(args), torch.Generator()
    asked = [(data.batch(4, seed.manual_seed(0), progress)[1] != -100).sum() for progress in (0.1, 0.9)]
    assert asked == [16, 32]
    assert all((batch[1] != -100).sum() == 16 for batch in data.held_out(2, 3))


def test_the_form_that_was_asked_for_is_trained():
    """Where a mixer has it; the others take their fastest."""
    args = train.parse(["--mixer", "h3,attention", "--form", "scan"])[0]
    model = train.build_model(args, 300)
    assert [block.form for block in model.blocks] == ["scan", None]
    seen = []
    model.blocks[0].mixer.forward = lambda x, form: seen.append(form) or x
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert seen == ["scan"]


def test_only_so_many_shapes_are_recorded():
    args = train.parse(["--task", "induction", "--batch_size", "4", *SMALL])[0]
    data, machine = train.Task(args), train.Machine("cpu")
    model = train.build_model(args, data.vocab_size)
    optimizer = train.optimizer_for(model, args)
    captured = train.Captured(optimizer, machine.device)
    captured.graphs = dict.fromkeys(range(8))
    for _ in range(2):                                           # as usual, also where it is seen again
        train.train_step(model, optimizer, data.batch(4, torch.Generator().manual_seed(0)), args, machine, captured)
    assert len(captured.graphs) == 8


CAUSAL = sorted(name for name, mixer in train.from_lessons("MIXERS").items() if mixer.causal)
CAUSAL += ["attention:rope=false:n_positions=90"]


GROW = "ngram repeat_attention baseconv hyena sgconv monarch_mixer".split()            # a step changes sizes for good


@pytest.mark.parametrize("mixer", CAUSAL)
def test_a_decoder_steps_as_the_model_does(mixer):
    """Also in place, as in a CUDA graph, in which no number may stand for a position; and the states that it was given
    stay what they were."""
    model = train.build_model(train.parse(["--mixer", mixer, *SMALL])[0], 300).double().eval()
    ids = torch.randint(300, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, given = model.prefill(ids[:, :70])
        before = [x.clone() for x in tree_flatten(given)[0] if torch.is_tensor(x)]
        decoder, states = train.Decoder(model, given, 6), given
        for i in range(70, 76):
            wanted, states = model.step(ids[:, i], states)
            if i == 72 and mixer not in GROW:
                decoder.own(ids[:, i])
            if i >= 72 and mixer not in GROW:
                decoder.ids.copy_(ids[:, i])
                assert torch.allclose(decoder.step_in_place(), wanted, atol=1e-9)
            else:
                assert torch.allclose(decoder(ids[:, i]), wanted, atol=1e-9)
        after = [x for x in tree_flatten(given)[0] if torch.is_tensor(x)]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_step_in_place_does_not_overwrite_what_it_still_moves():
    """A state of which one part becomes the other."""
    class Swap(torch.nn.Module):
        blocks = ()

        def step(self, ids_t, states):
            a, b = states
            return ids_t + a, [b, a]

    decoder = train.Decoder(Swap(), [], 4)
    decoder.states = [torch.tensor([1]), torch.tensor([2])]
    decoder.own(torch.tensor([0]))
    assert [decoder.step_in_place().item() for _ in range(4)] == [1, 2, 1, 2]


def test_a_decoder_has_room_for_so_many_tokens():
    model = train.build_model(train.parse(["--mixer", "attention", *SMALL])[0], 300).eval()
    ids = torch.randint(300, (1, 9))
    decoder = train.Decoder(model, model.prefill(ids)[1], 2)
    for i in range(2):
        decoder(ids[:, i])
    with pytest.raises(ValueError, match="room for 2 tokens"):
        decoder(ids[:, 2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: it records CUDA graphs")
@pytest.mark.parametrize("mixer", CAUSAL)
def test_a_recorded_step_of_generation_is_the_step(mixer):
    """In bfloat16, so with the kernels. cosFormer looks whether its positions are at an end: done as usual."""
    model = train.build_model(train.parse(["--mixer", mixer, *SMALL])[0], 300).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(300, (2, 90), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        _, states = model.prefill(ids[:, :70])
        decoder = train.Decoder(model, states, 6)
        for i in range(70, 76):
            wanted, states = model.step(ids[:, i], states)
            assert torch.allclose(decoder(ids[:, i]), wanted, atol=3e-2, rtol=3e-2)
    assert (decoder.graph is not None) == (mixer not in (*GROW, "cosformer"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: it records CUDA graphs")
def test_a_recorded_step_is_the_step(text, tmp_path):
    for name, flags in (("as usual", []), ("recorded", ["--capture"])):
        train.main([*SMALL, "--device", "cuda", "--data", text, "--steps", "30", "--out", str(tmp_path / name), *flags])
    assert losses(tmp_path / "as usual") == pytest.approx(losses(tmp_path / "recorded"), rel=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--capture"]])
def test_trains_on_a_gpu(flags, text, tmp_path):
    train.main([*SMALL, "--device", "cuda", "--data", text, "--steps", "60", "--lr", "0.01",
                "--out", str(tmp_path / "r"), *flags])
    assert np.mean(losses(tmp_path / "r")[-5:]) < 0.7 * losses(tmp_path / "r")[0]
