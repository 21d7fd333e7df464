"""The checker is checked: the assertions that pass the mixers must refuse mixers with the classic mistakes."""
import pytest
import torch
import torch.nn as nn
from harness import D_MODEL, check_forms, check_matrix, check_split, sees_future


class Toy(nn.Module):
    """A decayed, normalised sum, as matrix and as loop; `mistake` spoils the loop (or, for 'mask', both)."""
    forms = ("parallel", "recurrent")
    causal = True

    def __init__(self, mistake=None):
        super().__init__()
        self.mistake, self.gate = mistake, nn.Parameter(torch.zeros(D_MODEL, dtype=torch.float64))

    def values(self, x):
        return (x * self.gate.sigmoid())[:, None]

    def output(self, o, x):
        return o[:, 0]

    def matrix(self, x):
        lag = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        M = (0.9 ** lag.double()) * (lag >= (-1 if self.mistake == "mask" else 0))
        return (M / M.sum(-1, keepdim=True)).expand(len(x), 1, -1, -1)

    def init_state(self, b):
        return torch.zeros(b, D_MODEL, dtype=torch.float64), torch.zeros(b, 1, dtype=torch.float64)

    def step(self, x_t, state):
        v, (S, z) = x_t * self.gate.sigmoid(), state
        late = self.mistake == "late decay"
        S, z = (0.9 * (S + v), 0.9 * (z + 1)) if late else (0.9 * S + v, 0.9 * z + 1)
        if self.mistake == "in place":
            state[0].copy_(S)
        return (S if self.mistake == "no normaliser" else (S / 0.9 if late else S) / z), (S, z)

    def prefill(self, x, state=None):
        state, y = self.init_state(len(x)) if state is None else state, []
        for x_t in x.unbind(1):
            y_t, state = self.step(x_t, state)
            y.append(y_t)
        return torch.stack(y, 1), state

    def forward(self, x, form=None):
        if form == "recurrent":
            y, _ = self.prefill(x)
            return y.detach() + 0 * x * self.gate if self.mistake == "no gradient" else y
        return self.output(self.matrix(x) @ self.values(x), x)


def test_the_sound_toy_passes():
    for t in (1, 7, 65):
        check_forms(Toy(), t)
        check_matrix(Toy(), t)
    check_split(Toy(), 20, 7, 13)
    assert not sees_future(Toy(), "parallel")


@pytest.mark.parametrize("mistake", ["mask", "no normaliser", "late decay", "no gradient"])
def test_forms_that_differ_are_refused(mistake):
    with pytest.raises(AssertionError, match="differ by"):
        check_forms(Toy(mistake), 7)


@pytest.mark.parametrize("mistake", ["mask", "no normaliser", "late decay", "in place"])
def test_states_that_do_not_continue_are_refused(mistake):
    with pytest.raises((AssertionError, RuntimeError), match="differ by|in-place|inplace"):
        check_split(Toy(mistake), 20, 7, 13)


def test_a_mask_off_by_one_is_seen():
    assert sees_future(Toy("mask"), "parallel")
    with pytest.raises(AssertionError, match="above the diagonal"):
        check_matrix(Toy("mask"), 7)


def test_nan_is_never_close():
    toy = Toy()
    toy.gate.data[0] = torch.nan
    with pytest.raises(AssertionError):
        check_forms(toy, 7)
