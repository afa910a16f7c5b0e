"""The search: what it compiles, what it leaves out, and that it finds the best."""

import dataclasses
import math

import pytest

from jaxtrain.aot import search
from jaxtrain.aot.__main__ import main
from jaxtrain.aot.search import Bound, Candidate

KEPT = {"none": 8.0, "minimal": 4.0, "save_attention": 2.0, "full": 1.0}
COST = {"none": 1.0, "minimal": 1.05, "save_attention": 1.2, "full": 1.33}


@dataclasses.dataclass(frozen=True)
class Fake:
    """A model of a step: state over fsdp, activations by rows, gathers by step."""

    candidate: Candidate
    memory: float
    tokens: int = 0
    mfu: float = 0.5
    refusal: str | None = None

    @property
    def sizes(self):
        return dict(self.candidate.mesh)

    @property
    def device_bytes(self):
        kept = KEPT[self.candidate.remat] * self.candidate.rows
        return 160 / self.sizes["fsdp"] / self.sizes["tensor"] + kept

    @property
    def fits(self):
        return self.device_bytes <= self.memory

    @property
    def step_secs(self):
        work = COST[self.candidate.remat] * self.candidate.rows
        return max(work, 3.0 * (self.sizes["fsdp"] > 1)) * self.sizes["tensor"] ** 0.1


def compile_fake(memory, compiled):
    def call(candidate):
        compiled.append(candidate)
        shards = dict(candidate.mesh)["data"] * dict(candidate.mesh)["fsdp"]
        return Fake(candidate, memory, tokens=candidate.rows * shards)

    return call


def bound(candidate):
    """True, and a little loose."""
    fake = Fake(candidate, 0.0)
    shards = fake.sizes["data"] * fake.sizes["fsdp"]
    state = 160 / fake.sizes["fsdp"] / fake.sizes["tensor"]
    least = max(candidate.rows, 3.0 * (fake.sizes["fsdp"] > 1))
    return Bound(state + candidate.rows, 0.98 * least / (candidate.rows * shards))


CANDIDATES = search.make_candidates(16, heads=8, row_tokens=1024)


@pytest.mark.parametrize("memory", [24.0, 48.0, 200.0])
def test_the_best_of_all_is_found_and_few_are_compiled(memory):
    compiled = []
    every = [compile_fake(memory, [])(c) for c in CANDIDATES]
    expected = max(r.tokens / r.step_secs for r in every if r.fits)
    outcomes = search.search(
        CANDIDATES,
        bound,
        compile_fake(memory, compiled),
        memory_bytes=memory,
        max_compiles=100,
    )
    best = search.choose_best(outcomes)
    assert best.tokens_per_sec == pytest.approx(expected, rel=0.05)
    assert len(compiled) < len(CANDIDATES) / 5
    assert len(outcomes) == len(CANDIDATES)


def test_the_number_of_compilations_is_capped_and_the_rest_are_counted():
    compiled = []
    outcomes = search.search(
        CANDIDATES, bound, compile_fake(48.0, compiled), memory_bytes=48.0,
        max_compiles=2,
    )  # fmt: skip
    assert len(compiled) == 2
    table = search.format_table(outcomes, 48.0)
    assert len(table.splitlines()) >= 4
    assert "more: not tried: --max_compiles is reached" in table
    assert "more: state and layers' inputs alone are too large" in table


def test_a_cap_below_nothing_compiles_nothing():
    compiled = []
    search.search(
        CANDIDATES, bound, compile_fake(48.0, compiled), memory_bytes=48.0,
        max_compiles=-3,
    )  # fmt: skip
    assert compiled == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--search", "--max_compiles=0"], "--max_compiles=0: give 1 or more"),
        (["--search", "--max_compiles=-3"], "--max_compiles=-3: give 1 or more"),
        (["--max_compiles=12"], "--max_compiles: only --search has such a limit"),
    ],
)
def test_a_cap_is_refused_where_it_ends_no_search(flags, told):
    with pytest.raises(ValueError, match=told):
        main(["from_scratch", "--topology=v5e:2x2", *flags])


def test_where_nothing_fits_there_is_no_best():
    outcomes = search.search(
        CANDIDATES, bound, compile_fake(5.0, []), memory_bytes=5.0, max_compiles=9
    )
    assert search.choose_best(outcomes) is None


def test_every_candidate_uses_all_devices_and_long_rows_may_be_split():
    for mesh, _, _ in CANDIDATES:
        sizes = dict(mesh)
        assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 16
        assert sizes["context"] == 1
    long = search.make_candidates(32, heads=8, row_tokens=65536, num_slices=2)
    assert {dict(c.mesh)["context"] for c in long} == {1, 2, 4, 8, 16}
    assert {dict(c.mesh)["data"] % 2 for c in long} == {0}


def test_experts_are_shared_out_in_every_way_that_divides_them():
    for experts, allowed in ((24, {1, 2, 4, 8}), (0, {1})):
        found = search.make_candidates(16, heads=8, row_tokens=1024, experts=experts)
        sizes = [dict(candidate.mesh) for candidate in found]
        assert {mesh.get("expert", 1) for mesh in sizes} == allowed
        for mesh in sizes:
            assert math.prod(mesh.values()) == 16
            assert mesh.get("expert") != 1  # as a run's mesh has it
            assert mesh["tensor"] == 1 or "expert" not in mesh
    mesh = (("data", 1), ("fsdp", 1), ("expert", 8), ("context", 1), ("tensor", 1))
    flags = search.as_flags(Candidate(mesh, "none", 1))
    assert flags["mesh.expert"] == 8
    assert flags["training.deepspeed.zero_stage"] == 3  # of all that is no expert


def test_a_candidate_is_told_as_keys_of_a_configuration():
    mesh = (("data", 1), ("fsdp", 4), ("context", 2), ("tensor", 1))
    assert search.as_flags(Candidate(mesh, "full", 2)) == {
        "mesh.fsdp": 4,
        "mesh.context": 2,
        "training.deepspeed.zero_stage": 3,
        "training.gradient_checkpointing": True,
        "training.remat_policy": "full",
        "training.remat_layers": -1,
        "training.per_device_train_batch_size": 2,
    }
