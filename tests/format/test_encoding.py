"""Every encoding is checked against the dense gradient, computed in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timstore.encoding import Encoded, densify, encode, restore
from timstore.encoding.products import norm, product
from timstore.records import BFLOAT16, Factors, Gradient, Parameter, Rows, narrow, widen


def parameter(name: str, *shape: int) -> Parameter:
    return Parameter(name, shape, "float32")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoded(part: Encoded, shape: tuple[int, int]) -> np.ndarray:
    """Read a part back, as the documented format says, without the library's reader."""
    matrices = {role: matrix.values for role, matrix in part.matrices.items()}
    if not matrices:
        return np.zeros(shape, np.float32)
    if part.encoding == "factors":
        inputs = restore(matrices["inputs"], matrices.get("inputs_scales"))
        outputs = restore(matrices["output_gradients"], matrices.get("output_gradients_scales"))
        return outputs.T @ (inputs if part.row_map is None else inputs[part.row_map])
    values = restore(matrices["values"], matrices.get("values_scales"))
    if part.encoding == "dense":
        return values.reshape(shape)
    dense = np.zeros(shape, values.dtype)
    np.add.at(dense, matrices["indices"][:, 0], values)
    return dense


def one(gradient: Gradient, *shape: int, **options: object) -> Encoded:
    known = parameter("w", *shape)
    parts, _ = encode({"w": (gradient,)}, {"w": known}, **options)
    return parts[0]


def test_factors_stay_factors_when_they_are_smaller() -> None:
    inputs, outputs = normal(0, 8, 64), normal(1, 8, 48)
    part = one(Factors(inputs, outputs), 48, 64)
    assert part.encoding == "factors"
    assert part.matrices["inputs"].values.tobytes() == inputs.tobytes()
    assert part.matrices["output_gradients"].values.tobytes() == outputs.tobytes()
    assert part.bytes == inputs.nbytes + outputs.nbytes
    assert part.dense_bytes == 48 * 64 * 4
    assert part.norm == pytest.approx(np.linalg.norm(outputs.T.astype(float) @ inputs), rel=1e-6)


def test_factors_longer_than_the_matrix_become_dense() -> None:
    inputs, outputs = normal(0, 100, 16), normal(1, 100, 16)
    part = one(Factors(inputs, outputs), 16, 16)
    assert part.encoding == "dense"
    np.testing.assert_allclose(decoded(part, (16, 16)), outputs.T.astype(float) @ inputs, rtol=1e-4, atol=1e-4)


def test_inputs_that_layers_share_are_stored_once_and_pay_for_themselves_together() -> None:
    inputs = normal(0, 30, 40)
    layers = {name: (Factors(inputs, normal(seed, 30, 40)),) for seed, name in enumerate("qkv")}
    known = {name: parameter(name, 40, 40) for name in "qkv"}
    alone, _ = encode({"q": layers["q"]}, known)
    assert alone[0].encoding == "dense"
    together, norm = encode(layers, known)
    assert [part.encoding for part in together] == ["factors"] * 3
    assert len({id(part.matrices["inputs"]) for part in together}) == 1
    assert sum(part.bytes for part in together) == 4 * inputs.nbytes
    dense = [layer[0].output_gradients.T.astype(float) @ inputs for layer in layers.values()]
    assert norm == pytest.approx(np.sqrt(sum(np.sum(one**2) for one in dense)), rel=1e-6)


def test_token_rows_that_are_zero_are_not_stored_and_row_maps_keep_their_place() -> None:
    inputs, masked, full = normal(0, 10, 50), normal(1, 10, 50), normal(2, 10, 50)
    masked[:7] = 0
    full[[0, 9]] = 0
    parts, _ = encode(
        {"head": (Factors(inputs, masked),), "other": (Factors(inputs, full),)},
        {"head": parameter("head", 50, 50), "other": parameter("other", 50, 50)},
    )
    head, other = parts
    assert len(head.matrices["output_gradients"].values) == 3
    assert len(other.matrices["output_gradients"].values) == 8
    assert len(head.matrices["inputs"].values) == 9  # the union of rows 1-8 and 7-9
    np.testing.assert_allclose(decoded(head, (50, 50)), masked.T @ inputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decoded(other, (50, 50)), full.T @ inputs, rtol=1e-5, atol=1e-5)


