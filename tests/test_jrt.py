"""Lesson 05: every form with every prefix, who may see what, generation behind it, transforms, the order effect."""
import importlib

import pytest
import torch
from harness import MIXERS, check_close, inputs, make, plain_forms

import train

lesson = importlib.import_module("05_jrt")
PREFIXES = [0, 1, 31, 70, torch.tensor([20, 64])]


def values_and_gradients(mixer, form, x, prefix):
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y = mixer(x, form, prefix=prefix)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()).sum().backward()
    return [y.detach(), x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in mixer.parameters())]


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
def test_forms_agree_with_any_prefix(prefix):
    mixer = make("jrt")
    x, _ = inputs(mixer, 70)
    results = {form: values_and_gradients(mixer, form, x, prefix) for form in plain_forms(mixer)}
    for form in ("chunked", "recurrent"):
        for one, other in zip(results["parallel"], results[form], strict=True):
            check_close(one, other, 1e-9, form)
    check_close(mixer.output(mixer.matrix(x, prefix) @ mixer.values(x), x), mixer(x, prefix=prefix), 1e-9, "matrix")
    rows = mixer.matrix(x, prefix).sum(dim=-1).unflatten(1, (2, -1)).sum(dim=1)
    check_close(rows, torch.ones(2, 4, 70).double(), 1e-12, "rows of decoder and encoder together")


@pytest.mark.parametrize("form", plain_forms(lesson.JRT))
@pytest.mark.parametrize("prefix", [0, 30])
def test_no_position_sees_what_it_must_not(form, prefix):
    """Behind the prefix nobody sees the future; inside it everybody sees all of it, and nothing behind it."""
    mixer = make("jrt")
    x, _ = inputs(mixer, 70)
    y = mixer(x, form, prefix=prefix)
    for at in (5, 29, 30, 31, 50, 69):
        changed = x.clone()
        changed[:, at] += 3
        moved = (mixer(changed, form, prefix=prefix) - y).abs().amax(dim=(0, 2)) > 1e-9
        first = 0 if at < prefix else at
        assert not moved[:first].any() and moved[first:].all(), (at, moved)


@pytest.mark.parametrize("prefix", [0, 1, 31, 50])
def test_generation_behind_a_prefix_is_the_parallel_form(prefix):
    mixer = make("jrt")
    x, _ = inputs(mixer, 70)
    y = mixer(x, "parallel", prefix=prefix)
    y1, state = mixer.prefill(x[:, :50], prefix=prefix)
    y2, state = mixer.prefill(x[:, 50:60], state)
    steps = []
    for t in range(60, 70):
        y_t, state = mixer.step(x[:, t], state)
        steps.append(y_t)
    check_close(torch.cat([y1, y2, torch.stack(steps, dim=1)], dim=1), y, 1e-9, "prefill, prefill, steps")
    assert state[0].numel() == mixer.state_size(70) == mixer.state_size(7)


def test_the_encoder_alone_is_bidirectional_linear_attention():
    """With the decoder's projections over the whole text. The last token has then seen everything twice, which the
    normaliser takes back: there the whole mixer is bidirectional, too."""
    jrt, both_ways = make("jrt"), make("bidirectional")
    x, _ = inputs(jrt, 40)
    with torch.no_grad():
        jrt.k_enc.weight.copy_(jrt.qk.weight.chunk(2)[1])
        jrt.v_enc.weight.copy_(jrt.v.weight)
    both_ways.load_state_dict({n: p for n, p in jrt.state_dict().items() if "enc" not in n})
    y = both_ways(x)
    check_close(jrt(x, prefix=40)[:, -1], y[:, -1], 1e-11, "the last token")
    encoder = jrt.matrix(x, 40)[:, 4:]
    encoder = encoder / encoder.sum(dim=-1, keepdim=True)
    check_close(jrt.out(lesson.join_heads(encoder @ jrt.values(x)[:, 4:])), y, 1e-11, "the encoder alone, every token")


