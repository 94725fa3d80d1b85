"""Pickles from anybody: what is legitimate comes back bit for bit, what is not runs nothing and ends in our error."""

import builtins
import copyreg
import io
import json
import math
import os
import pickle
import pickletools
import random
import re
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

from timstore.errors import CorruptionError, FormatError, InvalidInputError, NotFoundError
from timstore.interchange.pickles import read_pickle
from timstore.records import BFLOAT16

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

# An audit hook cannot be taken away again: this one does nothing outside of `watched`.
EVENTS: list[tuple[str, str]] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if EVENTS is not None and event != "builtins.id":
        EVENTS.append((event, str(arguments[0]) if event == "open" else ""))


if not hasattr(sys, "pickles_are_watched"):
    sys.addaudithook(note)
    sys.pickles_are_watched = True  # type: ignore[attr-defined]


@contextmanager
def watched(allowed: Path | None = None) -> Iterator[list[tuple[str, str]]]:
    """Collect every audit event, and every call of an importing, executing or opening builtin, but that one file's."""
    global EVENTS
    seen: list[tuple[str, str]] = []
    kept = {
        (place, name): getattr(place, name)
        for place, name in [
            *((builtins, name) for name in ("eval", "exec", "compile", "__import__")),
            (os, "system"),
            (os, "popen"),
            (subprocess, "Popen"),
            (torch, "load"),
        ]
    }

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((f"call of {name}", ""))
            return original(*arguments, **options)

        return call

    for (place, name), original in kept.items():
        setattr(place, name, counted(name, original))
    EVENTS = seen
    try:
        yield seen
    finally:
        EVENTS = None
        for (place, name), original in kept.items():
            setattr(place, name, original)
        seen[:] = [one for one in seen if one != ("open", str(allowed))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pickles") / "epoch_0.pkl"
    # numpy imports parts of itself when they are first needed: before anything is watched.
    load(made, pickle.dumps([np.ones(2, bool), torch.ones(2), np.float32(1)]))
    return made


def load(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return read_pickle(path)


def refused(path: Path, data: bytes, words: str = "") -> FormatError:
    """Read what must not be read, and prove that nothing was imported, executed or opened meanwhile."""
    path.write_bytes(data)
    modules = set(sys.modules)
    with watched(path) as seen, pytest.raises(FormatError) as caught:
        read_pickle(path)
    assert seen == []
    assert set(sys.modules) == modules
    message = str(caught.value)
    assert message.startswith(str(path))
    assert words in message
    assert len(message) < 1_000
    assert caught.value.fields["path"] == str(path)
    return caught.value


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    """The opcodes that put a global on the stack."""
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def number(value: int) -> bytes:
    return b"I%d\n" % value


def items(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def called(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + items(*arguments) + b"R"


# What is legitimate comes back bit for bit.

BITS = np.random.default_rng(0).integers(0, 256, 480, np.uint8).tobytes()  # with NaNs of every payload
KINDS = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
FLAT = {kind: np.frombuffer(BITS, kind).copy() for kind in KINDS}
FLAT["b1"] = np.frombuffer(BITS, "u1") > 127
FLAT["bfloat16"] = np.frombuffer(BITS, "<u2").view(BFLOAT16).copy()


def shapes_of(flat: np.ndarray) -> dict[str, np.ndarray]:
    matrix = flat[:60].reshape(6, 10)
    return {
        "flat": flat,
        "matrix": matrix,
        "zero axes": flat[:1].reshape(()),
        "three axes": flat[:60].reshape(3, 4, 5),
        "empty": flat[:0].reshape(0, 7),
        "fortran": np.asfortranarray(matrix),
        "transposed": matrix.T,
        "strided": matrix[::2, 1::3],
        "backwards": matrix[::-1],
    }


def assert_same_bits(read: Any, expected: np.ndarray) -> None:
    assert type(read) is np.ndarray
    assert read.shape == expected.shape
    assert read.dtype == (expected.dtype if expected.dtype == BFLOAT16 else expected.dtype.newbyteorder("="))
    assert read.dtype.isnative
    assert read.flags.owndata
    assert read.flags.writeable
    assert read.tobytes() == expected.astype(read.dtype).tobytes()


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_come_back_bit_for_bit(path: Path, kind: str, protocol: int) -> None:
    for array in shapes_of(FLAT[kind]).values():
        assert_same_bits(load(path, pickle.dumps(array, protocol)), array)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] != "1"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_big_endian_arrays_become_native_and_keep_their_values(path: Path, kind: str, protocol: int) -> None:
    array = FLAT[kind].astype(f">{kind}").reshape(2, -1)
    read = load(path, pickle.dumps(array, protocol))
    assert_same_bits(read, FLAT[kind].reshape(2, -1))
    assert read.tobytes() == array.byteswap().tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scalars_become_numbers_of_the_same_value(path: Path, protocol: int) -> None:
    for kind, flat in FLAT.items():
        for scalar in flat[:20]:
            read = load(path, pickle.dumps(scalar, protocol))
            if kind == "bfloat16":
                assert_same_bits(read, np.array(scalar))
            else:
                assert type(read) is {"f": float, "i": int, "u": int, "b": bool}[kind[0]]
                assert np.array(read, kind).tobytes() == scalar.tobytes() or (math.isnan(read) and np.isnan(scalar))


TORCH = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory, by way of single bytes, which every dtype has."""
    whole = tensor.detach().clone(memory_format=torch.contiguous_format)
    data = whole.flatten().view(torch.uint8).numpy().tobytes()
    dtype = BFLOAT16 if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype).removeprefix("torch."))
    return np.frombuffer(data, dtype).reshape(tuple(tensor.shape))


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_come_back_as_arrays_bit_for_bit(path: Path, kind: str, protocol: int) -> None:
    data = bytearray(byte & 1 for byte in BITS) if kind == "bool" else bytearray(BITS)
    flat = torch.frombuffer(data, dtype=getattr(torch, kind))
    matrix = flat[:60].reshape(6, 10)
    tensors = [flat, matrix, matrix.T, matrix[::2, 1::3], matrix[3], flat[7].reshape(()), flat[:0].reshape(0, 7)]
    tensors += [matrix[:, None, 2:4], flat.as_strided((5, 3), (2, 1))]  # windows that overlap have their values twice
    tensors += [torch.nn.Parameter(matrix, requires_grad=flat.is_floating_point())]
    for tensor in tensors:
        assert_same_bits(load(path, pickle.dumps(tensor, protocol)), bits_of(tensor))


def epoch() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    by_sample: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    by_sample[3]["layer.weight"] = rng.standard_normal((4, 3)).astype(np.float32)
    by_sample[3]["layer.weight_step"] = 17
    by_sample["7"] = OrderedDict(bias=torch.arange(5.0), scale=torch.tensor(2.5, dtype=torch.bfloat16))
    by_sample["ü"]["nested"] = [[0.1, -0.0, math.inf], [1e-310, 2.0, -3]]
    by_sample[np.int64(9)]["rows"] = [np.ones(3), (1, 2.5)]
    by_sample[-(2**40)] = {"number": np.float32(0.1), "flag": True, "none": None, "raw": b"\x00\xff", "big": 2**63}
    return {"sample_gradients": by_sample}


def epoch_read(value: Any) -> None:
    assert type(value) is dict
    assert list(value) == ["sample_gradients"]
    samples = value["sample_gradients"]
    assert type(samples) is dict
    assert [(type(key), key) for key in samples] == [(int, 3), (str, "7"), (str, "ü"), (int, 9), (int, -(2**40))]
    assert all(type(held) is dict for held in samples.values())
    assert samples[3]["layer.weight_step"] == 17
    expected = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    assert_same_bits(samples[3]["layer.weight"], expected)
    assert_same_bits(samples["7"]["bias"], np.arange(5, dtype=np.float32))
    assert_same_bits(samples["7"]["scale"], np.array(0x4020, "<u2").view(BFLOAT16))
    assert repr(samples["ü"]) == "{'nested': [[0.1, -0.0, inf], [1e-310, 2.0, -3]]}"
    assert_same_bits(samples[9]["rows"][0], np.ones(3))
    assert repr(samples[9]["rows"][1]) == "(1, 2.5)"
    last = {"number": float(np.float32(0.1)), "flag": True, "none": None, "raw": b"\x00\xff", "big": 2**63}
    assert repr(samples[-(2**40)]) == repr(last)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_epoch_of_every_kind_of_value_comes_back_in_plain_containers(path: Path, protocol: int) -> None:
    data = pickle.dumps(epoch(), protocol)
    epoch_read(load(path, data))
    epoch_read(load(path, pickletools.optimize(data)))
    slow = io.BytesIO()
    pickle._Pickler(slow, protocol).dump(epoch())
    epoch_read(load(path, slow.getvalue()))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_what_numpy_1_wrote_is_read(path: Path, protocol: int) -> None:
    data = pickle.dumps(epoch(), protocol)
    assert b"numpy._core" in data
    epoch_read(load(path, data.replace(b"numpy._core", b"numpy.core")))


def test_a_pickle_of_every_length_of_text_and_integer_comes_back(path: Path) -> None:
    value = ["x" * 300, "é" * 70_000, b"y" * 300, b"z" * 70_000, "line\nbreak\\u0041", 0.1, math.nan, -math.inf, 5e-324]
    value += [sign * 2**power for power in range(64) for sign in (1, -1)]
    value += [{}, [], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    for protocol in PROTOCOLS:
        assert repr(load(path, pickle.dumps(value, protocol))) == repr(value)
    assert load(path, b"\x80\x04\x8d" + struct.pack("<Q", 4) + b"text.") == "text"
    assert load(path, b"\x80\x04\x8e" + struct.pack("<Q", 4) + b"data.") == b"data"


def test_what_the_file_has_once_is_one_object(path: Path) -> None:
    array, row = np.arange(4.0), [1.0, 2.0]
    read = load(path, pickle.dumps({"a": array, "b": array, "c": row, "d": [row, (row,)]}))
    assert read["a"] is read["b"]
    assert read["c"] is read["d"][0] is read["d"][1][0]


def test_tensors_are_read_without_torch(path: Path) -> None:
    path.write_bytes(pickle.dumps(torch.arange(3.0)))
    script = f"""
import sys
from timstore.interchange.pickles import read_pickle
assert read_pickle({str(path)!r}).tolist() == [0, 1, 2]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# What is hostile runs nothing.

HOSTILE = """
os.system posix.system nt.system os.popen os.execv os.remove subprocess.Popen subprocess.check_output pty.spawn
builtins.eval builtins.exec builtins.compile builtins.getattr builtins.setattr builtins.__import__ builtins.open
builtins.globals builtins.vars builtins.map builtins.type builtins.object builtins.breakpoint builtins.help
builtins.set builtins.frozenset builtins.bytearray builtins.complex __builtin__.eval __builtin__.apply
__builtin__.execfile __main__.watched functools.partial functools.reduce operator.attrgetter operator.methodcaller
operator.itemgetter operator.call codecs.encode codecs.decode codecs.open _codecs.decode _codecs.lookup
_codecs.register timeit.timeit timeit.main pip.main pip._internal.main pip._internal.cli.main.main runpy.run_path
runpy.run_module runpy._run_code importlib.import_module importlib._bootstrap._call_with_frames_removed
imp.load_source zipimport.zipimporter pickle.loads _pickle.loads pickle.Unpickler marshal.loads types.FunctionType
types.CodeType types.MethodType ctypes.CDLL ctypes.string_at cProfile.run cProfile.runctx profile.run pdb.run
bdb.Bdb.run trace.Trace doctest.debug_script code.InteractiveInterpreter code.interact pydoc.pipepager pydoc.locate
shutil.rmtree shutil.copyfile pathlib.Path webbrowser.open socket.create_connection
asyncio.unix_events._UnixSubprocessTransport._start venv.create ensurepip._run_pip
idlelib.pyshell.ModifiedInterpreter.runcommand lib2to3.pgen2.grammar.Grammar.loads logging.config.listen
multiprocessing.util.spawnv_passfds unittest.mock._importer distutils.file_util.write_file
test.support.script_helper.assert_python_ok site.execsitecustomize sys.modules sys.setprofile copyreg._reconstructor
copyreg.__newobj__ copyreg.add_extension copy_reg._reconstructor collections.Counter collections.namedtuple
collections._OrderedDictKeysView collections.abc.Mapping numpy.load numpy.fromfile numpy.memmap numpy.save
numpy.fromstring numpy.vectorize numpy.matrix numpy.recarray numpy.ma.core._mareconstruct numpy.char.chararray
numpy.testing._private.utils.runstring numpy.testing.measure numpy.testing.rundocs numpy.f2py.crackfortran.getlincoef
numpy.f2py.crackfortran.myeval numpy.f2py.crackfortran.param_eval numpy.f2py.diagnose.run_command numpy.f2py.compile
numpy.distutils.exec_command.exec_command numpy._core.multiarray.fromfile numpy.core.multiarray.set_string_function
numpy._core._internal._reconstruct numpy._core.numeric.fromfunction torch.load torch.save torch.Tensor
torch.FloatStorage torch.hub.load torch.hub._load_local torch.hub.load_state_dict_from_url torch.jit.load
torch.jit.frontend.get_source_lines torch.jit.unsupported_tensor_ops.execWrapper torch.serialization.load
torch.serialization._get_layout torch.package.PackageImporter torch.storage.UntypedStorage
torch._dynamo.guards.GuardBuilder.get torch._dynamo.eval_frame.DisableContext torch._inductor.codecache.compile_file
torch._inductor.runtime.compile_tasks._reload_python_module
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression torch.fx.graph_module._forward_from_src
torch.utils.collect_env.run torch.utils.cpp_extension.load_inline torch.utils.bottleneck.__main__.run_cprofile
torch.utils._config_module.ConfigModule.load_config torch.utils.data.datapipes.utils.decoder.basichandlers
torch.distributed.rpc.rpc_sync torch.ao.quantization.quantize_fx.prepare_fx torch._utils._import_dotted_name
torch._utils._rebuild_qtensor torch._utils._rebuild_wrapper_subclass torch._utils._rebuild_sparse_tensor
torch._utils._rebuild_parameter_with_state torch._utils._rebuild_tensor_v3 torch._tensor._rebuild_from_type_v2
torch.nn.modules.module.Module transformers.pipeline yaml.unsafe_load joblib.load dill._dill._create_function
cloudpickle.loads
"""
PAIRS = [tuple(full.rpartition(".")[::2]) for full in HOSTILE.split()]
LAWFUL = ["collections OrderedDict", "collections defaultdict", "builtins dict", "_codecs encode", "numpy dtype"]


def stacked(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def forms(module: str, attribute: str, argument: bytes) -> dict[str, bytes]:
    """The ways in which a pickle can have a global called, made, changed or handed on."""
    plain = name(module, attribute)
    return {
        "GLOBAL REDUCE": plain + items(argument) + b"R.",
        "GLOBAL alone": b"\x80\x02" + plain + b".",
        "STACK_GLOBAL REDUCE": b"\x80\x04" + stacked(module, attribute) + items(argument) + b"R.",
        "INST": b"(" + argument + b"i" + plain[1:] + b".",
        "OBJ": b"(" + plain + argument + b"o.",
        "NEWOBJ": b"\x80\x02" + plain + items(argument) + b"\x81.",
        "NEWOBJ_EX": b"\x80\x04" + stacked(module, attribute) + items(argument) + b"}\x92.",
        "BUILD": plain + b"}" + text("x") + argument + b"sb.",
        "in a frame": b"\x80\x04\x95" + struct.pack("<Q", len(plain) + 4) + plain + b")R0.",
        "as a factory": name("collections", "defaultdict") + plain + b"\x85R" + b".",
        "as an element": b"](" + plain + argument + b"\x85Re.",
    }


@pytest.mark.parametrize("form", forms("os", "system", text("")))
def test_a_name_that_is_not_listed_is_refused_and_nothing_runs(path: Path, form: str) -> None:
    marker = path.parent / "ran"
    argument = text(f"touch {marker}")
    for module, attribute in PAIRS:
        error = refused(path, forms(module, attribute, argument)[form])
        if form not in ("OBJ", "INST"):
            assert ascii(f"{module}.{attribute}")[:-1] in str(error)
            assert "was imported or executed" in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("form", forms("os", "system", text("")))
def test_the_hostile_pickles_of_these_tests_do_harm_elsewhere(path: Path, form: str) -> None:
    marker = path.parent / f"harm {form}"
    path.write_bytes(forms("os", "mkdir", text(str(marker)))[form])
    with watched() as seen, suppress(Exception):
        pickle._Unpickler(io.BytesIO(path.read_bytes())).load()
    assert "pickle.find_class" in {event for event, _ in seen}
    assert marker.exists() == (form in ("GLOBAL REDUCE", "STACK_GLOBAL REDUCE", "INST", "OBJ", "as an element"))


def test_a_dotted_name_is_refused_wherever_it_is_split(path: Path) -> None:
    for module, attribute in PAIRS:
        parts = f"{module}.{attribute}".split(".")
        for place in range(1, len(parts)):
            pair = ".".join(parts[:place]), ".".join(parts[place:])
            refused(path, b"\x80\x04" + stacked(*pair) + text("true") + b"\x85R.", "which is never looked up")


@pytest.mark.parametrize("lawful", LAWFUL)
def test_a_listed_name_can_only_be_called_as_its_writer_calls_it(path: Path, lawful: str) -> None:
    module, attribute = lawful.split()
    for form, data in forms(module, attribute, text("x")).items():
        if form != "as a factory":
            refused(path, data, f"({form})" if form in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX") else "")


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections.OrderedDict", "__class__"),
        ("collections", "__dict__"),
        ("builtins", "dict.fromkeys"),
        ("builtins", "dict.__subclasses__"),
        ("_codecs", "encode.__self__"),
        ("numpy", "dtype.__class__"),
        ("numpy", "_core.multiarray.scalar"),
        ("numpy._core", "multiarray._reconstruct"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch", "storage._load_from_bytes"),
        ("timstore.interchange.pickles", "os.system"),
        ("", "OrderedDict"),
        ("collections", ""),
        ("collections ", "OrderedDict"),
        ("collections", "OrderedDict\x00"),
        ("collections", "ordereddict"),
        ("сollections", "OrderedDict"),  # noqa: RUF001
        ("ｃollections", "OrderedDict"),  # noqa: RUF001
        ("collections", "OrderedDict\u200b"),
        ("collections\u202e", "OrderedDict"),
        ("\ud800", "\udfff"),
        ("collections", "a\nb\x1b[2J"),
        ("x" * 1_000_000, "y" * 1_000_000),
        ("x." * 500_000, "y"),
    ],
)
def test_names_are_compared_whole_and_never_taken_apart(path: Path, module: str, attribute: str) -> None:
    error = refused(path, b"\x80\x04" + stacked(module, attribute) + b")R.", "which is never looked up")
    assert str(error).isprintable()
    assert str(error).isascii()


def test_a_module_that_could_be_imported_is_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = path.parent / "imported"
    (path.parent / "made_up_for_pickles.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef f(*a): return a\n")
    monkeypatch.syspath_prepend(path.parent)
    for data in forms("made_up_for_pickles", "f", text("x")).values():
        refused(path, data)
    assert not marker.exists()
    pickle.loads(forms("made_up_for_pickles", "f", text("x"))["GLOBAL REDUCE"])  # the test can fail
    assert marker.exists()
    del sys.modules["made_up_for_pickles"]


def test_extension_codes_are_refused_even_where_they_are_registered(path: Path) -> None:
    codes = {b"\x82\xc8": 200, b"\x83\x20\x4e": 20000, b"\x84\x00\x00\x00\x10": 2**28}
    for opcode, code in codes.items():
        copyreg.add_extension("os", f"system{code}", code)
        try:
            refused(path, b"\x80\x02" + opcode + items(text("true")) + b"R.", "EXT")
        finally:
            copyreg.remove_extension("os", f"system{code}", code)
    copyreg.add_extension("collections", "OrderedDict", 200)
    try:
        refused(path, b"\x80\x02\x82\xc8)R.", "EXT1")
    finally:
        copyreg.remove_extension("collections", "OrderedDict", 200)


@pytest.mark.parametrize(
    "data",
    [
        b"Pstorage\n.",
        text("storage") + b"Q.",
        items(text("storage"), text("x")) + b"Q.",
        b"\x80\x05\x97.",
        b"\x80\x05C\x01a\x98.",
        b"\x80\x04\x8f.",
        b"\x80\x04(K\x01\x91.",
        b"\x80\x04\x8f(K\x01\x90.",
        b"S'x'\n.",
        b"U\x01x.",
        b"T\x01\x00\x00\x00x.",
        b"NN0.",
        b"N2.",
        b"(N1N.",
        b"\xff.",
    ],
)
def test_opcodes_that_no_writer_of_gradients_uses_are_refused(path: Path, data: bytes) -> None:
    refused(path, data, "opcode")


EMPTY = name("numpy._core.multiarray", "_reconstruct") + items(name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b") + b"R"
SET = text("__class__") + name("collections", "OrderedDict") + b"s"


@pytest.mark.parametrize(
    "built",
    [
        *(name(*lawful.split()) for lawful in LAWFUL),
        b"N",
        b"]",
        b"}",
        b")",
        b"K\x01",
        text("x"),
        called("collections", "OrderedDict"),
        called("numpy", "dtype", text("f8")),
        pickle.dumps(np.ones(3), 2)[2:-1],
        pickle.dumps(np.ones(3), 5)[13:-1],
        pickle.dumps(torch.ones(3), 2)[2:-1],
        pickle.dumps(np.float64(3), 2)[2:-1],
        EMPTY,
    ],
)
@pytest.mark.parametrize(
    "state", [b"N", b"}" + SET, b"N}" + SET + b"\x86", b")", b"K\x01", items(*[b"K\x01"] * 5), items(*[b"N"] * 8)]
)
def test_no_state_can_be_set_but_that_of_fresh_arrays_and_dtypes(path: Path, built: bytes, state: bytes) -> None:
    refused(path, b"\x80\x02" + built + state + b"b.")


def test_an_array_is_filled_once_and_by_the_state_that_numpy_has(path: Path) -> None:
    lawful = array_of(items(b"K\x02"))["below 5"]
    state = lawful[2 + len(EMPTY) : -1]
    assert_same_bits(load(path, b"\x80\x03" + EMPTY + state + b"."), np.zeros(2, np.float32))
    refused(path, b"\x80\x03" + EMPTY + state + state + b".", "sets the state")
    refused(path, b"\x80\x03" + EMPTY + b"(K\x02" + state[3:] + b".", "sets the state")
    refused(path, b"\x80\x03" + EMPTY + b".", "for a value")


def test_what_a_name_stands_for_stays_as_it_is(path: Path) -> None:
    refused(path, b"\x80\x02" + name("numpy", "dtype") + b"}" + text("call") + b"Nsb0.")
    refused(path, b"\x80\x02" + name("numpy", "dtype") + b"N}" + text("call") + b"Ns\x86b.")
    assert_same_bits(load(path, pickle.dumps(np.ones(3))), np.ones(3))


# torch's bytes within a pickle.


def blob_of(tensor: torch.Tensor) -> bytes:
    (blob,) = [argument for _, argument, _ in pickletools.genops(pickle.dumps(tensor, 3)) if type(argument) is bytes]
    return blob


def tensor_of(
    blob: bytes, *, offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), rest: bytes = b""
) -> bytes:
    """The pickle of a float32 tensor, by hand."""
    storage = name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(blob)) + blob + b"\x85R"
    place = b"".join(items(*map(number, axes)) for axes in (size, stride))
    hooks = called("collections", "OrderedDict")
    arguments = items(storage, number(offset), place, b"\x89", hooks, rest)
    return b"\x80\x03" + name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R."


BLOB = blob_of(torch.arange(4.0))


def test_a_tensor_made_by_hand_is_read(path: Path) -> None:
    assert_same_bits(load(path, tensor_of(BLOB)), np.arange(4, dtype=np.float32))
    assert_same_bits(load(path, tensor_of(BLOB, rest=b"}")), np.arange(4, dtype=np.float32))
    read = load(path, tensor_of(BLOB, offset=1, size=(2, 2), stride=(1, 1)))
    assert read.tolist() == [[1, 2], [2, 3]]


@pytest.mark.parametrize(
    "options",
    [
        {"size": (5,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**62},
        {"stride": (2,)},
        {"stride": (-1,)},
        {"stride": (2**62,)},
        {"size": (5,), "stride": (0,)},
        {"size": (2**33,), "stride": (0,)},
        {"size": (2**32, 2**32), "stride": (0, 0)},
        {"size": (4, 4), "stride": (0, 1)},
        {"size": (-1,)},
        {"size": (2**64,)},
        {"size": (2**40, 0), "stride": (0, 1)},
        {"size": (1,) * 65, "stride": (1,) * 65},
        {"size": (4,), "stride": ()},
        {"size": (4,), "stride": (1, 1)},
        {"rest": b"}" + text("neg") + b"\x88s"},
        {"rest": b"K\x01"},
    ],
    ids=str,
)
def test_a_tensor_that_does_not_lie_in_its_storage_is_refused(path: Path, options: dict[str, Any]) -> None:
    error = refused(path, tensor_of(BLOB, **options))
    numbers = [options.get("offset", 0), *options.get("size", ()), *options.get("stride", ())]
    if (
        "rest" not in options
        and 0 not in options.get("size", ())
        and len(numbers) < 6
        and options.get("stride") not in ((), (1, 1))
    ):
        within = all(0 <= one < 2**63 for one in numbers)
        assert ("expanded, or beyond its storage" if within else "no sizes") in str(error)


def saved(value: Any, *, as_zip: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=as_zip)
    return stream.getvalue()


def test_bytes_of_torch_that_are_not_one_storage_are_refused(path: Path) -> None:
    evil = name("os", "system") + items(text(f"touch {path.parent / 'ran'}")) + b"R."
    parts = [b"".join((b"\x80\x02", one, b".")) for one in BLOB.split(b".\x80\x02")]
    parts[0] = parts[0][2:]
    head, data = b"".join(parts[:4]), BLOB[-24:]
    assert head + b"\x80\x02" + BLOB.split(b".\x80\x02")[4] == BLOB, "the format of these tests is torch's"
    others = [b"".join([*parts[:place], evil, *parts[place:4], parts[4][:-1]]) for place in range(5)]
    others += [b"".join([*parts[:place], evil, *parts[place + 1 : 4], parts[4][:-1]]) for place in range(4)]
    others += [
        BLOB[:-1],
        BLOB + b"x",
        BLOB + BLOB,
        b"",
        b"N." * 5,
        data,
        BLOB.replace(b"torch\nFloat", b"torch\nComplexFloat"),
    ]
    others += [
        BLOB.replace(b"torch\nFloatStorage", replaced) for replaced in (b"os\nsystem", b"torch\nTensor", b"torch\nload")
    ]
    others += [BLOB.replace(b"storageq", b"moduleXq"), BLOB.replace(b"storageq", b"modulesq")]
    others += [
        BLOB.replace(b"torch\nFloat", b"torch\nDouble"),
        BLOB.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
    ]
    others += [BLOB.replace(b"K\x04Ntq\x04Q", b"K\x05Ntq\x04Q"), BLOB.replace(b"K\x04Ntq\x04Q", b"K\x04K\x01tq\x04Q")]
    others += [BLOB.replace(b"K\x04Ntq\x04Q", b"M\xff\xffNtq\x04Q")[:-24] + struct.pack("<Q", 0xFFFF) + data[8:]]
    others += [BLOB[:-24] + struct.pack("<Q", 2**61) + data[8:], BLOB[:-24] + struct.pack("<q", -1) + data[8:]]
    others += [saved(value, as_zip=as_zip) for value in (torch.ones(4), {"a": 1}) for as_zip in (False, True)]
    others += [saved(torch.ones(4).untyped_storage(), as_zip=True)]
    key = re.findall(rb"\d{6,}", BLOB)[0]
    other = b"9" * len(key)
    others += [BLOB.replace(key, other, 1), BLOB.replace(key, other).replace(other, key, 1)]
    assert len(set(others)) == len(others)
    assert BLOB not in others
    for blob in others:
        refused(path, tensor_of(blob))
    assert not (path.parent / "ran").exists()


# What is larger than the file is refused before memory is taken.


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def long(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def array_of(shape: bytes, data: bytes = b"C\x08" + bytes(8), kind: str = "f4") -> dict[str, bytes]:
    """An array's pickle, as protocols below 5 have it, and as protocol 5 has it."""
    dtype = called("numpy", "dtype", text(kind), b"\x89", b"\x88")
    dtype += items(b"K\x03", text("<"), b"NNN", number(-1), number(-1), b"K\x00") + b"b"
    buffer = name("numpy._core.numeric", "_frombuffer") + items(data, dtype, shape, text("C")) + b"R."
    return {
        "below 5": b"\x80\x03" + EMPTY + items(b"K\x01", shape, dtype, b"\x89", data) + b"b.",
        "protocol 5": b"\x80\x05" + buffer,
    }


def test_an_array_made_by_hand_is_read(path: Path) -> None:
    for data in array_of(items(b"K\x02")).values():
        assert_same_bits(load(path, data), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "shape",
    [
        (25_000_000_000,),
        (3,),
        (1,),
        (),
        (0,),
        (-2,),
        (-1, -2),
        (2**32, 2**32),
        (2**63,),
        (2**64 + 2,),
        (2**62, 2**62, 2),
        (1,) * 64 + (2,),
        (2**40, 2, 0),
    ],
    ids=str,
)
def test_an_array_has_the_bytes_of_its_shape(path: Path, shape: tuple[int, ...]) -> None:
    axes = items(*map(long, shape))
    with little_memory():
        for data in array_of(axes).values():
            refused(path, data)
        for data in array_of(axes, b"C\x00").values():
            if shape != (0,):
                refused(path, data, "no sizes" if any(not 0 <= axis < 2**63 for axis in shape) else "")


def test_a_shape_of_more_axes_than_numpy_has_is_not_multiplied_out(path: Path) -> None:
    for data in array_of(items(long(2**62) * 100_000)).values():
        refused(path, data, "no sizes")


@pytest.mark.parametrize("axes", [b"N", b"K\x02", b"](K\x02e", items(b"\x88"), items(b"G" + bytes(8)), items(b"N")])
def test_a_shape_is_a_tuple_of_integers(path: Path, axes: bytes) -> None:
    for data in array_of(axes).values():
        refused(path, data)


@pytest.mark.parametrize(
    "kind", ["O", "O8", "V8", "V2", "S4", "U1", "M8", "m8", "c8", "f16", "g", "float32", "", "(2,)f4", "f4,f4"]
)
def test_a_dtype_that_is_no_number_is_refused(path: Path, kind: str) -> None:
    for data in array_of(items(b"K\x02"), kind=kind).values():
        refused(path, data)


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, os.system], object),
        np.zeros(2, [("a", "f4"), ("b", "i4")]),
        np.zeros(2, [("bfloat16", "<f2")]),
        np.zeros(2, [("other", "<u2")]),
        np.zeros(2, "V2"),
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, complex),
        np.zeros(2, np.longdouble),
        np.zeros((2, 2)).view(np.matrix),
        np.ma.array([1.0]),
        np.zeros(2, [("a", "f4")])[0],
        np.datetime64("2020"),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(1).expand(3),
        torch.nn.Linear(1, 1),
        torch.Size([1]),
        torch.float32,
        np.dtype("f4"),
        np.float32,
        {1, 2},
        frozenset([1]),
        bytearray(b"a"),
        2**65,
        -(2**65),
        10**4000,
        1j,
        "\ud800",
        {"\udfff": 1},
        {1.5: 1},
        {None: 1},
        {True: 1},
        {(1, 2): 1},
        {b"a": 1},
        range(3),
        Path("a"),
        FormatError,
    ],
    ids=lambda value: f"{type(value).__name__}",
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_layout_never_has_is_refused(path: Path, array: Any, protocol: int) -> None:
    refused(path, pickle.dumps(array, protocol))


def dtype_of(kind: str, *state: bytes) -> bytes:
    return array_of(items(b"K\x02"), b"C\x04" + bytes(4), "f2")["protocol 5"].replace(
        called("numpy", "dtype", text("f2"), b"\x89", b"\x88")
        + items(b"K\x03", text("<"), b"NNN", number(-1), number(-1), b"K\x00"),
        called("numpy", "dtype", text(kind), b"\x89", b"\x88") + items(*state),
    )


def test_a_dtype_has_the_state_that_numpy_gives_it(path: Path) -> None:
    three, sizes = b"K\x03", number(-1) + number(-1) + b"K\x00"
    assert_same_bits(load(path, dtype_of("f2", three, text(">"), b"NNN", sizes)), np.zeros(2, "f2"))
    for state in (
        (b"K\x04", text("<"), b"NNN", sizes),
        (three, text("="), b"NNN", sizes),
        (three, b"N", b"NNN", sizes),
        (three, text("<"), b"K\x01NN", sizes),
        (three, text("<"), b"N" + items(text("a")) + b"N", sizes),
        (three, text("<"), b"NN}", sizes),
    ):
        refused(path, dtype_of("f2", *state), "structured")
    part = called("numpy", "dtype", text("u2")) + b"K\x00\x86"
    named = b"}" + text("bfloat16") + part + b"s"
    lawful = (three, text("|"), b"N", items(text("bfloat16")), named, b"K\x02K\x01K\x10")
    assert_same_bits(load(path, dtype_of("V2", *lawful)), np.zeros(2, BFLOAT16))
    for place, other in (
        (3, items(text("float16"))),
        (3, b"N"),
        (4, b"N"),
        (4, named.replace(b"K\x00\x86", b"K\x01\x86")),
    ):
        refused(path, dtype_of("V2", *lawful[:place], other, *lawful[place + 1 :]), "structured")


def test_an_array_is_in_an_order_that_numpy_writes(path: Path) -> None:
    data = array_of(items(b"K\x01K\x02"))["protocol 5"]
    for order in ("C", "F"):
        assert_same_bits(load(path, data.replace(text("C"), text(order))), np.zeros((1, 2), np.float32))
    for order in (text("A"), text("K"), text("c"), b"N", b"K\x01", b"]"):
        refused(path, data.replace(text("C"), order), "it has an array of shape (1, 2)")


def test_booleans_are_0_or_1(path: Path) -> None:
    for data in array_of(items(b"K\x02"), b"C\x02\x00\x02", "b1").values():
        refused(path, data, "booleans")


@pytest.mark.parametrize("frame", [b"", b"\x80\x04", b"\x80\x04\x95" + struct.pack("<Q", 9)])
@pytest.mark.parametrize(
    ("opcode", "width"),
    [(b"T", 4), (b"X", 4), (b"B", 4), (b"\x8b", 4), (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8), (b"\x95", 8)],
)
def test_announced_lengths_are_not_believed(path: Path, frame: bytes, opcode: bytes, width: int) -> None:
    for length in (2, 100, 2**31 - 1, 2**31, 2**32 - 1, 10**11, 2**62, 2**63 - 1, 2**63, 2**64 - 1):
        if length < 2 ** (8 * width):
            with little_memory():
                refused(path, frame + opcode + length.to_bytes(width, "little") + b".")


def test_a_frame_lies_within_the_file(path: Path) -> None:
    framed = b"\x80\x04\x95" + struct.pack("<Q", 2) + b"N."
    assert load(path, framed) is None
    refused(path, framed.replace(b"\x02", b"\x03"), "before a frame does")


def test_an_index_of_the_memo_takes_no_room(path: Path) -> None:
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\xff.")
    with little_memory():
        assert read_pickle(path) is None
    path.write_bytes(b"Np%d\n." % 10**300)
    with little_memory():
        assert read_pickle(path) is None
    for data in (
        b"Np-1\n.",
        b"h\x00.",
        b"j\xff\xff\xff\xff.",
        b"g5\n.",
        b"g-1\n.",
        b"gx\n.",
        b"Np" + b"9" * 5000 + b"\n.",
    ):
        refused(path, data)


def binary(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


LARGE = binary(blob_of(torch.zeros(25_000))) + b"q\x00"
STORED = name("torch.storage", "_load_from_bytes") + b"h\x00\x85R"
SEVERAL = {
    "arrays": (binary(bytes(100_000)) + b"q\x00", array_of(items(long(25_000)), b"h\x00")["below 5"][2:-1]),
    "arrays of protocol 5": (
        binary(bytes(100_000)) + b"q\x00",
        array_of(items(long(25_000)), b"h\x00")["protocol 5"][2:-1],
    ),
    "bytes": (text("\0" * 100_000) + b"q\x00", called("_codecs", "encode", b"h\x00", text("latin1"))),
    "storages": (LARGE, STORED),
    "tensors": (
        LARGE + STORED + b"q\x00",
        called("torch._utils", "_rebuild_tensor_v2", b"h\x00K\x00", items(number(25_000)), b"K\x01\x85\x89N"),
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_naming_the_same_bytes_often_does_not_multiply_them(path: Path, kind: str) -> None:
    first, again = SEVERAL[kind]
    once = b"\x80\x05(" + first + again + b"t."
    if kind in ("storages", "tensors"):
        refused(path, once, "a storage for a value")  # which is left where it was made
    else:
        load(path, once)
    with little_memory():
        what = "storages" if kind == "storages" else "bytes" if kind == "bytes" else "arrays"
        refused(path, b"\x80\x05(" + first + again * 1_000 + b"t.", f"its {what} would take more bytes")


def laughs(levels: int, opener: bytes = b"](", closer: bytes = b"e") -> bytes:
    """Lists of ten times the list before: 10 ** levels values in 30 bytes for each level."""
    first = b"](K\x01eq\x00"
    return first + b"".join(
        opener + (b"h" + bytes([level])) * 10 + closer + b"q" + bytes([level + 1]) for level in range(levels)
    )


@pytest.mark.parametrize("levels", [5, 12, 40])
def test_lists_of_lists_do_not_unfold(path: Path, levels: int) -> None:
    data = b"\x80\x02(" + laughs(levels) + b"l."
    refused(path, data, "more than")
    refused(path, b"\x80\x02(" + laughs(levels, b"(", b"t") + b"l.", "more than")
    # where a value is looked at or shown before the tree is
    bomb = b"(" + laughs(levels) + b"lq\xf0"
    for use in (
        called("numpy", "dtype", b"h\xf0"),
        called("_codecs", "encode", text("x"), b"h\xf0"),
        called("numpy._core.multiarray", "scalar", b"h\xf0", b"h\xf0"),
        called("collections", "defaultdict", b"h\xf0"),
        called("torch.storage", "_load_from_bytes", b"h\xf0"),
        name("numpy._core.numeric", "_frombuffer") + items(b"h\xf0", b"h\xf0", b"h\xf0", b"h\xf0") + b"R",
        array_of(b"h\xf0")["protocol 5"][2:-1],
        array_of(items(b"h\xf0"))["protocol 5"][2:-1],
        array_of(items(b"K\x02"))["protocol 5"][2:-1].replace(text("C"), b"h\xf0"),
        EMPTY + b"h\xf0b",
        EMPTY + items(*[b"h\xf0"] * 5) + b"b",
        called("numpy", "dtype", text("V2")) + items(*[b"h\xf0"] * 8) + b"b",
        called("numpy", "dtype", text("f4")) + items(*[b"h\xf0"] * 8) + b"b",
        b"}h\xf0Ns",
    ):
        refused(path, b"\x80\x02" + bomb + use + b"\x86.")
    key = re.compile(rb"X.\0\0\0\d{6,}q", re.DOTALL)
    refused(path, tensor_of(key.sub(lambda found: bomb[:-2] + b"q", BLOB)), "another format")  # a key to compare
    head = b"\x80\x02" + bomb + b"."
    refused(path, tensor_of(head * 5))
    refused(path, tensor_of(BLOB.replace(b"q\x02X\x03\x00\x00\x00cpu", b"q\x02" + bomb[1:], 1)))


def test_an_array_in_lists_counts_wherever_it_appears(path: Path) -> None:
    array = pickle.dumps(np.zeros(10_000), 2)[2:-1] + b"q\xf0"
    refused(path, b"\x80\x02(" + array + b"h\xf0" * 1_000 + b"l.", "more than")
    rows = load(path, b"\x80\x02(" + array + b"h\xf0" * 10 + b"l.")
    assert len(rows) == 11
    samples = load(
        path,
        b"\x80\x02("
        + b"".join(number(key) + array[:-2] * (not key) + (b"q\xf0", b"h\xf0")[key > 0] for key in range(1_000))
        + b"d.",
    )
    assert len({id(array) for array in samples.values()}) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"(" * 3_000_000,
        b"]" * 300_000 + b"a" * 299_999 + b".",
        b")" + b"\x85" * 300_000 + b".",
        b"})" + b"\x85" * 300_000 + b"Ns.",
        b"(" * 200_000 + b"t" * 200_000 + b".",
        b"(" * 200_000 + b"l" * 200_000 + b".",
        b"(NN" * 200_000 + b"d" * 200_000 + b".",
        b"}" + b"K\x01}" * 200_000 + b"s" * 200_000 + b".",
        called("collections", "OrderedDict") + b"\x85" * 200_000 + b".",
        EMPTY + b")" + b"\x85" * 300_000 + b"b.",
        called("numpy", "dtype", b")" + b"\x85" * 300_000) + b".",
        b"]" * 101 + b"a" * 100 + b".",
    ],
    ids=lambda data: f"{len(data)} bytes of {data[:6]!r}",
)
def test_nesting_deeper_than_arrays_are_is_refused(path: Path, data: bytes) -> None:
    refused(path, data)


def test_nesting_as_deep_as_arrays_are_is_read(path: Path) -> None:
    read = load(path, b"]" * 100 + b"a" * 99 + b".")
    levels = 0
    while read:
        (read,) = read
        levels += 1
    assert levels == 99


def test_depth_counts_however_it_is_come_by(path: Path) -> None:
    """A list that is shown first by its bottom, each time but little deeper."""
    chain = (
        b"](" + b"]q\x00" + b"".join(b"]" * 60 + b"h%c" % n + b"a" * 60 + b"q%c" % (n + 1) for n in range(5)) + b"e."
    )
    refused(path, b"\x80\x02" + chain, "deeper")


@pytest.mark.parametrize(
    "data",
    [
        b"]q\x00h\x00a.",
        b"]q\x00(h\x00h\x00h\x00e.",
        b"}q\x00K\x01h\x00s.",
        b"]q\x00h\x00\x85a.",
        b"]q\x00}K\x01h\x00sa.",
        b"]q\x00(]h\x00a]h\x00ae.",
    ],
)
def test_a_container_within_itself_is_refused(path: Path, data: bytes) -> None:
    assert type(pickle.loads(data)) in (list, dict)
    refused(path, data, "in themselves")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNd.", "twice"),
        (b"}(K\x01NK\x01Nu.", "twice"),
        (b"}K\x01NsK\x01Ns.", "twice"),
        (b"}(K\x01NK\x02u.", ""),
        (b"(K\x01d.", ""),
        (b"}]Ns.", "list"),
        (b"}}Ns.", "dict"),
        (b"}" + pickle.dumps(np.ones(2), 2)[2:-1] + b"Ns.", ""),
        (b"}" + name("collections", "OrderedDict") + b"Ns.", ""),
        (b"](K\x00Nu.", ""),
        (b"](NeK\x01Ns.", "sets items of a list"),
        (b"}Na.", ""),
        (b"NNa.", ""),
        (pickle.dumps(np.ones(2), 2)[2:-1] + b"Na.", ""),
        (name("numpy", "dtype") + b"(Ne.", ""),
        (b"", "empty"),
        (b".", ""),
        (b"N", "ends"),
        (b"a.", ""),
        (b"e.", ""),
        (b"t.", ""),
        (b"R.", ""),
        (b"b.", ""),
        (b"s.", ""),
        (b"u.", ""),
        (b"\x94.", ""),
        (b"\x93.", ""),
        (b"NN\x93.", ""),
        (b"NNR.", "calls"),
        (b"N)R.", "calls"),
        (name("collections", "OrderedDict") + b"]R.", "calls"),
        (name("collections", "OrderedDict") + b"NR.", "calls"),
        (b"NN.", "ends within"),
        (b"(N.", "ends within"),
        (b"\x80\x06N.", "protocol"),
        (b"\x80\xffN.", "protocol"),
        (b"Ix\n.", ""),
        (b"I" + b"9" * 10_000 + b"\n.", ""),
        (b"I0x" + b"f" * 10_000 + b"\n.", ""),
        (b"L\n.", ""),
        (b"Fx\n.", ""),
        (b"V\\u12\n.", ""),
        (b"X\x01\x00\x00\x00\xff.", ""),
        (b"c\xff\n\xff\n.", ""),
        (b"\x8b\xff\xff\xff\xff.", ""),
        (json.dumps({"sample_gradients": {"1": {"w": [1.0]}}}).encode(), ".json"),
        (b"\n {}", ".json"),
        (saved({"a": 1}, as_zip=True), "torch.load"),
        (saved({"a": 1}, as_zip=False), "torch.load"),
        (b"\x93NUMPY\x01\x00", ""),
        (b"\x1f\x8b\x08\x00", ""),
        (bytes(1_000), ""),
    ],
    ids=repr,
)
def test_what_is_damaged_or_no_pickle_is_refused_with_what_it_is(path: Path, data: bytes, words: str) -> None:
    refused(path, data, words)


