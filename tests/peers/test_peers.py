"""Every mixer is the paper's: all its forms held to code from elsewhere, or to the paper's formula in its own letters.

Equal forms can be wrong together; what stands here was not written from the lessons."""
import papers_attention  # noqa: F401  (each enters its referees)
import papers_linear  # noqa: F401
import papers_recall  # noqa: F401
import papers_ssm  # noqa: F401
import pytest
from harness import MIXERS
from referees import REFEREES, hold

LENGTHS = (1, 21)


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("r", REFEREES, ids=lambda r: f"{r.name}-{r.by}")
def test_every_form_is_the_referees(r, t):
    hold(r, t)


def test_every_mixer_has_a_referee():
    missing = sorted(set(MIXERS) - {r.name for r in REFEREES})
    assert not missing, f"no referee for {', '.join(missing)}: see {len(REFEREES)} others in tests/peers"
