"""The training script: it learns, goes on where it stopped, spreads over processes, refuses bad input in one line."""
import csv
import gc
import io
import os
import random
import re
import shutil
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
from kernels.muon import orthogonal

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
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"loss": 1.0, "tokens": 1, "accuracy": next(held_out)})
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_exact(optimizer, text, tmp_path):
    common = [*SMALL, "--data", text, "--eval_every", "6", "--optimizer", optimizer]
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
    args, _ = train.parse(["--lr", "0.01", "--weight_decay", "0.2", "--beta2", "0.9"])
    groups = {g["lr"]: g for g in train.optimizer_for(model, args).param_groups}
    assert all(g["betas"] == (0.9, 0.9) for g in groups.values())
    assert groups[1e-3]["params"] == [model.weight] and groups[1e-3]["weight_decay"] == 0
    assert groups[0.01]["params"] == [model.bias] and groups[0.01]["weight_decay"] == 0


def test_orthogonal_keeps_the_singular_vectors():
    """Singular values from 0.7 to 1.2 whatever they were, the vectors as they were; nothing comes of nothing."""
    torch.manual_seed(0)
    for i, j in ((8, 8), (24, 8), (8, 24)):
        G = torch.randn(2, i, j, dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        turned = U.mT @ orthogonal(G) @ Vh.mT
        values = turned.diagonal(dim1=1, dim2=2)
        assert (turned - torch.diag_embed(values)).abs().max() < 1e-9
        large = S > S.max(dim=1, keepdim=True).values / 50
        assert values[large].min() > 0.65 and values.max() < 1.25
    assert (orthogonal(torch.zeros(1, 3, 3)) == 0).all()


def test_two_steps_of_muon_by_hand():
    """Mean of the gradients, Nesterov's look ahead, orthogonal, larger for a tall matrix; a bias is AdamW's, and so is
    a parameter with a rate of its own."""
    torch.manual_seed(0)
    model, twin = (torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)) for _ in range(2))
    model[1].weight.optim = {"lr": 0.005}
    twin.load_state_dict(model.state_dict())
    args, _ = train.parse(["--optimizer", "muon", "--lr", "0.003", "--weight_decay", "0.5"])
    muon, W, mean = train.optimizer_for(model, args), model[0].weight.detach().clone(), torch.zeros(16, 4)
    adamw = torch.optim.AdamW([{"params": [twin[0].bias, twin[1].bias], "lr": 0.003, "weight_decay": 0.0},
                               {"params": [twin[1].weight], "lr": 0.005, "weight_decay": 0.5}], betas=(0.9, 0.99))
    for _ in range(2):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mean = 0.9 * mean + 0.1 * twin[0].weight.grad
        lr, G = 0.02, 0.1 * twin[0].weight.grad + 0.9 * mean
        W = (1 - lr * 0.5) * W - lr * 2 * orthogonal(G[None])[0]
        muon.step(), adamw.step()
    assert torch.allclose(model[0].weight, W, atol=1e-6)
    for p, q in zip(list(model.parameters())[1:], list(twin.parameters())[1:], strict=True):
        assert torch.allclose(p, q, atol=1e-7)


