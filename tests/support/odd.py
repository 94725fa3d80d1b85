"""Arguments of every kind, right ones and odd ones, and calls of which one argument is odd."""

import inspect
import os
import tempfile
import warnings

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import timstore
from timstore import Factors, Rows
from timstore.errors import shown
from timstore.records import Parameter, StepGroup

EXAMPLES = int(os.environ.get("TIMSTORE_FUZZ", "0"))
# So many examples are tried on one store, before it is checked as a whole.
TOGETHER = 25
G = np.arange(6, dtype=np.float32).reshape(2, 3) + 1
# Where syncing costs nothing, if there is such a place.
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def fuzzed(few):
    """Run so many examples that are always the same, or TIMSTORE_FUZZ new ones; what fails is shown as it was drawn."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
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


NAMES = ["w", "", "\0", "w\ud800", "\udfff", "é", "w" * 5000, "\u202e\n'\";--", "😀"]
NAMES += ["sample", "commit", "all", "auto", "r"]
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
# Arguments that hold others by name, of which one may be odd.
_KEYS = {"gradients", "numbers", "digests", "hashes", "row", "before", "groups", "rows"}


class Drawn(dict):
    """Arguments that were drawn, shown as far as they can be."""

    def __repr__(self):
        return shown(dict(self), 2000)


@st.composite
def odd_call(draw, usual, name=None):
    """Return arguments of which one, or what it holds, is odd, now and then two.

    `name` says which one is.
    """
    taken = Drawn(usual)
    names = sorted(taken)
    for one in {name or draw(st.sampled_from(names)), *draw(st.lists(st.sampled_from(names), max_size=1))}:
        odd = draw(anything)
        inside = taken[one]
        if one in _KEYS and isinstance(inside, list | dict) and draw(st.booleans()):
            key = draw(st.sampled_from(["w", "v", "sample", "owner", "lr", "samples", *NAMES, 1, 2**70]))
            odd = [{**inside[0], key: odd}] if isinstance(inside, list) else {**inside, key: odd}
        taken[one] = odd
    return taken


class Answer:
    """What a call returned."""

    def __init__(self, value):
        self.value = value


def answer_of(call, arguments):
    """Call, and return what it answers; None where it was refused in an error of ours, which can be shown.

    What a function of the user's own raises (`outputs`, `progress`) is the user's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Answer(call(**arguments))
    except timstore.TimstoreError as error:
        str(error).encode()
    except Exception as error:
        if not any(callable(arguments.get(name)) for name in ("outputs", "progress")):
            error.add_note(f"called with {arguments!r}")
            raise
    return None


def left_out(calls):
    """Return the arguments that calls take and no example exchanges.

    Args:
        calls: functions, and the arguments that are exchanged in each.
    """
    found = []
    for call, exchanged in calls:
        taken = inspect.signature(call).parameters.values()
        named = {one.name for one in taken if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        found += [f"{call.__qualname__}: {name}" for name in sorted(named - {"self"} - set(exchanged))]
    return found
