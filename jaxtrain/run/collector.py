"""Work without the garbage collector, which would find nothing in what it makes.

A run imports some 2,000 modules, and each of the collector's rounds looks through all
of them anew: a sixth of the time. Tracing a train step makes as many objects that stay.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Collect nothing within; where nothing is collected anyway, this does nothing."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Collect nothing while the block imports, nor look at what it imported later.

    Where jax is imported already, and somebody computes with it, this does nothing.
    """
    if "jax" in sys.modules or not gc.isenabled():
        yield
        return
    with paused():
        try:
            yield
        finally:
            gc.freeze()
