"""Every public argument of a store and of a recorder is given everything: only errors of ours, and nothing is lost.

TIMSTORE_FUZZ=20000 runs so many examples of each, drawn anew, instead of the few that are always the same.
"""

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import timstore
from timstore import Factors, Rows
from timstore.errors import shown
from timstore.records import Parameter, StepGroup

EXAMPLES = int(os.environ.get("TIMSTORE_FUZZ", "0"))
FEW = {"store": 3, "recorder": 2}
# A sample that is recorded last, and that nothing odd names.
LAST = 987654321
G = np.arange(6, dtype=np.float32).reshape(2, 3) + 1


def fuzzed(kind):
    return settings(
        max_examples=EXAMPLES or FEW[kind],
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if EXAMPLES else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


class Odd:
    """Nothing that anybody may call does what it should."""

    def __repr__(self):
        raise RuntimeError("no text")

    def __index__(self):
        raise RuntimeError("no index")

    def __float__(self):
        raise RuntimeError("no number")

    def __iter__(self):
        raise RuntimeError("no items")

    def __len__(self):
        raise RuntimeError("no length")

    def __eq__(self, other):
        raise RuntimeError("no equal")

    def __bool__(self):
        raise RuntimeError("neither")

    __hash__ = object.__hash__


def deep():
    value = []
    for _ in range(2000):
        value = [value]
    return value


def tensors():
    """Tensors and arrays of every kind, the odd ones made anew: torch warns where they are made."""
    plain = torch.ones(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            plain,
            plain.half(),
            plain.bfloat16(),
            plain.double(),
            plain.to(torch.complex64),
            plain.int(),
            plain.bool(),
            plain.to(torch.float8_e4m3fn),
            plain.to("meta"),
            plain.to_sparse(),
            plain.to_sparse_csr(),
            torch.ones(3, 2).T,
            torch.ones(1, 3).expand(2, 3),
            torch.ones(2, 3, requires_grad=True),
            torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            torch.tensor(1.0),
            torch.tensor(3),
            torch.zeros(0, 3),
            torch.full((2, 3), float("nan")),
            G,
            G.astype(np.float16),
            G.astype(np.longdouble),
            G.astype(">f4"),
            G.astype(np.complex128),
            G.astype(object),
            G.astype(int),
            G[::-1, ::-1],
            np.float32(2),
            np.array(1.5, np.float32),
            np.zeros((0, 3), np.float32),
            np.zeros((2, 3), np.float32),
            np.full((2, 3), np.inf, np.float32),
            np.ma.masked_array(G, G > 2),
            np.array(["a", "b"]),
            np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
            np.matrix([[1.0, 2.0]], dtype=np.float32),
            np.datetime64("2020-01-01"),
            Factors(G, G),
            Factors(np.ones((0, 3), np.float32), np.ones((0, 2), np.float32)),
            Factors(G, None),
            Factors(np.float32(1), np.float32(2)),
            Rows(np.array([0, 1]), G, (5, 3)),
            Rows(np.array([0, 7]), G, (5, 3)),
            Rows(np.array([-1, 0]), G, (2**62, 3)),
            Rows([0, 1], G, [5, 3]),
            Rows(None, None, None),
            Rows(torch.tensor([1, 0]), torch.ones(2, 3).bfloat16(), (5, 3)),
            [G, Factors(G, G)],
            [G, G],
            [],
        ]


NAMES = ["w", "", "\0", "w\ud800", "\udfff", "é", "w" * 5000, "\u202e\n'\";--", "😀", "sample", "commit", "all", "r"]
ODD = [None, True, False, ..., NotImplemented, b"w", {}, [], (), set(), object(), type, Odd, Odd(), deep(), range(3)]
NUMBERS = [0, 1, 2, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**70, 10**5000, 0.5, -0.0, 1e308, 1e-320, 1j]
NUMBERS += [float("nan"), float("inf"), np.int64(3), np.uint64(2**63), np.float64("nan"), np.bool_(True), "512MB", "1"]

anything = st.deferred(
    lambda: st.one_of(
        st.sampled_from(NUMBERS),
        st.sampled_from(NAMES),
        st.sampled_from(ODD),
        st.builds(lambda number: tensors()[number], st.integers(0, len(tensors()) - 1)),
        st.text(st.characters(exclude_categories=()), max_size=4),
        st.integers(),
        st.floats(),
        st.lists(anything, max_size=3),
        st.lists(anything, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from([*NAMES, 1, -1, 2**70, None, 1.5]), anything, max_size=2),
        st.builds(Parameter, anything, anything, anything, anything),
        st.builds(StepGroup, group_id=anything, lr=anything, idle=anything, options=anything),
    )
)
_GROUP = {"lr": 0.1, "momentum": 0.9}

# What each call takes when nothing is odd; every argument of it is exchanged.
CALLS = {
    "append": dict(epoch=0, step=5, sample=1, gradients={"w": G}, lr=0.1, loss=1.0, tokens=3, dot=0.5, rank=0)
    | dict(allow_zero=False, allow_nonfinite=False, copy=True),
    "append_step": dict(epoch=0, step=6, groups=[_GROUP], rank=0, consumed_ratio=1.0, sample_ids=[1], tokens=3)
    | dict(grad_norm=1.0, amp_scale=1.0, clip_value=None, mean_over=None, micro_batches=[1], skipped=0),
    "declare": dict(parameters=[Parameter("v", (2, 3), "float32", 0)]),
    "append_fingerprints": dict(epoch=0, step=0, digests={"w": "00"}),
    "append_states": dict(epoch=0, step=0, role="start_state", numbers={"w": G}, name="exp_avg"),
    "append_hashes": dict(hashes={1: "00"}),
    "append_rollback": dict(row={"samples": [1], "digest_after": "00"}, before={"w": G}),
    "keep_probe": dict(batches=[{"x": np.ones(2)}, np.ones(2), [np.ones(2)]], loss="mse"),
    "begin_attempt": dict(from_epoch=3, from_step=0, scope=(1, 2), ranks=1),
    "join_attempt": dict(attempt=0),
    "claim_scope": dict(scope=None, ranks=1),
    "sql": dict(query="SELECT ? AS x", params=[1]),
    "read": dict(where="sample = 1"),
    "gradient": dict(epoch=0, step=0, sample=1, parameter="w", rank=0),
    "samples.update": dict(rows=[{"sample": 1, "owner": "a"}]),
    "compact": dict(progress=None),
}
_KEYS = {"gradients", "numbers", "digests", "hashes", "row", "before", "groups", "rows"}


class Drawn(list):
    """What was drawn, shown as far as it can be."""

    def __repr__(self):
        return shown(list(self), 2000)


@st.composite
def odd_calls(draw, usual):
    """Return arguments, as often as there are some, of which one is odd, or what it holds is; now and then two."""
    return Drawn(_odd(draw, usual, name) for name in usual)


def _odd(draw, arguments, name):
    taken = dict(arguments)
    for one in {name, *draw(st.lists(st.sampled_from(sorted(taken)), max_size=1))}:
        odd = draw(anything)
        if one in _KEYS and draw(st.booleans()):
            key = draw(st.sampled_from(["w", "v", "sample", "owner", "lr", "samples", *NAMES, 1, 2**70]))
            inside = taken[one]
            odd = [{**inside[0], key: odd}] if isinstance(inside, list) else {**inside, key: odd}
        taken[one] = odd
    return taken


def run(store, verb, arguments):
    """Call, and take what is refused in an error of ours; return whether it was accepted."""
    method = store
    for name in verb.split("."):
        method = getattr(method, name)
    if callable(arguments.get("progress")):
        return False  # what a function of the user's own does is the user's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = method(**arguments)
            if verb == "read":
                list(answer)
            elif verb == "sql":
                answer.fetchall()
    except timstore.TimstoreError as error:
        str(error).encode()  # it can be shown
        return False
    return True


TABLES = ("records", "gradients", "steps", "parameters", "samples", "attempts", "fingerprints", "rollbacks", "commits")


def assert_is_whole(path, samples):
    """The store opens, all of it can be read, and the records of step 0 are what was accepted first."""
    with timstore.open(path, "r") as store:
        for table in TABLES:
            store.sql(f"FROM {table}").fetchall()
        store.probe(), store.latest_fingerprints()
        for record in store.read():
            for name in record.gradients:
                record.dense(name)
        for sample in samples:
            assert np.array_equal(store.gradient(0, 0, sample, "w"), G if sample == 1 else G * 2)
    assert timstore.verify(path).sound


@pytest.mark.parametrize("verb", CALLS)
@fuzzed("store")
@given(data=st.data())
def test_every_argument_of_a_store(verb, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        store = timstore.open(path, durability="os")
        store.append(0, 0, 1, {"w": G}, lr=0.1)
        kept = {1, LAST}
        for arguments in data.draw(odd_calls(CALLS[verb])):
            if run(store, verb, arguments) and verb == "begin_attempt":
                start = int(arguments["from_epoch"]), int(arguments["from_step"])
                kept -= {1} if start == (0, 0) else set()
        store.append(0, 0, LAST, {"w": G * 2}, lr=0.1)
        store.close()
        assert_is_whole(path, kept)


RECORD = dict(model=None, optimizer=None, samples=[1, 2], resume_from=None, probe=None, optimizer_history="final")
RECORD |= dict(scaler=None, mean_over="samples", budget="1GB", steps=3, epochs=1, rank=0, allow_zero=False)
RECORD |= dict(capture="modules", batch_axis=0, id_column=None, by_content=False, process_group=None)
# What the `with` block is given: `ids` beside the batch, and the epoch that is set.
WITHIN = dict(ids=[1, 2], epoch=1)


@pytest.mark.parametrize("given_to", ["record", "recorder"])
@fuzzed("recorder")
@given(data=st.data())
def test_every_argument_of_a_recorder(given_to, data):
    usual = RECORD if given_to == "record" else WITHIN
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        store = timstore.open(path, durability="os")
        store.append(0, 0, 1, {"w": G}, lr=0.1)
        store.append(0, 0, LAST, {"w": G * 2}, lr=0.1)
        for arguments in data.draw(odd_calls(usual)):
            recorded(store, *((arguments, WITHIN) if given_to == "record" else (RECORD, arguments)))
        store.close()
        assert_is_whole(path, {1, LAST})


def recorded(store, options, within):
    """Train a step under a recorder; return the error that refused it, of ours."""
    net = torch.nn.Linear(3, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {**options, "resume_from": options["resume_from"] or (1, 0)}
    options |= {name: one for name, one in (("model", net), ("optimizer", sgd)) if options[name] is None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with store.record(**options) as recorder:
                recorder.epoch = within["epoch"]
                recorder.batch(within["ids"])
                net(torch.ones(2, 3)).square().mean().backward()
                sgd.step()
    except timstore.TimstoreError as error:
        str(error).encode()  # it can be shown
