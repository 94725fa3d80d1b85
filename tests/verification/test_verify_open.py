"""`verify` works on what cannot be opened, beside who writes, and where nothing may be written; it reads well."""

import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from full_stores import body, fill, gradients, normal, tree

import timstore
from timstore.format.local_files import LocalObjects


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return fill(tmp_path_factory.mktemp("source") / "run", patch)


@pytest.fixture
def store(source, tmp_path):
    shutil.copytree(source, tmp_path / "run")
    return tmp_path / "run"


def only(report, path):
    """Return the finding of a report that has no other damage."""
    (finding,) = report.damage
    assert finding.path == path, report
    return finding


def test_a_store_without_settings_is_checked_all_the_same(store):
    (store / "timstore.json").unlink()
    with pytest.raises(timstore.CorruptionError):
        timstore.open(store, "r")
    report = timstore.verify(store)
    assert only(report, "timstore.json").kind == "missing" and not report.leftovers
    assert report.records == 10
    shard = next(store.glob("data/*/*/z/w9-*/c/0/0"))
    shard.unlink()
    assert {one.path for one in timstore.verify(store).damage} == {"timstore.json", str(shard.relative_to(store))}


@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_record_in_the_middle_is_named_with_what_it_held(store, damage):
    folder = max(store.glob("log/*"), key=lambda folder: len(list(folder.iterdir())))
    record = sorted(folder.iterdir())[1]
    fields = body(record)
    name, prefix = str(record.relative_to(store)), "/".join(fields["objects"][0]["path"].split("/")[:3])
    if damage == "torn":
        record.write_bytes(record.read_bytes()[:-9])
    else:
        record.unlink()
    with pytest.raises(timstore.CorruptionError):
        timstore.open(store, "r")
    report = timstore.verify(store)
    finding = only(report, name)
    assert finding.kind == ("torn" if damage == "torn" else "gap")
    assert (finding.writer, finding.seq, finding.samples) == (fields["writer"], 1, (1, 2, 30))
    (leftover,) = report.leftovers
    assert leftover.path == prefix and "keep it" in leftover.message


@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_compaction_that_is_lost_is_one_finding(store, damage):
    with timstore.open(store) as opened:
        opened.compact()
        opened.append(1, 0, 1, gradients(1, 1), lr=0.1)
    path = store / "ckpt/000000000001.json"
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    report = timstore.verify(store)
    finding = only(report, "ckpt/000000000001.json")
    assert finding.kind == ("torn" if damage == "torn" else "missing") and finding.samples == (1, 2, 30)
    assert not report.leftovers


def test_an_attempt_that_is_lost_is_found_through_who_names_it(store):
    for number in (0, 1):
        path = store / f"runs/{number:06d}.json"
        data = path.read_bytes()
        path.unlink()
        assert only(timstore.verify(store), f"runs/{number:06d}.json").kind == "missing"
        path.write_bytes(data)


def test_a_torn_end_is_damage_or_a_lost_tail_as_the_durability_says(tmp_path, monkeypatch):
    for durability, severity in (("commit", "damage"), ("os", "leftover")):
        path = tmp_path / durability
        fill(path, monkeypatch, durability=durability)
        for folder in path.glob("log/*"):
            record = sorted(folder.iterdir())[-1]
            record.write_bytes(record.read_bytes()[:50])
        report = timstore.verify(path)
        torn = [one for one in report.findings if one.path.startswith("log/")]
        assert len(torn) == 2 and {one.severity for one in torn} == {severity}
        assert {one.kind for one in torn} == {"torn" if severity == "damage" else "lost-tail"}


def test_what_nothing_names_is_a_leftover(store):
    writer, other = sorted(path.name for path in store.glob("data/*"))
    (extra,) = store.glob(f"data/{writer}/000000000000-*")
    planted = {
        "notes.txt": "unexpected",
        ".timstore.json.ab12cd34": "temporary",
        f"log/{writer}/.000000000009.json.ab12cd34": "temporary",
        "log/notes": "unexpected",
        "runs/notes.txt": "unexpected",
        "ckpt/.000000000001.json.ab12cd34": "temporary",
        f"data/{writer}/notes": "unexpected",
        f"data/{writer}/odd\n\udcff": "unexpected",
        f"{extra.relative_to(store)}/more.parquet": "unreferenced",
        f"{extra.relative_to(store)}/z/w1-int8/c/0/0": "unreferenced",
    }
    folders = {
        f"data/{other}/000000000000-00000000": "unreferenced",
        f"data/{other}/000000000099-00000000": "unreferenced",
        "data/0123456789abcdef/000000000000-00000000": "unreferenced",
        "data/m-000000000001-00000000": "unreferenced",
    }
    for name in [*planted, *(f"{folder}/records-0000.parquet" for folder in folders)]:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"?")
    (store / "data/0123456789abcdee/000000000000-00000000").mkdir(parents=True)
    report = timstore.verify(store)
    assert report.sound and {one.path: one.kind for one in report.leftovers} == planted | folders
    print(report)  # a name may hold anything
    (store / "ckpt/notes.txt").write_bytes(b"?")
    assert only(timstore.verify(store), "ckpt/notes.txt").kind == "newer"


