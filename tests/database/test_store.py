"""The store: what is appended comes back, and can be read by anyone who has the format's description."""

import os
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

import timstore
from timstore import Factors, Rows
from timstore.database.opening import create_settings


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def product(factors):
    """Return the gradient that factors stand for, in float64."""
    return np.einsum("to,ti->oi", np.asarray(factors.output_gradients, float), np.asarray(factors.inputs, float))


def scattered(rows):
    """Return the gradient that rows stand for, in float64."""
    dense = np.zeros(rows.shape)
    for index, values in zip(rows.indices, rows.values, strict=True):
        dense[index] += values
    return dense


@pytest.mark.parametrize("reopened", [False, True])
def test_every_kind_of_gradient_comes_back(tmp_path, reopened):
    shared = normal(0, 5, 40)
    tied = [Factors(normal(6, 3, 24), normal(7, 3, 32)), Rows(np.array([4, 9, 4]), normal(8, 3, 24), (32, 24))]
    gradients = {
        "q": Factors(shared, normal(1, 5, 48)),
        "k": Factors(shared, normal(2, 5, 36)),
        "embedding": Rows(np.array([3, 90, 3]), normal(3, 3, 16), (100, 16)),
        "bias": normal(4, 17),
        "scale": np.array(2.5, np.float32),
        "conv": normal(5, 4, 3, 2, 2),
        "tied": tied,
    }
    expected = {
        "q": product(gradients["q"]),
        "k": product(gradients["k"]),
        "embedding": scattered(gradients["embedding"]),
        "tied": product(tied[0]) + scattered(tied[1]),
        **{name: gradients[name] for name in ("bias", "scale", "conv")},
    }
    store = timstore.open(tmp_path)
    store.append(1, 2, 77, gradients, lr=0.1, loss=0.5, tokens=5, rank=3)
    store.commit()
    if reopened:
        store.close()
        store = timstore.open(tmp_path, "r")
    (record,) = store.read()
    assert (record.epoch, record.step, record.sample, record.rank) == (1, 2, 77, 3)
    assert (record.loss, record.tokens) == (0.5, 5)
    assert set(record.gradients) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(record.dense(name), value, rtol=1e-6, atol=1e-6, err_msg=name)
        assert store.gradient(1, 2, 77, name, rank=3).shape == value.shape
    for name in ("bias", "scale", "conv"):
        assert record.dense(name).tobytes() == gradients[name].tobytes()
    square = sum(float(np.sum(np.square(value))) for value in expected.values())
    assert store.sql("SELECT norm FROM records").fetchall()[0][0] == pytest.approx(np.sqrt(square), rel=1e-5)
    store.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_back_bit_for_bit_in_their_own_dtype(store, dtype):
    values = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    values[0, :3] = torch.tensor([-0.0, 1e-40 if dtype == torch.float32 else 0.25, 3.0])
    store.append(0, 0, 0, {"w": values.requires_grad_()})
    store.commit()
    wide = values.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).numpy()
    assert store.gradient(0, 0, 0, "w").tobytes() == wide.tobytes()
    assert store.sql("SELECT dtype FROM parameters").fetchall() == [(str(dtype).removeprefix("torch."),)]


