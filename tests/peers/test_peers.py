"""Every mixer is the paper's: all its forms held to code from elsewhere, or to the paper's formula in its own letters.

Equal forms can be wrong together; what stands here was not written from the lessons."""
import packages_others  # noqa: F401  (each of these enters its referees)
import packages_transformers  # noqa: F401
import papers_attention  # noqa: F401
import papers_linear  # noqa: F401
import papers_recall  # noqa: F401
import papers_ssm  # noqa: F401
import pytest
import referees
import torch
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
    assert not missing, f"no referee for {', '.join(missing)}: enter one, as the {len(REFEREES)} in tests/peers are"


# ------------------------------------------------------------------------------------------- the referees are refereed


def spoiled(spoil):
    """The first referee of attention, with something done to its answer."""
    r = next(r for r in REFEREES if r.name == "attention" and not r.needs)
    return r._replace(y=lambda p, x: spoil(r.y(p, x), p), by="a spoiled formula")


def only_the_gradient(y, p):
    return y * (1 + 0.001 * (p["out.weight"] - p["out.weight"].detach()).sum())


@pytest.mark.parametrize("what, spoil", [("output", lambda y, p: 1.0001 * y), ("gradient of out", only_the_gradient)])
def test_a_referee_that_disagrees_is_heard(monkeypatch, what, spoil):
    monkeypatch.setattr(referees, "ERRORS", {})
    with pytest.raises(AssertionError, match=f"attention is not what a spoiled formula says: {what}"):
        hold(spoiled(spoil), 5)


def test_a_missing_package_is_skipped_by_name_and_fails_where_it_must_be(monkeypatch):
    monkeypatch.delenv("PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_package.*requirements-peers.txt"):
        referees.require("no_such_package")
    monkeypatch.setenv("PEERS", "required")
    with pytest.raises(pytest.fail.Exception, match="no_such_package.*requirements-peers.txt"):
        referees.require("no_such_package")
    referees.require("torch")


def test_a_package_of_another_version_is_skipped_as_if_it_were_missing(monkeypatch):
    """Its arguments have other names, or its numbers are others."""
    monkeypatch.delenv("PEERS", raising=False)
    monkeypatch.setattr(referees.importlib.machinery.PathFinder, "find_spec", lambda name: name)
    monkeypatch.setattr(referees.importlib.metadata, "version", {"transformers": "4.0.0"}.get)
    with pytest.raises(pytest.skip.Exception, match=r"transformers is 4.0.0, not 5\.\d+\.\d+: pip install"):
        referees.require("transformers")


def test_float32_is_back_after_a_peer_has_run():
    with referees.in_double():
        assert torch.zeros(1).float().dtype == torch.zeros(1).dtype == torch.float32 == torch.float64
    assert torch.zeros(1).float().dtype == torch.zeros(1).dtype == torch.float32 != torch.float64
