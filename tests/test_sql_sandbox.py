"""SQL from anybody reads the tables and nothing else.

Every attempt below works on an ordinary connection to the same tables (a test says so, so that no attempt fails for
the wrong reason) and has to fail, without any effect, on the catalogue's.
"""

import hashlib
import shutil
import tempfile

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from timstore.catalog import AttemptRow, Catalog, CommitRows
from timstore.errors import InvalidInputError
from timstore.format.tables import SCHEMAS

REFUSED = (InvalidInputError, duckdb.Error)
SAMPLES = list(range(5))

# <word> stands for a path: see `World.fill`.
READS = [
    "SELECT * FROM read_text('<csv>')",
    "SELECT content FROM read_text(['<csv>'])",
    "FROM read_blob('<csv>')",
    "FROM read_blob('<catalogue>')",
    "FROM read_csv('<csv>')",
    "FROM read_csv_auto('<csv>')",
    "FROM sniff_csv('<csv>')",
    "FROM read_json('<json>')",
    "FROM read_ndjson_objects('<json>')",
    "FROM read_parquet('<parquet>')",
    "FROM parquet_scan('<parquet>')",
    "FROM parquet_metadata('<parquet>')",
    "FROM parquet_schema('<parquet>')",
    "FROM parquet_file_metadata('<parquet>')",
    "FROM parquet_kv_metadata('<parquet>')",
    "FROM read_duckdb('<database>', table_name = 'secret')",
    "FROM '<csv>'",
    'SELECT * FROM "<csv>"',
    "FROM '<parquet>'",
    "FROM '<database>'",
    "FROM glob('<folder>/*')",
    "FROM glob('<private>/*')",
    "SELECT sample FROM records WHERE EXISTS (FROM read_text('<csv>'))",
    "SELECT (SELECT content FROM read_text('<csv>')) FROM records",
    "WITH x AS (FROM read_text('<csv>')) FROM x",
    "FROM records UNION ALL BY NAME FROM read_csv('<csv>')",
    "FROM query('FROM read_text(''<csv>'')')",
    "FROM query_table('<csv>')",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''<csv>'')'))",
    "FROM duckdb_extensions()",
]

WRITES_IN_A_SELECT = [
    "WITH gone AS (DELETE FROM stored.records RETURNING *) SELECT * FROM gone",
    "WITH new AS (INSERT INTO stored.records FROM stored.records RETURNING *) SELECT * FROM new",
    "WITH other AS (UPDATE stored.records SET sample = 666 RETURNING *) SELECT * FROM other",
    "FROM enable_logging('QueryLog', storage = 'file', storage_path = '<out>')",
    "FROM enable_logging('QueryLog')",
    "FROM enable_profiling(save_location = '<out>.json', format = 'json')",
]

# No ordinary connection on a machine without network or extensions could do these either.
UNREACHABLE = [
    "FROM 'http://127.0.0.1:9/x.csv'",
    "FROM read_csv('https://127.0.0.1:9/x.csv')",
    "FROM 's3://bucket/x.parquet'",
    "FROM sqlite_scan('<database>', 'secret')",
    "FROM postgres_scan('host=127.0.0.1', 'public', 'x')",
    "FROM st_read('<csv>')",
    "SELECT getenv('HOME')",
    "FROM arrow_scan(1, 2, 3)",
    "FROM pandas_scan(1)",
    "FROM duckdb_secrets(redact = false)",
    "FROM query('COPY (SELECT 1) TO ''<out>''')",
    "FROM query('SELECT 1; SELECT 2')",
    "FROM destroy_external_resource('read_text', '<csv>')",
]

STATEMENTS = [
    "COPY records TO '<out>'",
    "COPY (SELECT 1) TO '<out>' (FORMAT parquet)",
    "COPY (SELECT 1) TO '<catalogue>' (FORMAT csv, USE_TMP_FILE false)",
    "COPY (SELECT 1) TO '<catalogue>.wal' (FORMAT csv, USE_TMP_FILE false)",
    "COPY (SELECT 1) TO '<private>/x.csv'",
    "COPY stored.commits FROM '<commits>'",
    "COPY FROM DATABASE catalogue TO memory",
    "EXPORT DATABASE '<out>'",
    "IMPORT DATABASE '<export>'",
    "PRAGMA import_database('<export>')",
    "ATTACH ':memory:' AS other",
    "ATTACH ':memory:' AS stored",
    "ATTACH '<database>'",
    "ATTACH '<database>' AS other (READ_ONLY)",
    "ATTACH '<out>' AS other (READ_WRITE)",
    "ATTACH '<private>/x.duckdb' AS other (READ_WRITE)",
    "CREATE TABLE x AS SELECT 1",
    "CREATE TABLE stored.x (a INTEGER)",
    "CREATE TEMP TABLE x AS FROM read_text('<csv>')",
    "CREATE OR REPLACE VIEW records AS SELECT 666 AS sample",
    "CREATE SCHEMA x",
    "CREATE SEQUENCE x",
    "CREATE TYPE x AS ENUM ('a')",
    "CREATE MACRO sum(x) AS 42",
    "CREATE INDEX x ON stored.records (sample)",
    "INSERT INTO stored.records FROM stored.records",
    "UPDATE stored.records SET sample = 666",
    "DELETE FROM stored.records",
    "TRUNCATE stored.records",
    "MERGE INTO stored.records USING (SELECT 1 AS sample) s USING (sample) WHEN MATCHED THEN DELETE",
    "DROP VIEW records",
    "DROP TABLE stored.records CASCADE",
    "DROP SCHEMA stored CASCADE",
    "ALTER TABLE stored.records ADD COLUMN x INTEGER",
    "COMMENT ON TABLE stored.records IS 'x'",
    "SET threads = 1",
    "SET memory_limit = '1GB'",
    "SET temp_directory = '<out>'",
    "SET GLOBAL python_enable_replacements = true",
    "SET allowed_directories = ['<folder>']",
    "SET home_directory = '<out>'",
    "RESET threads",
    "RESET python_enable_replacements",
    "PRAGMA enable_profiling",
    "PRAGMA profiling_output = '<out>.txt'",
    "CALL enable_logging('QueryLog', storage = 'file', storage_path = '<out>')",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '<out>'",
    "EXPLAIN ANALYZE DELETE FROM stored.records",
]