def test_misplaced_prefixes_are_refused():
    mixer = make("jrt")
    x, _ = inputs(mixer, 10)
    for prefix in (11, -1):
        with pytest.raises(ValueError, match=f"prefix of {prefix} tokens does not fit 10"):
            mixer(x, prefix=prefix)
    _, state = mixer.prefill(x, prefix=4)
    with pytest.raises(ValueError, match="prefix comes first"):
        mixer.prefill(x, state, prefix=1)
    with pytest.raises(ValueError, match="prefix of 50 tokens"):
        mixer.matrix(x, prefix=50)
    with pytest.raises(ValueError, match="prefix of -3 tokens"):
        mixer(x, prefix=torch.tensor([-3, 5]))
    with pytest.raises(ValueError, match="feature_dim 0"):
        MIXERS["jrt"](32, feature_dim=0)
    for wrong in (2.5, torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="whole number"):
            mixer(x, prefix=wrong)
    with pytest.raises(ValueError, match="unknown feature_map 'exp'"):
        MIXERS["jrt"](32, feature_map="exp")


# ---------------------------------------------------------------------------------------------------------- transforms


def test_jrt_prompt_asks_in_the_second_reading_only():
    based = importlib.import_module("04_based")
    ids, targets = based.mqar(8, torch.Generator().manual_seed(0), vocab_size=64)
    valid = torch.rand(8, 64, 64) < 0.5
    extras = {"weights": (targets != -100).float(), "prefix": 64, "valid": valid, "each": torch.arange(8)}
    twice, asked, more = lesson.jrt_prompt((ids, targets, extras))
    assert torch.equal(twice, torch.cat([ids, ids], 1)) and (asked[:, :64] == -100).all()
    assert torch.equal(asked[:, 64:], targets) and more["prefix"] == 128
    assert torch.equal(more["each"], torch.arange(8)) and not more["weights"][:, :64].any()
    assert torch.equal(more["weights"][:, 64:], extras["weights"])
    assert more["valid"].shape == (8, 128, 64) and torch.equal(more["valid"][:, 64:], valid)
    with pytest.raises(ValueError, match="the answer would be in it"):
        lesson.jrt_prompt((ids[:, :-1], ids[:, 1:], {}))


def test_jrt_prompt_does_not_need_the_order():
    """Who reads twice may keep the second set: in the second reading the first set comes again."""
    ids, targets, extras = lesson.set_disjointness(4, torch.Generator().manual_seed(0), first=30, second=3)
    twice, asked, _ = lesson.jrt_prompt((ids, targets, extras))
    second = set(ids[0, 32:35].tolist())
    assert [t for t in twice[0, 36:].tolist() if t in second][0] == asked[0, -1]


def test_every_form_goes_on_from_a_state():
    g = torch.Generator().manual_seed(0)
    q, k, k_enc = (torch.rand(2, 3, 9, 5, generator=g, dtype=torch.float64) for _ in range(3))
    v, v_enc = (torch.randn(2, 3, 9, 4, generator=g, dtype=torch.float64) for _ in range(2))
    S, inside = torch.rand(2, 3, 5, 5, generator=g, dtype=torch.float64), torch.ones(1, 1, 9, 1, dtype=torch.float64)
    o, after = lesson.recurrent(q, k, v, k_enc, v_enc, inside, S)
    for form in (lesson.parallel, lesson.chunked):
        for ours, other in zip(form(q, k, v, k_enc, v_enc, inside, S), (o, after), strict=True):
            check_close(ours, other, 1e-12, form.__name__)
    assert (o - lesson.recurrent(q, k, v, k_enc, v_enc, inside, 0 * S)[0]).abs().max() > 1e-2


