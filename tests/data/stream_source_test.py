"""Shares of a stream: each row once an epoch, and exact from any position."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.data.stream.source import HubSource, Share, head, open_stream

COUNT = 37


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The rows 0 to 36 in one jsonl, six jsonl, parquet row groups, and as a hub's."""
    folder = tmp_path_factory.mktemp("rows")
    numbers = [{"text": str(i)} for i in range(COUNT)]
    lines = [json.dumps(row) + "\n" for row in numbers]
    (folder / "one.jsonl").write_text("".join(lines))
    (folder / "six").mkdir()
    for i in range(6):
        (folder / "six" / f"{i}.jsonl").write_text("".join(lines[i * 7 : i * 7 + 7]))
    pq.write_table(
        pa.Table.from_pylist(numbers), folder / "a.parquet", row_group_size=4
    )
    files = sorted(map(str, (folder / "six").iterdir()))
    streamed = datasets.load_dataset(
        "json", data_files=files, split="train", streaming=True
    )
    return {
        "one": open_stream(str(folder / "one.jsonl")),
        "six": open_stream(str(folder / "six")),
        "parquet": open_stream(str(folder / "a.parquet")),
        "first": open_stream(str(folder / "six"), max_rows=20),
        "hub": HubSource("hub", streamed),
        "first of hub": HubSource("hub", streamed, 20),
    }


NAMES = st.sampled_from(["one", "six", "parquet", "first", "hub", "first of hub"])


def read(cursor):
    return [int(row.row["text"]) for row in cursor]


@given(
    name=NAMES,
    count=st.integers(1, 7),
    seed=st.none() | st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_the_shares_of_an_epoch_have_every_row_once(sources, name, count, seed, epoch):
    shares = [
        read(sources[name].open(Share(index, count, seed), epoch, None))
        for index in range(count)
    ]
    rows = 20 if "first" in name else COUNT
    assert sorted(row for share in shares for row in share) == list(range(rows))
    if count == 1 and (seed is None or name in ("one", "first")):
        assert shares[0] == list(range(rows))  # in order


@given(
    name=NAMES,
    count=st.integers(1, 3),
    seed=st.none() | st.integers(0, 9),
    stop=st.integers(0, COUNT),
)
def test_a_cursor_goes_on_behind_any_row(sources, name, count, seed, stop):
    source, share = sources[name], Share(count - 1, count, seed)
    whole = read(source.open(share, 2, None))
    first = source.open(share, 2, None)
    for _ in range(min(stop, len(whole))):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert read(source.open(share, 2, state)) == whole[stop:]
    # Neither cursor knows of the other, nor the next one of them.
    assert first.get_state() == state
    assert read(first) == whole[stop:]
    assert read(source.open(share, 2, None)) == whole


def test_files_and_residues_change_hands_from_epoch_to_epoch(sources):
    for name, count in (("six", 3), ("one", 4), ("hub", 3)):
        share = Share(0, count, seed=1)
        epochs = [read(sources[name].open(share, e, None)) for e in range(3)]
        assert epochs[0] != epochs[1] != epochs[2], name


def test_rows_tell_where_they_stand(sources):
    assert head(sources["six"], 9).places[8] == "1.jsonl line 2"
    assert head(sources["parquet"], 9).places[8] == "a.parquet row 9"
    assert head(sources["hub"], 9).places[8] == "hub row 9"


def test_a_hub_name_without_network_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"'someone/absent' is no local file.*local path"
    ):
        open_stream("someone/absent")
