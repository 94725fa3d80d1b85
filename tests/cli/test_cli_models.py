"""The verbs that change checkpoints, build models and move trajectories: what they pass on, ask, and refuse."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_stores import OUT, RECORDED, WIDTH, fill, json_of, run
from safetensors.torch import save_file

import timstore
from timstore.rollbacks import RollbackReport

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
REPORT = RollbackReport(
    samples=(3,),
    skipped=(),
    records=2,
    parameters=10,
    method="closed form",
    approximates="little",
    denominator="kept",
    clipping="none",
    strength=1.0,
    dry_run=False,
    model="the last one",
    delta_norm=1.0,
    relative_change=0.1,
    error_bound=0.0,
    rounding=0.0,
    read_bytes=8,
    seconds=0.1,
    rollback_id="ab",
    warnings=("first order only",),
)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("cli") / "run.tim")


@pytest.fixture
def calls(monkeypatch):
    """What `timstore.rollback` is called with; it reports and warns, and does nothing."""
    made = []

    def rollback(*positional, **named):
        made.append((positional, named))
        for warning in ("first order only", "of another kind"):
            warnings.warn(warning, timstore.TimstoreWarning, stacklevel=1)
        return REPORT

    monkeypatch.setattr(timstore, "rollback", rollback)
    return made


@pytest.mark.parametrize(
    ("ids", "expected"), [("17", [17]), ("17,42", [17, 42]), (" 17, 42,", [17, 42]), ("-5,+6", [-5, 6])]
)
def test_rollback_takes_ids(filled, calls, ids, expected):
    run("rollback", "model", "--store", filled, "--ids", ids, "-o", "new")
    ((target, chosen, store), named) = calls[0]
    assert (target, chosen, store) == (Path("model"), expected, filled)
    assert named == {
        "output": Path("new"),
        "in_place": False,
        "where": None,
        "strength": 1.0,
        "method": "auto",
        "memory_limit": "512MB",
        "dry_run": False,
        "force": False,
    }


def test_rollback_takes_ids_from_a_file_and_by_sql(filled, calls, tmp_path):
    (tmp_path / "ids").write_text("17\n42, 3\n\n")
    run("rollback", "model", "--store", filled, "--ids-file", tmp_path / "ids", "--dry-run")
    options = ("--where", "sample < 3", "--in-place", "--yes", "--strength", "0.5", "--method", "final moment")
    run("rollback", "model", "--store", filled, *options, "--memory-limit", "1GB", "--skip-missing", "--force")
    assert calls[0][0][1] == [17, 42, 3]
    assert calls[1][0][1] is None
    assert calls[1][1] == {
        "output": None,
        "in_place": True,
        "where": "sample < 3",
        "strength": 0.5,
        "method": "final moment",
        "memory_limit": "1GB",
        "dry_run": False,
        "force": True,
        "missing": "skip",
    }


def test_rollback_prints_its_report_and_says_a_warning_once(filled, calls):
    text, messages = run("rollback", "model", "--store", filled, "--ids", "3", "--dry-run")
    assert text == f"{REPORT}\n" and messages == "warning: of another kind\n"
    (found,) = json_of("rollback", "model", "--store", filled, "--ids", "3", "--dry-run")
    assert found == REPORT.to_dict()


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "new"),
        ("--ids", "3"),
        ("--ids", "3", "--where", "true", "-o", "new"),
        ("--ids", "3", "-o", "new", "--in-place"),
        ("--ids", "", "-o", "new"),
        ("--ids", "3,x", "-o", "new"),
        ("--ids", "3", "-o", "new", "--strength", "1.5"),
        ("--ids", "3", "--in-place"),
        ("--ids", "3", "--dry-run", "--loss", "mse"),
    ],
)
def test_rollback_refuses_what_is_not_clear(filled, calls, options):
    text, messages = run("rollback", "model", "--store", filled, *options, code=2)
    assert text == "" and "Error: " in messages and calls == []


def test_rollback_needs_the_store_and_the_file(filled, calls, tmp_path):
    assert "there is no store" in run("rollback", "m", "--store", tmp_path / "no", "--ids", "3", "--dry-run", code=5)[1]
    assert "no: No such file" in run("rollback", "m", "--store", filled, "--ids-file", "no", "--dry-run", code=5)[1]
    assert calls == []


def test_rollback_reads_a_probe_from_a_file(filled, calls, tmp_path):
    rows = [{"input_ids": [5, 6, number]} for number in range(10)] + [{"input_ids": [1, 2], "labels": [-100, 2]}]
    (tmp_path / "probe.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("rollback", "m", "--store", filled, "--ids", "3", "--dry-run", "--probe", tmp_path / "probe.jsonl")
    batches = calls[0][1]["probe"]
    assert [batch["input_ids"].shape for batch in batches] == [(8, 3), (2, 3), (1, 2)]
    assert batches[1]["input_ids"].tolist() == [[5, 6, 8], [5, 6, 9]]
    assert batches[2]["labels"].tolist() == [[-100, 2]]
    for content in ('{"input_ids": 5}', '{"input_ids": [1.5]}', '{"tokens": [1]}', "nonsense"):
        (tmp_path / "probe.jsonl").write_text(content)
        options = ("--ids", "3", "--dry-run", "--probe", tmp_path / "probe.jsonl")
        assert "probe.jsonl" in run("rollback", "m", "--store", filled, *options, code=1)[1]


def test_rollback_takes_the_probe_that_the_store_keeps(filled, calls, tmp_path):
    options = ("--ids", "3", "--dry-run", "--probe", "kept")
    assert "keeps no probe" in run("rollback", "m", "--store", filled, *options, code=5)[1]
    path = shutil.copytree(filled, tmp_path / "run.tim")
    with timstore.open(path) as store:
        store.keep_probe([{"input_ids": np.array([[1, 2]])}], loss="cross_entropy")
    run("rollback", "m", "--store", path, *options)
    run("rollback", "m", "--store", path, *options, "--loss", "mse")
    assert calls[0][1]["probe"] == "auto" and "loss" not in calls[0][1] and calls[1][1]["loss"] == "mse"


def test_messages_name_options_as_a_command_line_does(filled, monkeypatch):
    def refuse(*_, **__):
        raise timstore.CoverageError("no records; missing='skip' goes on, or pass output=, or model=net, or lr=0.1")

    monkeypatch.setattr(timstore, "rollback", refuse)
    _, messages = run("rollback", "m", "--store", filled, "--ids", "3", "--dry-run", code=1)
    assert messages == "error: no records; --skip-missing goes on, or pass --output, or model=net, or lr=0.1\n"


def test_a_probe_of_a_single_file_is_told_what_a_command_line_can_do(filled, tmp_path):
    held = {"fc.weight": torch.zeros(OUT, WIDTH), "fc.bias": torch.zeros(OUT)}
    save_file(held, tmp_path / "a.safetensors")
    (tmp_path / "probe.jsonl").write_text('{"input_ids": [1, 2]}')
    options = ("--store", filled, "--ids", "3", "--dry-run", "--probe", tmp_path / "probe.jsonl")
    _, messages = run("rollback", tmp_path / "a.safetensors", *options, code=1)
    assert "names its class: pass the model's folder, with a config.json that does\n" in messages
    assert "model=" not in messages
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Unheard"]}')
    save_file(held, tmp_path / "model" / "model.safetensors")
    assert (
        "roll back in Python, and pass model=, an nn.Module" in run("rollback", tmp_path / "model", *options, code=1)[1]
    )


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def test_forecast_is_that_of_the_library_and_the_same_again(model):
    options = ("--samples", "5", "--steps", "4", "--tokens", "16", "--precision", "bfloat16", "--epochs", "2")
    (found,) = json_of("forecast", model, *options)
    assert (found["records"], found["steps"], found["precision"]) == (10, 4, "bfloat16")
    assert found["total_bytes"] > found["records"] * found["record_bytes"] > 10_000
    (whole,) = json_of("forecast", model, *options, "--optimizer-history", "gradients")
    assert whole["gradients_bytes"] > 0 == found["gradients_bytes"]
    assert whole["record_bytes"] == found["record_bytes"]


def test_forecast_takes_the_precision_of_the_model(model):
    from timstore.cli.untrained import untrained

    state = torch.get_rng_state()
    assert {one.dtype for one in untrained(model).parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)
    (model / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "bfloat16", "architectures": None}))
    assert {one.dtype for one in untrained(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "tokens", "said"),
    [
        ({"model_type": "nothing"}, 16, "transformers makes no model of"),
        ({"hidden_size": "wide"}, 16, "transformers makes no model of"),
        ({"architectures": ["LlamaForSequenceClassification"]}, 16, "of tokens= for a language model"),
    ],
)
def test_forecast_of_what_is_no_language_model_is_one_sentence(model, changes, tokens, said):
    (model / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    text, messages = run("forecast", model, "--samples", "2", "--steps", "2", "--tokens", tokens, code=1)
    assert text == "" and said in messages


def test_forecast_needs_a_configuration_and_transformers(model, tmp_path, monkeypatch):
    options = ("--samples", "2", "--steps", "2", "--tokens", "8")
    assert "no config.json in" in run("forecast", tmp_path, *options, code=5)[1]
    assert "--samples" in run("forecast", model, "--samples", "0", "--steps", "2", "--tokens", "8", code=2)[1]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'timstore[hf]'" in run("forecast", model, *options, code=1)[1]


@pytest.mark.parametrize(("layout", "ending"), [("json", "json"), ("pickle", "pkl")])
def test_what_is_exported_is_imported_again(filled, tmp_path, layout, ending):
    run("export", filled, tmp_path / "out", "--format", layout, "--where", "epoch = 1")
    assert (tmp_path / "out" / f"epoch_1.{ending}").exists()
    allow = ("--allow-pickle",) if layout == "pickle" else ()
    if allow:
        assert "--allow-pickle" in run("import", tmp_path / "out", tmp_path / "again.tim", code=1)[1]
    (found,) = json_of("import", tmp_path / "out", tmp_path / "again.tim", *allow)
    assert found["records"] == RECORDED
    with timstore.open(filled, "r") as old, timstore.open(tmp_path / "again.tim", "r") as new:
        query = "SELECT step, sample FROM records WHERE epoch = 1 ORDER BY ALL"
        assert new.sql(query).fetchall() == old.sql(query).fetchall()
        assert np.array_equal(new.gradient(1, 2, 4, "fc.weight"), old.gradient(1, 2, 4, "fc.weight"))


def test_import_asks_before_it_adds_to_a_store(filled, tmp_path):
    run("export", filled, tmp_path / "out", "--where", "sample = 3")
    text, messages = run("import", tmp_path / "out", filled, code=2)
    assert text == "" and "a store of 3 commits, will be added to" in messages and "--yes" in messages


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "import_trajectories",
            (),
            {"format": "auto", "lr": None, "scale": None, "allow_pickle": False, "dry_run": False},
        ),
        (
            "import_trajectories",
            ("--format", "pickle", "--lr", "1e-4", "--scale", "0.5", "--allow-pickle", "--dry-run"),
            {"format": "pickle", "lr": 1e-4, "scale": 0.5, "allow_pickle": True, "dry_run": True},
        ),
        ("export_trajectories", (), {"format": "json", "where": None}),
        ("export_trajectories", ("--format", "pickle", "--where", "true"), {"format": "pickle", "where": "true"}),
    ],
)
def test_trajectories_go_where_and_as_they_are_told(filled, tmp_path, monkeypatch, name, options, expected):
    from timstore import legacy

    made = []
    report = legacy.Exported if name.startswith("export") else legacy.Imported
    fields = {one: 0 for one in report.__dataclass_fields__}
    monkeypatch.setattr(legacy, name, lambda *places, **named: made.append((places, named)) or report(**fields))
    places = (tmp_path / "in", tmp_path / "new.tim") if name.startswith("import") else (filled, tmp_path / "out")
    assert json_of(name.partition("_")[0], *places, *options) == [fields]
    ((first, second), named) = made[0]
    assert (getattr(first, "path", first), second) == places and named == expected


def test_an_unknown_format_is_wrong_usage(filled):
    assert "yaml" in run("export", filled, "out", "--format", "yaml", code=2)[1]
