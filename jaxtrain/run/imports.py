"""Imports without the garbage collector, which finds nothing in modules.

A run imports some 2,000 modules, and each of the collector's rounds looks through all
of them anew: a sixth of the time.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Collect nothing while the block imports, nor look at what it imported later.

    Where jax is imported already, and somebody computes with it, this does nothing.
    """
    if "jax" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
