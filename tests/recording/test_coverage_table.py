"""Everything that is recorded against autograd one sample at a time, and what is refused; docs/coverage.md is this.

Renew it with `TIMSTORE_COVERAGE=write pytest tests/recording/test_coverage_table.py`.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from coverage_cases import CASES, IDS, SAMPLES, Case
from coverage_refusals import BEGIN, REFUSED, Refused
from references import Gradients, largest_error, one_by_one, recorded

import timstore

PRICE = "one more backward pass for each recorded sample"
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
PINS = Path(__file__).parents[2] / "scripts" / "constraints.txt"
COMMAND = "TIMSTORE_COVERAGE=write pytest tests/recording/test_coverage_table.py"

ALL = [case for cases in CASES.values() for case in cases]
measured: dict[str, float] = {}
warned: dict[str, str] = {}
refused: dict[str, str] = {}


def label(row: Case | Refused) -> str:
    return f"{row.group}: {row.name}" if row.name else row.group


def test_every_row_has_a_name_of_its_own() -> None:
    assert len({label(case) for case in ALL}) == len(ALL)
    assert len({label(one) for one in REFUSED}) == len(REFUSED)


@pytest.mark.parametrize("case", ALL, ids=label)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_recorded_gradients_are_those_of_autograd_one_sample_at_a_time(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = case.model()
    batches = case.batches()
    around = case.around or nullcontext
    options: dict[str, Any] = dict(case.options)
    if options.get("scaler") == "new":
        options["scaler"] = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
    scale = 1024.0 if "scaler" in options else 1.0
    want = one_by_one(model, batches, IDS, case.loss, around=around, scale=scale)
    told = bool(case.warns) or case.passes
    with warnings.catch_warnings(record=told) as caught:
        warnings.simplefilter("always" if told else "error", timstore.TimstoreWarning)
        samples = SAMPLES if not case.warns else sorted({one for ids in IDS for one in ids})
        steps = recorded(tmp_path / "s", model, batches, IDS, case.loss, samples, around=around, **options)
    messages = [str(one.message) for one in caught or () if issubclass(one.category, timstore.TimstoreWarning)]
    assert any(PRICE in one for one in messages) or not case.passes
    assert all(PRICE in one for one in messages if case.warns not in one or not case.warns)
    if case.warns:
        warned[label(case)] = next(one for one in messages if case.warns in one)
        want = {0: total(want)}
        steps = [({0: total(got)}, {(0, name): 0.0 for name in want[0]}) for got, _ in steps]
        samples = [0]
    error = max(largest_error(got, want, bounds, samples) for got, bounds in steps)
    assert error <= case.limit
    measured[label(case)] = error


def total(gradients: Gradients) -> dict[str, np.ndarray]:
    names = {name for one in gradients.values() for name in one}
    return {name: sum(one[name] for one in gradients.values() if name in one) for name in names}


@pytest.mark.parametrize("case", REFUSED, ids=label)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_cannot_be_recorded_is_refused_before_anything_changed(case: Refused, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = case.model()
    batches = case.batches()
    optimizer = case.make_optimizer(model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    when = BEGIN
    with timstore.open(tmp_path / "s") as store:
        with (
            pytest.raises(case.error, match=case.message) as caught,
            store.record(model, optimizer, **case.options),
        ):
            for when in case.run(model, optimizer, batches, case.loss):  # noqa: B007
                pass
        assert store.sql("SELECT count(*) FROM steps").fetchall() == [(0,)]
    assert when == case.when
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    refused[label(case)] = str(caught.value)


# --- the page ------------------------------------------------------------------------------------------------


def test_the_page_lists_what_was_measured_here() -> None:
    if len(measured) < len(ALL) or len(refused) < len(REFUSED):
        pytest.skip("only a part of the table was run, or it failed")
    page = "\n".join(written())
    if os.environ.get("TIMSTORE_COVERAGE") == "write":
        PAGE.write_text(page)
    assert PAGE.exists(), f"write it with {COMMAND}"
    kept = PAGE.read_text()
    if f"transformers=={transformers.__version__}" not in PINS.read_text().splitlines():
        pytest.skip("the page is of the pinned version of transformers")
    assert unmeasured(kept) == unmeasured(page), f"renew it with {COMMAND}"
    errors = [float(one) for one in re.findall(ERROR, kept)]
    assert [label(case) for error, case in zip(errors, ALL, strict=True) if error > case.limit] == []


ERROR = r"(?<=\| )\d\.\de[-+]\d\d(?= \|)"


def unmeasured(page: str) -> list[str]:
    """Return the page's lines without what another machine or version of torch may measure otherwise."""
    return re.sub(r"torch \S+ and", "torch and", re.sub(ERROR, "error", page)).splitlines()


def written() -> Iterator[str]:
    yield from INTRODUCTION.splitlines()
    for heading, cases in CASES.items():
        last = "warning" if cases[0].warns else None
        yield from ("", f"## {heading}", "")
        yield from table(
            ["what", "case", "error", "how", *([last] if last else [])],
            (
                [case.group, case.name, f"{measured[label(case)]:.1e}", case.how]
                + ([shortened(warned[label(case)])] if last else [])
                for case in cases
            ),
        )
    yield from ("", "## Refusals", "", "The model is as it was, and the store has no step.", "")
    yield from table(
        ["what", "case", "refused at", "message"],
        ([one.group, one.name, one.when, shortened(refused[label(one)])] for one in REFUSED),
    )
    yield ""


def table(heads: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for cells in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shortened(message: str) -> str:
    """Return a message's first sentence, or as much as has room, without numbers that rounding has a part in."""
    sentence = re.split(r"(?<=[^.]\.) (?=[A-Z])", re.sub(r" \(off by [^)]*\)", "", message))[0]
    return sentence if len(sentence) <= 200 else f"{sentence[:197].rpartition(' ')[0]} ..."


INTRODUCTION = f"""\
# What is recorded

A row is a model that is trained for two steps of two micro-batches, of four samples each. Three of the samples are
recorded. Each recorded gradient is held to autograd one sample at a time: the same batch runs again, and the losses of
all other samples are multiplied by zero. The error is the norm of the difference. It is divided by the sum over the
sample's tokens of what each adds to the gradient, in norm; for a Linear layer that is the product of the norms of what
came in and of the gradient at what came out. It is never divided by less than a hundredth of the sample's whole
gradient, since some gradients are nothing but rounding. The page shows the largest error of any parameter and sample.

The limit is 1e-5 for float32, 1e-12 for float64, and 1e-2 for half precision, in the weights or under autocast.

How a row is recorded:

- modules: hooks on the modules, which needs nothing to be set.
- found: the same, and the place of the batch is proved in the first backward pass.
- declared: the same, and the place of the batch is given, as the row says or with an id for every token.
- one more backward pass for each recorded sample: of the parameters that no module shows, which a warning names; with
  `capture="per-sample"` without the warning, and refused with `capture="modules"`.
- warned: the record holds what came through its sample's row, a part of which other samples caused. The sum of all
  samples' records is compared, and the error is that of the sum.

A test holds this page to what it measures. This renews it:

    {COMMAND}

Measured with torch {torch.__version__} and transformers {transformers.__version__}.
"""
