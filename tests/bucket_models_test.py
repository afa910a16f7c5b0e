"""Models in buckets: their weights are read slice by slice, the rest is copied."""

import collections
import importlib
import itertools
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxtrain import assets
from jaxtrain.config import default_config, resolve
from jaxtrain.models import Decoder, hf
from jaxtrain.models import bucket as bucket_models
from jaxtrain.models.fingerprint import fingerprint_model
from jaxtrain.models.hf_files import find_weights, read_header
from jaxtrain.models.hf_float8 import whole_tensors
from jaxtrain.models.hf_layouts import split_by_rows
from jaxtrain.models.hf_names import leaves_of
from jaxtrain.models.source import read_sizes, read_source
from jaxtrain.models.weight_files import open_weights
from jaxtrain.storage import reading
from jaxtrain.storage.address import filesystem
from jaxtrain.storage.objects import read_range
from jaxtrain.storage.reading import list_files
from tests.buckets import Proxy, bucket, endpoint_of, gs_bucket, serve
from tests.two_processes import run_two

__all__ = ["bucket", "gs_bucket"]
MODEL = assets.asset_path(assets.MODEL)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of copies of this test alone."""
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def upload(folder, address):
    filesystem(address).put(f"{folder}/", f"{address}/", recursive=True)
    return address


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The embedded model in several shards."""
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(MODEL, folder)
    config = hf.load_config(MODEL)
    params = hf.load_params(MODEL, Decoder(config))
    hf.save_pretrained(folder, config, params, max_shard_bytes=400_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Bytes that the libraries brought, by file, and the requests that took."""
    found = collections.defaultdict(list)
    for library, name in (("gcsfs", "GCSFileSystem"), ("s3fs", "S3FileSystem")):
        system = getattr(importlib.import_module(library), name)
        original = system._cat_file

        async def counted(self, path, *args, _original=original, **kwargs):
            content = await _original(self, path, *args, **kwargs)
            found[path.rpartition("/")[2]].append(len(content))
            return content

        monkeypatch.setattr(system, "_cat_file", counted)

    def range_counted(address, *args):
        content = read_range(address, *args)
        found[address.rpartition("/")[2]].append(len(content or b""))
        return content

    monkeypatch.setattr(reading, "read_range", range_counted)
    return found


def weight_bytes(reads):
    return sum(
        sum(sizes) for name, sizes in reads.items() if name.endswith(".safetensors")
    )


def headers(directory):
    """Bytes of the files' headers, with what is looked at to know git-lfs."""
    files, _ = find_weights(pathlib.Path(directory))
    return sum(read_header(file)[1] + 19 for file in files)


def layouts(config, axes, spec_of):
    """A layout for each leaf on devices in a mesh of these axes."""
    count = math.prod(axes.values())
    devices = np.array(jax.devices()[:count]).reshape(*axes.values())
    mesh = Mesh(devices, tuple(axes))
    tree = Decoder(config).abstract_params()
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(leaf)), tree)


