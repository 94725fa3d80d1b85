"""Pickles that are hostile: nothing of them runs, and no state is set."""

import copyreg
import io
import pickle
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from pickled import EMPTY, array_of, assert_same_bits, called, forms, items, load, name, refused, stacked, text, watched

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
        ("timstore.legacy.pickles", "os.system"),
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