def test_a_file_that_is_cut_off_or_goes_on_is_refused_at_every_byte(path: Path) -> None:
    small = {
        3: {"w": np.ones(3, np.float32), "b": torch.ones(2, dtype=torch.bfloat16), "l": [0.5, 1], "s": np.float64(2)}
    }
    for protocol in PROTOCOLS:
        data = pickle.dumps(small, protocol)
        load(path, data)
        for end in range(len(data)):
            path.write_bytes(data[:end])
            with pytest.raises(FormatError):
                read_pickle(path)
        path.write_bytes(data[:-1])
        with pytest.raises(CorruptionError, match="copy the whole file again"):
            read_pickle(path)
        for rest in (b"\n", b".", b"N", b"N.", data):
            refused(path, data + rest, "goes on")


def test_errors_name_the_byte(path: Path) -> None:
    for data in (
        b"](NNe" + name("os", "system") + b".",
        b"\x80\x04\x95\x20" + bytes(7) + b"](NNe" + name("os", "system") + b"N" * 22,
    ):
        error = refused(path, data)
        assert data[: error.fields["offset"]].endswith(b"os\nsystem\n")
        assert f"byte {error.fields['offset']} of {len(data)}" in str(error)


def test_a_larger_file_than_is_wanted_is_refused(path: Path) -> None:
    data = pickle.dumps([1.0] * 100)
    path.write_bytes(data)
    assert read_pickle(str(path), max_bytes=len(data)) == [1.0] * 100
    with pytest.raises(FormatError, match="max_bytes"):
        read_pickle(path, max_bytes=len(data) - 1)