def assert_equal_trees(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_a_model_in_a_bucket_is_the_same_model(bucket, sharded, reads, cache):
    address = upload(sharded, f"{bucket}/org/m")
    local = hf.resolve_model_path(address)
    assert local.is_relative_to(cache) and local.name == "m"
    assert not list(local.glob("*.safetensors"))
    on_disk = {file.name for file in sharded.iterdir()}
    copied = {file.name for file in local.iterdir()}
    assert copied == {n for n in on_disk if not n.endswith(".safetensors")}
    assert weight_bytes(reads) == 0
    config = hf.load_config(sharded)
    assert hf.load_config(local) == hf.match_weights(local, config) == config

    reads.clear()
    ours = hf.load_params(local, Decoder(config))
    assert_equal_trees(ours, hf.load_params(sharded, Decoder(config)))
    # Every weight once, and the headers not again.
    stored = sum(read_header(f)[1] for f in sharded.glob("*.safetensors"))
    total = sum(f.stat().st_size for f in sharded.glob("*.safetensors"))
    assert weight_bytes(reads) == total - stored
    assert fingerprint_model(local) == fingerprint_model(sharded)
    assert bucket_models.shown(str(local)) == address
    assert bucket_models.shown(str(sharded)) == str(sharded)


@pytest.mark.parametrize("axis", ["embed", "rows"])
def test_a_mesh_reads_each_byte_once_and_gets_its_own_part(
    gs_bucket, sharded, reads, axis
):
    """Split along either axis of the matrices, whichever lies along rows of a file."""

    def spec_of(leaf):
        split = -2 if axis == "embed" else -1
        if len(leaf.shape) < 2 or leaf.shape[split] % 4:
            return PartitionSpec()
        names = [None] * len(leaf.shape)
        names[split] = "fsdp"
        return PartitionSpec(*names)

    local = hf.resolve_model_path(upload(sharded, f"{gs_bucket}/m"))
    config = hf.load_config(local)
    targets = layouts(config, {"fsdp": 4}, spec_of)
    hf.match_weights(local, config)
    reads.clear()
    ours = hf.load_params(local, Decoder(config), targets)
    assert_equal_trees(ours, hf.load_params(sharded, Decoder(config), targets))
    assert jax.tree.map(lambda leaf: leaf.sharding, ours) == targets
    files = list(sharded.glob("*.safetensors"))
    total = sum(f.stat().st_size - read_header(f)[1] for f in files)
    assert weight_bytes(reads) == total


def test_a_device_reads_its_share_of_bytes(gs_bucket, sharded, reads, monkeypatch):
    """One of four hosts: what its devices do not hold is not asked for."""
    local = hf.resolve_model_path(upload(sharded, f"{gs_bucket}/m"))
    config = hf.load_config(local)
    hf.match_weights(local, config)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    with hf.open_tensors(local, config) as tensors:
        for leaf in leaves_of(config):
            if leaf.columns_axis is None:
                continue
            names = [None] * len(leaf.shape)
            names[leaf.columns_axis] = "fsdp"  # the worst case: columns of rows
            target = NamedSharding(mesh, PartitionSpec(*names))
            layout = split_by_rows(leaf, target)
            assert (
                layout.shard_shape(leaf.shape)[leaf.columns_axis]
                == (leaf.shape[leaf.columns_axis])
            )
            own = layout.devices_indices_map(leaf.shape)[jax.devices()[2]]
            bounds = tuple(
                range(size)[part] for part, size in zip(own, leaf.shape, strict=True)
            )
            reads.clear()
            part = hf._read_slice(leaf, tensors, bounds, np.dtype(np.float32))
            stored = tensors[leaf.tensor_name(leaf.places[0])].get_dtype()
            item_bytes = {"BF16": 2, "F32": 4}[stored]
            assert weight_bytes(reads) * 4 == math.prod(leaf.shape) * item_bytes
            assert part.size * 4 == math.prod(leaf.shape)


def test_columns_that_rows_cannot_replace_are_cut_on_the_host(gs_bucket, tmp_path):
    config = hf.load_config(MODEL)
    (leaf,) = [x for x in leaves_of(config) if x.path[-1] == "embedding"]
    mesh = Mesh(np.array(jax.devices()[:8]), ("fsdp",))
    odd = type(leaf)(leaf.path, (1001, 64), leaf.model_type)
    target = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    assert split_by_rows(odd, target) is target
    values = np.arange(1001 * 64, dtype=np.float32).reshape(1001, 64)
    file = tmp_path / "model.safetensors"
    save_file({"model.embed_tokens.weight": values}, file)
    filesystem(gs_bucket).put_file(str(file), f"{gs_bucket}/m/{file.name}")
    remote = list_files(f"{gs_bucket}/m")[file.name]
    with open_weights(remote) as opened:
        tensors = hf.Tensors(
            {n: opened.get_slice(n) for n in list(opened.keys())}, {}, in_bucket=True
        )
        loaded = hf._load_leaf(odd, tensors, target, np.dtype(np.float32))
    assert loaded.sharding == target
    np.testing.assert_array_equal(loaded, values)


def test_slices_are_those_of_safetensors(gs_bucket, tmp_path, reads):
    random = np.random.default_rng(0)
    tensors = {
        "vector": random.normal(size=13).astype(np.float32),
        "scalar": np.array(3.5, np.float32),
        "matrix": random.normal(size=(7, 5)).astype(jnp.bfloat16),
        "stack": random.normal(size=(4, 6, 3)).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    filesystem(gs_bucket).put_file(str(file), f"{gs_bucket}/x.safetensors")
    (remote,) = list_files(f"{gs_bucket}/x.safetensors").values()
    indices = [
        (slice(2, 5),), (slice(None),), (slice(2, 5), slice(1, 3)),
        (slice(3, 4), slice(2, 5), slice(0, 2)), (slice(3, 3),), (slice(1, 4),),
    ]  # fmt: skip
    with (
        open_weights(remote) as ours,
        open_weights(file) as on_disk,
        safe_open(file, framework="numpy") as theirs,
    ):
        for opened, name in itertools.product((ours, on_disk), tensors):
            assert sorted(opened.keys()) == sorted(theirs.keys())
            whole = tensors[name]
            mine, other = opened.get_slice(name), theirs.get_slice(name)
            assert mine.get_dtype() == other.get_dtype()
            assert mine.get_shape() == list(other.get_shape())
            np.testing.assert_array_equal(opened.get_tensor(name), whole)
            for index in indices:
                if len(index) <= whole.ndim:
                    np.testing.assert_array_equal(mine[index], whole[index])
        reads.clear()
        ours.get_slice("stack")[3:4, 2:5, :]
    assert weight_bytes(reads) == 3 * 3 * 2  # of one place, its rows alone


def test_faults_are_tried_again_and_damage_is_told(sharded, tmp_path):
    seen = collections.Counter()

    def fault(method, path):
        if method != "GET" or "safetensors" not in path or "download" not in path:
            return None
        seen["all"] += 1
        return {3: 503, 5: "cut", 7: 429}.get(seen["all"])

    with Proxy(endpoint_of("gs"), fault) as proxy, serve("gs", proxy.url) as root:
        address = upload(sharded, f"{root}/faults/m")
        local = hf.resolve_model_path(address)
        config = hf.load_config(local)
        ours = hf.load_params(local, Decoder(config))
        assert_equal_trees(ours, hf.load_params(sharded, Decoder(config)))
        assert seen["all"] > 7
        shard = sorted(sharded.glob("*.safetensors"))[1]
        whole = f"{address}/{shard.name}"
        filesystem(address).pipe_file(whole, shard.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"{whole} is cut off: .* bytes"):
            hf.match_weights(hf.resolve_model_path(address), config)
        filesystem(address).rm_file(whole)
        missing = f"names files that .* lacks: {shard.name}"
        with pytest.raises(ValueError, match=missing):
            hf.match_weights(hf.resolve_model_path(address), config)


def test_a_changed_model_gets_a_copy_of_its_own(gs_bucket, sharded):
    address = upload(sharded, f"{gs_bucket}/m")
    before = hf.resolve_model_path(address)
    assert hf.resolve_model_path(address) == before
    config = json.loads((sharded / "config.json").read_text())
    text = json.dumps(config | {"max_position_embeddings": 77})
    filesystem(address).pipe_file(f"{address}/config.json", text.encode())
    after = hf.resolve_model_path(address)
    assert after != before
    assert hf.load_config(after).max_position_embeddings == 77
    assert hf.load_config(before) == hf.load_config(sharded)


def test_float8_is_read_slice_by_slice_too(gs_bucket, tmp_path, reads):
    random = np.random.default_rng(1)
    codes = random.normal(size=(8, 6)).astype(ml_dtypes.float8_e4m3fn)
    scales = random.uniform(1, 2, size=(2, 2)).astype(np.float32)
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [8, 6], "data_offsets": [0, 48]},
        "w_scale_inv": {"dtype": "F32", "shape": [2, 2], "data_offsets": [48, 64]},
    }
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + codes.tobytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(content + scales.tobytes())
    filesystem(gs_bucket).put_file(str(file), f"{gs_bucket}/x.safetensors")
    (remote,) = list_files(f"{gs_bucket}/x.safetensors").values()
    with open_weights(remote) as opened:
        stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        ours = whole_tensors(stored, dict.fromkeys(stored, remote), (4, 3))["w"]
    wanted = codes.astype(np.float32) * scales.repeat(4, 0).repeat(3, 1)
    reads.clear()
    np.testing.assert_array_equal(ours[3:7, 1:5], wanted[3:7, 1:5])
    assert weight_bytes(reads) == 4 * 6


