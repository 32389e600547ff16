"""The tie to the paper: citations are checked at import, values carry what made them, the registry is computed."""

import copy
import functools
import pickle

import pytest
import torch

from etude import rules
from etude._method import _METHODS, ROOMS, find_method, method, methods, stamp

PAPER = "Doe & Roe 2024, On Things: A Study, arXiv:2401.00001"


@pytest.fixture(autouse=True)
def _registry_as_before():
    before = dict(_METHODS)
    yield
    _METHODS.clear()
    _METHODS.update(before)


@pytest.mark.parametrize(
    "citation",
    [
        "On Things, arXiv:2401.00001",
        "Doe 2024 On Things, arXiv:2401.00001",
        "Doe 2024, On Things",
        "Doe 2024, On Things, 2401.00001",
        "Doe 2024, On Things, arXiv:",
        "Doe 24, On Things, arXiv:2401.00001",
        " 2024, On Things, arXiv:2401.00001",
        "Doe 2024, On Things, arXiv:2401.00001 and more",
    ],
)
def test_a_malformed_citation_raises(citation):
    with pytest.raises(ValueError, match="must read"):
        method(citation)


@pytest.mark.parametrize(
    "where, url",
    [
        ("arXiv:2401.00001", "https://arxiv.org/abs/2401.00001"),
        ("doi:10.1000/x.1", "https://doi.org/10.1000/x.1"),
        ("https://doe.org/things", "https://doe.org/things"),
    ],
)
def test_a_citation_is_read(where, url):
    @method(f"Doe & Roe 2024, On 1999, and Other Things, {where}", note="n")
    def thing(a: float = 1.0):
        """One sentence
        on two lines.

        More.
        """

    m = _METHODS["yours", "thing"]
    assert (m.authors, m.year, m.title, m.url) == ("Doe & Roe", 2024, "On 1999, and Other Things", url)
    assert (m.name, m.room, m.family, m.note) == ("thing", "yours", "test_method", "n")
    assert (m.summary, m.knobs, m.off, m.parent) == ("One sentence on two lines.", {"a": 1.0}, None, None)
    assert m.fn is thing
    assert m not in methods().values(), "a method of the user's own is not of the house"


def test_a_method_without_a_docstring_raises():
    with pytest.raises(ValueError, match="needs a docstring"):

        @method(PAPER)
        def silent(): ...


def test_a_value_carries_its_method_and_all_knobs():
    told = stamp(rules.lion(3e-4, weight_decay=0.1))
    assert (told.room, told.name) == ("rules", "lion")
    assert told.knobs == {"lr": 3e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
    assert str(told) == "lion(lr=0.0003, betas=(0.9, 0.99), weight_decay=0.1)"
    for other in (copy.deepcopy(rules.lion()), pickle.loads(pickle.dumps(rules.lion()))):
        assert stamp(other) == stamp(rules.lion())


def test_a_class_stays_a_class_and_stamps_its_instances():
    @method(PAPER)
    class Thing(torch.nn.Module):
        """A thing."""

        def __init__(self, d: int, eps: float = 1e-5):
            super().__init__()
            self.d = d

    assert isinstance(Thing(3), Thing)
    assert stamp(Thing(3, eps=0.1)).knobs == {"d": 3, "eps": 0.1}
    assert _METHODS["yours", "Thing"].knobs == {"eps": 1e-5}


def test_a_function_that_is_the_method_returns_bare_tensors():
    @method(PAPER)
    def double(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        """x → by · x."""
        return by * x

    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert stamp(double(torch.ones(2))) is None
    assert stamp(double).knobs == {"by": 2.0}
    assert stamp(functools.partial(double, by=3.0)).knobs == {"by": 3.0}
    assert stamp(functools.partial(print)) is None
    assert stamp(lambda x: x) is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'bye'"):
        double(torch.ones(2), bye=1.0)


def test_the_parent_is_read_from_off():
    found = methods()
    assert found["rules", "lion"].parent == "signum"
    assert found["rules", "sgd"].parent is None

    @method(PAPER, off=lambda: (mine(), mine()))
    def mine(a: float = 1.0):
        """Its own parent is none."""
        return torch.nn.Identity()

    assert _METHODS["yours", "mine"].parent is None


def test_the_registry_is_ordered_by_room_and_knows_its_own():
    rooms = [room for room, _ in methods()]
    assert rooms == sorted(rooms, key=ROOMS.index)
    assert find_method("lion", of=rules.lion).name == "lion"
    assert find_method("lion", of=print) is None
