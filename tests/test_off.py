"""The neutral setting of a method equals its parent, bit for bit, on the same inputs."""

import importlib

import pytest
import torch

from etude._method import methods, stamp

PAIRS = {f"{m.room}.{m.name}": m for m in methods().values() if m.off}


@pytest.mark.parametrize("m", PAIRS.values(), ids=PAIRS.keys())
def test_off(m):
    plays = importlib.import_module(f"plays.{m.room}")
    torch.manual_seed(0)
    neutral, parent = m.off()
    tied = stamp(neutral), stamp(parent)
    assert all(tied), f"{m.name}: off must give stamped values (of functions: functools.partial), not {neutral, parent}"
    assert (tied[0].room, tied[0].name) == (m.room, m.name), "the first of the pair is the method itself"
    assert tied[1].room == m.room, "the second is its parent, of the same room"
    assert tied[1].name != m.name
    torch.manual_seed(0)
    ours = plays.play(neutral)
    torch.manual_seed(0)
    theirs = plays.play(parent)
    assert ours.numel() > 1
    assert ours.isfinite().all()
    assert torch.equal(ours, theirs)