def test_sizes_alone_read_no_weights(gs_bucket, reads):
    """What `jaxtrain aot` asks for."""
    config = default_config()
    config.model.name_or_path = upload(MODEL, f"{gs_bucket}/m")
    sizes = read_sizes(resolve(config))
    assert sizes.config == hf.load_config(MODEL)
    assert weight_bytes(reads) == 0


def test_what_is_wrong_is_told_by_the_address(gs_bucket, cache):
    address = upload(MODEL, f"{gs_bucket}/m")
    filesystem(address).rm_file(f"{address}/model.safetensors")
    filesystem(address).pipe_file(f"{address}/tokenizer.json", b"{")
    config = default_config()
    config.training.training_type = "sft"
    config.model.name_or_path = address
    with pytest.raises(ValueError, match=f"{address} has neither") as error:
        read_source(resolve(config))
    assert f"{address}/tokenizer.json is not JSON" in str(error.value)
    assert str(cache) not in str(error.value)


PROGRAM = """
import sys
folder, address, rank = sys.argv[1:]
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(rank))
import math, os
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtrain.models import Decoder, hf
from jaxtrain.storage.reading import RemoteFile

local = hf.resolve_model_path(os.environ["TEST_MODEL"])
config = hf.load_config(local)
hf.match_weights(local, config)
mesh = Mesh(np.array(jax.devices()), ("fsdp",))

def layout(leaf):  # columns of the files' rows, for matrices of layers
    names = [None] * len(leaf.shape)
    if len(leaf.shape) > 1:
        names[-2] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*names))

targets = jax.tree.map(layout, Decoder(config).abstract_params())
read = []
piece = RemoteFile._read_piece
RemoteFile._read_piece = lambda self, place: (
    read.append(place[1] - place[0]), piece(self, place))[1]
ours = hf.load_params(local, Decoder(config), targets)
disk = hf.load_params(os.environ["TEST_DISK"], Decoder(config), targets)
shapes = jax.tree.leaves(Decoder(config).abstract_params())
split = sum(math.prod(x.shape) for x in shapes if len(x.shape) > 1)
whole = sum(math.prod(x.shape) for x in shapes if len(x.shape) == 1)
item = jax.tree.leaves(disk)[0].dtype.itemsize
for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(disk), strict=True):
    assert mine.sharding == other.sharding
    for a, b in zip(mine.addressable_shards, other.addressable_shards, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
stacked_vectors = sum(read) - split * item // 2 - whole * item
assert 0 <= stacked_vectors < split * item * 0.02, (sum(read), split, whole)
"""


def test_each_of_two_processes_reads_half(gs_bucket, sharded, tmp_path, monkeypatch):
    """Both hold columns; each reads half of the rows, and they exchange parts."""
    address = upload(sharded, f"{gs_bucket}/m")
    monkeypatch.setenv("TEST_MODEL", address)
    monkeypatch.setenv("TEST_DISK", str(sharded))
    run_two(PROGRAM, tmp_path)