def test_prefix_lm_asks_for_hidden_tokens_and_for_the_next_behind_the_prefix():
    """Two means, as in the authors' code: the next token's, plus a quarter of that over the hidden tokens."""
    row = torch.arange(1, 42).repeat(500, 1)
    given = {"weights": torch.linspace(0.5, 2, 40).repeat(500, 1)}
    generator = torch.Generator().manual_seed(0)
    ids, targets, extras = lesson.prefix_lm((row[:, :-1], row[:, 1:], given), generator, prefix=30)
    hidden, w = ids == 0, extras["weights"]
    assert 0.13 < hidden[:, :30].float().mean() < 0.17 and not hidden[:, 30:].any()
    assert torch.equal(targets[hidden], row[:, :-1][hidden]) and (targets[:, :30][~hidden[:, :30]] == -100).all()
    asked = ~hidden[:, 30:]                                       # as the authors: what follows the prefix is not
    assert torch.equal(targets[:, 30:][asked], row[:, 31:][asked]) and extras["prefix"] == 30
    assert torch.equal(w[:, 30:][asked], given["weights"][:, 30:][asked]) and not w[:, :30][~hidden[:, :30]].any()
    assert w[hidden].sum().item() == pytest.approx(0.25 * w[~hidden].sum().item(), rel=1e-4)
    ids, targets, extras = lesson.prefix_lm((row[:, :-1], row[:, 1:], {}), prefix=30)        # a test
    assert torch.equal(ids, row[:, :-1]) and (targets[:, :30] == -100).all() and (targets[:, 30:] != -100).all()
    assert not extras["weights"][:, :30].any() and (extras["weights"][:, 30:] == 1).all()
    assert lesson.prefix_lm((row[:, :5], row[:, 1:6], {}), prefix=30)[2]["prefix"] == 5      # a short prompt
    whole = lesson.prefix_lm((row[:, :-1], row[:, 1:], {}), prefix=40)       # nothing behind it: the last is asked
    assert (whole[1][:, :39] == -100).all() and (whole[1][:, 39] != -100).all()


def test_set_disjointness_puts_the_answer_anywhere():
    ids, targets, extras = lesson.set_disjointness(200, torch.Generator().manual_seed(0), first=5, second=7)
    place = (ids == targets[:, -1:]).int()
    assert place[:, 1:6].sum() == place[:, 7:14].sum() == 200 == extras["prefix"] + 185
    assert (place[:, 1:6].sum(dim=0) > 20).all() and (place[:, 7:14].sum(dim=0) > 10).all()
    assert lesson.set_disjointness(2, prompt=False)[2] == {}


def test_sets_of_many_sizes_in_training():
    def sizes(seed, progress):
        ids, targets, extras = lesson.set_disjointness(3, torch.Generator().manual_seed(seed), 5, 7, mixed=0.8,
                                                       progress=progress)
        assert extras["prefix"] == ids.shape[1] and (targets[:, -1] != -100).all()
        second = (ids == 2).nonzero()
        assert len(second) == 3 and len(second[:, 1].unique()) == 1
        return second[0, 1].item() - 1, ids.shape[1] - second[0, 1].item() - 2

    assert {sizes(seed, 0.79) for seed in range(150)} == {*lesson.SIZES, *((b, a) for a, b in lesson.SIZES)}
    assert {sizes(seed, 0.8) for seed in range(20)} == {(5, 7)}
    with pytest.raises(ValueError, match="not first 16, second 256, vocab_size 263"):
        lesson.set_disjointness(3, vocab_size=263, mixed=0.8)


def test_the_order_matters_for_who_reads_once():
    for small, large, gap in ((4, 64, 0.3), (4, 256, 0.4)):
        orders = (small, large), (large, small)
        easy, hard = (lesson.order_effect(*sizes, trials=400)[0] for sizes in orders)
        assert easy > hard + gap and easy > 0.85
        twice, easy = (lesson.order_effect(*sizes, readings=2, trials=400)[0] for sizes in orders)
        assert twice == easy > 0.85
    accuracy, above = lesson.order_effect(64, 4, trials=400)
    assert above == pytest.approx((accuracy - 0.25) / 0.75)
    assert lesson.order_effect(256, 4, f=4, trials=400)[1] < 0.2 < lesson.order_effect(256, 4, f=24, trials=400)[1]


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("it is read, and read again. " * 900)
    return str(path)


TINY = """--d_model 16 --n_heads 2 --batch_size 4 --steps 3 --tokenizer byte --context 32 --n_tokens 9
          --device cpu""".split()


def test_jrt_trains_on_text_with_its_loss_and_writes(text, tmp_path, capsys):
    scores = train.main([*TINY, "--mixer", "short_conv,jrt", "--transform", "prefix_lm:prefix=20", "--data", text,
                         "--out", str(tmp_path / "run")])
    assert 7 < scores["bits_per_byte"] < 9 and scores["rest_share"] + scores["recall_share"] == 1
    capsys.readouterr()
    for prompt in ("read, and", "read, and read again, and again"):              # shorter and longer than the prefix
        train.main(["--sample", prompt, "--resume", str(tmp_path / "run")])
    assert "[stopped" not in capsys.readouterr().out
    train.main(["--resume", str(tmp_path / "run"), "--steps", "4", "--data", text])
    with pytest.raises(SystemExit):
        train.main(["--resume", str(tmp_path / "run"), "--steps", "5", "--transform", "prefix_lm:prefix=9"])
    assert "has --transform prefix_lm:prefix=20" in capsys.readouterr().err