def test_a_batch_is_its_samples_one_by_one_and_shared_inputs_stay_shared(store):
    shared = normal(0, 3, 5, 40)
    q, k, bias = normal(1, 3, 5, 48), normal(2, 3, 5, 36), normal(3, 3, 9)
    rows = Rows(np.array([[1, 2], [0, 0], [7, 3]]), normal(4, 3, 2, 16), (50, 16))
    gradients = {"q": Factors(shared, q), "k": Factors(shared, k), "bias": bias, "table": rows}
    store.append(0, 0, torch.tensor([10, 20, 30]), gradients, loss=[1.0, 2.0, 3.0])
    store.commit()
    records = list(store.read())
    assert [(record.sample, record.loss) for record in records] == [(10, 1.0), (20, 2.0), (30, 3.0)]
    for number, record in enumerate(records):
        np.testing.assert_allclose(record.dense("q"), product(Factors(shared[number], q[number])), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(record.dense("k"), product(Factors(shared[number], k[number])), rtol=1e-5, atol=1e-5)
        assert record.dense("bias").tobytes() == bias[number].tobytes()
        one = Rows(rows.indices[number], rows.values[number], rows.shape)
        np.testing.assert_allclose(record.dense("table"), scattered(one), rtol=1e-6)
    (inputs,) = store.path.glob("data/*/*/z/w40-float32")
    assert zarr.open_array(inputs, mode="r").shape == (15, 40)


def test_a_stranger_with_zarr_and_pyarrow_recomputes_a_gradient(tmp_path):
    """Nothing of timstore is used to read: what docs/format.md says is enough."""
    inputs, outputs = normal(0, 9, 70), normal(1, 9, 130)
    outputs[[0, 4]] = 0  # two tokens that only the other layer needs
    other = Factors(inputs, normal(2, 9, 90))
    with timstore.open(tmp_path, precision="int8") as store:
        store.append(0, 0, 1, {"other": other, "w": Factors(inputs, outputs)})
        store.append(0, 0, 2, {"w": Factors(normal(3, 9, 70), normal(4, 9, 130))})
    (commit,) = [path for path in tmp_path.glob("data/*/*") if (path / "gradients.parquet").exists()]
    gradients = pq.read_table(commit / "gradients.parquet").to_pylist()
    owner = next(n for n, row in enumerate(gradients) if (row["sample"], row["parameter"]) == (1, "w"))
    assert gradients[owner]["precision"] == "int8"
    roles = {row["role"]: row for row in pq.read_table(commit / "slices.parquet").to_pylist() if row["owner"] == owner}
    assert set(roles) == {"inputs", "inputs_scales", "output_gradients", "output_gradients_scales"}
    group = zarr.open_group(commit / "z", mode="r")

    def stored(role):
        row, scale = roles[role], roles[f"{role}_scales"]
        values = group[row["array"]][row["start"] : row["start"] + row["rows"]]
        bits = group[scale["array"]][scale["start"] : scale["start"] + scale["rows"]].astype(np.uint32)
        assert dict(group[scale["array"]].attrs) == {"dtype": "bfloat16"}
        scales = (bits << 16).view(np.float32)
        return values.astype(np.float64) * np.repeat(scales, 64, axis=1)[:, : values.shape[1]]

    row_map = roles["output_gradients"]["row_map"]
    assert row_map == [1, 2, 3, 5, 6, 7, 8]
    recomputed = stored("output_gradients").T @ stored("inputs")[row_map]
    true = product(Factors(inputs, outputs))
    error = np.linalg.norm(recomputed - true) / np.linalg.norm(true)
    assert 0 < error < 0.02
    assert gradients[owner]["rel_error"] == pytest.approx(error, rel=1e-4)
    with timstore.open(tmp_path, "r") as store:
        np.testing.assert_allclose(store.gradient(0, 0, 1, "w"), recomputed, rtol=1e-4, atol=1e-4)


def test_rows_above_a_megabyte_are_split_by_columns_and_read_back(store):
    wide = normal(0, 2, 600_000)
    table = Rows(np.array([1, 0, 1]), normal(1, 3, 300_000), (4, 300_000))
    store.append(0, 0, 0, {"wide": wide, "table": table})
    store.commit()
    assert store.gradient(0, 0, 0, "wide").tobytes() == wide.tobytes()
    np.testing.assert_allclose(store.gradient(0, 0, 0, "table"), scattered(table), rtol=1e-6, atol=1e-7)
    (path,) = store.path.glob("data/*/*/slices.parquet")
    blocks = [row["block"] for row in pq.read_table(path).to_pylist() if row["block"] and row["block"][1] == 2]
    assert blocks == [[0, 2, 0, 262144], [0, 2, 262144, 524288], [0, 2, 524288, 600000]]


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_the_error_of_a_lossy_record_is_the_one_that_is_written_down(tmp_path, precision):
    gradients = {
        "dense": normal(0, 20, 130),
        "rows": Rows(np.array([3, 5, 3]), normal(1, 3, 70), (90, 70)),
        "factors": Factors(normal(2, 6, 100), normal(3, 6, 90)),
    }
    true = {
        "dense": gradients["dense"].astype(float),
        "rows": scattered(gradients["rows"]),
        "factors": product(gradients["factors"]),
    }
    with timstore.open(tmp_path, precision=precision, max_rel_error=0.03) as store:
        store.append(0, 0, 0, gradients)
        store.commit()
        rows = store.sql("SELECT parameter, precision, rel_error FROM gradients").fetchall()
        for name, kept, error in rows:
            measured = np.linalg.norm(store.gradient(0, 0, 0, name) - true[name]) / np.linalg.norm(true[name])
            assert kept == precision
            assert 1e-4 < measured < 0.03
            assert error == pytest.approx(measured, rel=1e-3)


def test_a_part_that_int8_would_change_too_much_is_kept_finer(tmp_path):
    spiked = np.full((1, 64), 1e-3, np.float32)
    spiked[0, :8] = [1.0, *[4e-3] * 7]
    with timstore.open(tmp_path, precision="int8", max_rel_error=0.005) as store:
        store.append(0, 0, 0, {"w": spiked})
        store.commit()
        ((kept, error),) = store.sql("SELECT precision, rel_error FROM gradients").fetchall()
        assert (kept, error <= 0.005) == ("bfloat16", True)


def test_the_callers_buffers_may_be_reused_at_once(store):
    buffer, factors = normal(0, 8), Factors(normal(1, 4, 30), normal(2, 4, 20))
    expected = buffer.copy(), product(factors)
    store.append(0, 0, 0, {"bias": buffer, "w": factors})
    buffer[:] = factors.inputs[:] = 7
    store.commit()
    assert store.gradient(0, 0, 0, "bias").tobytes() == expected[0].tobytes()
    np.testing.assert_allclose(store.gradient(0, 0, 0, "w"), expected[1], rtol=1e-5, atol=1e-5)


def test_two_handles_write_one_store_at_once(tmp_path):
    with timstore.open(tmp_path) as one, timstore.open(tmp_path) as two:
        for step in range(4):
            one.append(0, step, 1, {"w": normal(step, 3)})
            two.append(0, step, 2, {"w": normal(10 + step, 3)})
            one.commit()
        assert one.sql("SELECT count(*) FROM records").fetchall() == [(4,)]
        two.commit()
        assert one.sql("SELECT count(*) FROM records").fetchall() == [(4,)]
        one.refresh()
        assert one.sql("SELECT count(*) FROM records").fetchall() == [(8,)]
        assert one.gradient(0, 3, 2, "w").tobytes() == normal(13, 3).tobytes()
    assert len(list(tmp_path.glob("log/*"))) == 2


def test_a_new_attempt_supersedes_what_was_recorded_from_there_on(store):
    for step in range(4):
        store.append(0, step, 5, {"w": normal(step, 3)}, lr=0.1)
    assert store.begin_attempt(0, 2) == 1
    assert store.frontier == (0, 1)
    store.append(0, 2, 5, {"w": normal(20, 3)}, lr=0.2)
    store.commit()
    rows = store.sql("SELECT attempt, step FROM records ORDER BY step").fetchall()
    assert rows == [(0, 0), (0, 1), (1, 2)]
    assert store.sql("SELECT step, lr FROM steps ORDER BY step").fetchall() == [(0, 0.1), (1, 0.1), (2, 0.2)]
    assert store.gradient(0, 2, 5, "w").tobytes() == normal(20, 3).tobytes()
    with pytest.raises(timstore.NotFoundError):
        store.gradient(0, 3, 5, "w")


def test_modes_say_what_must_be_there(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(timstore.NotFoundError, match="no store at"):
        timstore.open(path, "r")
    assert not path.exists()
    timstore.open(path, "x").close()
    with pytest.raises(timstore.AlreadyExistsError):
        timstore.open(path, "x")
    timstore.open(path).close()
    with pytest.raises(timstore.InvalidInputError, match="'q'"):
        timstore.open(path, "q")


@pytest.mark.parametrize("mode", ["a", "x"])
def test_only_one_of_two_that_create_a_store_at_once_made_it(tmp_path, monkeypatch, mode):
    def overtaken(objects, **options):
        create_settings(objects, **options)
        return create_settings(objects, **options)

    monkeypatch.setattr("timstore.database.opening.create_settings", overtaken)
    if mode == "a":
        timstore.open(tmp_path, mode).close()
    else:
        with pytest.raises(timstore.AlreadyExistsError):
            timstore.open(tmp_path, mode)


def test_a_creation_that_was_killed_leaves_a_path_that_can_be_used(tmp_path):
    (tmp_path / ".timstore.json.0123abcd").write_bytes(b"{")
    timstore.open(tmp_path).close()


@pytest.mark.parametrize(
    ("option", "kept", "other"),
    [("precision", "int8", "exact"), ("max_rel_error", 0.1, 0.02), ("durability", "os", "commit")],
)
def test_other_options_than_the_stores_own_are_refused_naming_both(tmp_path, option, kept, other):
    timstore.open(tmp_path, **{option: kept}).close()
    with pytest.raises(timstore.InvalidInputError) as caught:
        timstore.open(tmp_path, **{option: other})
    assert repr(kept) in str(caught.value) and repr(other) in str(caught.value)
    timstore.open(tmp_path, **{option: kept}).close()


def test_reading_writes_nothing(tmp_path):
    with timstore.open(tmp_path) as store:
        store.append(0, 0, 1, {"w": normal(0, 3)})

    def state():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [tmp_path, *tmp_path.rglob("*")]}

    before = state()
    with timstore.open(tmp_path, "r") as store:
        assert len(list(store.read())) == 1
        assert store.sql("SELECT * FROM records").fetchall()
        store.refresh()
        for write in (
            lambda: store.append(0, 1, 1, {"w": normal(0, 3)}),
            lambda: store.append_step(0, 1, [{"lr": 0.1}]),
            lambda: store.begin_attempt(0, 0),
            lambda: store.samples.update([{"sample": 1, "owner": "a"}]),
        ):
            with pytest.raises(timstore.ReadOnlyError):
                write()
    assert state() == before


def test_folders_and_files_are_private(store):
    store.append(0, 0, 1, {"w": normal(0, 3)})
    store.commit()
    for folder, _, files in os.walk(store.path / "data"):
        assert os.stat(folder).st_mode & 0o077 == 0
        assert all(os.stat(os.path.join(folder, name)).st_mode & 0o077 == 0 for name in files)


def test_a_store_that_everyone_can_read_is_pointed_out(tmp_path):
    timstore.open(tmp_path / "s").close()
    for folder, file, warned in ((0o700, 0o644, 0), (0o755, 0o600, 0), (0o755, 0o644, 1)):
        (tmp_path / "s").chmod(folder)
        (tmp_path / "s/timstore.json").chmod(file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            timstore.open(tmp_path / "s", "r").close()
        assert [w.category for w in caught] == [timstore.TimstoreWarning] * warned
        assert all(w.filename == __file__ and "chmod -R go=" in str(w.message) for w in caught)
