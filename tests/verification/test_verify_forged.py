"""Under right checksums, too, what verification calls sound can be read, and what readers refuse is named."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import seen
from full_stores import body, fill, forge_rows, gradients, naming, replace_object
from stores import forged

import timstore


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return two stores by name: one as it was written, one compacted."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plain", "compacted"):
            made[name] = fill(tmp_path_factory.mktemp(name) / "run", patch, "exact")
            with timstore.open(made[name]) as store:
                if name == "compacted":
                    store.compact()
                store.append(1, 0, 30, gradients(0, 30), lr=0.1)
    return made


@pytest.fixture
def store(stores, request, tmp_path):
    return shutil.copytree(stores[getattr(request, "param", "plain")], tmp_path / "forged")


def largest(store, kind):
    """Return the file of that kind with the most rows, the first of them."""
    paths = sorted(store.glob(f"data/**/{kind}*.parquet"))
    counts = [pq.read_metadata(path).num_rows for path in paths]
    return str(paths[counts.index(max(counts))].relative_to(store))


def put(column, value, **wanted):
    """Return a change that puts a value into the first row in which columns hold certain values."""

    def change(table):
        rows = table.to_pylist()
        row = next(
            row
            for row in rows
            if all(test(row[name]) if callable(test) else row[name] == test for name, test in wanted.items())
        )
        row[column] = value(row[column]) if callable(value) else value
        return pa.Table.from_pylist(rows, table.schema)

    return change


FORGED = [
    ("slices", put("start", -1)),
    ("slices", put("rows", 10_000)),
    ("slices", put("start", 2**62)),
    ("slices", put("array", "w7-float32")),
    ("slices", put("array", "w48-float32", array="w40-float32")),
    ("slices", put("row_map", [0, 2, 4], row_map=bool)),
    ("slices", put("row_map", [0, 2], row_map=bool)),
    ("slices", put("role", "values", role="inputs")),
    ("slices", put("owner", None)),
    ("slices", lambda table: table.drop_columns(["role"])),
    ("chunks", put("offset", lambda offset: offset + 1)),
    ("chunks", put("crc32", lambda crc32: crc32 ^ 1)),
    ("chunks", put("chunk", None)),
    ("gradients", put("parameter", "ghost")),
    ("gradients", put("parameter", "bias", parameter="q")),
    ("gradients", put("encoding", "dense", encoding="rows")),
    ("gradients", put("sample", None)),
    ("gradients", lambda table: table.drop_columns(["norm"])),
    ("records", put("sample", None)),
    ("steps", put("epoch", None)),
]


@pytest.mark.parametrize("store", ["plain", "compacted"], indirect=True)
def test_what_readers_refuse_is_damage_of_the_commit_that_holds_it(store, stores):
    assert timstore.verify(store).findings == ()
    for number, (kind, change) in enumerate(FORGED):
        name = largest(store, kind)
        forge_rows(store, name, change)
        with pytest.raises(timstore.TimstoreError):
            seen(store)
        report = timstore.verify(store)
        assert report.damage and not report.leftovers, (number, kind)
        record = naming(store, name)
        named = {name, str(record.relative_to(store))}
        commits = {(one.writer, one.seq) for one in report.damage if one.seq is not None}
        assert len(commits) == 1 or {one.path for one in report.damage} <= named, (number, kind, str(report))
        source = stores["compacted" if (store / "ckpt").exists() else "plain"]
        for path in (file for file in source.rglob("*") if file.is_file()):
            shutil.copy(path, store / path.relative_to(source))


@pytest.mark.parametrize("what", ["z/w9-float32/zarr.json", "slices.parquet", "probe.npz"])
def test_an_object_that_is_no_such_thing_is_found(store, what):
    folder = (store / largest(store, "slices")).parent
    path = next(store.glob("data/*/*/*.npz")) if what == "probe.npz" else folder / what
    replace_object(store, str(path.relative_to(store)), b"PK" + bytes(40))
    (finding,) = timstore.verify(store).damage
    assert finding.path == str(path.relative_to(store)) and finding.kind in ("malformed", "newer")


RECORDS = {
    "previous": ({"previous": "0" * 64}, "chain"),
    "store": ({"store": "0" * 32}, "foreign"),
    "writer": ({"writer": "0" * 16}, "misplaced"),
    "number": ({"seq": 77}, "misplaced"),
    "kind": ({"kind": "merge"}, "malformed"),
    "version": ({"format": [9, 0]}, "newer"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_readers_refuse_is_found_and_its_data_is_no_rubbish(store, what):
    changes, kind = RECORDS[what]
    record = naming(store, largest(store, "slices"))
    record = record.with_name("000000000001.json")
    record.write_bytes(forged(record.read_bytes(), **changes))
    report = timstore.verify(store)
    (finding,) = report.damage
    assert (finding.kind, finding.path, finding.seq) == (kind, str(record.relative_to(store)), 1)
    assert finding.samples == (1, 2, 30) and ["keep it" in one.message for one in report.leftovers] == [True]


@pytest.mark.parametrize("store", ["compacted"], indirect=True)
def test_a_compaction_that_readers_refuse_is_found(store):
    (path,) = store.glob("ckpt/*.json")
    original = path.read_bytes()
    fields = body(path)
    for changes in ({"commits": fields["commits"] + 1}, {"store": "0" * 32}, {"checkpoint": 9}):
        path.write_bytes(forged(original, **changes))
        report = timstore.verify(store)
        assert {one.path for one in report.damage} == {str(path.relative_to(store))}, report
