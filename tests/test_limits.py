"""Where one mixer is a special case of another, across lessons; and what stands in several lessons is the same."""
from harness import MIXERS, close, inputs, make


def same_weights(a, b):
    """b with a's parameters."""
    b.load_state_dict(a.state_dict())
    return b


def test_a_window_as_long_as_the_text_is_full_attention():
    full = make("attention")
    window = same_weights(full, MIXERS["window"](32, window=50).double())
    x, _ = inputs(full, 50)
    for form in full.forms:
        close(window(x, form), full(x, form), 1e-12, form)
    assert (window(*inputs(full, 60)[:1]) - full(*inputs(full, 60)[:1])).abs().max() > 1e-3
