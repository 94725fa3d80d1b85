"""What somebody may try in SQL, or on a relation, and the files around a catalogue that it would reach."""

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

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
