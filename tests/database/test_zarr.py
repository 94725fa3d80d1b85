"""The arrays of a store as zarr-python opens them: what they hold is what was recorded, and they cannot be changed."""

import numpy as np
import pyarrow as pa
import pytest

import timstore
from timstore.records import Factors, Rows

DRAW = np.random.default_rng(5)
LINEAR = [
    Factors(DRAW.normal(size=(9, 40)).astype(np.float32), DRAW.normal(size=(9, 30)).astype(np.float32))
    for _ in range(4)
]
BIAS = DRAW.normal(size=(4, 30)).astype(np.float32)
TABLE = DRAW.normal(size=(4, 2, 8)).astype(np.float32)
SHAPES = {"linear": (30, 40), "bias": (30,), "table": (50, 8)}


def recorded(path, **options):
    with timstore.open(path, durability="os", **options) as store:
        for sample in range(4):
            rows = Rows(np.array([3, 7 + sample]), TABLE[sample], (50, 8))
            gradients = {"linear": LINEAR[sample], "bias": BIAS[sample], "table": rows}
            store.append(0, sample, sample, gradients, lr=0.1)
            if sample == 1:
                store.commit()
    return path


def put_together(path):
    """Return (sample, parameter) to its gradient, from what `Store.zarr` gives alone."""
    gradients = {}
    with timstore.open(path, "r") as store:
        for group, rows in store.zarr():
            roles = {}
            for row in rows.to_pylist():
                values = group[row["array"]][row["start"] : row["start"] + row["rows"]]
                if values.dtype == np.uint16:
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                key = row["sample"], row["parameter"], row["encoding"]
                roles.setdefault(key, {})[row["role"]] = values, row["row_map"]
            for (sample, parameter, encoding), of in roles.items():
                if encoding == "factors":
                    outputs, row_map = of["output_gradients"]
                    inputs, _ = of["inputs"]
                    dense = outputs.T @ (inputs if row_map is None else inputs[row_map])
                elif encoding == "rows":
                    dense = np.zeros(SHAPES[parameter], np.float32)
                    dense[of["indices"][0][:, 0]] = of["values"][0]
                else:
                    dense, _ = of["values"]
                gradients[sample, parameter] = dense.reshape(SHAPES[parameter])
    return gradients


@pytest.mark.parametrize("precision", ["exact", "bfloat16"])
@pytest.mark.parametrize("folded", [False, True])
def test_rows_of_the_arrays_make_up_the_gradients_that_were_recorded(tmp_path, precision, folded):
    path = recorded(tmp_path / "s", precision=precision)
    if folded:
        with timstore.open(path) as store:
            store.compact()
    gradients = put_together(path)
    assert len(gradients) == 12
    with timstore.open(path, "r") as store:
        for (sample, parameter), gradient in gradients.items():
            known = store.gradient(0, sample, sample, parameter)
            np.testing.assert_allclose(gradient, known, rtol=1e-5, atol=1e-5, err_msg=parameter)
    if precision == "exact":
        for sample, factors in enumerate(LINEAR):
            dense = factors.output_gradients.T.astype(np.float64) @ factors.inputs
            np.testing.assert_allclose(gradients[sample, "linear"], dense, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(gradients[sample, "bias"], BIAS[sample])


def test_the_arrays_cannot_be_changed(tmp_path):
    with timstore.open(recorded(tmp_path / "s"), "r") as store:
        for group, rows in store.zarr():
            assert isinstance(rows, pa.Table) and group.read_only
            with pytest.raises(ValueError, match=r"read.only"):
                group[rows["array"][0].as_py()][0] = 1


def test_an_altered_or_missing_array_is_an_error_and_not_zeros(tmp_path):
    path = recorded(tmp_path / "s")
    with timstore.open(path, "r") as store:
        folders = [path / commit.objects[0].path for commit in store.snapshot().view.commits]
        shards = [next(folder.parent.glob("z/w40-float32/c/0/0")) for folder in folders[:2]]
        shards[0].write_bytes(shards[0].read_bytes()[::-1])
        shards[1].unlink()
        for (group, _), said in zip(store.zarr(), ("was altered", "is missing"), strict=True):
            with pytest.raises(timstore.CorruptionError, match=said):
                group["w40-float32"][:]


def test_a_store_without_records_has_no_arrays(tmp_path):
    with timstore.open(tmp_path / "s") as store:
        assert list(store.zarr()) == []
        store.samples.update([{"sample": 1, "owner": "ada"}])
        assert list(store.zarr()) == []
