"""What no file can hold is refused by the call that brings it, and what was accepted before is on disk."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from older_layouts import written

import timstore
from timstore import Factors, Rows
from timstore.errors import FormatError, InvalidInputError
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter, claim_attempt
from timstore.format.segments import build_segment
from timstore.format.settings import create_settings
from timstore.legacy import import_trajectories
from timstore.records import Parameter

HALF = "w\ud800"
GRADIENT = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
BIG = 2**70


def append(**changes):
    given = {"epoch": 0, "step": 1, "sample": 1, "gradients": {"w": GRADIENT}, "lr": 0.1, **changes}
    return lambda store: store.append(**given)


def named(name):
    return append(gradients={name: GRADIENT})


def valued(value):
    return append(gradients={"v": value})


def quantized():
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


REFUSED = {
    # Names
    "append: half a surrogate pair": named(HALF),
    "append: an empty name": named(""),
    "append: NUL": named("w\0"),
    "append: a name of 5,000 bytes": named("é" * 2500),
    "append: bytes": named(b"w"),
    "append_step: idle": lambda store: store.append_step(0, 1, [{"lr": 0.1, "idle": (HALF,)}]),
    "append_step: optimizer": lambda store: store.append_step(0, 1, [{"lr": 0.1, "optimizer": HALF}]),
    "append_step: options": lambda store: store.append_step(0, 1, [{"lr": 0.1, "options": HALF}]),
    "append_states: parameter": lambda store: store.append_states(0, 0, "exp_avg_sq", {HALF: GRADIENT}),
    "append_states: name": lambda store: store.append_states(0, 0, "start_state", {"w": GRADIENT}, name=HALF),
    "append_fingerprints: parameter": lambda store: store.append_fingerprints(0, 0, {HALF: "00"}),
    "append_fingerprints: digest": lambda store: store.append_fingerprints(0, 0, {"w": HALF}),
    "append_hashes: digest": lambda store: store.append_hashes({1: HALF}),
    "declare: name": lambda store: store.declare([Parameter(HALF, (2, 3), "float32")]),
    "declare: dtype": lambda store: store.declare([Parameter("v", (2, 3), HALF)]),
    "keep_probe: loss": lambda store: store.keep_probe([np.ones(2)], loss=HALF),
    "keep_probe: name": lambda store: store.keep_probe([{HALF: np.ones(2)}], loss="mse"),
    "samples: value": lambda store: store.samples.update([{"sample": 1, "owner": HALF}]),
    "samples: column": lambda store: store.samples.update([{"sample": 1, HALF: "a"}]),
    "samples: a column without a name": lambda store: store.samples.update([{"sample": 1, "": "a"}]),
    "append_rollback: method": lambda store: store.append_rollback({"method": HALF}),
    # Numbers
    **{f"append: sample {one!r:.20}": append(sample=one) for one in (-1, BIG, 1.0, True, "1", None, 2**63)},
    **{f"append: step {one!r:.20}": append(step=one) for one in (-1, BIG, 1.0, float("nan"))},
    **{f"append: rank {one!r:.20}": append(rank=one) for one in (-1, BIG)},
    "append: lr": append(lr=1j),
    "append: loss": append(loss="much"),
    "append: tokens": append(tokens=BIG),
    "append_step: sample_ids": lambda store: store.append_step(0, 1, [{"lr": 0.1}], sample_ids=[BIG]),
    "append_step: a negative id": lambda store: store.append_step(0, 1, [{"lr": 0.1}], sample_ids=[-1]),
    "append_step: group_id": lambda store: store.append_step(0, 1, [{"lr": 0.1, "group_id": BIG}]),
    "append_step: counter": lambda store: store.append_step(0, 1, [{"lr": 0.1, "counter": BIG}]),
    "append_step: tokens": lambda store: store.append_step(0, 1, [{"lr": 0.1}], tokens=BIG),
    "append_fingerprints: step": lambda store: store.append_fingerprints(-1, 0, {"w": "00"}),
    "append_states: step": lambda store: store.append_states(0, BIG, "exp_avg_sq", {"w": GRADIENT}),
    "append_hashes: sample": lambda store: store.append_hashes({-1: "00"}),
    "begin_attempt: scope": lambda store: store.begin_attempt(0, 1, scope=(BIG,)),
    "begin_attempt: a negative id": lambda store: store.begin_attempt(0, 1, scope=(-1,)),
    "begin_attempt: ranks": lambda store: store.begin_attempt(0, 1, ranks=BIG),
    "begin_attempt: epoch": lambda store: store.begin_attempt(BIG, 1),
    "claim_scope: scope": lambda store: store.claim_scope((BIG,)),
    "claim_scope: ranks": lambda store: store.claim_scope("all", ranks=0),
    "declare: group_id": lambda store: store.declare([Parameter("v", (2,), "float32", BIG)]),
    "declare: shape": lambda store: store.declare([Parameter("v", (2**40, 2**40), "float32")]),
    "samples: sample": lambda store: store.samples.update([{"sample": -1, "owner": "a"}]),
    # Shapes
    "append: an empty axis": valued(np.ones((0, 4), np.float32)),
    "append: an empty axis of factors": valued(Factors(np.ones((2, 0), np.float32), np.ones((2, 3), np.float32))),
    "append: an empty axis of rows": valued(Rows(np.zeros(0, int), np.ones((0, 4), np.float32), (0, 4))),
    "append: rows beyond any size": valued(Rows(np.zeros(1, int), np.ones((1, 4), np.float32), (2**62, 4))),
    "append_states: an empty axis": lambda store: store.append_states(0, 0, "exp_avg_sq", {"v": np.ones((0, 4))}),
    "append_states: another shape": lambda store: store.append_states(0, 0, "exp_avg_sq", {"w": np.ones((3, 2))}),
    # What holds no numbers
    "append: meta": valued(torch.ones(2, device="meta")),
    "append: quantized": lambda store: store.append(0, 1, 1, {"v": quantized()}),
    "append: nested": lambda store: store.append(0, 1, 1, {"v": nested()}),
    "append: complex": valued(np.ones(2, np.complex64)),
    "append: objects": valued(np.array([1.0, None])),
    "append: masked": valued(np.ma.masked_array(np.ones(2, np.float32), [True, False])),
    "append_states: meta": lambda store: store.append_states(0, 0, "gradient", {"w": torch.ones(2, 3, device="meta")}),
    "keep_probe: objects": lambda store: store.keep_probe([np.array([object()])], loss="mse"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_at_the_call_and_costs_nothing_else(tmp_path, what):
    store = timstore.open(tmp_path)
    store.append(0, 0, 1, {"w": GRADIENT}, lr=0.1)
    with pytest.raises(InvalidInputError):
        REFUSED[what](store)
    store.append(0, 1, 2, {"w": GRADIENT * 2}, lr=0.1)
    store.close()
    with timstore.open(tmp_path, "r") as reopened:
        assert reopened.sql("SELECT step, sample FROM records ORDER BY ALL").fetchall() == [(0, 1), (1, 2)]
        assert reopened.sql("SELECT step, lr FROM steps ORDER BY ALL").fetchall() == [(0, 0.1), (1, 0.1)]
        assert np.array_equal(reopened.gradient(0, 1, 2, "w"), GRADIENT * 2)
    assert timstore.verify(tmp_path).sound


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_a_rate_that_is_not_a_number_is_the_same_for_all_samples(tmp_path, lr):
    with timstore.open(tmp_path) as store:
        for sample in (2, 3):
            store.append(0, 1, sample, {"w": GRADIENT}, lr=lr)
            store.append_step(0, 2, [{"lr": 0.1, "eps": lr}], grad_norm=lr)
        store.commit()
        # Looked up again, and still the same.
        store.append(0, 1, 4, {"w": GRADIENT}, lr=lr)
    with timstore.open(tmp_path, "a") as store:
        store.append(0, 1, 5, {"w": GRADIENT}, lr=lr)
        assert store.sql("SELECT count(*) FROM steps").fetchall() == [(2,)]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_a_model_with_an_empty_parameter_is_recorded_without_it(tmp_path, optimizer, frozen, shape):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.empty = torch.nn.Parameter(torch.zeros(shape), requires_grad=not frozen)
    stepped = optimizer(model.parameters(), lr=0.1)
    inputs = torch.randn(2, 3)
    expected = [
        torch.autograd.grad(model(inputs[n : n + 1]).square().sum() / 4, model.weight)[0].numpy() for n in range(2)
    ]
    with timstore.open(tmp_path) as store, store.record(model, stepped) as recorder:
        recorder.batch([5, 6])
        (model(inputs).square().mean() + model.empty.sum()).backward()
        stepped.step()
    with timstore.open(tmp_path, "r") as store:
        for sample, gradient in zip((5, 6), expected, strict=True):
            np.testing.assert_allclose(store.gradient(0, 0, sample, "weight"), gradient, rtol=1e-5)
        names = store.sql("SELECT DISTINCT parameter FROM gradients ORDER BY 1").fetchall()
        assert names == [("bias",), ("weight",)]


@pytest.mark.parametrize("scope", [(1, 2**70), (2**63,), (-(2**70), 1)])
def test_a_store_whose_scope_no_table_holds_opens_again(tmp_path, scope):
    """Earlier versions took ids of any size."""
    with timstore.open(tmp_path) as store:
        store.append(0, 0, 1, {"w": GRADIENT}, lr=0.1)
        store.commit()
        claim_attempt(LocalObjects(tmp_path, durable=True), 0, 1, scope, 1)
    with timstore.open(tmp_path) as store:
        store.append(0, 1, 2, {"w": GRADIENT}, lr=0.1)
        store.commit()
        assert store.sql("SELECT sample FROM records ORDER BY 1").fetchall() == [(1,), (2,)]
        assert store.sql("SELECT recorded FROM attempts ORDER BY attempt").fetchall()[1] == ("selected",)
    assert timstore.verify(tmp_path).sound


def test_a_store_with_a_samples_column_without_a_name_opens_again(tmp_path):
    """Earlier versions took one."""
    objects = LocalObjects(tmp_path, durable=True)
    settings = create_settings(objects)
    claim_attempt(objects, 0, 0, "all", 1, first=True)
    rows = pa.table({"sample": pa.array([1, 2], pa.int64()), "": ["x", "y"], "owner": ["a", "b"]})
    LogWriter(objects, settings).commit(0, 0, None, 0, lambda: build_segment([], {"samples": rows}, {}, []))
    with timstore.open(tmp_path) as store:
        expected = [(1, "a"), (2, "b")]
        assert store.sql("SELECT sample, owner FROM samples ORDER BY 1").fetchall() == expected
        store.samples.update([{"sample": 3, "owner": "c"}])
        store.compact()
        assert store.sql("SELECT sample, owner FROM samples ORDER BY 1").fetchall() == [*expected, (3, "c")]


def older(folder, name):
    """Write a sample with two parameters, one named as a file of JSON spells it."""
    gradients = json.dumps({"0": {"w?": [1.0], "NAME": [2.0]}}).replace("NAME", name)
    return written(folder, {0: f'{{"sample_gradients": {gradients}}}'}, learning_rate=0.1)


@pytest.mark.parametrize("name", [r"w\ud800", r"w\uDFFF", r"w\ud83dx", r"w\ud83d\u0041", r"w\ud83d\ud83d", r"\ud83d\n"])
def test_half_a_surrogate_pair_in_an_older_layout_is_refused(tmp_path, name):
    """The parser makes `w?` of `w\\ud800`, which is another parameter's name."""
    with pytest.raises(FormatError, match=r"\\u.* is half of a surrogate pair"):
        import_trajectories(older(tmp_path / "old", name), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [r"w\ud83d\ude00", r"w\uD83D\uDE00", r"w\\ud800", "w😀", r"w\u00e9"])
def test_whole_characters_and_what_only_looks_like_half_a_pair_are_names(tmp_path, name):
    import_trajectories(older(tmp_path / "old", name), tmp_path / "new")
    with timstore.open(tmp_path / "new", "r") as store:
        names = store.sql("SELECT parameter FROM gradients ORDER BY norm").fetchall()
        assert names == [("w?",), (json.loads(f'"{name}"'),)]
