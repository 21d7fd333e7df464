"""The first page of each lesson, fed to the lesson's own forms: the same numbers, so that it cannot drift."""
import importlib

import pytest
import torch
from harness import check_close

one, two, three, four, five = (importlib.import_module(name) for name in (
    "01_attention", "02_linear_attention", "03_ssm", "04_based", "05_jrt"))
LESSONS = (one, two, three, four, five)
TOKENS = torch.tensor([[2.0, 0.0], [-1.0, -1.0], [0.0, 2.0], [2.0, 0.0]])                    # A c B A


def heads(*tensors):
    """(t, d) -> (1, 1, t, d)"""
    return [x[None, None] for x in tensors]


def test_01_all_ways_to_attend():
    q, k, v, M, y = one.first()
    assert torch.equal(v, TOKENS)
    q, k, v = heads(q, k, v)
    check_close(one.attention_weights(q, k)[0, 0], M, 1e-6, "M")
    for name, o in {"parallel": one.parallel_attention(q, k, v), "chunked": one.chunked_attention(q, k, v, chunk=2),
                    "recurrent": one.recurrent_attention(q, k, v, one.Cache(
                        k[:, :, :0], v[:, :, :0], torch.ones(1, 0, dtype=torch.bool), 0),
                        torch.ones(1, 4, dtype=torch.bool))[0]}.items():
        check_close(o[0, 0], y, 1e-6, name)


def test_02_the_recurrence_with_three_decays():
    pages = two.first()
    assert len(pages) == 3
    for q, k, v, g, states, M, y in pages:
        assert torch.equal(v, TOKENS)
        q, k, v = heads(q, k, v)
        g = g[None, None, None]
        check_close(two.weights(q, k, two.segment_sums(two.gates(g, q)))[0, 0], M, 1e-6, "M")
        for name in ("parallel", "recurrent", "chunked"):
            o, S = two.FORMS[name](q, k, v, g)
            check_close(o[0, 0], y, 1e-6, name)
            check_close(S[0, 0], states[-1], 1e-6, f"{name}: S")
    assert len({str(page[5].tolist()) for page in pages[:2]}) == 2 and not torch.equal(pages[1][5], pages[2][5])


def test_02_the_delta_rule_on_two_tokens(capsys):
    two.first()
    k, v = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    _, S = two.delta_recurrent(*heads(k, k, v), None, torch.ones(1, 1, 2, 1))
    assert S[0, 0, 0].tolist() == [0.0, 2.0]
    assert "Hebb has [2.0, 2.0], the delta rule [0.0, 2.0]" in capsys.readouterr().out


def test_03_loop_convolution_scan_matrix_and_selection():
    u, a, b, C, states, K, M, y, a_t, chosen = three.first()
    assert torch.equal(u, TOKENS)
    signal = u.T[None]                                                                       # (1, c, t)
    g = torch.complex(torch.zeros(2), torch.pi * (a < 0).float())[None, None, None]          # log(1), log(-1)
    k, q = (x[None, None, None].to(g.dtype) for x in (b, C))
    check_close(three.kernel_of(g, k, q, 4).real[0], K, 1e-5, "K")
    check_close(three.weights(g, k, q, 4).real[0, 0], M, 1e-5, "M")
    for how in (three.loop, three.scan_from, three.chunks):
        o, h = three.through_states(how, signal, g.expand(1, 2, 1, 2), k.expand(1, 2, 1, 2), q, None)
        check_close(o[0].T, y, 1e-5, how.__name__)
        check_close(h[0].real, states[-1], 1e-5, "h")
    check_close(three.convolved(signal, g.expand(1, 2, 1, 2), k, q, None)[0][0].T, y, 1e-5, "conv")
    one_state = torch.ones(1, 1, 4, 1)
    selected = three.weights(a_t.clamp(min=1e-30).log()[None, None, :, None], one_state, one_state, 4)[0, 0]
    check_close(selected, chosen, 1e-6, "selection")


def test_04_a_key_beside_its_value():
    pages = four.first()
    assert set(pages) == {"AcBA", "AcAB"} and torch.equal(pages["AcBA"][2], TOKENS)
    term = four.Taylor()
    for q, k, v, M, y in pages.values():
        q, k, v = heads(q, k, v)
        check_close(term.matrix(q, k)[0, 0], M, 1e-5, "M")
        for name in ("parallel", "chunked", "recurrent"):
            o, _ = four.FORMS[name](term, q, k, v, term.init(v, 1, 1, 2, 2))
            check_close(o[0, 0], y, 1e-5, name)
    shift = four.taps_at([1, 1], 2).float()                                                  # k is x, one token late
    assert torch.equal(four.short_conv(TOKENS.T[None], shift)[0].T, pages["AcBA"][1])


def test_05_read_twice_is_a_prefix():
    q, k, v, causal, M, y = five.first()
    assert torch.equal(v, TOKENS)
    q, k, v = heads(q, k, v)
    inside, nothing = torch.ones(1, 1, 4, 1), torch.zeros(1, 1, 2, 3)
    weights = (q @ k.mT).tril() + q @ (k * inside).mT
    assert torch.equal(weights[0, 0], M) and torch.equal((q @ k.mT).tril()[0, 0], causal)
    S = five.encode(k, v, inside)
    assert torch.equal(weights @ v, y[None, None]) and torch.equal(S[0, 0, :, :2], (k.mT @ v)[0, 0])
    q, k = q.abs(), k.abs()                                      # the lesson divides by the sum of the weights
    twice = [torch.cat([x, x], dim=2) for x in (q, k, v)]
    again, _ = five.chunked(*twice, *twice[1:], torch.zeros(1, 1, 8, 1), nothing, chunk=3)
    for form in (five.parallel, five.chunked, five.recurrent):
        check_close(form(q, k, v, k, v, inside, nothing)[0], again[:, :, 4:], 1e-5, form.__name__)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_first_page_is_flat_and_prints_a_table(lesson, capsys):
    lesson.first()
    assert 5 <= capsys.readouterr().out.count("\n") <= 25