def test_a_dense_gradient_with_few_rows_becomes_rows_and_minus_zero_counts() -> None:
    dense = np.zeros((100, 8), np.float32)
    dense[3], dense[70] = normal(0, 8), -0.0
    part = one(dense, 100, 8)
    assert part.encoding == "rows"
    assert part.matrices["indices"].values[:, 0].tolist() == [3, 70]
    assert part.matrices["values"].values.tobytes() == dense[[3, 70]].tobytes()


def test_rows_named_twice_are_summed() -> None:
    rows = Rows(np.array([5, 2, 5]), normal(0, 3, 6), (20, 6))
    part = one(rows, 20, 6)
    expected = np.zeros((20, 6))
    np.add.at(expected, rows.indices, rows.values)
    np.testing.assert_allclose(decoded(part, (20, 6)), expected, rtol=1e-6)
    assert part.norm == pytest.approx(np.linalg.norm(expected), rel=1e-6)


def test_parts_of_a_tied_parameter_sum_and_their_inner_products_are_in_the_norm() -> None:
    parts = (
        Factors(normal(0, 3, 8), normal(1, 3, 30)),
        Rows(np.array([1, 4, 4]), normal(2, 3, 8), (30, 8)),
        normal(3, 30, 8),
    )
    encoded, norm = encode({"w": parts}, {"w": parameter("w", 30, 8)})
    dense = densify(parts, (30, 8)).astype(float)
    expected = parts[0].output_gradients.T.astype(float) @ parts[0].inputs + parts[2]
    np.add.at(expected, parts[1].indices, parts[1].values)
    np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sum(decoded(part, (30, 8)) for part in encoded), expected, rtol=1e-5, atol=1e-5)
    assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)


def test_two_sets_of_rows_share_those_that_both_have() -> None:
    indices = np.array([1, 4, 4, 7]), np.array([9, 4, 7, 7])
    parts = tuple(Rows(one, normal(seed, 4, 8), (30, 8)) for seed, one in enumerate(indices))
    _, norm = encode({"w": parts}, {"w": parameter("w", 30, 8)})
    expected = np.zeros((30, 8))
    for part in parts:
        np.add.at(expected, part.indices, part.values)
    assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-6)


@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(1, 1, 1), (63, 200, 33), (65, 129, 100), (300, 130, 70)])
def test_products_of_any_size_are_those_of_numpy(tokens: int, d_in: int, d_out: int) -> None:
    left, right = normal(0, tokens, d_out), normal(1, tokens, d_in)
    np.testing.assert_allclose(product(left.T, right), left.T.astype(float) @ right, rtol=1e-4, atol=1e-3)
    assert norm(Factors(right, left)) == pytest.approx(np.linalg.norm(left.T.astype(float) @ right), rel=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["factors", "dense", "rows"])
def test_the_error_of_a_lossy_precision_is_measured_and_within_its_limit(precision: str, kind: str) -> None:
    gradient: Gradient = {
        "factors": Factors(normal(0, 6, 130), normal(1, 6, 70)),
        "dense": normal(2, 70, 130),
        "rows": Rows(np.array([3, 9]), normal(3, 2, 130), (70, 130)),
    }[kind]
    part = one(gradient, 70, 130, precision=precision)
    exact = densify((gradient,), (70, 130)).astype(float)
    error = np.linalg.norm(decoded(part, (70, 130)) - exact) / np.linalg.norm(exact)
    assert part.encoding == kind
    assert part.precision == precision
    assert part.rel_error == pytest.approx(error, rel=0.02)
    assert 1e-4 < error < (4e-3 if precision == "bfloat16" else 0.02)


