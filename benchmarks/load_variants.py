"""Scratch: variants of reading weights."""

import concurrent.futures, contextlib, os, sys, time
import jax, numpy as np

t = time.perf_counter()
jax.devices()
print("devices alone", time.perf_counter() - t)
from jaxtrain.models import hf, hf_tensors, weight_files
from jaxtrain.models.hf_files import read_header
from jaxtrain.models.transformer import Decoder

D = sys.argv[1] + "/model"
dec = Decoder(hf.load_config(D))


class Sl:
    def __init__(s, a, kind):
        s.a, s.kind = a, kind

    def get_dtype(s):
        return s.kind

    def get_shape(s):
        return list(s.a.shape)

    def __getitem__(s, i):
        return s.a[i]


class Mapped:
    def __init__(s, f):
        s.h, s.start = read_header(f)
        s.b = np.memmap(f, np.uint8, "r")

    def keys(s):
        return list(s.h)

    def get_slice(s, n):
        e = s.h[n]
        a, b = e["data_offsets"]
        return Sl(
            np.asarray(s.b[s.start + a : s.start + b])
            .view(weight_files._TYPES[e["dtype"]])
            .reshape(e["shape"]),
            e["dtype"],
        )


@contextlib.contextmanager
def opened(f):
    yield Mapped(f)


def pool_each(self, read, items):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read, items))


serial = hf_tensors.Tensors.for_each
so = hf_tensors.open_weights
where = [0.0]
rs = hf._read_slice


def timed_read(*a):
    t = time.perf_counter()
    try:
        return rs(*a)
    finally:
        where[0] += time.perf_counter() - t


hf._read_slice = timed_read
for name in ("safe serial", "safe pool", "map serial", "map pool") * 2:
    hf_tensors.Tensors.for_each = serial if "serial" in name else pool_each
    hf_tensors.open_weights = so if "safe" in name else opened
    t, c = time.perf_counter(), time.process_time()
    where[0] = 0.0
    p = hf.load_params(D, dec, dtype="float32")
    b = time.perf_counter() - t
    jax.block_until_ready(p)
    print(
        f"{name}: {time.perf_counter() - t:.2f} s, cpu {time.process_time() - c:.2f}, returned after {b:.2f}, reading {where[0]:.2f}",
        flush=True,
    )
    del p
