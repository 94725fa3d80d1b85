"""A store whose files were changed says so, or answers as before: never anything else."""

import os
import random
import shutil

import numpy as np
import pytest
from damage import bit_flip, deletion, extension, seen, swap, truncation

import timstore
from timstore import Factors, Rows
from timstore.database.snapshot import Snapshot

DAMAGES = 400
FLIPS = int(os.environ.get("TIMSTORE_FLIPS", "200"))  # more take long: some 0.1 s each
SEED = 20240611
KINDS = (bit_flip, bit_flip, bit_flip, truncation, extension, deletion, swap)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A closed store with every kind of file that there is."""
    path = tmp_path_factory.mktemp("small") / "run"
    with timstore.open(path, precision="int8") as store:
        for step in range(2):
            shared = normal(step, 4, 40)
            for sample in (1, 2):
                gradients = {
                    "q": Factors(shared, normal(10 + sample, 4, 48)),
                    "k": Factors(shared, normal(20 + sample, 4, 48)),
                    "table": Rows(np.array([sample, 7]), normal(30 + sample, 2, 16), (60, 16)),
                    "bias": normal(40 + step, 9),
                }
                store.append(0, step, sample, gradients, lr=0.1, loss=1.5)
            store.commit()
        store.samples.update([{"sample": 1, "owner": "ada"}])
        store.append_fingerprints(0, 1, {"q": "0" * 64})
        store.keep_probe([{"x": np.arange(4)}], loss="mse")
        store.begin_attempt(0, 2)
        store.append(0, 2, 1, {"bias": normal(50, 9)}, lr=0.1)
    return path


@pytest.fixture(scope="module")
def folded(small, tmp_path_factory):
    """The same store, a compaction over most of it."""
    path = tmp_path_factory.mktemp("folded") / "run"
    shutil.copytree(small, path)
    with timstore.open(path) as store:
        store.compact()
        store.append(0, 3, 2, {"bias": normal(51, 9)}, lr=0.1)
        store.samples.update([{"sample": 2, "owner": "bob"}])
    return path


@pytest.mark.parametrize(("which", "count", "kinds"), [("small", DAMAGES, KINDS), ("folded", FLIPS, (bit_flip,))])
def test_random_damage_is_noticed_or_harmless(request, tmp_path, which, count, kinds):
    """Every file is damaged by every kind in turn; which bytes, and whom it is swapped with, is drawn."""
    small = request.getfixturevalue(which)
    expected = seen(small)
    names = sorted(path.relative_to(small) for path in small.rglob("*") if path.is_file())
    print(f"seed {SEED}, {len(names)} files")
    draw = random.Random(SEED)
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    files = [copy / name for name in names]
    originals = [path.read_bytes() for path in files]
    noticed = 0
    for number in range(count):
        damage, path = kinds[number // len(files) % len(kinds)], files[number % len(files)]
        what = f"damage {number}: {damage.__name__} of {path.relative_to(copy)}"
        damage(draw, path, files)
        try:
            found = seen(copy)
        except timstore.TimstoreError as error:
            noticed += 1
            assert path.name in str(error) or damage is swap, f"{what}: {error}"
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} is no error of ours") from error
        else:
            assert found == expected, f"{what}: passed unseen"
        for file, data in zip(files, originals, strict=True):
            file.write_bytes(data)
    # The group's zarr.json is for other readers, and the end of a log may be lost when its writer was done.
    print(f"{noticed} of {count} noticed, the others harmless")
    assert noticed > 0.7 * count


@pytest.mark.parametrize("kind", ["gradients.parquet", "slices.parquet", "records.parquet", "c/0/0", "zarr.json"])
def test_every_bit_position_of_an_object_counts_and_the_error_says_where(small, tmp_path, kind):
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    path = next(path for path in sorted(copy.glob("data/*/*/**/*")) if path.match(f"w*/{kind}") or path.name == kind)
    original = path.read_bytes()
    draw = random.Random(SEED)
    for position in draw.sample(range(len(original)), min(5, len(original))):
        data = bytearray(original)
        data[position] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(timstore.CorruptionError, match="crc32 does not match") as caught:
            seen(copy)
        assert caught.value.fields["path"] == str(path.relative_to(copy))
        assert "of commit " in str(caught.value) and "steps (0, " in str(caught.value)


@pytest.mark.parametrize("kind", ["timstore.json", "runs/*.json", "log/*/*.json"])
def test_every_character_of_a_record_counts(small, tmp_path, kind):
    """Also where another character would read well: a digit of a rate of error, of a step, of a time."""
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    draw = random.Random(SEED)
    for path in sorted(copy.glob(kind)):
        original = path.read_bytes()
        for position in draw.sample(range(len(original)), 25):
            data = bytearray(original)
            data[position] ^= 1
            path.write_bytes(data)
            with pytest.raises(timstore.CorruptionError, match=f"{path.name} is torn or was altered: its check line"):
                timstore.open(copy, "r")
        path.write_bytes(original)


def test_swapped_shards_of_equal_size_are_noticed(tmp_path):
    """Shards are made of pieces that end in their crc32c: the crc32c of the whole is the same for all of them."""
    path = tmp_path / "run"
    with timstore.open(path) as store:
        for step in range(2):
            store.append(0, step, 1, {"w": normal(step, 16)})
            store.commit()
    one, two = path.glob("data/*/*/z/w16-float32/c/0/0")
    mine, theirs = one.read_bytes(), two.read_bytes()
    assert len(mine) == len(theirs) and mine != theirs
    one.write_bytes(theirs)
    with timstore.open(path, "r") as store, pytest.raises(timstore.CorruptionError, match="was altered"):
        list(store.read())


def test_zeros_are_never_made_up_for_what_is_missing(small, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    for shard in copy.glob("data/*/*/z/*/c/0/0"):
        shard.unlink()
    with timstore.open(copy, "r") as store:
        assert store.sql("SELECT count(*) FROM gradients").fetchall() == [(17,)]
        with pytest.raises(timstore.CorruptionError, match="is missing"):
            store.gradient(0, 0, 1, "bias")


def test_a_commit_cut_off_the_end_of_an_open_log_is_noticed_by_who_saw_it(tmp_path):
    with timstore.open(tmp_path) as store:
        store.append(0, 0, 1, {"w": normal(0, 3)})
        store.commit()
        (record,) = tmp_path.glob("log/*/*.json")
        with timstore.open(tmp_path, "r") as reader:
            data = record.read_bytes()
            record.unlink()
            with pytest.raises(timstore.CorruptionError, match="is missing"):
                reader.refresh()
            record.write_bytes(data)
            reader.refresh()
            assert reader.gradient(0, 0, 1, "w").tobytes() == normal(0, 3).tobytes()


def test_a_newer_format_is_refused_naming_the_version(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("timstore.format.paths.FORMAT", (2, 3))
        timstore.open(tmp_path).close()
    for mode in ("r", "a"):
        with pytest.raises(timstore.FormatError, match=r"format 2\.3"):
            timstore.open(tmp_path, mode)


def test_damage_met_after_opening_leaves_the_handle_usable(small, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    with timstore.open(copy, "r") as store:
        shards = list(copy.glob("data/*/*/z/w9-*/c/0/0"))
        kept = [shard.read_bytes() for shard in shards]
        for shard in shards:
            shard.write_bytes(b"")
        with pytest.raises(timstore.CorruptionError, match="0 bytes instead of"):
            store.gradient(0, 0, 1, "bias")
        for shard, data in zip(shards, kept, strict=True):
            shard.write_bytes(data)
        assert np.abs(store.gradient(0, 0, 1, "bias") - normal(40, 9)).max() < 0.05
        assert isinstance(store.snapshot(), Snapshot)
