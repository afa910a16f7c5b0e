"""Traffic and collectives of programs, against sums made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.aot.hlo_cost import analyze
from jaxtrain.aot.hlo_groups import device_groups, network_share
from jaxtrain.aot.hlo_text import parse, shape_bytes, split_tuple


def test_bytes_of_shapes_as_the_compiler_writes_them():
    assert shape_bytes("bf16[2,3]{1,0}") == 12
    assert shape_bytes("(f32[4]{0}, s8[2,2], pred[], u4[8])") == 16 + 4 + 1 + 4
    on_chip = "f32[4]{0:T(128)S(1)}"
    assert shape_bytes(on_chip) == 16
    assert shape_bytes(on_chip, device_memory_only=True) == 0
    nested = "((f32[4,2]{1,0:T(8,128)}, s8[2]), pred[])"
    assert split_tuple(nested) == ["(f32[4,2]{1,0:T(8,128)}, s8[2])", "pred[]"]


LOOP = """\
HloModule handmade

%body (p: (s32[], f32[6,8,8], f32[8,8])) -> (s32[], f32[6,8,8], f32[8,8]) {
  %p = (s32[], f32[6,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[6,8,8]{2,1,0} get-tuple-element(%p), index=1
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  %gathered = f32[16,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %t = (s32[], f32[6,8,8]{2,1,0}, f32[8,8]{1,0}) tuple(%i, %w, %x)
}

%test (p.1: (s32[], f32[6,8,8], f32[8,8])) -> pred[] {
  %p.1 = (s32[], f32[6,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  %n = s32[] constant(6)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[6,8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[6,8,8]{2,1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[6,8,8], f32[8,8]) tuple(%zero, %a, %b)
  %l = (s32[], f32[6,8,8], f32[8,8]) while(%start), condition=%test, body=%body
  %out = f32[8,8]{1,0} get-tuple-element(%l), index=2
  ROOT %sum = f32[8,8]{1,0} add(%out, %out)
}
"""
MATRIX = 8 * 8 * 4
CONDITIONAL = """\
HloModule handmade

%usual (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %swapped = f32[8,8]{1,0} all-to-all(%x), channel_id=1, dimensions={0}
}

%rare (y: f32[8,8]) -> f32[8,8] {
  %y = f32[8,8]{1,0} parameter(0)
  ROOT %shifted = f32[8,8]{1,0} collective-permute(%y), channel_id=2
}

ENTRY %main (p: pred[], a: f32[8,8]) -> f32[8,8] {
  %p = pred[] parameter(0)
  %a = f32[8,8]{1,0} parameter(1)
  ROOT %r = f32[8,8]{1,0} conditional(%p, %a, %a), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%usual, %rare}",
        "true_computation=%rare, false_computation=%usual",
    ],
)
def test_of_a_conditional_what_runs_where_the_predicate_is_false_counts(branches):
    cost = analyze(CONDITIONAL.replace("BRANCHES", branches))
    assert cost.collectives == {"all-to-all": (1.0, MATRIX)}


def test_a_loop_costs_its_body_as_often_as_it_runs():
    cost = analyze(LOOP)
    assert cost.collectives == {"all-gather": (6.0, 6 * 16 * 8 * 4)}
    slices = 6 * 2 * MATRIX
    gathers = 6 * (MATRIX + 2 * MATRIX)
    assert cost.bytes_accessed == slices + gathers + 3 * MATRIX


def entry(*lines: str) -> str:
    """A program of these instructions; %w is f32[64,8,8], %x f32[8,8], %i s32[]."""
    head = (
        "%w = f32[64,8,8]{2,1,0} parameter(0)",
        "%x = f32[8,8]{1,0} parameter(1)",
        "%i = s32[] parameter(2)",
    )
    body = "\n".join(f"  {line}" for line in (*head, *lines))
    return f"ENTRY %main (w: f32[64,8,8]) -> f32[] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[2,8,8]{2,1,0} slice(%w), slice={[0:2], [0:8], [0:8]}", 4 * MATRIX),
        # The expert's weights fetched to on-chip memory: read once, and only these.
        (
            "((f32[64,8,8]{2,1,0}), f32[2,8,8]{2,1,0:S(1)}, s32[]{:S(2)})"
            " slice-start(%w), slice={[0:2], [0:8], [0:8]}",
            2 * MATRIX,
        ),
        (
            "(f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]{:S(2)}) copy-start(%x)",
            MATRIX,
        ),
        (
            "(f32[8,8]{1,0}, f32[8,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)})"
            " collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            2 * MATRIX,
        ),
        # Three rows of 64 matrices, and where they are.
        (
            "f32[3,8,8]{2,1,0} gather(%w, %x), offset_dims={1,2}, slice_sizes={1,8,8}",
            (3 + 3 + 1) * MATRIX,
        ),
        # One matrix is added to: read, and written, with what is added and where.
        ("f32[64,8,8]{2,1,0} scatter(%w, %i, %x), to_apply=%add", 3 * MATRIX + 4),
        ("f32[64,8,8]{2,1,0} dynamic-update-slice(%w, %x, %i, %i, %i)", 2 * MATRIX),
    ],
)
def test_an_instruction_costs_what_it_touches(line, expected):
    assert analyze(entry(f"ROOT %r = {line}")).bytes_accessed == expected


def test_of_what_a_fusion_reads_slices_of_only_these_count():
    inner = """\
%look (p: f32[64,8,8], j: s32[]) -> f32[1,8,8] {
  %p = f32[64,8,8]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %one = f32[1,8,8]{2,1,0} dynamic-slice(%p, %j, %j, %j)
}

%fused (q: f32[64,8,8], k: s32[], y: f32[8,8]) -> f32[8,8] {
  %q = f32[64,8,8]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %y = f32[8,8]{1,0} parameter(2)
  %flat = f32[64,8,8]{2,1,0} bitcast(%q)
  %found = f32[1,8,8]{2,1,0} fusion(%flat, %k), kind=kLoop, calls=%look
  %as = f32[8,8]{1,0} bitcast(%found)
  ROOT %sum = f32[8,8]{1,0} add(%as, %y)
}

"""
    fused = "ROOT %r = f32[8,8]{1,0} fusion(%w, %i, %x), kind=kLoop, calls=%fused"
    # The slice, the other operand, the result; the index is told by a scalar.
    assert analyze(inner + entry(fused)).bytes_accessed == 3 * MATRIX


# As the compiler for TPUs writes a gathering of weights that goes on beside two other
# operations: it stands in each of them, with its buffers going in and out.
UNDER_WAY = """\
%begin (s: f32[8,8]) -> (f32[8,8], f32[64,8,8]) {
  %s = f32[8,8]{1,0} parameter(0)
  %g.1 = f32[64,8,8]{2,1,0} all-gather(%s), channel_id=5, dimensions={0}
  ROOT %c.1 = (f32[8,8]{1,0}, f32[64,8,8]{2,1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (s.2: f32[8,8], b.2: f32[64,8,8], y: f32[8,8]) -> (f32[8,8], f32[8,8], f32[64,8,8]) {
  %s.2 = f32[8,8]{1,0} parameter(0)
  %b.2 = f32[64,8,8]{2,1,0} parameter(1)
  %y = f32[8,8]{1,0} parameter(2)
  %g.2 = f32[64,8,8]{2,1,0} all-gather(%s.2), channel_id=5, dimensions={0}
  %n = f32[8,8]{1,0} negate(%y)
  ROOT %t = (f32[8,8]{1,0}, f32[8,8]{1,0}, f32[64,8,8]{2,1,0}) tuple(%n, %s.2, %g.2)
}

%end (s.3: f32[8,8], b.3: f32[64,8,8]) -> f32[64,8,8] {
  %s.3 = f32[8,8]{1,0} parameter(0)
  %b.3 = f32[64,8,8]{2,1,0} parameter(1)
  %g.3 = f32[64,8,8]{2,1,0} all-gather(%s.3), channel_id=5, dimensions={0}
  ROOT %c.3 = f32[64,8,8]{2,1,0} custom-call(%s.3, %b.3, %g.3), custom_call_target="AsyncCollectiveDone"
}

"""  # noqa: E501


def test_a_collective_that_overlaps_with_others_costs_once():
    gte = "get-tuple-element"
    lines = [
        "%f = (f32[8,8]{1,0}, f32[64,8,8]{2,1,0}) fusion(%x), kind=kCustom,"
        " output_to_operand_aliasing={{0}: (0, {})}, calls=%begin",
        f"%s = f32[8,8]{{1,0}} {gte}(%f), index=0",
        f"%b = f32[64,8,8]{{2,1,0}} {gte}(%f), index=1",
    ]
    for step in range(2):
        lines += [
            f"%f.{step} = (f32[8,8]{{1,0}}, f32[8,8]{{1,0}}, f32[64,8,8]{{2,1,0}})"
            " fusion(%s, %b, %x), kind=kLoop, calls=%beside,"
            " output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}"
        ]
    lines += ["ROOT %e = f32[64,8,8]{2,1,0} fusion(%s, %b), kind=kCustom, calls=%end"]
    cost = analyze(UNDER_WAY + entry(*lines))
    assert cost.collectives == {"all-gather": (1.0, 64 * MATRIX)}
    # Of the gathering: its part read, all of it written. Of each operation beside it:
    # an operand and a result.
    assert cost.bytes_accessed == (1 + 64) * MATRIX + 2 * 2 * MATRIX


def test_sums_that_share_a_channel_count_each_and_scattered_ones_by_all_parts():
    lines = [
        "%a = f32[8,8]{1,0} all-reduce(%x), channel_id=1, to_apply=%add",
        "%b = (f32[8,8]{1,0}, f32[8,8]{1,0}) all-reduce-start(%x, %a), channel_id=1",
        # As programs for GPUs have it: operands, then results.
        "%d = ((f32[8,8]{1,0}), f32[8,8]{1,0}) all-reduce-start(%x), channel_id=2",
        "ROOT %c = f32[1,8]{1,0} reduce-scatter(%x), channel_id=1, dimensions={0}",
    ]
    assert analyze(entry(*lines)).collectives == {
        "all-reduce": (3.0, 4 * MATRIX),
        "reduce-scatter": (1.0, MATRIX),
    }


def test_rows_that_a_compiled_program_looks_up_cost_no_whole_table():
    table = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
    rows = jax.ShapeDtypeStruct((16,), jnp.int32)
    compiled = jax.jit(lambda t, i: t[i]).lower(table, rows).compile()
    moved = analyze(compiled.as_text()).bytes_accessed
    # Rows read and written; wrapping the indices is a few passes over 64 bytes.
    least = 2 * 16 * 256 * 4
    assert least < moved < least + 10 * 64


def test_a_compiled_sum_over_devices_is_one_all_reduce():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    layout = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    function = jax.jit(lambda x: x.sum(0), in_shardings=layout, out_shardings=whole)
    compiled = function.lower(jax.ShapeDtypeStruct((8, 1024), jnp.float32)).compile()
    text = compiled.as_text()
    assert analyze(text).collectives == {"all-reduce": (1.0, 4096.0)}
    assert analyze(text, device_count=8, per_host=8).between_slices == {}
    # Four devices of a host bring in a quarter each of what the other host has.
    network = analyze(text, device_count=8, per_host=4).between_slices
    assert network == {"all-reduce": (1.0, 4096 / 2 / 4)}


# --- groups --------------------------------------------------------------------------

ROWS, COLUMNS = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%a", ROWS),
        ("replica_groups=[2,4]<=[8], to_apply=%a", ROWS),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, x=1", ROWS),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", COLUMNS),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", COLUMNS),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'data'}", COLUMNS),
        ("replica_groups={}, to_apply=%a", [list(range(8))]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_every_notation(text, groups):
    assert device_groups(f"%x), channel_id=1, {text}", 8).tolist() == groups


@pytest.mark.parametrize(
    "text",
    ["replica_groups=mesh['a'=4] {'a'}", "replica_groups=mesh['a'=8] {'a':(1)2}"],
)
def test_groups_that_are_not_understood_are_an_error(text):
    with pytest.raises(ValueError, match="no groups of 8 devices in"):
        device_groups(text, 8)


def test_what_passes_between_hosts_is_what_a_host_lacks_shared_by_its_members():
    rows, columns = np.array(ROWS), np.array(COLUMNS)
    assert network_share("all-gather", rows, per_host=4) == 0
    assert network_share("all-gather", columns, per_host=4) == 1 / 2
    # Hosts of two: half of a row is elsewhere, and two bring it in.
    assert network_share("all-gather", rows, per_host=2) == 1 / 4
    assert network_share("all-to-all", rows, per_host=2) == 1 / 2
    ring = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    assert network_share("collective-permute", ring, per_host=2) == 1
    assert network_share("collective-permute", ring, per_host=4) == 0


def test_computations_keep_their_instructions_in_order():
    computations, first = parse(LOOP)
    assert first == "main"
    assert list(computations["test"]) == ["p.1", "n", "i.1", "less"]
    assert computations["main"]["l"].called == ["body"]
    assert computations["body"]["slice"].operands == ["w", "i", "i", "i"]