def test_a_run_does_not_change_its_optimizer(text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--steps", "1", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    error = refusal(["--resume", tmp_path / "run", "--steps", "3", "--optimizer", "adamw"], capsys)
    assert "has --optimizer muon: it cannot go on with adamw" in error


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, message", [
    ("--data /no/such/file", "no such file"), ("--mixer atention", "did you mean attention"),
    ("--task indction", "did you mean induction"), ("--mixer window:windw=3", "no option 'windw'; it has .*window"),
    ("--mixer window:window=0", "window must be at least 1"), ("--mixer window:window=2.5", "must be int"),
    ("--mixer attention:rope=3", "must be bool"), ("--mixer cosformer:M=9", "M = 9"), ("--task text:length=3", "text"),
    ("--lr nan", "--lr must be a number"), ("--seed -1", "--seed"), ("--top_k -1", "--top_k"), ("--mlp -1", "--mlp"),
    ("--device meta", "--device meta"), ("--task induction --data README.md", "makes its own data"),
    ("--d_model 30 --n_heads 4", "30 is not a multiple of n_heads 4"), ("--mixer linformer", "not causal"),
    ("--n_layers 1", "pattern of 2 layers"), ("--mixer jamba --n_layers 4", "pattern of 8 layers"),
    ("--batch_size 7 --accumulate 2", "7 is not a multiple"), ("--steps 0", "--steps must be at least 1"),
    ("--steps many", "invalid int value"), ("--nonsense 3", "unrecognized arguments"), ("--device cuda:99", "cuda:99"),
    ("--task induction:length=3", "length"), ("--vocab_size 100", "257"), ("--resume /no/run", "has no checkpoint"),
    ("--sample hello", "there is no run"), ("--out /proc/no/folder", "cannot write"),
    ("--form scan", "--form scan: .* has .*parallel"), ("--capture --device cpu", "--capture is for one GPU"),
    ("--tokenizer gpt3", "invalid choice"), ("--enough 0.9", "text has none"), ("--rare -1", "--rare"),
    ("--beta2 1", "--beta2 must be at least 0 and below 1"), ("--lr_end -0.1", "--lr_end"), ("--optimizer sgd", "muon"),
    ("--task induction --enough 2", "at most 1"), ("--mixer attention:window=abc", "window must be int .*not 'abc'"),
    ("--mixer attention:window=1.5", "window must be int"), ("--mixer attention:qk_norm=abc", "qk_norm must be float"),
    ("--mixer taylor:feature_dim=0", "feature_dim must be at least 1"), ("--mixer rglru:gelu=3", "gelu must be str"),
    ("--mixer ngram:n_heads=abc", "n_heads must be int"), ("--mixer kda:expand_v=2", "no option 'expand_v'; it has"),
    ("--mixer griffin,attention", "griffin is a pattern of layers, .*stands alone"), ("--task text:x=1", "text has no"),
    ("--mixer attention,", "a name is missing in 'attention,'"), ("--lr inf", "a number above 0"),
    ("--mlp 0.1 --d_model 16", "--mlp 0.1 .* is no width"), ("--mixer gated_rfa:tau=0", "tau must be above 0"),
    ("--mixer lru:r_max=3", "r_min .* r_max"), ("--mixer rwkv6:depth=3", "depth must be from 0"),
    ("--mixer rwkv4:depth=-1", "depth must be from 0"), ("--mixer rwkv7:depth=3", "depth must be from 0"),
    ("--mixer lru:r_min=1", "r_min = 1 and r_max = 1.0"), ("--mixer lru:r_min=-0.5", "r_min = -0.5"),
    pytest.param("--mixer lru:max_phase=" + 400 * "9", "int too (big|large)", id="400 digits"),
    ("--mixer attention:qk_norm=-1", "qk_norm must be a number, and at least 0"),
    ("--mixer attention:qk_norm=-1.0", "at least 0"),
    ("--data=", "--data : no such file or folder"), ("--task induction --data=", "makes its own data")])
def test_bad_flags_are_refused(flags, message, capsys, tmp_path):
    assert re.search(message, refusal([*SMALL, "--steps", "1", *flags.split()], capsys))


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not.*text"), (bytes(range(128, 256)) * 9, "not UTF-8"),
    (b"too short", "shorter than --context 32"), (b"x", "shorter than --context 32"),
    (b"text and \0 bytes" * 99, "NUL")])