def test_what_a_compaction_that_died_left_behind_is_a_leftover(store, tmp_path):
    shutil.copytree(store, tmp_path / "before")
    with timstore.open(store) as opened:
        opened.compact()
    # As if nothing had been deleted.
    shutil.copytree(tmp_path / "before", store, dirs_exist_ok=True)
    report = timstore.verify(store)
    assert report.sound
    kinds = {one.kind for one in report.leftovers}
    assert kinds == {"superseded", "unreferenced"}
    with timstore.open(store) as opened:
        opened.append(1, 0, 1, gradients(1, 1), lr=0.1)
        opened.compact()
    assert timstore.verify(store).findings == ()


def test_a_verification_changes_nothing_and_may_be_forbidden_to(store, monkeypatch):
    next(store.glob("data/*/*/z/w9-*/c/0/0")).unlink()
    (store / "log/.temporary").write_bytes(b"?")
    for path in sorted(store.rglob("*"), reverse=True):
        path.chmod(0o500 if path.is_dir() else 0o400)
    store.chmod(0o500)
    before = tree(store)

    def refuse(*_):
        raise AssertionError("a verification changes the disk")

    monkeypatch.setattr(LocalObjects, "_call", refuse)
    assert {one.kind for one in timstore.verify(store).findings} == {"missing", "temporary"}
    assert tree(store) == before
    for path in (store, *(path for path in store.rglob("*") if path.is_dir())):
        path.chmod(0o700)


def test_who_writes_and_rolls_up_meanwhile_makes_no_damage(store):
    done = threading.Event()
    failures = []

    def write():
        try:
            for step in range(12):
                with timstore.open(store) as opened:
                    opened.append(2, step, 1, gradients(step, 1), lr=0.1)
                    opened.commit()
                    opened.append(3, step, 1, {"bias": normal(step, 9)}, lr=0.1)
                    opened.compact()
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reports = []
    while not done.is_set():
        reports.append(timstore.verify(store))
    thread.join()
    assert not failures and len(reports) >= 3
    for report in reports:
        assert report.sound, report
    last = timstore.verify(store)
    assert last.findings == () and last.records == 10 + 24


def test_a_recorded_run_with_rollbacks_is_sound(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Flatten(), torch.nn.Linear(24, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    probe = [torch.randint(0, 20, (8, 3))]
    with timstore.open(tmp_path / "run") as store:
        with store.record(model, optimizer, samples=[1, 4], optimizer_history="gradients", probe=probe) as recorder:
            for epoch in range(2):
                recorder.epoch = epoch
                for ids in torch.arange(12).split(4):
                    recorder.batch(ids)
                    features = (ids[:, None] + torch.arange(3)) % 20
                    torch.nn.functional.cross_entropy(model(features), ids % 3).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        assert store.verify().findings == ()
        done = store.rollback(model, [4], keep_delta=True, optimizer=optimizer)
        store.undo(model, done.rollback_id)
        store.compact()
        assert store.verify().findings == ()
    with pytest.raises(timstore.StateError):
        store.verify()


def test_paths_that_hold_no_store_are_refused(tmp_path):
    with pytest.raises(timstore.NotFoundError):
        timstore.verify(tmp_path / "nowhere")
    with pytest.raises(timstore.NotFoundError):
        timstore.verify(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(timstore.InvalidInputError):
        timstore.verify(tmp_path / "file")
    with pytest.raises(timstore.InvalidInputError):
        timstore.verify("s3://bucket/run")


def test_a_store_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("timstore.format.paths.FORMAT", (2, 0))
        timstore.open(tmp_path).close()
    with pytest.raises(timstore.FormatError, match=r"format 2\.0"):
        timstore.verify(tmp_path)


def test_the_report_reads_well(store):
    assert str(timstore.verify(store)).startswith("sound: ")
    shard = sorted(store.glob("data/*/*/z/w40-int8/c/0/0"))[0]
    shard.write_bytes(b"")
    report = timstore.verify(store, progress=True)
    text = str(report)
    assert max(map(len, text.splitlines()[1:])) <= 100 and str(shard.relative_to(store)) in text
    assert "DAMAGED" in text and " (1" in text and "has 0 bytes instead of" in text
    plain = report.to_dict()
    assert plain["sound"] is False and plain["findings"][0]["kind"] == "altered"


def test_findings_are_named_without_torch(store):
    script = f"""
import sys, timstore
report = timstore.verify({str(store)!r})
assert isinstance(report, timstore.Verification) and report.sound
assert timstore.Finding("missing", "x", "y").severity == "damage"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_numbers_of_a_zero_gradient_may_be_left_out(tmp_path):
    with timstore.open(tmp_path / "run") as store:
        store.append(0, 0, 1, {"w": np.zeros((4, 3), np.float32)}, allow_zero=True)
    assert timstore.verify(tmp_path / "run").findings == ()
