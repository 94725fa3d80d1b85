"""SQL from anybody reads the tables and nothing else.

Every attempt of `sql_attempts` works on an ordinary connection to the same tables (a test says so, so that none fails
for the wrong reason) and has to fail, without any effect, on the catalogue's.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pytest
from sql_attempts import (
    HARMLESS,
    METHODS,
    READS,
    STATEMENTS,
    UNREACHABLE,
    UNREACHABLE_STATEMENTS,
    WRITES_IN_A_SELECT,
    World,
)

from timstore.catalog import AttemptRow, Catalog, CommitRows
from timstore.errors import InvalidInputError
from timstore.format.schemas import SCHEMAS

REFUSED = InvalidInputError
SAMPLES = list(range(5))


class Sandbox(World):
    """A catalogue to attack."""

    def __init__(self, root):
        self.root = root
        rows = [
            {"attempt": 0, "epoch": 0, "step": 1, "rank": 0, "sample": sample, "norm": 1.0, "bytes": 8}
            for sample in SAMPLES
        ]
        commit = CommitRows(0, "w", 0, "now", 5, 40, {"records": pa.Table.from_pylist(rows, SCHEMAS["records"])})
        self.catalog = Catalog.build([commit], [AttemptRow(0, 0, 0, 1, None, "all")])
        assert list((root / "temp").iterdir()) == []
        # The tables' file has no other name any more.
        super().__init__(root, Path(f"/proc/self/fd/{self.catalog._descriptor}"))
        self.before = self.state()

    def state(self):
        """Return every file and its content, every setting, and what SQL answers."""
        files = {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            for path in sorted(self.root.rglob("*"))
        }
        questions = [
            "SELECT sample, norm FROM records ORDER BY sample",
            "SELECT name, value FROM duckdb_settings() ORDER BY name",
            "SELECT sum(sample), getvariable('sample') FROM stored.records",
            "SELECT * FROM commits",
            "SELECT database_name, path FROM duckdb_databases() ORDER BY database_oid",
            "SELECT view_name, sql FROM duckdb_views() ORDER BY ALL",
            "SELECT current_schema()",
        ]
        return files, [self.catalog.sql(question).fetchall() for question in questions]


@pytest.fixture(scope="module")
def module_sandbox(tmp_path_factory):
    root = tmp_path_factory.mktemp("sandbox")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("temp", "home", "here"):
            (root / name).mkdir()
        patch.setattr(tempfile, "tempdir", str(root / "temp"))
        patch.setenv("HOME", str(root / "home"))
        patch.chdir(root / "here")
        sandbox = Sandbox(root)
        assert sandbox.before[1][0] == [(sample, 1.0) for sample in SAMPLES]
        yield sandbox
        sandbox.catalog.close()


@pytest.fixture
def sandbox(module_sandbox):
    """Yield the sandbox, and fail a test after which a file, a setting or an answer is another."""
    yield module_sandbox
    assert module_sandbox.state() == module_sandbox.before


@pytest.fixture
def ordinary(module_sandbox, tmp_path, monkeypatch):
    """Yield an ordinary connection to a copy of the tables, and what is around it."""
    (tmp_path / "private").mkdir()
    catalogue = tmp_path / "private" / "catalogue.duckdb"
    shutil.copyfile(module_sandbox.paths["catalogue"], catalogue)
    monkeypatch.chdir(tmp_path)
    with duckdb.connect(catalogue) as connection:
        yield connection, World(tmp_path, catalogue)


@pytest.mark.parametrize("query", READS + WRITES_IN_A_SELECT)
def test_without_the_sandbox_the_question_is_answered(ordinary, query):
    connection, world = ordinary
    connection.sql(world.fill(query)).to_arrow_table()


@pytest.mark.parametrize("statement", STATEMENTS)
def test_without_the_sandbox_the_statement_runs(ordinary, statement):
    connection, world = ordinary
    connection.execute("ATTACH ':memory:' AS memory")
    connection.sql("FROM records").query("v", world.fill(statement))


@pytest.mark.parametrize("method", METHODS)
def test_without_the_sandbox_the_method_works(ordinary, method):
    connection, world = ordinary
    relation = connection.sql("FROM stored.records")
    connection.execute("DROP VIEW records")
    METHODS[method](world, relation)


@pytest.mark.parametrize("query", READS + WRITES_IN_A_SELECT + UNREACHABLE)
def test_a_question_reaches_nothing_but_the_tables(sandbox, query):
    with pytest.raises(REFUSED):
        sandbox.catalog.sql(sandbox.fill(query)).to_arrow_table()


@pytest.mark.parametrize("query", READS + WRITES_IN_A_SELECT + UNREACHABLE)
def test_a_question_to_a_relation_reaches_nothing_but_the_tables(sandbox, query):
    relation = sandbox.catalog.sql("FROM records")
    with pytest.raises(REFUSED):
        relation.query("v", sandbox.fill(query)).fetchall()


@pytest.mark.parametrize("statement", STATEMENTS + UNREACHABLE_STATEMENTS + HARMLESS)
def test_a_statement_that_is_no_select_is_refused(sandbox, statement):
    with pytest.raises(InvalidInputError) as caught:
        sandbox.catalog.sql(sandbox.fill(statement))
    assert caught.value.kind == "not-a-select"


@pytest.mark.parametrize("statement", STATEMENTS + UNREACHABLE_STATEMENTS)
def test_a_statement_through_a_relation_fails(sandbox, statement):
    relation = sandbox.catalog.sql("FROM records")
    with pytest.raises(REFUSED):
        relation.query("v", sandbox.fill(statement))


@pytest.mark.parametrize("statement", HARMLESS)
def test_what_one_relation_leaves_behind_is_not_seen_by_the_next(sandbox, statement):
    relation = sandbox.catalog.sql("FROM records")
    relation.query("v", statement)


@pytest.mark.parametrize("method", METHODS)
def test_a_relation_has_no_method_that_reads_or_writes_elsewhere(sandbox, method):
    relation = sandbox.catalog.sql("FROM records")
    with pytest.raises(REFUSED):
        METHODS[method](sandbox, relation)


@pytest.mark.parametrize(
    "query",
    ["SELECT 1; SELECT 2", "SELECT 1; DROP VIEW records", "DROP VIEW records; SELECT 1", "", ";", "-- nothing"],
)
def test_a_question_is_exactly_one_statement(sandbox, query):
    with pytest.raises(InvalidInputError) as caught:
        sandbox.catalog.sql(query)
    assert caught.value.kind == "not-a-select"


@pytest.mark.parametrize("params", [lambda path: [path], lambda path: {"path": path}])
def test_a_parameter_is_no_way_to_a_file(sandbox, ordinary, params):
    given = params(sandbox.fill("<csv>"))
    query = "SELECT content FROM read_text($path)" if isinstance(given, dict) else "SELECT content FROM read_text(?)"
    assert ordinary[0].sql(query, params=given).fetchall() == [("sample,word\n1,secret\n",)]
    with pytest.raises(REFUSED):
        sandbox.catalog.sql(query, given).fetchall()


module_frame = pd.DataFrame({"sample": [1]})
module_table = pa.table({"sample": [1]})


@pytest.mark.parametrize("name", ["module_frame", "module_table", "local_frame", "local_table"])
@pytest.mark.parametrize(
    "query",
    ["FROM {}", "FROM query_table('{}')", "FROM query('FROM {}')", "SELECT 1 FROM records WHERE sample IN (FROM {})"],
)
def test_a_python_variable_is_no_table(sandbox, ordinary, name, query):
    local_frame, local_table = module_frame, module_table
    connection = ordinary[0]
    assert connection.sql(query.format(name)).fetchall() == [(1,)], "the name can be reached from here"
    with pytest.raises(REFUSED, match="does not exist"):
        sandbox.catalog.sql(query.format(name)).fetchall()
    with pytest.raises(REFUSED, match="does not exist"):
        sandbox.catalog.sql("FROM records").query("v", query.format(name)).fetchall()
    assert local_frame is not None
    assert local_table is not None


def test_every_door_is_shut_and_locked(sandbox):
    expected = {
        "access_mode": "read_only",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "enable_external_access": False,
        "lock_configuration": True,
        "python_enable_replacements": False,
        "temp_directory": "",
    }
    columns = ", ".join(f"current_setting('{name}')" for name in expected)
    assert sandbox.catalog.sql(f"SELECT {columns}").fetchall() == [tuple(expected.values())]


def test_asking_how_the_database_is_set_up_is_harmless(sandbox):
    for query in (
        "SELECT current_setting('secret_directory')",
        "FROM duckdb_settings()",
        "FROM duckdb_databases()",
        "FROM duckdb_functions()",
        "FROM duckdb_secrets()",
        "FROM duckdb_logs()",
        "FROM pragma_database_size()",
        "FROM checkpoint()",
        "SELECT write_log('x'), setseed(0.5)",
    ):
        sandbox.catalog.sql(query).fetchall()
