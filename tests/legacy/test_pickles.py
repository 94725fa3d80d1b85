"""Pickles of the older layout: legitimate ones come back bit for bit; whatever else is in one runs nothing, takes no
memory and is refused in our words."""

import builtins
import copyreg
import gc
import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from timstore.errors import CorruptionError, FormatError
from timstore.legacy.layout import gradients
from timstore.legacy.pickle_files import read_pickle
from timstore.records import BFLOAT16

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
BITS = np.random.default_rng(0).integers(0, 256, 480, np.uint8).tobytes()  # with NaNs of every payload

# --- a watch over what reading does ------------------------------------------------------------------------------

EVENTS: list[tuple[str, str]] | None = None  # an audit hook cannot be taken away again: this one sleeps meanwhile


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if EVENTS is not None and event not in ("builtins.id", "array.__new__"):
        EVENTS.append((event, str(arguments[0]) if event == "open" else ""))


sys.addaudithook(note)


@contextmanager
def watched(path: Path) -> Iterator[list[tuple[str, str]]]:
    """Collect every audit event but the opening of one file, and every call that imports, executes or loads."""
    global EVENTS
    seen: list[tuple[str, str]] = []
    places = [(builtins, name) for name in ("eval", "exec", "compile", "__import__")]
    places += [(os, "system"), (os, "popen"), (subprocess, "Popen"), (torch, "load")]
    originals = {(place, name): getattr(place, name) for place, name in places}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((f"call of {name}", ""))
            return original(*arguments, **options)

        return call

    for (place, name), original in originals.items():
        setattr(place, name, counted(name, original))
    gc.disable()  # what other tests left may remove files as it goes
    EVENTS = seen
    try:
        yield seen
    finally:
        EVENTS = None
        gc.enable()
        for (place, name), original in originals.items():
            setattr(place, name, original)
        seen[:] = [event for event in seen if event != ("open", str(path))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pickles") / "epoch_0.pkl"
    gc.collect()
    for protocol in (0, 5):  # numpy and Python import something of their own when it is first needed
        read(made, dumped({"a": np.ones(2), "b": torch.ones(2), "c": np.float32(1), "d": [1.0]}, protocol))
    return made


def dumped(parameters: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> bytes:
    return pickle.dumps({"sample_gradients": {"1": parameters}}, protocol)


def read(path: Path, data: bytes) -> dict[str, Any]:
    """Read an epoch's file; returns each parameter's gradient, of whatever sample."""
    path.write_bytes(data)
    return {name: array for _, entries in read_pickle(path) for name, array, _ in gradients(entries)}


def refused(path: Path, data: bytes, words: str = "") -> FormatError:
    """Read what must not be read: nothing is imported, executed or opened, and less than 4 MB are taken."""
    path.write_bytes(data)
    modules = set(sys.modules)
    tracemalloc.start()
    try:
        with watched(path) as seen, pytest.raises(FormatError) as caught:
            read(path, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [event for event in seen if event[0] != "open" or event[1] != str(path)] == []
    assert set(sys.modules) == modules
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message and len(message) < 1_000 and message.isascii(), message
    assert peak < 4_000_000 + 300 * len(data)
    return caught.value


# --- pickles made by hand ----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def long(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def called(full: str, *arguments: bytes) -> bytes:
    module, _, attribute = full.rpartition(".")
    return name(module, attribute) + items(*arguments) + b"R"


def file_of(value: bytes) -> bytes:
    """An epoch's file whose only gradient is what these opcodes leave."""
    return b"\x80\x04}" + text("sample_gradients") + b"}" + text("1") + b"}" + text("w") + value + b"sss."


def forms(module: str, attribute: str, argument: bytes) -> dict[str, bytes]:
    """The ways in which a pickle can have a name called, made, changed or handed on."""
    plain = name(module, attribute)
    stacked = text(module) + text(attribute) + b"\x93"
    return {
        "GLOBAL REDUCE": plain + items(argument) + b"R",
        "GLOBAL alone": plain,
        "STACK_GLOBAL REDUCE": stacked + items(argument) + b"R",
        "INST": b"(" + argument + b"i" + plain[1:],
        "OBJ": b"(" + plain + argument + b"o",
        "NEWOBJ": plain + items(argument) + b"\x81",
        "NEWOBJ_EX": stacked + items(argument) + b"}\x92",
        "BUILD": plain + b"}" + text("x") + argument + b"sb",
        "as a factory": name("collections", "defaultdict") + plain + b"\x85R",
        "as an element": b"](" + plain + argument + b"\x85Re",
    }


EMPTY = called("numpy._core.multiarray._reconstruct", name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")


def array_of(shape: bytes, data: bytes = b"C\x08" + bytes(8), kind: str = "f4") -> list[bytes]:
    """An array, as protocols below 5 have it, and as protocol 5 has it."""
    dtype = called("numpy.dtype", text(kind), b"\x89", b"\x88")
    dtype += items(b"K\x03", text("<"), b"NNN", b"I-1\n", b"I-1\n", b"K\x00") + b"b"
    buffer = called("numpy._core.numeric._frombuffer", data, dtype, shape, text("C"))
    return [EMPTY + items(b"K\x01", shape, dtype, b"\x89", data) + b"b", buffer]


def blob_of(tensor: torch.Tensor) -> bytes:
    (blob,) = [argument for _, argument, _ in pickletools.genops(pickle.dumps(tensor, 3)) if type(argument) is bytes]
    return blob


def tensor_of(blob: bytes, offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,)) -> bytes:
    storage = called("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(blob)) + blob)
    place = [items(*map(long, axes)) for axes in (size, stride)]
    hooks = called("collections.OrderedDict")
    return called("torch._utils._rebuild_tensor_v2", storage, long(offset), *place, b"\x89", hooks)


BLOB = blob_of(torch.arange(4.0))


def laughs(levels: int, opener: bytes = b"](", closer: bytes = b"e") -> bytes:
    """Lists of ten times the list before: 10 ** levels numbers in 30 bytes for each level."""
    return b"](K\x01eq\x00" + b"".join(
        opener + (b"h" + bytes([level])) * 10 + closer + b"q" + bytes([level + 1]) for level in range(levels)
    )


# --- what is legitimate ------------------------------------------------------------------------------------------


def assert_same_bits(array: Any, expected: np.ndarray) -> None:
    assert type(array) is np.ndarray
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert array.tobytes() == expected.tobytes()


def views_of(flat: Any) -> dict[str, Any]:
    matrix = flat[:60].reshape(6, 10)
    return {
        "flat": flat,
        "zero axes": flat[7:8].reshape(()),
        "three axes": flat[:60].reshape(3, 4, 5),
        "empty": flat[:0].reshape(0, 7),
        "transposed": matrix.T,
        "strided": matrix[::2, 1::3],
        "a row": matrix[3],
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_come_back_bit_for_bit(path: Path, protocol: int) -> None:
    for kind in ("f2", "f4", "f8"):
        views = views_of(np.frombuffer(BITS, kind)) | {"fortran": np.asfortranarray(np.frombuffer(BITS, kind)[None])}
        for name, array in read(path, dumped(views, protocol)).items():
            assert_same_bits(array, views[name])
        swapped = {name: view.astype(f">{kind}") for name, view in views.items()}
        for name, array in read(path, dumped(swapped, protocol)).items():
            assert_same_bits(array, views[name])
    for kind in ("i1", "i2", "i4", "u1", "u2", "u4", "b1"):
        views = views_of(np.frombuffer(BITS, "u1") > 99 if kind == "b1" else np.frombuffer(BITS, kind))
        for name, array in read(path, dumped(views, protocol)).items():
            assert array.dtype in (np.float32, np.float64) and np.array_equal(array, views[name])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_come_back_as_arrays_bit_for_bit(path: Path, protocol: int) -> None:
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool):
        flat = torch.frombuffer(bytearray(byte & 1 if kind is torch.bool else byte for byte in BITS), dtype=kind)
        views = views_of(flat) | {"windows": flat.as_strided((5, 3), (2, 1))}
        views |= {"parameter": torch.nn.Parameter(flat, requires_grad=flat.is_floating_point())}
        for name, array in read(path, dumped(views, protocol)).items():
            tensor = views[name].detach().contiguous()
            if kind is torch.bfloat16:
                assert_same_bits(array, tensor.view(torch.int16).numpy().view(BFLOAT16))
            elif tensor.is_floating_point():
                assert_same_bits(array, tensor.numpy())
            else:
                assert np.array_equal(array, tensor.numpy())


def epoch() -> dict[str, Any]:
    by_sample: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    by_sample[3] = {"w": np.arange(12, dtype=np.float32).reshape(4, 3), "w_step": 17}
    by_sample["ü"] = OrderedDict(b=torch.arange(5.0), s=torch.tensor(2.5, dtype=torch.bfloat16), s_step=np.int64(4))
    by_sample["\n" + "x" * 70_000] = {"l": [[0.1, -0.0, np.inf], (1e-310, np.float64(2.0), -3)], "r": [np.ones(3)] * 2}
    by_sample[np.int64(-(2**40))] = {"f": np.float32(0.1), "n": 2**63 - 1, "e": [], "big": [2**70, 2**700]}
    return {"sample_gradients": by_sample, "other": [b"\x00\xff", None, True, 2**80, "é" * 300]}


def epoch_read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    samples = {key: list(gradients(entries)) for key, entries in read_pickle(path)}
    assert list(samples) == [3, "ü", "\n" + "x" * 70_000, -(2**40)]
    got = {name: (array.tolist(), array.shape, step) for held in samples.values() for name, array, step in held}
    assert got == {
        "w": (np.arange(12).reshape(4, 3).tolist(), (4, 3), 17),
        "b": ([0, 1, 2, 3, 4], (5,), None),
        "s": ((0x4020,), (), 4),  # bfloat16's bits
        "l": ([[0.1, -0.0, np.inf], [1e-310, 2, -3]], (2, 3), None),
        "r": ([[1, 1, 1], [1, 1, 1]], (2, 3), None),
        "f": (float(np.float32(0.1)), (), None),
        "n": (2.0**63, (), None),
        "e": ([], (0,), None),
        "big": ([2.0**70, 2.0**700], (2,), None),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_epoch_of_every_kind_of_value_is_read_whoever_wrote_it(path: Path, protocol: int) -> None:
    data = pickle.dumps(epoch(), protocol)
    epoch_read(path, data)
    epoch_read(path, pickletools.optimize(data))
    slow = io.BytesIO()
    pickle._Pickler(slow, protocol).dump(epoch())
    epoch_read(path, slow.getvalue())
    if protocol < 4:  # what numpy 1 wrote; later protocols say how long names are
        assert b"numpy._core" in data
        epoch_read(path, data.replace(b"numpy._core", b"numpy.core"))


def test_tensors_are_read_without_torch(path: Path) -> None:
    path.write_bytes(dumped({"w": torch.arange(3.0)}))
    script = f"""
import pathlib, sys
from timstore.legacy.pickle_files import read_pickle
((_, [(_, load)]),) = read_pickle(pathlib.Path({str(path)!r}))
assert load().tolist() == [0, 1, 2]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- what is hostile ---------------------------------------------------------------------------------------------

HOSTILE = """
os.system posix.system os.remove subprocess.Popen builtins.eval builtins.exec builtins.getattr builtins.setattr
builtins.__import__ builtins.open builtins.map builtins.set builtins.bytearray __builtin__.apply __main__.watched
functools.partial operator.attrgetter operator.methodcaller codecs.encode codecs.open _codecs.decode timeit.timeit
runpy.run_path importlib.import_module pickle.loads marshal.loads types.FunctionType ctypes.CDLL cProfile.run pdb.run
shutil.rmtree pathlib.Path webbrowser.open copyreg._reconstructor copyreg.__newobj__ collections.Counter
collections.OrderedDict.fromkeys builtins.dict.__subclasses__ numpy.load numpy.memmap numpy.testing.rundocs
numpy._core.multiarray.fromfile numpy._core.multiarray.scalar.__call__ torch.load torch.hub.load torch.jit.load
torch.storage._load_from_bytes.__globals__ torch.FloatStorage torch._utils._rebuild_tensor_v2.__globals__
torch._utils._rebuild_wrapper_subclass torch._tensor._rebuild_from_type_v2 timstore.legacy.pickle_files.os.system
transformers.pipeline joblib.load cloudpickle.loads
"""
NAMES = [tuple(full.rpartition(".")[::2]) for full in HOSTILE.split()]
LAWFUL = [("collections", "OrderedDict"), ("builtins", "dict"), ("_codecs", "encode"), ("numpy", "dtype")]


@pytest.mark.parametrize("form", forms("os", "system", b""))
def test_a_name_that_is_not_listed_is_refused_and_nothing_runs(path: Path, form: str) -> None:
    marker = path.parent / "ran"
    for module, attribute in NAMES:
        error = refused(path, file_of(forms(module, attribute, text(f"touch {marker}"))[form]))
        if form not in ("OBJ", "INST"):
            assert f"it names '{module}.{attribute}', which is never looked up" in str(error)
            assert "Nothing that the file names was imported or executed" in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("form", forms("os", "system", b""))
def test_the_hostile_pickles_of_these_tests_do_harm_elsewhere(path: Path, form: str) -> None:
    marker = path.parent / f"harm {form}"
    with suppress(Exception):
        pickle.loads(file_of(forms("os", "mkdir", text(str(marker)))[form]))
    assert marker.exists() == (form in ("GLOBAL REDUCE", "STACK_GLOBAL REDUCE", "INST", "OBJ", "as an element"))


def test_names_are_compared_whole_however_they_are_split_or_written(path: Path) -> None:
    odd = [
        ("numpy", "_core.multiarray.scalar"),
        ("torch", "storage._load_from_bytes"),
        ("", "OrderedDict"),
        ("a\nb", ""),
    ]
    odd += [("collections ", "OrderedDict"), ("сollections", "OrderedDict"), ("\ud800", "\udfff")]  # noqa: RUF001
    odd += [("x" * 1_000_000, "y" * 1_000_000), ("collections", "OrderedDict\x00\x1b[2J")]
    for module, attribute in odd:
        stacked = text(module) + text(attribute) + b"\x93)R"
        assert str(refused(path, file_of(stacked), "which is never looked up")).isprintable()


@pytest.mark.parametrize(("module", "attribute"), LAWFUL)
def test_a_listed_name_can_only_be_called_as_its_writer_calls_it(path: Path, module: str, attribute: str) -> None:
    for data in forms(module, attribute, text("x")).values():
        refused(path, file_of(data))


def test_opcodes_that_no_writer_of_gradients_uses_are_refused(path: Path) -> None:
    copyreg.add_extension("collections", "OrderedDict", 200)
    try:
        refused(path, file_of(b"\x82\xc8)R"), "opcode 130, EXT1")
    finally:
        copyreg.remove_extension("collections", "OrderedDict", 200)
    for opcodes in (
        b"Pid\n",
        b"\x97",
        b"C\x01a\x98",
        b"\x8f",
        b"(K\x01\x91",
        b"S'x'\n",
        b"U\x01x",
        b"NN0",
        b"N2",
        b"(N1N",
    ):
        refused(path, file_of(opcodes), "no gradient needs the opcode")
    refused(path, file_of(text("storage") + b"Q"), "numbers in lists, not a str")


SET = b"}" + text("__class__") + name("collections", "OrderedDict") + b"s"
BUILT = [name(*pair) for pair in LAWFUL] + [b"N", b"]", b"}", b")", b"K\x01", text("x"), EMPTY, tensor_of(BLOB)]
BUILT += [called("numpy.dtype", text("f8")), *array_of(items(b"K\x02")), called("collections.OrderedDict")]


@pytest.mark.parametrize("state", [b"N", b"}", SET, b"N" + SET + b"\x86", b")", items(*[b"K\x01"] * 5), b"(NNNNNNNNt"])
def test_no_state_can_be_set_but_that_of_fresh_arrays_and_dtypes(path: Path, state: bytes) -> None:
    for built in BUILT:
        refused(path, file_of(built + state + b"b"))
    for good in array_of(items(b"K\x02")):
        assert read(path, file_of(good))["w"].tolist() == [0, 0]  # what names stand for is as it was


@pytest.mark.parametrize(
    "value",
    [
        *(np.array([None, os.system], object), np.zeros(2, [("a", "f4")]), np.zeros(2, "V2"), np.array(["a"])),
        *(np.zeros(2, "M8[s]"), np.zeros(2, complex), np.zeros(2, np.longdouble), np.ma.array([1.0])),
        *(torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.ones(2, device="meta")),
        *(torch.ones(1).expand(3), torch.nn.Linear(1, 1), np.dtype("f4"), np.float32, {1, 2}, 1j, range(3)),
        *(bytearray(b"a"), b"a", "1.5", None, True, 2**64, {"a": 1.0}, Path("a"), FormatError),
        *([1.0, None], ["1.5"], [True], [[1.0], [1.0, 2.0]], [1.0, [1.0]], [np.ones(2), np.ones(3)], [10**400]),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_a_gradient_that_is_no_array_of_numbers_is_refused(path: Path, value: Any) -> None:
    for protocol in PROTOCOLS:
        refused(path, dumped({"w": value}, protocol))


@pytest.mark.parametrize("key", ["\ud800", 1.5, None, True, (1, 2), b"a", 2**65], ids=repr)
def test_a_key_that_names_no_sample_is_refused(path: Path, key: Any) -> None:
    for protocol in PROTOCOLS:
        refused(path, pickle.dumps({"sample_gradients": {key: {}}}, protocol))
    refused(path, file_of(b"}(K\x01NK\x01Nu"), "the key 1 twice in one dict")


# --- what is damaged, or larger than it is -----------------------------------------------------------------------


def test_a_file_that_is_cut_off_or_goes_on_is_refused_at_every_byte(path: Path) -> None:
    small = {"w": np.ones(3, np.float32), "b": torch.ones(2, dtype=torch.bfloat16), "l": [0.5, 1], "s": np.float64(2)}
    for protocol in PROTOCOLS:
        data = dumped(small, protocol)
        assert len(read(path, data)) == 4
        for end in range(len(data)):
            path.write_bytes(data[:end])
            with pytest.raises(FormatError, match=r"copy the whole file again|write dicts, lists"):
                list(read_pickle(path))
        with pytest.raises(CorruptionError, match="ends before what it announces: copy the whole file again"):
            read(path, data[:-1])
        for rest in (b"\n", b".", b"N.", data):
            refused(path, data + rest, "goes on after its end")


def test_a_file_of_something_else_says_what_it_is(path: Path) -> None:
    saved = io.BytesIO(), io.BytesIO()
    torch.save({"a": 1}, saved[0])
    torch.save({"a": 1}, saved[1], _use_new_zipfile_serialization=False)
    for data, words in (
        (saved[0].getvalue(), "load it with torch.load"),
        (saved[1].getvalue(), "load it with torch.load"),
        (b'\n {"sample_gradients": {}}', "a name that ends in .json"),
        (b"", "it is empty"),
        (b"\x93NUMPY\x01\x00", "it is no pickle"),
        (bytes(1_000), "no gradient needs the opcode 0, which is none"),
        (pickle.dumps({"gradients": {}}), "it has no sample_gradients"),
        (pickle.dumps({"sample_gradients": {"1": [1.0]}}), "sample '1': it is no mapping of parameters"),
    ):
        refused(path, data, words)
    error = refused(path, file_of(b"](NNe" + name("os", "system") + b"N"))
    assert path.read_bytes()[: error.fields["offset"]].endswith(b"os\nsystem\n")


@pytest.mark.parametrize(
    ("opcode", "width"), [(b"X", 4), (b"B", 4), (b"\x8b", 4), (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8)]
)
def test_a_length_that_is_announced_is_not_believed(path: Path, opcode: bytes, width: int) -> None:
    for length in (100, 2**31 - 1, 2**31, 2**32 - 1, 10**11, 2**63 - 1, 2**63, 2**64 - 1):
        if length < 2 ** (8 * width):
            announced = opcode + length.to_bytes(width, "little")
            refused(path, file_of(announced))
            refused(path, b"\x80\x04\x95" + struct.pack("<Q", length) + file_of(announced)[2:])


def test_an_index_of_the_memo_takes_no_room(path: Path) -> None:
    for index in (b"r\xff\xff\xff\xff", b"p%d\n" % 10**300):
        refused(path, file_of(b"N" + index), "not a NoneType")  # it is read, and no gradient
    for opcodes in (
        b"Np-1\n",
        b"h\x00",
        b"j\xff\xff\xff\xff",
        b"gx\n",
        b"Np" + b"9" * 5000 + b"\n",
        b"I" + b"9" * 10_000 + b"\n",
    ):
        refused(path, file_of(opcodes))


SHAPES = [(25_000_000_000,), (3,), (), (-2,), (-1, -2), (2**32, 2**32), (2**63,), (2**64 + 2,), (2**62, 2**62, 2)]
SHAPES += [(1,) * 64 + (2,), (2**40, 2, 0), (2**62,) * 1000]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape)[:40])
def test_an_array_has_the_bytes_of_its_shape(path: Path, shape: tuple[int, ...]) -> None:
    for data in (b"C\x08" + bytes(8), b"C\x00"):
        for array in array_of(items(*map(long, shape)), data):
            refused(path, file_of(array), "it has an array")
    for axes in (b"N", b"K\x02", b"](K\x02e", items(b"\x88"), items(b"G" + bytes(8))):
        for array in array_of(axes):
            refused(path, file_of(array), "no sizes")


PLACES: list[dict[str, Any]] = [{"size": (5,)}, {"offset": 1}, {"offset": -1}, {"offset": 2**62}, {"stride": (2**62,)}]
PLACES += [
    {"size": (5,), "stride": (0,)},
    {"size": (2**32, 2**32), "stride": (0, 0)},
    {"stride": (-1,)},
    {"stride": ()},
]
PLACES += [{"size": (2**40, 0), "stride": (0, 1)}, {"size": (1,) * 65, "stride": (1,) * 65}, {"size": (2**64,)}]


def test_a_tensor_lies_in_its_storage(path: Path) -> None:
    assert read(path, file_of(tensor_of(BLOB, 1, (2, 2), (1, 1))))["w"].tolist() == [[1, 2], [2, 3]]
    for place in PLACES:
        refused(path, file_of(tensor_of(BLOB, **place)), "it has a")


def test_bytes_of_torch_that_are_not_one_storage_are_refused(path: Path) -> None:
    evil = b"\x80\x02" + called("os.system", text(f"touch {path.parent / 'ran'}")) + b"."
    large = b"\x80\x02" + called("builtins.bytearray", b"J\xff\xff\xff\x7f") + b"."  # 2 GB for torch.load
    deep = b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."  # and the end of the process
    parts = [b"\x80\x02" + part + b"." for part in BLOB[2:].split(b".\x80\x02")]
    parts[4:] = [parts[4][:-1]]
    assert b"".join(parts) == BLOB, "the format of these tests is torch's"
    others = [b"".join([*parts[:at], bad, *parts[at + 1 :]]) for at in range(4) for bad in (evil, large, deep)]
    others += [BLOB[:-1], BLOB + b"x", b"", b"N." * 5]
    for old, new in (
        *(
            (b"torch\nFloatStorage", b"torch\n%s" % kind)
            for kind in (b"ComplexFloatStorage", b"load", b"DoubleStorage")
        ),
        (b"storageq", b"moduleXq"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        (b"K\x04Ntq\x04Q", b"K\x05Ntq\x04Q"),
        (struct.pack("<Q", 4) + np.arange(4, dtype="<f4").tobytes(), struct.pack("<Q", 2**61)),
    ):
        assert old in BLOB
        others.append(BLOB.replace(old, new))
    for blob in others:
        refused(path, file_of(tensor_of(blob)))
    assert not (path.parent / "ran").exists()


def test_what_is_named_often_does_not_multiply(path: Path) -> None:
    large = blob_of(torch.zeros(25_000))
    stored = b"B" + struct.pack("<I", len(large)) + large + b"q\x00"
    for first, again in (
        (text("\0" * 100_000) + b"q\x00", called("_codecs.encode", b"h\x00", text("latin1"))),
        (stored, called("torch.storage._load_from_bytes", b"h\x00")),
    ):
        refused(path, file_of(b"(" + first + again * 1_000 + b"t"), "would take more than the file has")
    for levels in (5, 12, 40):
        for bomb in (laughs(levels), laughs(levels, b"(", b"t")):
            refused(path, file_of(b"(" + bomb + b"l"), "")
            refused(path, file_of(b"](" + bomb + b"l"), "")
    bomb = b"(" + laughs(20) + b"lq\xf0"
    for use in (
        called("numpy.dtype", b"h\xf0"),
        called("_codecs.encode", text("x"), b"h\xf0"),
        called("numpy._core.multiarray.scalar", b"h\xf0", b"h\xf0"),
        called("collections.defaultdict", b"h\xf0") + b"h\xf0b",
        called("numpy._core.numeric._frombuffer", b"h\xf0", b"h\xf0", b"h\xf0", b"h\xf0"),
        *array_of(b"h\xf0"),
        called("numpy.dtype", text("f4")) + items(*[b"h\xf0"] * 8) + b"b",
        b"}h\xf0Ns",
        b"h\xf0",
    ):
        refused(path, file_of(bomb + b"0" * 0 + use + b"\x86"))


@pytest.mark.parametrize(
    "value",
    [
        b"(" * 300_000,
        b"]" * 300_000 + b"a" * 299_999,
        b")" + b"\x85" * 300_000,
        b"})" + b"\x85" * 300_000 + b"Ns",  # hashed as a key, this ends the process
        b"(" * 200_000 + b"l" * 200_000,
        b"}" + b"K\x01}" * 200_000 + b"s" * 200_000,
        b"]q\x00h\x00a",
        b"]q\x00(h\x00h\x00h\x00e",
        b"]q\x00(]h\x00a]h\x00ae",
        b"]q\x00h\x00\x85a",
    ],
    ids=lambda value: f"{len(value)} bytes of {value[:6]!r}",
)
def test_lists_within_lists_or_within_themselves_are_refused(path: Path, value: bytes) -> None:
    refused(path, file_of(value))


# --- what nobody came up with ------------------------------------------------------------------------------------


def mutated(draw: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        place, how = draw.randrange(len(data) + 1), draw.choice([0, 0, 0, 0, 1, 2, 3, 4])
        if how == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif how == 1 and place < len(data):
            data[place] = draw.choice(b"().0RbsuetldicqhrjpgQoP\x80\x81\x82\x85\x92\x93\x94\x95\x96\xff\x00")
        elif how == 2:
            del data[place : place + draw.choice([1, 2, 8, 40])]
        elif how == 3:
            data[place:place] = draw.randbytes(draw.choice([1, 2, 4]))
        else:
            other = draw.choice(seeds)
            start = draw.randrange(len(other))
            data[place : place + draw.choice([0, 10])] = other[start : start + draw.choice([4, 20, 100])]
    return bytes(data)


def test_three_thousand_mutations_end_in_gradients_or_our_error_and_run_nothing(path: Path) -> None:
    lawful = {
        "w": np.arange(30, dtype=">f4").reshape(5, 6).T,
        "w_step": 4,
        "l": [[0.5, 1.5], [1, 2]],
        "s": np.float32(2),
    }
    pairs = [("os", "system"), ("builtins", "eval"), ("builtins", "__import__"), ("torch", "load"), ("os", "mkdir")]
    seeds = [pickle.dumps({"sample_gradients": {3: OrderedDict(lawful)}}, protocol) for protocol in PROTOCOLS] * 5
    seeds += [file_of(tensor_of(BLOB.replace(b"q\x03", b"q\x03"), 1, (3,), (1,)))] * 5
    seeds += [file_of(form) for pair in pairs for form in forms(*pair, text("/nowhere/x")).values()]
    draw, modules, reads, refusals = random.Random(0), set(sys.modules), 0, 0
    for trial in range(3_000):
        data = mutated(draw, seeds)
        with watched(path) as seen:
            try:
                arrays = read(path, data).values()
            except FormatError as error:
                refusals += 1
                assert len(str(error)) < 1_000
            else:
                reads += 1
                assert all(type(array) is np.ndarray and array.dtype.kind in "fV" for array in arrays)
        assert seen == [], (trial, data)
    assert set(sys.modules) == modules
    assert reads > 150 and refusals > 1_500