UNREACHABLE_STATEMENTS = [
    "INSTALL httpfs",
    "FORCE INSTALL httpfs FROM 'http://127.0.0.1:9'",
    "LOAD httpfs",
    "LOAD '<csv>'",
    "UPDATE EXTENSIONS",
    "ATTACH 'http://127.0.0.1:9/x.duckdb'",
    "SET lock_configuration = false",
    "RESET lock_configuration",
    "SET enable_external_access = true",
    "SET disabled_filesystems = ''",
    "CREATE SECRET x (TYPE s3)",
    "CREATE PERSISTENT SECRET x (TYPE s3)",
    "DETACH catalogue",
    "USE temp",
]

# These work, and only for the relation that is asked.
HARMLESS = [
    "CREATE TEMP TABLE records AS SELECT 666 AS sample",
    "CREATE TEMP VIEW records AS SELECT 666 AS sample",
    "CREATE TEMP MACRO sum(x) AS 42",
    "SET VARIABLE sample = 666",
    "SET schema = 'stored'",
    "USE stored",
    "PREPARE x AS SELECT 1",
    "BEGIN",
    "CHECKPOINT",
    "VACUUM",
    "ANALYZE",
]

METHODS = {
    "create": lambda world, relation: relation.create("x"),
    "to_table": lambda world, relation: relation.to_table("x"),
    "insert_into": lambda world, relation: relation.query("v", "FROM stored.records").insert_into("stored.records"),
    "create_view": lambda world, relation: relation.project("666 AS sample").create_view("x"),
    "create_view over a table": lambda world, relation: relation.project("666 AS sample").create_view("records"),
    "to_view": lambda world, relation: relation.project("666 AS sample").to_view("records"),
    "to_parquet": lambda world, relation: relation.to_parquet(world.fill("<out>")),
    "write_parquet": lambda world, relation: relation.write_parquet(world.fill("<out>")),
    "to_csv": lambda world, relation: relation.to_csv(world.fill("<out>")),
    "write_csv": lambda world, relation: relation.write_csv(world.fill("<out>")),
    "write_csv into the private folder": lambda world, relation: relation.write_csv(world.fill("<private>/x.csv")),
    "filter": lambda world, relation: relation.filter(world.fill("EXISTS (FROM read_text('<csv>'))")).fetchall(),
    "project": lambda world, relation: relation.project(
        world.fill("(SELECT content FROM read_text('<csv>'))")
    ).fetchall(),
    "aggregate": lambda world, relation: relation.aggregate(
        world.fill("any_value((SELECT content FROM read_text('<csv>')))")
    ).fetchall(),
    "order": lambda world, relation: relation.order(world.fill("(SELECT size FROM read_text('<csv>'))")).fetchall(),
    "join": lambda world, relation: relation.query(
        "v", world.fill("SELECT content FROM v, read_text('<csv>')")
    ).fetchall(),
}


class World:
    """The catalogue's file, and around it files that no question may read, change or add to."""

    def __init__(self, root, catalogue):
        folder = root / "files"
        self.paths = {
            "folder": folder,
            "csv": folder / "secret.csv",
            "json": folder / "secret.json",
            "parquet": folder / "secret.parquet",
            "database": folder / "secret.duckdb",
            "commits": folder / "commits.csv",
            "export": folder / "export",
            "out": folder / "out",
            "private": catalogue.parent,
            "catalogue": catalogue,
        }
        self.paths["export"].mkdir(parents=True)
        self.paths["csv"].write_text("sample,word\n1,secret\n")
        self.paths["json"].write_text('{"sample": 1, "word": "secret"}\n')
        self.paths["commits"].write_text("commit,writer,seq,at,records,bytes\n1,x,0,now,1,1\n")
        pq.write_table(pa.table({"sample": [1]}), self.paths["parquet"])
        with duckdb.connect(self.paths["database"]) as connection:
            connection.execute("CREATE TABLE secret AS SELECT 1 AS sample")
        (self.paths["export"] / "schema.sql").write_text("CREATE TABLE imported (a INTEGER);")
        (self.paths["export"] / "load.sql").write_text("")

    def fill(self, text):
        """Put paths in the place of words in angle brackets."""
        for word, path in self.paths.items():
            text = text.replace(f"<{word}>", str(path))
        return text


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
        (private,) = (root / "temp").iterdir()
        super().__init__(root, private / "catalogue.duckdb")
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
    with pytest.raises(duckdb.Error):
        relation.query("v", sandbox.fill(statement))


@pytest.mark.parametrize("statement", HARMLESS)
def test_what_one_relation_leaves_behind_is_not_seen_by_the_next(sandbox, statement):
    relation = sandbox.catalog.sql("FROM records")
    relation.query("v", statement)


@pytest.mark.parametrize("method", METHODS)
def test_a_relation_has_no_method_that_reads_or_writes_elsewhere(sandbox, method):
    relation = sandbox.catalog.sql("FROM records")
    with pytest.raises(duckdb.Error):
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