def test_a_part_too_coarse_for_the_limit_is_kept_finer() -> None:
    gradient = normal(0, 20, 64)
    assert one(gradient, 20, 64, precision="int8", max_rel_error=0.02).precision == "int8"
    assert one(gradient, 20, 64, precision="int8", max_rel_error=0.004).precision == "bfloat16"
    exact = one(gradient, 20, 64, precision="int8", max_rel_error=1e-6)
    assert exact.precision == "exact"
    assert exact.matrices["values"].values.tobytes() == gradient.tobytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_exact_keeps_every_bit_of_every_dtype(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 24 * 16 * 8, np.uint8)
    if dtype == "bfloat16":
        values = bits.view("<u2").view(BFLOAT16)[: 24 * 16].reshape(24, 16)
    else:
        values = bits.view(dtype)[: 24 * 16].reshape(24, 16)
    part, _ = encode({"w": (values,)}, {"w": parameter("w", 24, 16)}, drop_zero_rows=False)
    assert part[0].matrices["values"].values.tobytes() == values.tobytes()
    assert part[0].rel_error == 0


@given(st.floats(width=32, allow_nan=True, allow_infinity=True))
@settings(max_examples=300, deadline=None)
def test_bfloat16_rounds_to_nearest_even(value: float) -> None:
    import torch

    array = np.array([value], np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(widen(narrow(array)), expected)


@pytest.mark.parametrize("precision", ["exact", "bfloat16", "int8"])
def test_a_zero_part_stores_nothing_under_any_precision(precision: str) -> None:
    part = one(np.zeros((6, 100), np.float32), 6, 100, precision=precision)
    assert part.norm == part.rel_error == part.bytes == 0 and part.matrices == {}


def test_a_zero_part_stores_nothing() -> None:
    part = one(Factors(normal(0, 4, 10), np.zeros((4, 10), np.float32)), 10, 10)
    assert not part.matrices
    assert part.norm == 0
    assert np.array_equal(decoded(part, (10, 10)), np.zeros((10, 10)))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 0), (4, 3, 2, 2)])
def test_any_number_of_axes_is_stored_as_rows(shape: tuple[int, ...]) -> None:
    values = np.asarray(np.random.default_rng(0).standard_normal(shape), np.float32)
    known = parameter("w", *shape)
    parts, _ = encode({"w": (values,)}, {"w": known})
    got = decoded(parts[0], known.matrix_shape)
    assert got.reshape(shape).tobytes() == values.tobytes()


@pytest.mark.parametrize("tokens", [3, 40, 400])
def test_layers_that_share_an_input_have_their_own_norms(tokens: int) -> None:
    inputs = normal(0, tokens, 48)
    outputs = {"narrow": normal(1, tokens, 8), "wide": normal(2, tokens, 96)}
    outputs["wide"][0] = 0  # a row that only this layer leaves out
    gradients = {name: (Factors(inputs, output),) for name, output in outputs.items()}
    known = {name: parameter(name, output.shape[1], 48) for name, output in outputs.items()}
    parts, whole = encode(gradients, known)
    dense = {name: output.astype(np.float64).T @ inputs.astype(np.float64) for name, output in outputs.items()}
    for part in parts:
        assert part.norm == pytest.approx(np.linalg.norm(dense[part.parameter]), rel=1e-5)
        np.testing.assert_allclose(decoded(part, dense[part.parameter].shape), dense[part.parameter], atol=1e-4)
    assert whole == pytest.approx(np.sqrt(sum(np.linalg.norm(one) ** 2 for one in dense.values())), rel=1e-5)


def test_rows_that_begin_with_zero_are_kept_and_rows_of_zeros_are_not_wherever_they_are() -> None:
    inputs, outputs = normal(0, 12, 64), normal(1, 12, 64)
    outputs[:, 0] = 0  # as after a ReLU
    outputs[[0, 5, 11]] = 0
    outputs[3, 0] = -0.0
    part = one(Factors(inputs, outputs), 64, 64)
    assert len(part.matrices["output_gradients"].values) == 9
    np.testing.assert_allclose(decoded(part, (64, 64)), outputs.T @ inputs, rtol=0, atol=1e-5)
