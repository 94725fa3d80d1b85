"""`timstore samples import`: what a file says about samples, in the store."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_stores import fill, json_of, run

import timstore
from timstore.cli import sample_files

ROWS = [{"sample": 0, "owner": "u-7", "zip": "00123"}, {"sample": 40, "owner": None, "zip": "99999"}]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cli") / "run.tim")


@pytest.fixture
def store(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "run.tim")


def written(path, rows):
    """Write rows in the format that a file's name tells."""
    if path.suffix.lower() in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".TSV" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def held(path, columns="*", where="true"):
    with timstore.open(path, "r") as opened:
        answer = opened.sql(f"SELECT {columns} FROM samples WHERE {where} ORDER BY sample")
        return [dict(zip(answer.columns, row, strict=True)) for row in answer.fetchall()]


def files(path):
    return {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}


@pytest.mark.parametrize("suffix", [".csv", ".TSV", ".jsonl", ".parquet"])
def test_columns_of_every_format_are_attached(store, tmp_path, suffix):
    file = written(tmp_path / f"owners{suffix}", ROWS)
    text = ["--text", "zip"] if suffix in (".csv", ".TSV") else []
    (found,) = json_of("samples", "import", store, file, *text, "--yes")
    assert found == {"dry_run": False, "rows": 2, "columns": ["owner", "zip"], "new": 1, "replaced": 1}
    assert held(store, where="sample IN (0, 40)") == ROWS
    # What the file does not name is as it was.
    assert held(store, "owner", "sample = 1") == [{"owner": "u-1"}]


def test_csv_tells_text_from_numbers_and_an_empty_cell_from_an_empty_text(store, tmp_path):
    (tmp_path / "a.csv").write_text('sample,number,share,day,note\n1,00123,0.5,2026-01-02,""\n2,,,,"a, b"\n')
    run("samples", "import", store, tmp_path / "a.csv")
    first, second = held(store, "number, share, day, note", "sample IN (1, 2)")
    assert (first["number"], first["share"], str(first["day"]), first["note"]) == (123, 0.5, "2026-01-02", "")
    assert second == {"number": None, "share": None, "day": None, "note": "a, b"}


def test_a_dry_run_changes_nothing_and_says_what_would_be_done(store, tmp_path):
    file, before = written(tmp_path / "owners.csv", ROWS), files(store)
    text, _ = run("samples", "import", store, file, "--dry-run")
    assert text == "would attach owner, zip to 2 rows: 1 new sample, 1 stored value replaced\n"
    assert files(store) == before


def test_stored_values_are_replaced_only_by_those_who_say_so(store, tmp_path):
    file, before = written(tmp_path / "owners.csv", ROWS), files(store)
    text, messages = run("samples", "import", store, file, code=2)
    assert text == "" and "1 stored value will be replaced" in messages and "--yes" in messages
    assert files(store) == before
    run("samples", "import", store, file, "-y")
    # The same values again replace nothing, and nobody is asked.
    assert json_of("samples", "import", store, file)[0]["replaced"] == 0


