"""What a store says that cannot be true is found, though every checksum is right."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from full_stores import body, fill, forge_rows, gradients, naming, replace_object, reseal
from stores import forged

import timstore
from timstore.format.zarr_shards import ArrayLayout, decode_chunk, encode_shards


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return two stores by name: one as it was written, one rolled up."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plain", "compacted"):
            found[name] = fill(tmp_path_factory.mktemp(name) / "run", patch, "exact")
            with timstore.open(found[name]) as store:
                if name == "compacted":
                    store.compact()
                store.append(1, 0, 30, gradients(0, 30), lr=0.1)
    return found


@pytest.fixture
def store(stores, request, tmp_path):
    path = tmp_path / "forged"
    shutil.copytree(stores[getattr(request, "param", "plain")], path)
    return path


@pytest.mark.parametrize("store", ["plain", "compacted"], indirect=True)
def test_what_is_forged_below_is_sound_before(store):
    assert timstore.verify(store).findings == ()


def place(table, column, number, value):
    """Return a table with another value in one row."""
    values = table[column].to_pylist()
    values[number] = value(values[number]) if callable(value) else value
    index = table.column_names.index(column)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def row(table, **wanted):
    """Return the number of the first row in which columns hold certain values."""
    return next(
        number
        for number, one in enumerate(table.to_pylist())
        if all(value(one[name]) if callable(value) else one[name] == value for name, value in wanted.items())
    )


def slices(column, value, **wanted):
    return lambda table: place(table, column, row(table, **wanted), value)


def without(**wanted):
    """Return a change that leaves out one row."""

    def change(table):
        number = row(table, **wanted)
        return pa.concat_tables([table.slice(0, number), table.slice(number + 1)])

    return change


FORGED_ROWS = {
    "slices": {
        "a slice before its array": (slices("start", -1), "lie outside their array"),
        "a slice that ends after its array": (slices("rows", 10_000), "lie outside their array"),
        "a slice far behind its array": (slices("start", 2**62), "lie outside their array"),
        "an owner that does not exist": (slices("owner", 999), "belong to no row of the 18 gradients"),
        "a negative owner": (slices("owner", -1), "belong to no row"),
        "another gradient's slice": (
            slices("owner", lambda one: one + 1, role="values"),
            "do not tile|do not have the matrices",
        ),
        "a role that does not exist": (slices("role", "inputz"), "a role that does not exist"),
        "a role of another encoding": (slices("role", "values", role="inputs"), "do not have the matrices"),
        "a state's role": (slices("role", "theta"), "belong to no row of the 0 states"),
        "an array that does not exist": (slices("array", "w7-float32"), "name an array that their commit"),
        "an array of another width": (slices("array", "w48-float32", array="w40-float32"), "shape of their param"),
        "a row_map into nowhere": (slices("row_map", [0, 2, 4], row_map=bool), "leads outside their inputs"),
        "a negative row_map": (slices("row_map", [0, -1, 3], row_map=bool), "leads outside their inputs"),
        "a row_map that is too short": (slices("row_map", [0, 2], row_map=bool), "a row_map of another length"),
        "no row_map": (slices("row_map", None, row_map=bool), "as many inputs as output gradients"),
        "rows that are too few": (slices("rows", 2, role="output_gradients"), "row_map of another length|as many"),
        "a block elsewhere": (slices("block", [0, 3, 0, 36], block=bool), "do not tile the columns"),
        "no block": (slices("block", None, block=bool), "do not tile the columns"),
        "a slice that is left out": (without(role="output_gradients"), "do not have the matrices"),
        "a dense gradient without its slice": (without(array="w9-float32"), "have a norm and no numbers"),
    },
    "chunks": {
        "a chunk elsewhere": (slices("offset", lambda one: one + 1), "offset, bytes, crc32 of chunk"),
        "another size": (slices("bytes", 7), "offset, bytes, crc32 of chunk"),
        "another checksum": (slices("crc32", lambda one: one ^ 1), "offset, bytes, crc32 of chunk"),
        "another chunk": (slices("chunk", lambda one: one + 1), "offset, bytes, crc32 of chunk"),
        "a chunk after the array's end": (slices("chunk", 10_000), "which the commit does not have"),
        "a negative chunk": (slices("chunk", -1), "which the commit does not have"),
        "a chunk of no array": (slices("array", "w7-float32"), "which the commit does not have"),
        "nothing where something must be": (slices("crc32", None), "its column crc32 is empty in 1 rows"),
    },
    "gradients": {
        "a sample without a record": (slices("sample", 77), "belong to no record"),
        "a parameter that nobody declared": (slices("parameter", "ghost"), "a parameter that no commit declares"),
        "the parameter of another": (slices("parameter", "bias", parameter="q"), "the shape of their parameter"),
        "another encoding": (slices("encoding", "dense", encoding="rows"), "do not have the matrices that dense"),
        "an encoding that does not exist": (slices("encoding", "sparse"), "which is none of factors, dense, rows"),
        "another precision": (slices("precision", "bfloat16"), "are not stored in their precision"),
        "scales that are not there": (slices("precision", "int8"), "do not have the matrices"),
        "a row left out": (without(), "belong to no row of the 17 gradients|not numbered from 0"),
        "another attempt": (slices("attempt", 7), "gradients of attempt 7 in a commit of attempt 0"),
        "a step that is not covered": (slices("step", 40), "gradients are of"),
        "nothing where something must be": (slices("sample", None), "its column sample is empty in 1 rows"),
        "no such column": (lambda table: table.drop_columns(["norm"]), "it has no column norm"),
        "a column of another type": (
            lambda table: table.set_column(
                table.column_names.index("sample"), "sample", table["sample"].cast(pa.int32())
            ),
            "its column sample holds int32, not int64",
        ),
    },
    "records": {
        "a record left out": (without(), "says 3 records, and its rows are 2"),
        "a step that is not covered": (slices("epoch", 9), "records are of"),
    },
    "states": {
        "another role": (slices("role", "theta", role="exp_avg_sq"), "have numbers of another role|have no numbers"),
        "a role that does not exist": (slices("role", "momentum"), "which is none of exp_avg_sq"),
        "another's parameter": (slices("parameter", "bias", parameter="q"), "the shape of their parameter"),
    },
}
CASES = [
    pytest.param(name, kind, *case, id=f"{name}: {kind}, {what}")
    for name in ("plain", "compacted")
    for kind, cases in FORGED_ROWS.items()
    for what, case in cases.items()
]


@pytest.mark.parametrize(("store", "kind", "change", "message"), CASES, indirect=["store"])
def test_rows_that_cannot_be_true_are_found(store, kind, change, message):
    name = largest(store, kind)
    forge_rows(store, name, change)
    report = timstore.verify(store)
    says = str(naming(store, name).relative_to(store))
    found = [one for one in report.damage if matches(message, one.message)]
    assert found, report
    # What a row file says wrongly shows in others of its commit; of a rolled-up one the checkpoint says how many.
    named = {name, says, *(str(path.relative_to(store)) for path in store.glob("ckpt/*.json"))}
    assert any(one.path in named or one.path.endswith("slices.parquet") for one in found), report
    commits = {(one.writer, one.seq) for one in report.findings if one.seq is not None}
    assert len(commits) <= 1 and not report.leftovers, report


def matches(message, text):
    return any(part in text for part in message.split("|"))


def largest(store, kind):
    """Return the file of that kind with the most rows, the first of them: of a commit of the first writer."""
    paths = sorted(store.glob(f"data/**/{kind}*.parquet"))
    counts = [pq.read_metadata(path).num_rows for path in paths]
    return str(paths[counts.index(max(counts))].relative_to(store))


def arrays_of(store, pattern):
    """Return the metadata file, its layout, and the shards of the first array of that name in the largest commit."""
    folder = (store / largest(store, "slices")).parent
    (document,) = folder.glob(f"z/{pattern}/zarr.json")
    return document, ArrayLayout.from_json(document.read_bytes(), ""), sorted(document.parent.glob("c/*/0"))


def forge_shard(store, shard, layout, change):
    """Encode a shard of other numbers."""
    data = shard.read_bytes()
    rows = np.concatenate([decode_chunk(layout, data, chunk, "") for chunk in range(layout.chunks)])
    rows = change(rows.copy())
    one = ArrayLayout(len(rows), layout.width, layout.dtype, layout.chunk_rows, layout.chunks)
    forged, *_ = encode_shards(one, lambda start, out: out.__setitem__(slice(None), rows[start:][: len(out)]))
    replace_object(store, str(shard.relative_to(store)), forged.data)


@pytest.mark.parametrize("store", ["plain", "compacted"], indirect=True)
def test_a_row_index_beyond_its_parameter_is_found(store):
    _, layout, shards = arrays_of(store, "w1-int32")
    held = layout.rows - (len(shards) - 1) * layout.shard_rows

    def change(rows):
        rows[held - 1] = 60  # the table has 60 rows
        return rows

    forge_shard(store, shards[-1], layout, change)
    (finding,) = timstore.verify(store).findings
    assert finding.kind == "slices" and finding.path == str(shards[-1].relative_to(store))
    assert "indices of rows that their parameter does not have" in finding.message and len(finding.samples) == 1


@pytest.mark.parametrize("store", ["plain", "compacted"], indirect=True)
def test_a_chunk_that_does_not_decode_is_found_and_whose_rows_it_held(store):
    _, layout, shards = arrays_of(store, "w40-float32")
    name = str(shards[0].relative_to(store))
    replace_object(store, name, bytes(len(shards[0].read_bytes())))
    findings = timstore.verify(store).findings
    assert len(findings) == -(-min(layout.rows, layout.shard_rows) // layout.chunk_rows)
    assert {(one.kind, one.path) for one in findings} == {("chunk", name)}
    assert all(one.samples and set(one.samples) <= {1, 2, 30} and one.steps == ((0, 0), (0, 0)) for one in findings)


def test_numbers_after_the_end_of_an_array_are_found(store):
    document, layout, _ = arrays_of(store, "w16-float32")
    shorter = ArrayLayout(layout.rows - 1, layout.width, layout.dtype, layout.chunk_rows, layout.chunks)
    replace_object(store, str(document.relative_to(store)), shorter.to_json())
    kinds = {one.kind for one in timstore.verify(store).damage}
    assert kinds == {"slices", "count", "chunk"}


OBJECTS = {
    "z/zarr.json": (b"{}", "malformed", "not the metadata of a Zarr group"),
    "z/w9-float32/zarr.json": (b"{}", "malformed", "not the metadata of an array"),
    "slices.parquet": (b"PAR1" + bytes(40) + b"PAR1", "malformed", "no readable rows"),
    "probe.npz": (b"PK" + bytes(40), "malformed", "it holds no probe"),
}


@pytest.mark.parametrize("store", ["plain", "compacted"], indirect=True)
@pytest.mark.parametrize("what", OBJECTS)
def test_an_object_that_is_no_such_thing_is_found(store, what):
    data, kind, message = OBJECTS[what]
    path = (
        (store / largest(store, "slices")).parent / what if what != "probe.npz" else next(store.glob("data/*/*/*.npz"))
    )
    replace_object(store, str(path.relative_to(store)), data)
    (finding,) = timstore.verify(store).findings
    assert (finding.kind, finding.path) == (kind, str(path.relative_to(store))) and message in finding.message


def test_shards_that_a_record_leaves_out_are_found(store):
    _, _, shards = arrays_of(store, "w40-float32")
    name = str(shards[-1].relative_to(store))
    record = naming(store, name)
    reseal(store, record, objects=[info for info in body(record)["objects"] if info["path"] != name])
    damage, leftover = timstore.verify(store).findings
    assert (damage.kind, damage.path, leftover.kind, leftover.path) == ("malformed", name, "unreferenced", name)
    assert damage.samples and "does not name it" in damage.message


RECORDS = {
    "previous": ({"previous": "0" * 64}, "chain", "does not follow"),
    "store": ({"store": "0" * 32}, "foreign", "belongs to store"),
    "writer": ({"writer": "0" * 16}, "misplaced", "of writer"),
    "number": ({"seq": 77}, "misplaced", "holds record 77"),
    "kind": ({"kind": "merge"}, "malformed", "kind is 'merge'"),
    "records": ({"records": 4}, "count", "says 4 records, and its rows are 3"),
    "steps": ({"steps": [[0, 3], [0, 3]]}, "count", "its records are of (0, 1) to (0, 1)"),
    "no steps": ({"steps": None}, "count", "it says no steps"),
    "attempt": ({"attempt": 1}, "count", "of attempt 0 in a commit of attempt 1"),
    "version": ({"format": [9, 0]}, "newer", "format 9.0"),
    "close": ({"kind": "close"}, "malformed", "a close that names data"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_cannot_be_true_is_found(store, what):
    changes, kind, message = RECORDS[what]
    first = str(naming(store, largest(store, "slices")).relative_to(store))
    record = store / first.replace("000000000000", "000000000001")
    record.write_bytes(forged(record.read_bytes(), **changes))
    report = timstore.verify(store)
    name = str(record.relative_to(store))
    found = [one for one in report.damage if one.path == name and one.kind == kind and message in one.message]
    assert found and found[0].seq == 1, report
    later = name.replace("000000000001", "000000000002")
    # Its data is not taken for rubbish, and the record after it says that it was replaced.
    assert all(one.path in (name, later) for one in report.damage if one.kind not in ("missing", "count")), report
    assert all("keep it" in one.message for one in report.leftovers) or what == "close", report


@pytest.mark.parametrize("store", ["compacted"], indirect=True)
def test_a_checkpoint_that_cannot_be_true_is_found(store):
    (path,) = store.glob("ckpt/*.json")
    original = path.read_bytes()
    fields = body(path)
    writer, head = sorted(fields["writers"].items())[0]
    for changes, message in (
        ({"commits": fields["commits"] + 1}, "do not say which commits it covers"),
        ({"store": "0" * 32}, "belongs to store"),
        ({"checkpoint": 9}, "it describes checkpoint 9"),
        ({"writers": {**fields["writers"], writer: head | {"seq": head["seq"] + 1}}}, "not all commits before it"),
        ({"objects": fields["objects"][1:]}, ""),
    ):
        path.write_bytes(forged(original, **changes))
        report = timstore.verify(store)
        found = [one for one in report.damage if one.path == str(path.relative_to(store))]
        assert found and message in found[0].message, report
    path.write_bytes(original)
    assert timstore.verify(store).findings == ()