def test_bad_text_is_refused(content, message, capsys, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(content)
    for tokenizer in ("byte", "bpe"):
        flags = [*SMALL, "--data", path, "--out", tmp_path / "run", "--tokenizer", tokenizer]
        assert re.search(message, refusal(flags, capsys))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_text_is_refused(capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG\0")
    assert "no text" in refusal([*SMALL, "--data", tmp_path / "pictures"], capsys)


def test_options_are_read_as_what_they_are():
    assert train.look_up("attention: rope = false", "mixer", train.from_lessons("MIXERS"))[1] == {"rope": False}
    assert train.look_up("performer:m=8", "mixer", train.from_lessons("MIXERS"))[1] == {"m": 8}
    options = train.look_up("attention:window=none:qk_norm=1", "mixer", train.from_lessons("MIXERS"))[1]
    assert options == {"window": None, "qk_norm": 1}


def test_a_class_has_its_own_defaults_and_its_bases():
    options = train.options_of(train.from_lessons("MIXERS")["window"])
    assert options["window"] == 64 and options["rope"] is True


def test_spaces_around_a_name_in_a_list_of_mixers_do_not_count():
    assert train.pattern("window , attention") == train.pattern("window,attention")
    with pytest.raises(train.BadInput, match="griffin is a pattern of layers"):
        train.pattern("attention, griffin")
    with pytest.raises(train.BadInput, match="a name is missing in 'attention, '"):
        train.pattern("attention, ")


def test_an_mlps_width_is_the_nearest_multiple_of_16():
    assert [train.mlp_width(mlp, d_model) for mlp, d_model in ((8 / 3, 64), (8 / 3, 128), (0.1, 16))] == [176, 336, 0]


def test_no_seed_trains_on_what_is_held_out(tmp_path, monkeypatch):
    """A generator looks at the last 32 bits of its seed only."""
    task = ["--task", "induction:length=16:vocab_size=8", "--steps", "3"]
    held_out = [ids for ids, *_ in train.Task(train.parse([*SMALL, *task])[0]).held_out(8)]
    for seed in ("0", "1", "256", str(2 ** 31 - 1)):
        trained = batches_of([*task, "--seed", seed, "--out", str(tmp_path / seed)], monkeypatch)
        assert not any(torch.equal(a, b) for a in trained for b in held_out)


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
        return torch.autograd.grad((train.cross_entropy(x, targets) * w).sum(), x)[0]
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
    captured = train.Captured(optimizer, machine.device, train.one_update)
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


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_a_decoder_tries_no_step_that_it_has_no_room_for(monkeypatch, n_tokens):
    """To record one, a step is done beside those that are asked for."""
    class OnGPU(torch.Tensor):
        is_cuda = True

    class Count(torch.nn.Module):
        blocks = ()

        def step(self, ids_t, states):
            return ids_t, [states[0] + 1]
    left = []
    monkeypatch.setattr(train.Decoder, "record", lambda decoder, ids_t: left.append(decoder.left))
    decoder, ids = train.Decoder(Count(), [], n_tokens), torch.tensor([1]).as_subclass(OnGPU)
    decoder.states = [torch.tensor([0]).as_subclass(OnGPU)]
    for _ in range(n_tokens):
        decoder(ids)
    assert left == list(range(n_tokens - 1, 0, -1))


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


# ------------------------------------------------------------------------------------------- numbers worked out by hand


def test_the_schedule_by_hand():
    """A straight line to the peak, which step --warmup reaches, then half a cosine to --lr_end of it, by default 0."""
    args = train.parse(["--warmup", "4", "--steps", "12", "--lr_end", "0.1"])[0]
    factors = [train.schedule(step, args) for step in range(1, 13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[7] == pytest.approx(0.55) and factors[11] == pytest.approx(0.1)
    assert factors[5] == pytest.approx(0.55 + 0.45 * np.cos(np.pi / 4))
    no_warmup = train.parse(["--warmup", "0", "--steps", "2"])[0]
    assert [train.schedule(step, no_warmup) for step in (1, 2)] == pytest.approx([0.5, 0.0])


def test_the_learning_rates_of_a_run_are_the_schedules(text, tmp_path, monkeypatch):
    real_step, used = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda model, optimizer, *rest: used.append(
        optimizer.param_groups[0]["lr"]) or real_step(model, optimizer, *rest))
    train.main([*SMALL, "--data", text, "--steps", "6", "--warmup", "3", "--lr", "0.003", "--out", str(tmp_path / "r")])
    by_hand = [0.001, 0.002, 0.003, *(0.003 * (0.5 + 0.5 * np.cos(np.pi * i / 3)) for i in (1, 2, 3))]
    assert used == pytest.approx(by_hand)
    with open(tmp_path / "r" / "log.csv") as f:
        assert [float(row["lr"]) for row in csv.DictReader(f)] == pytest.approx(by_hand)


def test_fewer_steps_than_warm_up_is_said(text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--steps", "2", "--warmup", "8", "--out", str(tmp_path / "a")])
    assert "--steps 2 ends within --warmup 8: the learning rate never gets to 0.003" in capsys.readouterr().out
    train.main([*SMALL, "--data", text, "--steps", "2", "--warmup", "2", "--out", str(tmp_path / "b")])
    assert "--warmup" not in capsys.readouterr().out


def batches_of(argv, monkeypatch):
    """The ids of each step of a run."""
    seen = []
    monkeypatch.setattr(train, "train_step", lambda _, __, batch, *___: seen.append(batch[0]) or torch.ones(()))
    train.train(train.parse([*SMALL, *argv])[0], say=lambda *_, **__: None)
    return torch.stack(seen)


def test_the_seed_orders_the_data(text, tmp_path, monkeypatch):
    flags = ["--data", text, "--steps", "3"]
    runs = [batches_of([*flags, "--seed", seed, "--out", str(tmp_path / str(i))], monkeypatch)
            for i, seed in enumerate("011")]
    assert torch.equal(runs[1], runs[2])
    steps = [tuple(ids.flatten().tolist()) for run in runs[:2] for ids in run]
    assert len(set(steps)) == 6                                        # no step like another, nor like another seed's


def test_the_windows_cover_the_text_evenly(text, monkeypatch):
    """Of a text as long as the plays, in steps as the default's, from any seed on: once two texts' worth of tokens was
    trained on, each was in one window at least and in four at most. Of as many at random, a tenth is in none."""
    data = train.Text(train.parse([*SMALL, "--data", text])[0])
    data.train, data.context, starts = range(1_441_611), 128, []
    monkeypatch.setattr(data, "windows", lambda _, batch: starts.extend(batch))
    monkeypatch.setattr(data, "transform", lambda batch, generator: batch)
    for seed in (0, 2654435761 % 2 ** 31):
        starts.clear()
        for step in range(2 * len(data.train) // (16 * 128)):
            data.batch(16, torch.Generator().manual_seed(seed + step))
        edges = np.zeros(len(data.train) + 1, int)
        np.add.at(edges, starts, 1)
        np.add.at(edges, np.array(starts) + 128, -1)
        counts = edges.cumsum()[128:-129]                           # fewer windows reach the two ends
        assert counts.min() >= 1 and counts.max() <= 4


def test_a_checkpoint_from_before_a_flag_goes_on_as_it_began(text, tmp_path, monkeypatch):
    """It has no word of the flag: what was the rule then holds, not the default of today."""
    old = [word for name, value in train.BEFORE.items() for word in (f"--{name}", str(value))]
    train.main([*SMALL, "--data", text, "--steps", "8", *old, "--out", str(tmp_path / "whole")])
    cut, real_args, real_save = tmp_path / "cut", train.saved_args, train.save

    def save_and_stop(*rest):
        real_save(*rest)
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train, "save", save_and_stop)
        m.setattr(train, "saved_args", lambda args: {k: v for k, v in real_args(args).items() if k not in train.BEFORE})
        train.main([*SMALL, "--data", text, "--steps", "8", "--eval_every", "4", *old, "--out", str(cut)])
    checkpoint = train.load_checkpoint(cut)
    assert checkpoint["step"] == 4 and not checkpoint["args"].keys() & train.BEFORE.keys()
    train.main(["--resume", str(cut), "--device", "cpu"])
    assert losses(cut) == losses(tmp_path / "whole")


def test_what_is_held_out_is_trained_on_nowhere(tmp_path):
    """The last tenth of a file, and no token of it before; what is scored is what is held out."""
    path = tmp_path / "text"
    path.write_text("a" * 9000 + "b" * 1000)
    data = train.Text(train.parse([*SMALL, "--data", str(path)])[0])
    assert set(data.train) == {97} and set(data.val) == {98} and (len(data.train), len(data.val)) == (9000, 1000)
    for n_batches in (None, 1, 3):
        for ids, targets, _ in data.held_out(4, n_batches):
            assert (ids == 98).all() and (targets == 98).all()
    assert (data.batch(64, torch.Generator().manual_seed(0))[0] == 97).all()


def test_an_evaluation_by_hand(tmp_path):
    """A model that has the same opinion everywhere, on tokens of one to many bytes, of which the first is read only and
    the last is predicted only: bits per byte of what is predicted."""
    path = tmp_path / "text"
    path.write_text("some words " * 900 + "é" * 1100)
    flags = [*SMALL, "--data", str(path), "--tokenizer", "bpe", "--vocab_size", "262", "--context", "16"]
    args = train.parse([*flags, "--batch_size", "3"])[0]
    data, machine = train.Text(args), train.Machine("cpu")
    logits = torch.randn(data.vocab_size, generator=torch.Generator().manual_seed(0))
    data.val = np.array([data.vocab_size - 1, *range(97, 97 + 50), 260, *range(97, 97 + 64)], np.uint16)
    data.n_windows = 115 // 16

    class Constant(torch.nn.Module):
        def forward(self, ids, extras, asked):
            return logits.expand(len(asked), -1)

    held_out = torch.from_numpy(data.val.astype(np.int64))[1:]
    n = 7 * 16                                                                     # the windows that are whole
    nats = -logits.double().log_softmax(-1)[held_out[:n]]
    n_bytes = sum(len(data.tokenizer.decode_single_token_bytes(int(i))) for i in held_out[:n])
    scores = train.evaluate(Constant(), data, args, machine)
    assert scores["tokens"] == n and scores["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(nats.sum().item() / np.log(2) / n_bytes, rel=1e-5)
    assert f"held out, {n:,} tokens" in data.report(scores)
    part = train.evaluate(Constant(), data, args, machine, n_batches=2)
    assert part["tokens"] == 2 * 3 * 16


def test_a_look_at_the_held_out_text_is_spread_over_it(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(chr(33 + i // 100) for i in range(9000)) + "".join(chr(33 + i // 40) for i in range(1601)))
    data = train.Text(train.parse([*SMALL, "--data", str(path), "--context", "40"])[0])
    assert len(data.val) == 1061 or len(data.val) > 41
    data.val = np.frombuffer(bytes(i // 10 for i in range(1001)), np.uint8).astype(np.uint16)        # 0 0 0 ... 99 100
    data.context, data.n_windows = 10, 100
    first = torch.cat([ids[:, 0] for ids, _, _ in data.held_out(5, 2)]).tolist()
    assert first == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    for n_batches in (None, 20, 1000):
        assert torch.cat([ids[:, 0] for ids, _, _ in data.held_out(7, n_batches)]).tolist() == list(range(100))


def test_the_last_evaluation_does_not_depend_on_the_batch(text, tmp_path, monkeypatch, capsys):
    """Its batches are of a size for the machine; where it takes long, it says how much longer."""
    flags = [*SMALL, "--data", text, "--context", "16"]
    args = [train.parse([*flags, "--batch_size", n])[0] for n in ("2", "64")]
    data, machine = train.Text(args[0]), train.Machine("cpu")
    model, sizes = train.build_model(args[0], 256), []
    real_ask = train.ask
    monkeypatch.setattr(train, "ask", lambda model, batch, machine: sizes.append(len(batch[0])) or real_ask(
        model, batch, machine))
    scores = [train.evaluate(model, data, a, machine) for a in args]
    assert scores[0] == scores[1] and sizes[0] == 256 and len(sizes) == 2 * 2
    assert machine.rows(128, 4096) == 32 and machine.rows(10 ** 9, 10 ** 9) == 1
    monkeypatch.setattr(train.Machine, "rows", lambda *_: 32)
    times = iter(range(0, 10 ** 6, 3))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(times))
    train.evaluate(model, data, args[0], machine, say=print)
    assert re.search(r"held out: 21%   [01]:\d\d left", capsys.readouterr().out)


def test_weight_decay_is_for_matrices_and_a_bias_is_none():
    model = torch.nn.Module()
    model.weight, model.bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    model.gain = torch.nn.Parameter(torch.ones(2))
    groups = train.optimizer_for(model, train.parse(["--weight_decay", "0.2"])[0]).param_groups
    assert {g["weight_decay"]: len(g["params"]) for g in groups} == {0.2: 1, 0.0: 2}
    gates = train.build_model(train.parse(["--mixer", "rglru", *SMALL])[0], 300)
    decayed = [p for g in train.optimizer_for(gates, train.parse([])[0]).param_groups if g["weight_decay"]
               for p in g["params"]]
    biases = [p for name, p in gates.named_parameters() if name.endswith("bias")]
    assert any(p.ndim > 1 for p in biases) and not any(p is q for p in biases for q in decayed)


# ------------------------------------------------------------------------------------------------ a gradient's gradient


def test_a_gradient_of_the_losss_gradient_is_torchs():
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(5, 7, dtype=torch.float64), torch.randint(7, (5,))
    w, v = torch.rand(5, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)

    def twice(nats):
        x, weights = logits.clone().requires_grad_(), w.clone().requires_grad_()
        first, = torch.autograd.grad((nats(x, targets) * weights).square().sum(), x, create_graph=True)
        second = torch.autograd.grad((first * v).sum(), (x, weights), create_graph=True)
        return first, *second, *torch.autograd.grad(second[0].square().sum(), (x, weights))
    theirs = twice(lambda x, targets: torch.nn.functional.cross_entropy(x, targets, reduction="none"))
    for ours, other in zip(twice(train.cross_entropy), theirs, strict=True):
        assert torch.allclose(ours, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda x: train.cross_entropy(x, targets), logits.requires_grad_())


def test_a_penalty_on_the_gradient_reaches_the_weights():
    """.backward() through a gradient's norm, as for a WGAN; and the fast gradient is the slow one."""
    targets = torch.tensor([1, 0, 2])
    def penalty(nats):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        loss = nats(layer(torch.randn(3, 4)), targets).sum()
        grads = torch.autograd.grad(loss, layer.parameters(), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        return layer.weight.grad
    theirs = penalty(lambda x, targets: torch.nn.functional.cross_entropy(x, targets, reduction="none"))
    assert torch.allclose(penalty(train.cross_entropy), theirs, atol=1e-6)
    x = torch.randn(3, 5, requires_grad=True)
    slow, fast = (torch.autograd.grad(train.cross_entropy(x, targets).sum(), x, create_graph=c)[0] for c in (1, 0))
    assert torch.equal(slow, fast)


def test_float64_throughout(text, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        scores = train.train(train.parse([*SMALL, "--mixer", "attention", "--data", text, "--steps", "2", "--out",
                                          str(tmp_path / "run")])[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert 0 < scores["loss"] < 10
    assert train.cross_entropy(torch.randn(2, 3).double(), torch.zeros(2).long()).dtype == torch.float64


# ------------------------------------------------------------------------------ whatever the console, folder or signal


def test_text_of_any_alphabet_on_any_console(text, tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    train.main([*SMALL, "--data", text, "--steps", "1", "--out", run])
    for encoding in ("cp1252", "ascii"):
        console = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", console)
        train.main(["--resume", run, "--sample", "\u03a9 Romeo", "--n_tokens", "3"])
        console.flush()
        assert console.buffer.getvalue().startswith(b"? Romeo")


def test_what_runs_wrote_is_not_read(tmp_path, capsys, text):
    """Not the first run by the second, nor a run's own files when it goes on; one's own text beside them is read."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text(open(text).read())
    flags = [*SMALL, "--data", str(notes), "--steps", "2"]
    train.main([*flags, "--out", str(notes / "run1")])
    (notes / "run1" / "log.csv.tmp").write_text("half a log")
    (notes / "run1" / "mine.txt").write_text("a remark")
    capsys.readouterr()
    assert [p.name for p in train.text_files(notes)] == ["a.md", "mine.txt"]
    assert f"left out is what the runs in it wrote: {notes / 'run1'}" in capsys.readouterr().out
    (notes / "run1" / "mine.txt").unlink()
    train.main([*flags, "--out", str(notes / "run2")])
    a, b = (train.load_checkpoint(notes / name) for name in ("run1", "run2"))
    assert a["n_tokens"] == b["n_tokens"] and a["text"] == b["text"]
    train.main(["--resume", str(notes / "run1"), "--steps", "4"])
    train.main([*flags, "--out", str(notes)])
    train.main(["--resume", str(notes), "--steps", "4"])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "config.json").write_text("{}")                                     # of no run
    assert [p.name for p in train.text_files(tmp_path / "site")] == ["config.json"]


@pytest.mark.parametrize("mixer", ["attention:rope=false:n_positions=40", "cosformer:M=40", "hyena:max_len=40",
                                   "sgconv:max_len=40:d=8", "short_conv,attention:rope=false:n_positions=40"])
def test_a_sample_is_written_to_the_last_position(mixer, text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--mixer", mixer, "--steps", "1", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "run"), "--sample", "O", "--n_tokens", "60"])
    train.main(["--resume", str(tmp_path / "run"), "--sample", "O", "--n_tokens", "40"])
    said, exactly = capsys.readouterr().out.split("[stopped: ")[0], train.load_checkpoint(tmp_path / "run")
    model, args = train.build_model(train.parse([*SMALL, "--mixer", mixer])[0], 256).eval(), exactly["args"]
    train.load_weights(model, exactly, tmp_path)
    written, generator = [], torch.Generator().manual_seed(args["seed"])
    with pytest.raises(ValueError):
        for token in train.generate(model, torch.tensor([[79]]), 60, 0.6, 50, generator):
            written.append(token)
    assert len(written) == 40 and said == "O" + bytes(written).decode(errors="replace") + "\n"


def end_of(argv, capsys):
    """Exit code and the line in which it is explained."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in argv])
    error = capsys.readouterr().err.strip()
    assert "\n" not in error, error
    return stop.value.code, error


def at_step(n, what, monkeypatch):
    """Do something within step n."""
    real_step, steps = train.train_step, []

    def step(*arguments):
        steps.append(1)
        loss = real_step(*arguments)
        if len(steps) == n:
            what(*arguments)
        return loss
    monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_saved(number, code, text, tmp_path, capsys, monkeypatch):
    """Also where an exception is swallowed: in a callback of the garbage collector. It goes on as it would have."""
    flags, before = [*SMALL, "--data", text, "--steps", "9", "--eval_every", "100"], signal.getsignal(signal.SIGINT)
    train.main([*flags, "--out", str(tmp_path / "whole")])

    def callback(*_):
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    def while_collecting(*_):
        gc.callbacks.append(callback)
        gc.collect()
    with monkeypatch.context() as patch:
        at_step(4, while_collecting if number == signal.SIGINT else lambda *_: signal.raise_signal(number), patch)
        capsys.readouterr()
        got, error = end_of([*flags, "--out", tmp_path / "run"], capsys)
    assert got == code and f"interrupted; the checkpoint of step 4 is kept, --resume {tmp_path / 'run'}" in error
    assert len(losses(tmp_path / "run")) == 4
    train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert f"going on with {tmp_path / 'run'}: seed 0, step 4 of 9" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_the_first_step_or_after_the_last(text, tmp_path, capsys, monkeypatch):
    flags = [*SMALL, "--data", text, "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_fit", lambda *_: signal.raise_signal(signal.SIGINT))
        code, error = end_of([*flags, "--out", tmp_path / "a"], capsys)
    assert (code, error) == (130, "train.py: interrupted before anything new was saved")
    assert not (tmp_path / "a").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train.Text, "scores", lambda *args: args[-1] and signal.raise_signal(signal.SIGINT) or [])
        code, error = end_of([*flags, "--out", tmp_path / "b"], capsys)
    assert code == 130 and "the checkpoint of step 2" in error


def test_a_second_signal_does_not_wait(text, tmp_path, capsys, monkeypatch):
    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    at_step(3, twice, monkeypatch)
    flags = [*SMALL, "--data", text, "--steps", "9", "--out", tmp_path / "run"]
    assert end_of(flags, capsys) == (130, f"train.py: interrupted; nothing is saved in {tmp_path / 'run'} yet")


def test_two_runs_do_not_share_a_folder(text, tmp_path, capsys, monkeypatch):
    """The second is refused while the first holds it; a lock that nobody holds any more is none."""
    flags, run = [*SMALL, "--data", text, "--steps", "2"], tmp_path / "run"
    run.mkdir()
    with train.locked(run):
        assert "another process is training" in refusal([*flags, "--out", run], capsys)
    train.main([*flags, "--out", str(run)])
    capsys.readouterr()
    with train.locked(run):
        assert "another process is training" in refusal(["--resume", run, "--steps", "4"], capsys)
    checkpoint = train.parse(["--resume", str(run), "--steps", "4"])
    train.main(["--resume", str(run), "--steps", "4"])
    with pytest.raises(train.BadInput, match="another process has gone on"):
        train.train(*checkpoint, say=lambda *_, **__: None)
    monkeypatch.setattr(train.Path, "exists", lambda path: False)                          # both look at the same time
    (train.RUNS / "text-short_conv+based").mkdir(parents=True)
    with pytest.raises(train.BadInput, match="cannot write to"):
        train.output_folder(train.parse([])[0], None)


def test_weights_that_are_not_finite_are_not_saved(text, tmp_path, capsys, monkeypatch):
    def spoil(model, *_):
        with torch.no_grad():
            next(model.parameters())[0, 0] = torch.nan
    flags = [*SMALL, "--data", text, "--steps", "9", "--eval_every", "1", "--out", tmp_path / "run"]
    at_step(5, spoil, monkeypatch)
    assert "not finite after step 5: try an --lr below 0.003; the checkpoint of step 4" in refusal(flags, capsys)
    assert all(x.isfinite().all() for x in train.load_checkpoint(tmp_path / "run")["model"].values())


@pytest.mark.parametrize("file", ["checkpoint.pt", "log.csv", "loss.png", "sample.txt"])
def test_a_full_disk(file, text, tmp_path, capsys, monkeypatch):
    """Without a checkpoint a run ends, and says which one it has; without the other files it goes on."""
    run = tmp_path / "run"
    at_step(5, lambda *_: (run / f"{file}.tmp").symlink_to("/dev/full"), monkeypatch)
    flags = [*SMALL, "--data", text, "--steps", "6", "--eval_every", "3", "--out", run]
    if file == "checkpoint.pt":
        error = refusal(flags, capsys)
        assert "checkpoint.pt: No space left on device; the checkpoint of step 3" in error
    else:
        train.main([str(f) for f in flags])
        assert f"cannot write {run / file}: No space left on device" in capsys.readouterr().err
        assert train.load_checkpoint(run)["step"] == 6
    assert not list(run.glob("*.tmp")) and not list(run.glob(".*.tmp"))


def test_a_full_disk_while_tokenizing(text, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.os, "fsync", full)
    assert "No space left" in refusal([*SMALL, "--data", text, "--out", tmp_path / "run"], capsys)
    assert not list(train.CACHE.iterdir())


def test_a_folder_that_goes_away_or_cannot_be_written(text, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    flags = [*SMALL, "--data", text, "--steps", "4", "--eval_every", "2", "--out", run]
    with monkeypatch.context() as patch:
        at_step(3, lambda *_: shutil.rmtree(run), patch)
        assert f"No such file or directory; nothing is saved in {run} yet" in refusal(flags, capsys)
    run.mkdir()
    (run / "log.csv").mkdir()
    (run / "loss.png").mkdir()
    train.main([str(f) for f in flags])
    assert capsys.readouterr().err.count("Is a directory") == 4
    assert train.load_checkpoint(run)["step"] == 4


def test_a_plot_that_fails_ends_no_run(text, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")
    monkeypatch.setattr(train, "plot", fail)
    train.main([*SMALL, "--data", text, "--steps", "2", "--out", str(tmp_path / "run")])
    assert "loss.png: no font" in capsys.readouterr().err and train.load_checkpoint(tmp_path / "run")["step"] == 2
    monkeypatch.undo()
    train.plot(io.BytesIO(), [{"step": 1, "loss": 2.0}], "a$b$c_{")                          # a name that is no formula


def test_a_reader_that_has_seen_enough(text, tmp_path, capsys, monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    at_step(3, lambda *_: os.close(reader), monkeypatch)
    flags = [*SMALL, "--data", text, "--steps", "4", "--eval_every", "2", "--out", tmp_path / "run"]
    assert f"Broken pipe; the checkpoint of step 2 is kept, --resume {tmp_path / 'run'}" in refusal(flags, capsys)


def test_a_model_too_large_for_the_memory_is_refused(capsys):
    assert "allocate memory" in refusal([*SMALL, "--task", "induction", "--d_model", "10000000"], capsys)


def test_too_little_memory_for_a_step_is_said(text, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nOf the allocated memory ...")
    at_step(3, full, monkeypatch)
    flags = [*SMALL, "--data", text, "--steps", "4", "--eval_every", "2", "--out", tmp_path / "run"]
    assert "CUDA out of memory. Tried to allocate 20.00 MiB.; the checkpoint of step 2" in refusal(flags, capsys)


# ------------------------------------------------------------------------------------------ checkpoints and kept tokens


def test_one_bit_of_a_checkpoint(text, tmp_path):
    """Wherever it is: the checkpoint is refused, or it is one of those that mean nothing (padding)."""
    train.main([*SMALL, "--data", text, "--steps", "1", "--out", str(tmp_path / "run")])
    path, refused = tmp_path / "run" / "checkpoint.pt", 0
    whole, good = path.read_bytes(), train.load_checkpoint(tmp_path / "run")
    for at in range(999, len(whole), len(whole) // 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1:])
        try:
            other = train.load_checkpoint(tmp_path / "run")
        except train.BadInput as e:
            assert "damaged" in str(e) and "\n" not in str(e)
            refused += 1
        else:
            same = zip(*(tree_flatten((c["model"], c["optimizer"]))[0] for c in (good, other)), strict=True)
            assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in same)
    assert refused > 50


@pytest.mark.parametrize("change", [
    {"step": "5"}, {"args": 3}, {"args": {"mixer": 5}}, {"args": {"d_model": "many"}}, {"args": {7: 1}}, {"model": [1]},
    {"model": {"embed.weight": "x"}}, {"history": {}}, {"history": [3]}, {"history": [{"step": 1, "loss": "x"}]},
    {"optimizer": {"state": 1}}, {"optimizer": {}}, {"tokenizer": {"name": 3}}, {"n_tokens": "all"}, {"more": 1},
    {"text": 5}])
def test_a_checkpoint_of_other_contents_is_refused(change, text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--mixer", "short_conv", "--steps", "1", "--out", str(tmp_path / "run")])
    path = tmp_path / "run" / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    capsys.readouterr()
    refusal(["--resume", tmp_path / "run", "--steps", "3"], capsys)
    if "tokenizer" in change:
        assert "no such tokenizer" in refusal(["--resume", tmp_path / "run", "--sample", "O"], capsys)


def test_an_optimizer_of_other_shapes_is_refused(text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--steps", "1", "--out", str(tmp_path / "run")])
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2)
    torch.save(checkpoint, path)
    capsys.readouterr()
    assert "does not fit" in refusal(["--resume", tmp_path / "run", "--steps", "3"], capsys)


def test_another_text_of_the_same_length_is_noticed(text, tmp_path, capsys):
    train.main([*SMALL, "--data", text, "--steps", "1", "--out", str(tmp_path / "run")])
    played = open(text).read()
    (tmp_path / "play.txt").write_text(played.replace("the", "eht"))
    capsys.readouterr()
    assert "not the text" in refusal(["--resume", tmp_path / "run", "--steps", "3"], capsys)
    path = tmp_path / "run" / "checkpoint.pt"
    old = torch.load(path, weights_only=True)
    del old["text"]                                                                          # as it once was written
    torch.save(old, path)
    train.main(["--resume", str(tmp_path / "run"), "--sample", "O", "--n_tokens", "3"])
    (tmp_path / "play.txt").write_text(played)
    train.main(["--resume", str(tmp_path / "run"), "--steps", "2"])
    assert "without a hash of the text" in capsys.readouterr().out
    assert train.load_checkpoint(tmp_path / "run")["text"]


def zero(path):
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(512) + content[4608:])


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", [zero, lambda p: os.truncate(p, p.stat().st_size // 2), lambda p: p.unlink(),
                                    lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b"")])
def test_damaged_tokens_are_made_again(file, damage, text, capsys):
    args = train.parse([*SMALL, "--data", text, "--tokenizer", "bpe", "--vocab_size", "600"])[0]
    good = train.Text(args)
    wanted = np.array(good.train), np.array(good.val), good.identity
    before = [p.read_bytes() for p in sorted(train.CACHE.glob("*/*"))]
    damage(next(train.CACHE.glob(f"*/{file}")))
    if before == [p.read_bytes() for p in sorted(train.CACHE.glob("*/*"))]:
        pytest.skip("too short for this damage")
    capsys.readouterr()
    data = train.Text(args)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "made again" in said
    assert np.array_equal(data.train, wanted[0]) and np.array_equal(data.val, wanted[1]) and data.identity == wanted[2]
    train.Text(args)
    assert capsys.readouterr().out == ""


def test_a_fingerprint_is_of_everything_up_to_a_gigabyte(tmp_path):
    prints, path = set(), tmp_path / "train.bin"
    content = os.urandom(3 << 20) + b"end"
    for at in (None, 0, 1 << 20, len(content) - 1):
        path.write_bytes(content if at is None else content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        prints.add(train.fingerprint(tmp_path))
    assert len(prints) == 4
    with open(path, "r+b") as f:
        f.truncate(5 << 30)                  # a hole: 1024 MiB of it are read
        before = train.fingerprint(tmp_path)
        f.seek(5 << 20)
        f.write(b"x")
    assert train.fingerprint(tmp_path) != before


class PanicException(BaseException):
    """As pyo3, the bridge to Rust, raises: no Exception."""


def test_a_tokenizer_that_panics_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    """In its training, in encoding, and on a prompt; the file is named, and the way round. What stands in for the
    libraries panics at a word."""
    import rustbpe

    class Trainer:
        def train_from_iterator(self, pieces, vocab_size):
            if "boom" in "".join(pieces):
                raise PanicException("called `Option::unwrap()` on a `None` value")

        def get_mergeable_ranks(self):
            return [(bytes([i]), i) for i in range(256)]

        def get_pattern(self):
            return "."

    class Encoding:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def encode_ordinary(self, piece):
            if "boom" in piece:
                raise PanicException
            return self.tokenizer.encode_ordinary(piece)

    notes = tmp_path / "notes"
    notes.mkdir()
    for name in "abc":
        (notes / name).write_text("words and " * 99 + 99 * "boom " * (name == "b"))
    flags = [*SMALL, "--data", notes, "--steps", "1", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(rustbpe, "Tokenizer", Trainer)
        error = refusal([*flags, "--tokenizer", "bpe"], capsys)
        assert f"{notes / 'b'}: " in error and "--tokenizer byte" in error
    assert not (tmp_path / "run").exists()
    real = train.rebuild_tokenizer
    monkeypatch.setattr(train, "rebuild_tokenizer", lambda saved: Encoding(real(saved)))
    error = refusal([*flags, "--tokenizer", "bpe", "--vocab_size", "257"], capsys)
    assert f"{notes / 'b'}: " in error and "--tokenizer byte" in error
    (notes / "b").write_text("other words " * 99)
    train.main([str(f) for f in flags])
    capsys.readouterr()
    assert "--sample: " in refusal(["--resume", tmp_path / "run", "--sample", "boom"], capsys)