def test_a_column_in_other_letters_is_the_same_column(store, tmp_path):
    file = written(tmp_path / "owners.csv", [{"sample": 0, "OWNER": "u-9"}])
    assert json_of("samples", "import", store, file, "--yes")[0]["replaced"] == 1
    assert held(store, "owner", "sample = 0") == [{"owner": "u-9"}]
    # Of another type it would make the tables of the store unreadable.
    file = written(tmp_path / "numbers.csv", [{"sample": 0, "OWNER": 5}])
    assert "error: the samples column" in run("samples", "import", store, file, "--yes", code=1)[1]
    with (
        timstore.open(store) as opened,
        pytest.raises(timstore.InvalidInputError, match="OWNER holds string, not int64"),
    ):
        opened.samples.update([{"sample": 0, "OWNER": 5}])
    assert held(store, "owner", "sample = 0") == [{"owner": "u-9"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "owner\nu-1\n", "need an integer column `sample`"),
        ("a.csv", "sample,owner\nx,u-1\n", "holds integers"),
        ("a.csv", "sample,owner\n,u-1\n", "holds integers without gaps"),
        ("a.csv", "sample,owner\n1,u-1,more\n", "a.csv, line 2: it has more cells than line 1"),
        ("a.csv", "sample,owner\n1,u-1\n2\n", "a.csv, line 3: it has fewer cells than line 1"),
        ("a.csv", "sample,owner,Owner\n1,a,b\n", "apart"),
        ("a.csv", "sample,owner\n1,5\n", "owner holds string, not int64"),
        ("a.csv", b"sample,owner\n1,\xff\n", "line 2: column owner is no UTF-8 text"),
        ("a.csv", "", "a.csv, line 1: it names no columns"),
        ("a.jsonl", '{"sample": 1}\nnonsense\n', "row 2: no JSON"),
        ("a.jsonl", '{"sample": 1}\n[2]\n', "row 2: a line holds one object"),
        ("a.jsonl", '{"sample": "1"}\n', "holds integers"),
        ("a.jsonl", '{"sample": 1, "x": 1}\n{"sample": 2, "x": "a"}\n', 'a.jsonl, row 2: x is "a", of another type'),
        (
            "a.jsonl",
            '{"sample": 1, "x": 9223372036854775808}\n{"sample": 2, "x": -1}\n',
            "a.jsonl, row 1: x is 9223372036854775808, a number of more than 63 bits",
        ),
        ("a.jsonl", '{"sample": 1, "x": 99999999999999999999999}\n', "row 1: x is 99999999999999999999999, a number"),
        ("a.jsonl", '{"sample": 1, "x": 0.5}\n{"sample": 2, "x": 9007199254740993}\n', "row 2: x is 9007199254740993"),
        (
            "a.jsonl",
            '{"sample": 1, "x": [1, 0.5]}\n{"sample": 2, "x": [9007199254740993]}\n',
            "row 2: x[] is 9007199254740993",
        ),
        ("a.jsonl", '{"sample": 1, "x": {"a": 1}}\n{"sample": 2, "x": {"a": "b"}}\n', 'row 2: x.a is "b"'),
        ("a.jsonl", '{"sample": 1, "x": 1, "x": 2}\n', "row 1: a name is there twice"),
        ("a.jsonl", '{"sample": 1, "x": 1, "X": 2}\n', "apart"),
        ("a.jsonl", '{"sample": 1}\n{"x": 2}\n', "row 2: sample is missing"),
        ("a.csv", "sample,x\n1,0.5\n2,1e400\n", "row 2: column x holds 1e400"),
        ("a.jsonl", '{"sample": 99999999999999999999999}\n', "row 1: sample is 99999999999999999999999"),
        ("a.csv", "sample,o\n1,a\n2.5,b\n", "a.csv, row 2: sample is 2.5"),
        ("a.csv", "sample,o\n1,a\n99999999999999999999999,b\n", "row 2: sample is 99999999999999999999999"),
        ("a.csv", "sample,x\n1,1.5\n2,9007199254740993\n", "row 2: column x holds 9007199254740993, which a float"),
        ("a.csv", "sample,x\n1,18446744073709551615\n2,18446744073709551614\n", "pass --text x"),
        ("a.csv", 'sample,o\n3,"abc\n7,x\n', "a.csv, line 2: a cell begins with a quote and does not end with one"),
        ("a.csv", "sample,,o\n3,1,2\n", "a.csv, line 1: column 2 has no name"),
        ("a.jsonl", b'{"sample": 1, "x": "\xff"}\n', "row 1: no JSON"),
        ("a.parquet", "no parquet", "a.parquet: "),
        ("a.xlsx", "", "is named .csv, "),
    ],
)
def test_a_file_that_cannot_be_attached_is_refused_with_its_reason(store, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = files(store)
    text, messages = run("samples", "import", store, tmp_path / name, "--yes", code=1)
    assert text == "" and messages.startswith("error: ") and said in messages
    assert files(store) == before


def test_quotes_in_csv_that_end_are_taken_as_they_are(store, tmp_path):
    (tmp_path / "a.csv").write_text('sample,o,p\n1,"a ""b"", c\nd",""\n2,e"f,"g"\n"3","""",""""""\n')
    run("samples", "import", store, tmp_path / "a.csv")
    found = held(store, "o, p", "sample IN (1, 2, 3)")
    assert [tuple(row.values()) for row in found] == [('a "b", c\nd', ""), ('e"f', "g"), ('"', '""')]


def test_csv_that_looks_like_a_number_a_date_or_a_truth_to_some_stays_text(store, tmp_path):
    cells = {
        "a": ("yes", "no"),
        "b": ("12_34", "5"),
        "c": ("02-01-2026", "03-01-2026"),
        "d": ("00123", "x"),
        "e": ("t", "f"),
    }
    rows = [{"sample": at + 1, **{name: values[at] for name, values in cells.items()}} for at in range(2)]
    run("samples", "import", store, written(tmp_path / "a[1]*.csv", rows))
    assert held(store, "sample, a, b, c, d, e", "sample IN (1, 2)") == rows


def test_json_comes_over_as_it_is_nested_and_with_gaps(store, tmp_path):
    rows = [
        {
            "sample": 1,
            "day": "2026-01-02",
            "n": -(2**63),
            "tags": ["a", None],
            "pair": {"x/~y": [1, 2], "none": None},
            "f": 1.5,
        },
        {"sample": 2, "day": "x", "n": 2**63 - 1, "tags": [], "pair": {"x/~y": [], "none": None}, "f": 3},
        {"sample": 3, "day": None, "n": None, "tags": None, "pair": None, "f": None},
    ]
    run("samples", "import", store, written(tmp_path / "a.jsonl", rows))
    assert held(store, "sample, day, n, tags, pair, f", "sample IN (1, 2, 3)") == rows
    (kinds,) = held(store, "typeof(n) AS n, typeof(day) AS day", "sample = 1")
    assert kinds == {"n": "BIGINT", "day": "VARCHAR"}


def test_large_integers_of_csv_keep_their_digits_as_text(store, tmp_path):
    ids = ["18446744073709551615", "18446744073709551614"]
    (tmp_path / "a.csv").write_text(f"sample,acct\n1,{ids[0]}\n2,{ids[1]}\n")
    run("samples", "import", store, tmp_path / "a.csv", "--text", "acct")
    assert [row["acct"] for row in held(store, "acct", "sample IN (1, 2)")] == ids


def test_a_file_that_would_round_what_is_stored_is_refused(store, tmp_path):
    for sample, value, code in ((3, "1.5", 0), (7, "9007199254740993", 1)):
        (tmp_path / "a.csv").write_text(f"sample,score\n{sample},{value}\n")
        _, messages = run("samples", "import", store, tmp_path / "a.csv", code=code)
    assert "column score holds double, not int64" in messages
    assert held(store, "score", "score IS NOT NULL") == [{"score": 1.5}]


def test_ids_beyond_63_bits_are_refused(store, tmp_path):
    pq.write_table(pa.table({"sample": np.array([2**63 + 1], np.uint64)}), tmp_path / "a.parquet")
    assert "63 bits" in run("samples", "import", store, tmp_path / "a.parquet", code=1)[1]


def test_a_large_file_goes_in_by_blocks_that_have_to_fit_together(store, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_files, "_ROWS", 100)
    rows = [{"sample": number, "x": None if number < 150 else number, "y": float(number)} for number in range(300)]
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        found = json_of("samples", "import", store, written(tmp_path / name, rows), "--yes")[0]
        assert (found["rows"], found["replaced"]) == (300, 0)
    assert held(store, "sample, x, y", "x IS NOT NULL OR sample < 150") == rows
    # A later block that does not fit: nothing of the earlier ones is written.
    before = files(store)
    rows[0]["z"], rows[250]["z"] = 1, "text"
    assert "row 251: z is" in run("samples", "import", store, written(tmp_path / "b.jsonl", rows), "--yes", code=1)[1]
    assert files(store) == before


def test_what_is_not_there_ends_with_five(store, tmp_path):
    assert run("samples", "import", store, tmp_path / "no.csv", code=5)[1].endswith(
        "no.csv: No such file or directory\n"
    )
    file = written(tmp_path / "owners.csv", ROWS)
    assert "there is no store" in run("samples", "import", tmp_path / "no.tim", file, code=5)[1]
    assert not (tmp_path / "no.tim").exists()
