"""Imports and tracing without the garbage collector."""

import gc
import sys

import pytest

from jaxtrain.run.collector import importing, paused


@pytest.fixture
def calls(monkeypatch):
    """A collector that only notes what is asked of it; True: it is at work."""
    noted = [True]
    monkeypatch.setattr(gc, "isenabled", lambda: noted[-1] is True)
    monkeypatch.setattr(gc, "disable", lambda: noted.append(False))
    monkeypatch.setattr(gc, "freeze", lambda: noted.append("frozen"))
    monkeypatch.setattr(gc, "enable", lambda: noted.append(True))
    return noted


def test_collection_waits_until_all_is_imported(calls, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    with importing():
        assert calls[-1] is False
    assert calls == [True, False, "frozen", True]
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert calls[-1] is True
    with importing(), importing():  # the inner one leaves it as it is
        pass
    assert calls[-3:] == [False, "frozen", True]


def test_where_jax_computes_already_nothing_changes(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", sys)
    with importing():
        assert calls == [True]
    assert calls == [True]


def test_a_pause_ends_where_it_began(calls):
    with paused(), paused():
        assert calls[-1] is False
    assert calls == [True, False, True]
    with pytest.raises(ValueError), paused():
        raise ValueError
    assert calls[-1] is True