def test_a_file_that_is_none_is_an_error_of_ours(path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"epoch_9\.pkl"):
        read_pickle(path.with_name("epoch_9.pkl"))
    with pytest.raises(InvalidInputError, match="is not a file"):
        read_pickle(path.parent)
    os.mkfifo(path.with_name("pipe"))
    with pytest.raises(InvalidInputError, match="is not a file"):
        read_pickle(path.with_name("pipe"))


# Whatever else somebody may come up with.


class Reduced:
    """Pickles as a call of what it is told to."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def same_tensor(tensor: torch.Tensor) -> Reduced:
    """A tensor whose pickle is the same in every run: torch's has an address in it."""
    blob = re.sub(rb"X.\0\0\0\d{6,}q", b"X\1\0\0\0000q", blob_of(tensor), flags=re.DOTALL)
    storage = Reduced(torch.storage._load_from_bytes, blob)
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return Reduced(torch._utils._rebuild_tensor_v2, storage, *place, False, OrderedDict())


def seeds() -> list[bytes]:
    small = {
        3: {"w": np.ones((2, 2), np.float32), "w_step": 4},
        "7": OrderedDict(b=[[0.5, 1.5], [1, 2]], s=np.float32(2)),
    }
    lawful = [
        {"sample_gradients": small},
        {"t": same_tensor(torch.ones(2, 9).T), "h": same_tensor(torch.ones(3, dtype=torch.bfloat16))},
    ]
    lawful += [
        np.arange(30, dtype=">i4").reshape(5, 6).T,
        np.zeros(50, BFLOAT16),
        [(1, "x", None, True, 2**40, b"y")],
        defaultdict(dict, a={1: {}}),
    ]
    made = [pickle.dumps(value, protocol) for value in lawful for protocol in PROTOCOLS] * 3
    pairs = [("os", "system"), ("builtins", "eval"), ("builtins", "__import__"), ("torch", "load"), ("os", "mkdir")]
    made += [data for pair in pairs for data in forms(*pair, text("/nowhere/x")).values()]
    return [*made, laughs(3) + b".", b"\x80\x02" + EMPTY + b"}b."]