def test_a_prompt_is_read_as_a_prefix(monkeypatch):
    """What is drawn first comes from the logits that the whole prompt, read without causality, gives."""
    args, _ = train.parse([*TINY, "--mixer", "jrt,jrt", "--transform", "prefix_lm:prefix=20", "--n_tokens", "1"])
    tokenizer = train.make_tokenizer("byte", 256, [])
    model, args.sample = train.build_model(args, 256), "a prompt"
    ids = torch.tensor([tokenizer.encode(args.sample)])
    with torch.no_grad():
        logits = [model(ids, {"prefix": n})[0, -1] for n in (8, 0)]
    assert (logits[0] - logits[1]).abs().max() > 1e-5
    seen = []
    monkeypatch.setattr(train.torch, "multinomial", lambda p, *_, **__: seen.append(p) or p.argmax(-1, keepdim=True))
    train.write_on(model, tokenizer, args, "cpu")
    assert seen[0].argmax() == logits[0].argmax()


def test_transforms_hide_in_training_and_never_in_tests(text):
    for more in (["--data", text], ["--task", "set_disjointness:first=20:second=30:vocab_size=90"]):
        args, _ = train.parse([*TINY, "--mixer", "jrt", "--transform", "prefix_lm:prefix=30:masked=0.5", *more])
        data = train.Text(args) if args.task == "text" else train.Task(args)
        assert (data.batch(4, torch.Generator().manual_seed(0))[0] == 0).any()
        assert not any((ids == 0).any() for ids, *_ in data.held_out(4, 3))


def test_a_prefix_for_each_sequence_is_cut_with_the_batch():
    machine = train.Machine("cpu")
    batch = torch.zeros(4, 9).long(), torch.zeros(4, 9).long(), {"prefix": torch.arange(4), "n": 7}
    assert machine.move(batch, slice(2, 4))[2]["prefix"].tolist() == [2, 3] and machine.move(batch)[2]["n"] == 7


def test_the_recall_slice_knows_the_prefix():
    """A bigram that stood in the prefix has been seen, although nothing was asked there."""
    args, _ = train.parse(["--tokenizer", "byte", "--context", "8", "--transform", "prefix_lm:prefix=4"])
    data = train.Text(args)
    data.bigrams = torch.tensor([0]).numpy(), torch.tensor([0]).numpy()
    row = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 9, 9]])
    batch = data.transform((row[:, :-1], row[:, 1:], {"weights": torch.ones(1, 8)}))
    got = {name: count for name, _, count in data.scores(batch, None, torch.zeros(4), True)}
    assert got["recall"] == 1 and got["rest"] == 3 and got["bits_per_byte"] == 4


@pytest.mark.parametrize("mixer, transform", [("short_conv,jrt", 0), ("bidirectional", 0), ("taylor", "jrt_prompt")])
def test_set_disjointness_trains(mixer, transform, tmp_path):
    task = "set_disjointness:first=4:second=6:vocab_size=40"
    flags = [*TINY, "--task", task, "--mixer", mixer, "--out", str(tmp_path)]
    assert 0 <= train.main(flags + (["--transform", transform] if transform else []))["accuracy"] <= 1


@pytest.mark.parametrize("flags, message", [
    ("--transform jrt_prompt", "answer would be in it"), ("--transform jrt_promt", "did you mean jrt_prompt"),
    ("--transform prefix_lm:prefix=0", "at least 1"), ("--transform prefix_lm:prefix=x", "must be int"),
    ("--transform prefix_lm:prefix=8:mask=300", "beyond the vocabulary of 256"),
    ("--mixer scatterbrain:top=2.5", "top must be int"),
    ("--transform prefix_lm:weight=1e999", "finite weight"), ("--mixer jrt:feature_map=[1]", "feature_map must be str"),
    ("--transform prefix_lm:prefix=8 --mixer bidirectional", "not causal"),
    ("--transform prefix_lm:masked=1.5", "0 <= masked < 1"), ("--mixer bidirectional", "not causal")])
def test_bad_transforms_are_refused(flags, message, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--data", text, "--out", str(tmp_path / "run"), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
