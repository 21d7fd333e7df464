"""Tasks: somebody who does it right scores 100%, nobody is told the answer, and the seed decides everything."""
import importlib
import statistics

import pytest
import torch
from harness import TASKS

import train


def batch(name, seed=0, n=8, **options):
    ids, targets, *more = TASKS[name](n, generator=torch.Generator().manual_seed(seed), **options)
    return ids, targets, more[0] if more else {}


def induction(ids):
    """What followed the last occurrence of this token?"""
    answer = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        followed = {}
        for i, token in enumerate(row):
            if i:
                followed[row[i - 1]] = token
            answer[b, i] = followed.get(token, 0)
    return answer


def icll(ids, separator=18):
    """After the same letters since the last separator, what came before? (The automaton is deterministic.)"""
    answer = torch.full_like(ids, -1)
    for b, row in enumerate(ids.tolist()):
        followed, string = {}, ()
        for i, token in enumerate(row):
            if string is not None and i and token != separator:
                followed[string] = token
            string = () if token == separator else (*string, token)
            answer[b, i] = followed.get(string, -1)
    return answer


def h3_recall(ids):
    """The value that stood behind the last key before."""
    answer = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        pairs = dict(zip(row[:-1:2], row[1:-1:2], strict=True))
        answer[b, -1] = pairs[row[-1]]
    return answer


def h3_induction(ids):
    answer = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        answer[b, -1] = row[row.index(row[-1]) + 1]
    return answer


def listops(ids):
    """Reads the expression by Python's own parser."""
    answer = torch.zeros_like(ids)
    names = {10: "min(", 11: "max(", 12: "median_low(", 13: "total(", 14: "),", 15: ""}
    scope = {"min": lambda *a: min(a), "max": lambda *a: max(a), "median_low": lambda *a: statistics.median_low(a),
             "total": lambda *a: sum(a) % 10}
    for b, row in enumerate(ids.tolist()):
        text = "".join(names.get(token, f"{token},") for token in row)
        answer[b, -1] = eval(text.rstrip(","), scope)
    return answer


def recall(ids):
    """Where did this token stand the first time? What stood behind it then?"""
    answer = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        for i, token in enumerate(row):
            answer[b, i] = row[row.index(token) + 1] if row.index(token) + 1 < len(row) else 0
    return answer


def set_disjointness(ids):
    answer = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        common = set(row[1:row.index(2)]) & set(row[row.index(2) + 1:-1])
        answer[b, -1], = common
    return answer


def parity(ids):
    """Odd (1) or even (0)? Ones are token 3, after the two states and the token of no change."""
    return (ids == 3).cumsum(dim=1) % 2


SOLVERS = {"state_tracking": parity, "induction": induction, "icll": icll, "h3_recall": h3_recall,
           "h3_induction": h3_induction, "listops": listops, "associative_recall": recall,
           "set_disjointness": set_disjointness}
SOLVERS |= {name: recall for name in TASKS if name.startswith("mqar")}


@pytest.mark.parametrize("name", TASKS)
def test_someone_who_does_it_right_scores_everything(name):
    ids, targets, extras = batch(name, n=16)
    answer, asked = SOLVERS[name](ids), targets != -100
    assert asked.any(dim=1).all()
    if "valid" in extras:            # the solver knows a part of the automaton: right where it knows
        asked = asked & (answer >= 0)
        right = extras["valid"].gather(2, answer.clamp(min=0)[..., None])[..., 0]
    else:
        right = answer == targets
    assert asked.sum() >= 16 and right[asked].all()


@pytest.mark.parametrize("name", TASKS)
def test_shapes_and_seeds(name):
    (ids, targets, extras), again, other = batch(name), batch(name), batch(name, seed=1)
    assert ids.shape == targets.shape and ids.dtype == targets.dtype == torch.int64
    assert torch.equal(ids, again[0]) and torch.equal(targets, again[1]) and not torch.equal(ids, other[0])
    vocab_size = train.options_of(TASKS[name])["vocab_size"]
    assert 0 <= ids.min() and max(ids.max(), targets.max()) < vocab_size and (targets == -100).any()
    assert all(value.shape[:2] == ids.shape for value in extras.values() if torch.is_tensor(value))


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_not_in_the_input_at_its_own_place(name):
    """A model that repeats its current token must do no better than chance, and later inputs must not be needed."""
    ids, targets, extras = batch(name, n=64)
    asked = targets != -100
    valid = extras["valid"].gather(2, ids[..., None])[..., 0] if "valid" in extras else ids == targets
    assert valid[asked].float().mean() < 0.3


@pytest.mark.parametrize("name", ["h3_recall", "h3_induction"])
def test_h3_trains_on_all_tokens_and_asks_for_the_last(name):
    ids, last, _ = batch(name)
    for options in ({"progress": 0.5, "all_tokens": False}, {"progress": 1.0}):
        assert torch.equal(batch(name, **options)[1], last) and (last[:, :-1] == -100).all()
    targets = batch(name, progress=0.5)[1]
    assert torch.equal(targets[:, :-1], ids[:, 1:]) and torch.equal(targets[:, -1], last[:, -1])


