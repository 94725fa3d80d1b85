"""The command line: what it prints, where, and what it ends with."""

import csv
import io
import shutil

import numpy as np
import pytest
from cli_stores import EPOCHS, OUT, RECORDED, STEPS, TOKENS, WIDTH, fill, json_of, run

import timstore
from timstore.cli import app

VERBS = ("info", "sql", "rollback", "verify", "compact", "forecast", "import", "export", "samples", "samples import")
RECORDS = RECORDED * EPOCHS


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cli") / "run.tim")


@pytest.fixture
def own(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "run.tim")


def files(path):
    return {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_eighty_columns_and_cuts_nothing(verb):
    text, _ = run(*verb.split(), "--help")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and not any(line.endswith("...") for line in text.splitlines()[1:])
    # Every paragraph is there, and an example of everything that does something.
    assert verb in ("", "samples") or f"timstore {verb} " in text.partition("Examples:")[2]


def test_the_help_names_every_verb_and_every_exit_code():
    text, _ = run("--help")
    assert all(verb.split()[0] in text for verb in VERBS)
    assert all(f"{code} " in text for code in (0, 1, 2, 3, 5))


def test_every_verb_prints_json():
    for verb in VERBS:
        if verb != "samples":
            assert "--json" in run(*verb.split(), "--help")[0]


def test_the_version_is_that_of_the_package():
    assert run("--version") == (f"{timstore.__version__}\n", "")


def test_info_adds_up(filled):
    (found,) = json_of("info", filled)
    factors, bias = 4 * TOKENS * (WIDTH + OUT), 4 * OUT
    assert found["bytes"] == RECORDS * (factors + bias)
    assert found["dense_bytes"] == RECORDS * (4 * WIDTH * OUT + bias)
    assert found["ratio"] == found["dense_bytes"] / found["bytes"]
    assert found["disk_bytes"] == sum(map(len, files(filled).values()))
    assert (found["records"], found["samples"], found["steps"]) == (RECORDS, RECORDED, STEPS * EPOCHS)
    assert (found["epochs"], found["first"], found["last"]) == ([0, 1], [0, 0], [1, 3])
    assert [(row["encoding"], row["precision"], row["gradients"], row["bytes"]) for row in found["encodings"]] == [
        ("factors", "exact", RECORDS, RECORDS * factors),
        ("dense", "exact", RECORDS, RECORDS * bias),
    ]
    assert [(row["parameter"], row["shape"], row["encodings"]) for row in found["parameters"]] == [
        ("fc.weight", [OUT, WIDTH], ["factors"]),
        ("fc.bias", [OUT], ["dense"]),
    ]
    # Samples 6 and 7 are drawn without being recorded, nobody ever draws 8.
    assert found["coverage"] == {"recorded": 6, "drawn": 8, "not_recorded": 2, "never_drawn": 1, "gaps": 0}
    assert found["commits"] == 3 and found["last_commit_at"].endswith("+00:00")
    assert found["rollbacks"] == []


def test_info_for_people_says_the_same(filled):
    text, messages = run("info", filled)
    assert messages == ""
    assert max(map(len, text.splitlines())) <= 100
    for expected in (str(filled), "12 of 6 samples", "2 drawn without, 1 never drawn", "factors", "fc.weight", "32x64"):
        assert expected in text


def test_info_tells_gaps_attempts_scopes_states_and_rollbacks(own):
    with timstore.open(own) as store:
        store.append_step(2, 0, [{"lr": 0.1}], sample_ids=[0, 1])
        row = {"strength": 1.0, "method": "closed form", "records": 2, "delta_norm": 1.0, "digest_before": "a"}
        store.append_rollback({**row, "at": "2026-01-01T00:00:00+00:00", "samples": [0], "digest_after": "b"})
        store.begin_attempt(1, 2, scope=(0, 1, 11))
    (found,) = json_of("info", own)
    # Steps (1, 2), (1, 3) and (2, 0) are superseded: of the second epoch four records stay.
    assert found["records"] == RECORDED + 4 and found["last"] == [1, 1]
    first, second = found["attempts"]
    assert (first["records"], second["records"], second["chosen"], second["recorded"]) == (10, 0, 3, "selected")
    # The scope names 11, which no step draws.
    assert found["coverage"]["never_drawn"] == 2
    assert found["rollbacks"] == [
        {"at": "2026-01-01T00:00:00+00:00", "samples": 1, "method": "closed form", "strength": 1.0}
    ]
    with timstore.open(own) as store:
        store.append_step(1, 2, [{"lr": 0.1}], sample_ids=[0, 1])
        store.append_states(1, 2, "exp_avg_sq", {"fc.bias": np.ones(OUT, np.float32)})
    (found,) = json_of("info", own)
    assert found["coverage"]["gaps"] == 2
    assert [(row["role"], row["parameters"]) for row in found["states"]] == [("exp_avg_sq", 1)]
    text, _ = run("info", own)
    for expected in ("2 gaps", "3 chosen", "exp_avg_sq", "1 sample by closed form"):
        assert expected in text


def test_info_shows_the_ten_largest_parameters_or_all(tmp_path):
    with timstore.open(tmp_path / "s", durability="os") as store:
        for number in range(12):
            store.append(0, number, 1, {f"p{number}": np.ones((number + 1, 4), np.float32)})
    few, everything = run("info", tmp_path / "s")[0], run("info", tmp_path / "s", "--all")[0]
    assert "p11" in few and "p1 " not in few and "and 2 smaller ones: --all lists them" in few
    assert "p1 " in everything and "smaller" not in everything
    assert len(json_of("info", tmp_path / "s")[0]["parameters"]) == 12


def test_info_of_an_empty_store_and_without_batches(tmp_path):
    timstore.open(tmp_path / "s", durability="os").close()
    text, _ = run("info", tmp_path / "s")
    assert "none" in text
    (found,) = json_of("info", tmp_path / "s")
    assert (found["records"], found["first"], found["ratio"], found["last_commit_at"]) == (0, None, None, None)
    with timstore.open(tmp_path / "s") as store:
        store.append(0, 0, 7, {"w": np.ones((2, 3), np.float32)})
    # Without a step's batch nobody knows who else was drawn.
    assert json_of("info", tmp_path / "s")[0]["coverage"] == {"recorded": 1} | dict.fromkeys(
        ("drawn", "not_recorded", "never_drawn", "gaps")
    )
    assert "do not name their batches" in run("info", tmp_path / "s")[0]


def test_sql_prints_csv_that_reads_back(filled):
    query = """SELECT sample, owner, NULL AS nothing, [1, 2] AS parts, owner || ', "' AS odd, sample > 0 AS positive
    FROM samples ORDER BY sample LIMIT 2"""
    text, messages = run("sql", filled, query)
    assert messages == ""
    assert list(csv.reader(io.StringIO(text))) == [
        ["sample", "owner", "nothing", "parts", "odd", "positive"],
        ["0", "u-0", "", "[1, 2]", 'u-0, "', "false"],
        ["1", "u-1", "", "[1, 2]", 'u-1, "', "true"],
    ]


def test_sql_prints_json_objects_of_plain_values(filled):
    query = """SELECT 1 AS a, 2 AS a, 3 AS a_2,
    1.5 AS decimal, 'NaN'::DOUBLE AS nan, DATE '2026-01-02' AS day, 'x'::BLOB AS blob,
    {'in': [1, NULL]} AS struct, 170141183460469231731687303715884105727::HUGEINT AS huge, true AS yes,
    TIMESTAMP '2026-01-02 03:04:05' AS at, INTERVAL 90 SECOND AS long, 'é' AS text"""
    assert json_of("sql", filled, query) == [
        {
            "a": 1,
            "a_2": 2,
            "a_2_2": 3,
            "decimal": 1.5,
            "nan": None,
            "day": "2026-01-02",
            "blob": "78",
            "struct": {"in": [1, None]},
            "huge": 2**127 - 1,
            "yes": True,
            "at": "2026-01-02T03:04:05",
            "long": 90.0,
            "text": "é",
        }
    ]
    assert json_of("sql", filled, "SELECT sample FROM samples WHERE false") == []


@pytest.mark.parametrize("query", [(), ("-",)])
def test_sql_reads_the_query_from_standard_input(filled, query):
    assert run("sql", filled, *query, given="SELECT count(*) AS n FROM records")[0] == f"n\n{RECORDS}\n"


@pytest.mark.parametrize(
    "query", ["SELECT * FROM nothing", "DROP TABLE records", "SELECT 1; SELECT 2", "", "SELECT 'a'::INT"]
)
def test_sql_that_fails_says_why_and_prints_nothing(filled, query):
    text, messages = run("sql", filled, query, code=1)
    assert text == "" and messages.startswith("error: ")


def test_sql_that_takes_more_memory_than_it_has_says_how_to_give_it_more(filled):
    query = "SELECT list(i) FROM range(20000000) t(i)"
    assert "pass more, --sql-memory 4GB" in run("sql", filled, query, "--sql-memory", "64MB", code=1)[1]
    assert run("sql", filled, "SELECT 1 AS a", "--sql-memory", "64MB")[0] == "a\n1\n"
    assert "error: --sql-memory is at least" in run("sql", filled, query, "--sql-memory", "1MB", code=1)[1]


def test_verify_ends_with_three_when_there_is_damage(own):
    text, _ = run("verify", own)
    assert text.startswith("sound")
    (victim,) = [one for one in own.rglob("*") if one.name == "gradients.parquet"][:1]
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    text, _ = run("verify", own, code=3)
    assert text.startswith("DAMAGED") and victim.name in text
    (found,) = json_of("verify", own, code=3)
    assert found["sound"] is False and found["findings"][0]["kind"] == "altered"
    # What is read of it is refused with the same code.
    assert run("sql", own, "FROM gradients", code=3)[1].startswith("error: ")


def test_a_newer_store_is_not_readable(own):
    (own / "timstore.json").write_bytes(b"{}\n")
    assert "error: timstore.json" in run("info", own, code=3)[1]


def test_compact_folds_what_it_said_it_would(own):
    before = files(own)
    assert json_of("compact", own, "--dry-run") == [{"dry_run": True, "commits": 3}]
    assert run("compact", own, "--dry-run") == ("would fold 3 commits\n", "")
    assert files(own) == before
    (done,) = json_of("compact", own)
    assert (done["dry_run"], done["commits"], done["compaction"]) == (False, 3, 1)
    assert run("compact", own)[0] == run("compact", own, "--dry-run")[0] == "nothing to fold\n"
    with timstore.open(own) as store:
        store.append(9, 0, 1, {"fc.bias": np.ones(OUT, np.float32)})
    assert run("compact", own)[0].startswith("folded 1 commit, ")
    assert run("verify", own)[0].startswith("sound")


@pytest.mark.parametrize(
    "arguments",
    [("info",), ("sql", "SELECT 1"), ("verify",), ("compact",), ("compact", "--dry-run"), ("export", "out")],
)
def test_a_verb_makes_no_store_and_says_that_there_is_none(tmp_path, arguments):
    verb, *rest = arguments
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "empty"):
        text, messages = run(verb, path, *rest, code=5)
        assert text == "" and messages.startswith(f"error: there is no store at {path}")
    assert [one.name for one in tmp_path.iterdir()] == ["empty"]


def test_who_asks_for_it_gets_where_an_error_came_from(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMSTORE_TRACEBACK", "1")
    with pytest.raises(timstore.NotFoundError):
        app(["info", str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    "arguments", [("info",), ("sql",), ("nothing",), ("info", "--nothing"), ("samples", "nothing")]
)
def test_wrong_usage_ends_with_two(arguments):
    text, messages = run(*arguments, code=2)
    assert text == "" and "Usage: timstore" in messages


def test_without_arguments_the_help_is_shown():
    text, messages = run(code=2)
    assert "Commands:" in text + messages


def test_an_empty_question_and_a_file_in_place_of_a_store_are_said(filled, tmp_path):
    for arguments, given in ((["sql", filled, " "], None), (["sql", filled], "\n")):
        assert "error: the question is empty" in run(*arguments, code=1, given=given)[1]
    (tmp_path / "f").write_text("a")
    for verb in (["info"], ["sql"], ["compact"]):
        given = [*verb, tmp_path / "f", *(["SELECT 1"] if verb == ["sql"] else [])]
        assert "f is a file, and a store is a folder" in run(*given, code=1)[1]
