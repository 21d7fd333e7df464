"""Every mixer is the paper's: all its forms held to code from elsewhere, or to the paper's formula in its own letters.

Equal forms can be wrong together; what stands here was not written from the lessons."""
import packages_others  # noqa: F401  (each of these enters its referees)
import packages_transformers  # noqa: F401
import papers_attention  # noqa: F401
import papers_linear  # noqa: F401
import papers_recall  # noqa: F401
import papers_ssm  # noqa: F401
import pytest
from harness import MIXERS
from referees import REFEREES, hold

LENGTHS = (1, 21)
pytestmark = pytest.mark.filterwarnings("ignore")            # what other people's packages warn of is theirs


CASES = [(r, t) for r in REFEREES for t in LENGTHS if t >= r.shortest]


@pytest.mark.parametrize("r, t", CASES, ids=[f"{r.name} by {r.by}, {t}" for r, t in CASES])
def test_every_form_is_the_referees(r, t):
    hold(r, t)


def test_every_mixer_has_a_referee():
    missing = sorted(set(MIXERS) - {r.name for r in REFEREES})
    assert not missing, f"no referee for {', '.join(missing)}: see {len(REFEREES)} others in tests/peers"
