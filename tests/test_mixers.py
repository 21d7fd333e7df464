"""What every mixer promises, tested for all that the lessons list in MIXERS: list a mixer and it is tested."""
import pytest
import torch
from harness import (
    LENGTHS,
    MIXERS,
    check_forms,
    check_matrix,
    check_split,
    floats_in,
    inputs,
    make,
    plain_forms,
    sees_future,
)
from torch.utils._pytree import tree_leaves

import train

CAUSAL = [name for name in MIXERS if MIXERS[name].causal]
SEVERAL = [name for name in MIXERS if len(MIXERS[name].forms) > 1]


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("name", SEVERAL)
def test_forms_agree_in_values_and_gradients(name, t):
    check_forms(make(name), t)


@pytest.mark.parametrize("name", SEVERAL)
def test_forms_agree_in_float32(name):
    """ReBased divides by a sum that may be nearly 0, and B of S4D-LegS is up to 2: their gradients lose a bit more."""
    tolerance = {"rebased": 3e-4, "s4d_legs": 3e-4}.get(name, 1e-4)
    check_forms(make(name, torch.float32), 65, tolerance=tolerance, dtype=torch.float32)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("t, s, u", [(7, 3, 5), (140, 65, 130), (70, 1, 66)])
def test_prefill_and_step_continue(name, t, s, u):
    check_split(make(name), t, s, u)


@pytest.mark.parametrize("name", MIXERS)
def test_only_what_is_called_causal_is(name):
    mixer = make(name)
    for form in plain_forms(mixer):
        assert sees_future(mixer, form) != mixer.causal, form


@pytest.mark.parametrize("t", (1, 7, 70))
@pytest.mark.parametrize("name", MIXERS)
def test_matrix_is_what_mixes(name, t):
    check_matrix(make(name), t)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_is_where_the_mixer_is(name):
    """All of it, also what is empty: a step that moves something cannot be recorded."""
    leaves = tree_leaves(make(name).to("meta").init_state(2))
    assert all(x.is_meta for x in leaves if torch.is_tensor(x))


@pytest.mark.parametrize("name", CAUSAL)
def test_state_is_as_large_as_said(name):
    for t in (1, 70, 100):
        mixer = make(name)
        x, extras = inputs(mixer, t)
        with torch.no_grad():
            kept = floats_in(mixer.prefill(x, **extras)[1]) / len(x)
        said = mixer.state_size(t)
        assert kept <= said if name == "ngram" else kept == said, f"{kept} floats kept, {said} said"


@pytest.mark.parametrize("name", MIXERS)
def test_half_precision_and_autocast(name):
    mixer = make(name, torch.float32)
    x, extras = inputs(mixer, 66, dtype=torch.float32)
    y = mixer(x, **extras)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(x, **extras)
        if mixer.causal:
            first = {k: v[:, :60] for k, v in extras.items()}
            _, state = mixer.prefill(x[:, :60], **first)
            y_t, _ = mixer.step(x[:, 60], state, **{k: v[:, 60] for k, v in extras.items()})
            assert (y_t - y[:, 60]).abs().max() < 0.05 * y.abs().max()
    share = 0.1 if name == "retnet" else 0.05                    # its norm divides by tiny sums, with an eps of 1e-6
    assert (mixed.float() - y).abs().max() < share * y.abs().max()
    half, x = mixer.to(torch.bfloat16), x.to(torch.bfloat16)
    y_half = half(x, **extras)
    assert y_half.dtype == torch.bfloat16
    y = half.float()(x.float(), **extras)                # with the same rounded weights and inputs
    assert (y_half.float() - y).abs().max() < share * y.abs().max()


@pytest.mark.parametrize("name", MIXERS)
def test_misuse_is_refused_by_name(name):
    mixer = make(name)
    with pytest.raises(ValueError, match="has no form 'nonsense'.*" + mixer.forms[0]):
        mixer(inputs(mixer, 5)[0], "nonsense")
    with pytest.raises(ValueError, match="at least one"):
        mixer(inputs(mixer, 5)[0][:, :0])
    if train.options_of(MIXERS[name])["n_heads"] is not None:        # None: heads are not for choosing
        with pytest.raises(ValueError, match="multiple|divide"):
            MIXERS[name](30, n_heads=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MIXERS)
def test_on_a_gpu_every_form_is_the_cpus(name):
    mixer = make(name, torch.float32)
    x, extras = inputs(mixer, 130, dtype=torch.float32)
    y = mixer(x, **extras).detach()
    mixer, x, extras = mixer.cuda(), x.cuda(), {k: v.cuda() for k, v in extras.items()}
    for form in mixer.forms:
        assert (mixer(x, form, **extras).cpu() - y).abs().max() < 1e-3 * max(1, y.abs().max()), form
    with torch.autocast("cuda", torch.bfloat16):
        mixed = mixer(x, **extras)
        mixed.sum().backward()
    assert (mixed.float().cpu() - y).abs().max() < 0.05 * y.abs().max()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_an_empty_block_behind_a_state_is_refused(name):
    mixer = make(name)
    x, extras = inputs(mixer, 5)
    _, state = mixer.prefill(x, **extras)
    with pytest.raises(ValueError, match="at least one"):
        mixer.prefill(x[:, :0], state)