def test_icll_targets_are_valid_and_unpredictable():
    ids, targets, extras = batch("icll", n=32)
    asked = targets != -100
    ways = extras["valid"].sum(-1)[asked]
    assert extras["valid"].gather(2, targets.clamp(min=0)[..., None])[..., 0][asked].all()
    assert ways.min() == 1 and ways.max() == 3 and not extras["valid"][..., 18].any()
    assert 0.9 < asked.float().mean() < 1 and (ids == 18).any(dim=1).float().mean() > 0.9


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="length"):
        batch("induction", length=600, vocab_size=256)
    with pytest.raises(ValueError, match="vocab_size 4"):
        batch("icll", vocab_size=4)
    for wrong in ({"length": 65}, {"length": 64, "n_pairs": 17}, {"vocab_size": 8}):
        with pytest.raises(ValueError, match="mqar needs an even length"):
            batch("mqar", **wrong)
    with pytest.raises(ValueError, match="odd length"):
        batch("associative_recall", length=64)


def test_states_are_followed_beyond_the_lengths_of_training():
    linear = importlib.import_module("02_linear_attention")
    ids, targets, _ = batch("state_tracking", kind="count", modulo=3)
    assert torch.equal(((ids == 4).cumsum(dim=1) % 3)[:, 40:], targets[:, 40:]) and (targets[:, :40] == -100).all()
    ids, targets, _ = batch("state_tracking", kind="swaps", length=12, progress=0.5)     # in training: all are asked
    assert ids.shape == targets.shape == (8, 12) and targets.max() == 5
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        things, seen = ["a", "b", "c"], {}
        for token, state in zip(row, target, strict=True):
            i, j = ((0, 1), (1, 2), (0, 2))[token - 6]
            things[i], things[j] = things[j], things[i]
            assert seen.setdefault(state, "".join(things)) == "".join(things)
    assert (linear.moves("swaps", 0).sort(dim=0).values == torch.arange(6)[:, None]).all()      # a swap loses nothing
    for wrong in ({"kind": "sum"}, {"kind": "count", "modulo": 15}, {"test_length": 40}):
        with pytest.raises(ValueError, match="state_tracking"):
            batch("state_tracking", **wrong)


def test_mqar_is_zoologys():
    """Pairs first, all different, keys low and values high; queries at even distances, early ones far more likely."""
    based = importlib.import_module("04_based")
    ids, targets = based.mqar(2000, torch.Generator().manual_seed(0), length=64, n_pairs=4, vocab_size=64)
    keys, values = ids[:, 0:8:2], ids[:, 1:8:2]
    assert 1 <= keys.min() and keys.max() == 31 and values.min() == 32 and values.max() == 63
    assert all((x.sort(dim=1).values.diff(dim=1) > 0).all() for x in (keys, values))
    asked = targets != -100
    assert (asked.sum(dim=1) == 4).all() and not asked[:, :8].any() and not asked[:, 1::2].any()
    assert torch.equal(ids[:, 8:] != 0, asked[:, 8:])                                # the rest is token 0
    p = torch.arange(1, 29) ** -0.99
    first = asked[:, 8::2].float().mean(dim=0)                   # without replacement: flatter than p, and falling
    assert first[0] > 0.6 and first[0] > 3 * first[5] > 3 * first[20] > 0 and first[0] < 4 * p[0] / p.sum()
    ids, _ = based.mqar(20000, torch.Generator().manual_seed(0), length=32, n_pairs=8, vocab_size=20)
    for place in (0, 6, 14):                                              # each of the keys 1 to 9 as often, anywhere
        assert (ids[:, place].bincount(minlength=10)[1:] - 20000 / 9).abs().max() < 5 * (20000 / 9) ** 0.5
    for n_pairs, easier in ((3, 3), (4, 4), (8, 4), (32, 8)):        # with one pair alone its value would be the answer
        _, targets = based.mqar(2, torch.Generator(), length=128, n_pairs=n_pairs, easy=0.5, progress=0.2)
        assert (targets != -100).sum() == 2 * easier
    filled, _ = based.mqar(20, torch.Generator().manual_seed(0), filler=True, vocab_size=64)
    assert (filled == 0).float().mean() < 0.1


def test_listops_of_the_slide():
    lesson = importlib.import_module("03_ssm")
    assert lesson.LISTOPS[11]([2, 9, lesson.LISTOPS[10]([4, 7]), 0]) == 9
    ids, targets = lesson.listops(64, torch.Generator().manual_seed(0), length=60)
    assert set(targets[:, -1].tolist()) == set(range(10)) and {10, 11, 12, 13} <= set(ids.flatten().tolist())
    nested, digits = ((ids >= 10) & (ids <= 13)).sum() - len(ids), (ids < 10).sum()
    assert 0.12 < nested / (nested + digits) < 0.17      # a quarter of the arguments, had not long ones been dropped
    with pytest.raises(ValueError, match="max_args >= 2"):
        lesson.listops(max_args=1)


def test_the_automatas_strings_have_1_to_49_letters():
    ids, _, _ = importlib.import_module("01_attention").icll(2000, torch.Generator().manual_seed(0), length=110)
    ends = ids == 18
    first = ends.int().argmax(dim=1)
    second = ends.scatter(1, first[:, None], False).int().argmax(dim=1) - first - 1
    for lengths in (first, second):
        assert lengths.min() == 1 and lengths.max() == 49 and 23 < lengths.double().mean() < 27