def mutated(rng: random.Random, made: list[bytes]) -> bytes:
    data = bytearray(rng.choice(made))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        place = rng.randrange(len(data) + 1)
        how = rng.choice([0, 0, 0, 0, 1, 2, 3, 4])
        if how == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1 and place < len(data):
            data[place] = rng.choice(b"().0RbsuetldicqhrjpgQoP\x80\x81\x82\x85\x92\x93\x94\x95\x96\xff\x00")
        elif how == 2:
            del data[place : place + rng.choice([1, 2, 8, 40])]
        elif how == 3:
            data[place:place] = rng.randbytes(rng.choice([1, 2, 4]))
        else:
            other = rng.choice(made)
            start = rng.randrange(len(other))
            data[place : place + rng.choice([0, 10])] = other[start : start + rng.choice([4, 20, 100])]
    return bytes(data)


def is_plain(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(type(key) in (str, int) and is_plain(held) for key, held in value.items())
    if kind in (list, tuple):
        return all(map(is_plain, value))
    if kind is np.ndarray:
        return value.flags.owndata and (value.dtype.kind in "fiub" or value.dtype == BFLOAT16)
    return kind in (str, bytes, int, float, bool, type(None))


def test_ten_thousand_mutations_end_in_plain_values_or_our_error_and_run_nothing(path: Path) -> None:
    rng, made = random.Random(0), seeds()
    read = refusals = 0
    modules = set(sys.modules)
    for trial in range(10_000):
        data = mutated(rng, made)
        path.write_bytes(data)
        with watched(path) as seen:
            try:
                value = read_pickle(path)
            except FormatError as error:
                value = None
                refusals += 1
                assert len(str(error)) < 3_000
            else:
                read += 1
        assert seen == [], (trial, data)
        assert is_plain(value), (trial, data)
    assert set(sys.modules) == modules
    assert read > 500
    assert refusals > 5_000
