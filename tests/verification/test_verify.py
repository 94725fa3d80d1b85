"""`verify` finds every defect that is planted and names its file, and finds none in a sound store."""

import json
import random
import shutil

import pyarrow.parquet as pq
import pytest
from damage import bit_flip, deletion, extension, seen, swap, truncation
from full_stores import body, files_of, fill, gradients

import timstore

DAMAGES = 240
SEED = 20260705


def folded(path):
    """Compact, and write some more; twice."""
    for step in (3, 4):
        with timstore.open(path) as store:
            store.compact()
        with timstore.open(path) as store:
            store.append(0, step, 30, gradients(step, 30), lr=0.1)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return fill(tmp_path_factory.mktemp("plain") / "run", patch)


@pytest.fixture(scope="module")
def compacted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return folded(fill(tmp_path_factory.mktemp("compacted") / "run", patch))


@pytest.mark.parametrize("precision", ["exact", "bfloat16", "int8"])
def test_a_sound_store_has_no_findings_before_and_after_compactions(tmp_path, monkeypatch, precision):
    path = fill(tmp_path / "run", monkeypatch, precision)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    kinds = ("records", "gradients", "slices", "steps", "parameters", "samples", "fingerprints", "states", "rollbacks")
    assert {f"{kind}.parquet" for kind in kinds} | {"probe.npz"} <= {file.name for file in files}
    counts = []
    for rolls in range(3):
        report = timstore.verify(path)
        assert report.sound and report.findings == ()
        counts.append((report.commits, report.records))
        with timstore.open(path) as store:
            assert store.verify().findings == ()
            store.compact()
            assert (path / f"ckpt/{rolls + 1:012d}.json").exists()
            store.append(1, rolls, 1, gradients(rolls, 1), lr=0.1)
            store.commit()
            # The writer has not closed its log: nothing to find in that.
            assert store.verify().findings == ()
    (commits, records), *later = counts
    assert later == [(commits + 1, records + 1), (commits + 2, records + 2)]


def test_what_was_checked_is_counted(plain):
    told = []
    report = timstore.verify(plain, progress=lambda done, total: told.append((done, total)))
    data = [path for path in plain.glob("data/**/*") if path.is_file()]
    assert report.objects == len(data) and report.bytes == sum(path.stat().st_size for path in data)
    assert told[-1] == (report.bytes, report.bytes) and [done for done, _ in told] == sorted(done for done, _ in told)
    records = [body(path) for path in plain.glob("log/*/*.json")]
    assert report.records == sum(record["records"] for record in records)
    assert report.commits == sum(record["kind"] == "commit" for record in records)


def link(path):
    """Put the file elsewhere, and a link to it in its place."""
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def folder(path):
    path.unlink()
    path.mkdir()


WAYS = {
    "bit flip": bit_flip,
    "truncation": truncation,
    "extension": extension,
    "deletion": deletion,
    "swap": swap,
    "emptied": lambda _draw, path, _files: path.write_bytes(b""),
    "link": lambda _draw, path, _files: link(path),
    "folder": lambda _draw, path, _files: folder(path),
}


def read(path):
    return b"" if path.is_symlink() else path.read_bytes()


def restore(path, originals):
    """Put back every file that was changed."""
    for name, data in originals.items():
        file = path / name
        if file.is_symlink():
            file.with_name("elsewhere").unlink()
            file.unlink()
        elif file.is_dir():
            file.rmdir()
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)


@pytest.mark.parametrize("which", ["plain", "compacted"])
def test_every_planted_defect_is_found_and_its_file_named(which, request, tmp_path):
    source = request.getfixturevalue(which)
    before, originals = seen(source), {name: (source / name).read_bytes() for name in files_of(source)}
    # Every kind of file equally often, not every file: most are shards.
    kinds: dict[str, list[str]] = {}
    for name in originals:
        kinds.setdefault("/c/" if "/c/" in name else name[:3] + name.split("/")[-1].split("-")[0], []).append(name)
    print(f"seed {SEED}, {len(originals)} files of {len(kinds)} kinds")
    draw = random.Random(SEED)
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    for number in range(DAMAGES // 2):
        way = list(WAYS)[number % len(WAYS)]
        name = draw.choice(kinds[draw.choice(sorted(kinds))])
        what = f"damage {number}: {way} of {name}"
        WAYS[way](draw, copy / name, [copy / one for one in originals])
        report = timstore.verify(copy)
        # Of two files that were exchanged one may be the record without which the other says nothing.
        changed = {one for one, data in originals.items() if not (copy / one).is_file() or read(copy / one) != data}
        found = [one for one in report.findings if one.path in {name, *(changed if way == "swap" else ())}]
        if not found:
            assert way == "deletion" and is_like_never_written(copy, source, name, report), f"{what}: not found"
        elif report.sound:
            assert answers(copy) == before, f"{what}: it is more than a leftover"
        restore(copy, originals)
    assert timstore.verify(copy).findings == ()


def answers(path):
    """Return what can be read, or the error."""
    try:
        return seen(path)
    except timstore.TimstoreError as error:
        return error


def is_like_never_written(copy, source, name, report):
    """Say whether a store without a file is one that a writer leaves that has not come to write it yet.

    That is so of the end of a log, whose data is then a leftover, if the file held any.
    """
    record = source / name
    newer = [one for one in record.parent.iterdir() if one.name > record.name]
    if not name.startswith("log/") or newer:
        return False
    data = {"/".join(info["path"].split("/")[:3]) for info in body(record)["objects"]}
    assert not isinstance(answers(copy), Exception)
    return report.sound and {one.path for one in report.leftovers} == data


def test_a_defect_names_the_commit_the_steps_and_the_samples(plain, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    for record in sorted(plain.glob("log/*/*.json")):
        fields = body(record)
        for info in fields["objects"]:
            if info["kind"] not in ("shard", "slices", "records", "gradients"):
                continue
            data = (copy / info["path"]).read_bytes()
            (copy / info["path"]).write_bytes(data[::-1])
            (finding,) = timstore.verify(copy).damage
            assert (finding.kind, finding.path) == ("altered", info["path"])
            assert (finding.writer, finding.seq) == (fields["writer"], fields["seq"])
            assert finding.samples == concerned(plain, fields, info), info["path"]
            assert tuple(map(tuple, fields["steps"])) == finding.steps or finding.samples
            (copy / info["path"]).write_bytes(data)


def concerned(root, fields, info):
    """Return whose numbers an object holds, by going through the tables row by row."""
    tables = {
        one["kind"]: pq.read_table(root / one["path"]).to_pylist()
        for one in fields["objects"]
        if one["path"].endswith(".parquet")
    }
    if info["kind"] != "shard":
        return tuple(sorted({row["sample"] for row in tables.get("records", [])}))
    array, _, shard, _ = info["path"].split("/")[-4:]
    document = json.loads((root / info["path"]).parents[2].joinpath("zarr.json").read_text())
    size = document["chunk_grid"]["configuration"]["chunk_shape"][0]
    held = set(range(int(shard) * size, (int(shard) + 1) * size))
    return tuple(
        sorted(
            {
                tables["gradients"][row["owner"]]["sample"]
                for row in tables["slices"]
                if row["array"] == array
                and row["role"] not in ("exp_avg_sq", "theta", "gradient", "start_theta", "start_state")
                and held & set(range(row["start"], row["start"] + row["rows"]))
            }
        )
    )
