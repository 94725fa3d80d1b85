"""The main job on real text: train, record, ask in SQL, roll back, and compare with retraining.

A small Llama (1.3 M parameters) is pre-trained on sources of Python's standard library, then fine-tuned for
two epochs on other sources of it, 16 sequences of one more file among them. That fine-tuning is recorded.
The 16 are then rolled back, and the result is held against the same fine-tuning without them, and against
one in another batch order: the noise that retraining itself has.

Run: scripts/demo (3 to 4 minutes on two cores; --seed for another run, --store to keep the recorded run)
Ends with an error if the rolled-back model is farther from the retrained one than issue-sized limits allow.
"""

import argparse
import copy
import json
import math
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from language import (
    BATCH,
    EPOCHS,
    FORGET,
    FORGOTTEN,
    PRE_STEPS,
    SEQUENCES,
    Text,
    fine_tune,
    log_chances,
    new_model,
    pre_train,
)
from measuring import measured
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaForCausalLM

import timstore

LR, DECAY = 2e-4, 0.01
JSON_RECORDS = 4

QUESTIONS = {
    "Which forgotten sequences pulled hardest on the model?": """
        SELECT sample, any_value(line) AS starts_with, count(*) AS records, round(sum(norm), 3) AS pull
        FROM records JOIN samples USING (sample) GROUP BY sample ORDER BY pull DESC LIMIT 4""",
    "Where in the model did they pull?": """
        SELECT regexp_extract(parameter, '(embed_tokens|self_attn|mlp|norm)') AS part, encoding,
               round(sqrt(sum(norm * norm)), 3) AS pull, sum(bytes) AS bytes, sum(dense_bytes) AS dense_bytes
        FROM gradients GROUP BY ALL ORDER BY pull DESC""",
    "What did the optimizer do, and in how many of its steps were they?": """
        SELECT epoch, count(*) AS steps, count(*) FILTER (recorded > 0) AS with_forgotten,
               count(*) FILTER (consumed_ratio < 0.9999) AS clipped, round(avg(lr), 6) AS mean_lr
        FROM steps LEFT JOIN (SELECT epoch, step, count(*) AS recorded FROM records GROUP BY ALL) USING (epoch, step)
        GROUP BY epoch ORDER BY epoch""",
}

console = Console(width=118, highlight=False)
started = time.perf_counter()


def say(text: str) -> None:
    console.print(f"[{time.perf_counter() - started:4.0f} s] {text}", markup=False)


def adamw(model: LlamaForCausalLM) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)


def judge(models: Mapping[str, LlamaForCausalLM], text: Text) -> dict[str, dict[str, tuple[float, float]]]:
    """Return, for each model and text, (loss, mean KL(retrained || model) per token), and print them."""
    reference = log_chances(models["retrained"], text)
    table = Table("model", title="Loss, and mean KL(retrained || model) per token", title_justify="left")
    for name in reference:
        table.add_column(f"loss {name}", justify="right")
        table.add_column(f"KL {name}", justify="right")
    result: dict[str, dict[str, tuple[float, float]]] = {}
    for model_name, model in models.items():
        own, row = log_chances(model, text), {}
        for name, tokens in text.judged().items():
            loss = -own[name].gather(-1, tokens[:, 1:, None]).mean().item()
            kl = F.kl_div(own[name], reference[name], log_target=True, reduction="sum").item()
            row[name] = loss, kl / own[name][..., 0].numel()
        result[model_name] = row
        cells = (cell for loss, kl in row.values() for cell in (f"{loss:.4f}", f"{kl:.1e}" if kl else "0"))
        table.add_row(model_name, *cells)
    console.print(table)
    return result


def ask(store: timstore.Store) -> None:
    for question, query in QUESTIONS.items():
        relation = store.sql(query)
        table = Table(*relation.columns, title=question, title_justify="left")
        for row in relation.fetchall():
            table.add_row(*(str(value) for value in row))
        console.print(table)


def weigh(store: timstore.Store) -> None:
    """Write the store's records in other layouts, really, and print the bytes of each."""
    records = [
        {name: record.dense(name) for name in record.gradients}
        for record in track(list(store.read()), "dense records", console=console, transient=True)
    ]
    sizes = {"timstore, exact": (len(records), sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file()))}

    def raw(path: Path) -> None:
        with path.open("wb") as file:
            for record in records:
                for gradient in record.values():
                    gradient.tofile(file)

    def as_json(path: Path) -> None:
        with path.open("w") as file:
            for number, record in enumerate(records[:JSON_RECORDS]):
                lists = {name: gradient.tolist() for name, gradient in record.items()}
                json.dump({"sample_gradients": {str(number): lists}}, file)

    def as_npz(path: Path) -> None:
        arrays = {f"{number}/{name}": one for number, record in enumerate(records) for name, one in record.items()}
        np.savez_compressed(path, **arrays)

    writers: dict[str, tuple[int, Callable[[Path], object]]] = {
        "dense float32, raw": (len(records), raw),
        "pickle": (len(records), lambda path: path.write_bytes(pickle.dumps(records))),
        "npz, compressed": (len(records), as_npz),
        f"JSON (only {JSON_RECORDS} records)": (JSON_RECORDS, as_json),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (count, write) in track(writers.items(), "other layouts", console=console, transient=True):
            path = Path(folder, "records.npz")
            write(path)
            sizes[name] = count, path.stat().st_size
            path.unlink()
    table = Table("on disk", title=f"Bytes for {len(records)} records of {FORGET} sequences", title_justify="left")
    for column in ("records written", "MB", "KB per record", "against timstore"):
        table.add_column(column, justify="right")
    ours = sizes["timstore, exact"][1] / len(records)
    for name, (count, written) in sizes.items():
        each = written / count
        table.add_row(name, str(count), f"{written / 1e6:.1f}", f"{each / 1e3:.0f}", f"{each / ours:.2f}x")
    console.print(table)


def failures(result: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[str]:
    """Return the limits that the rolled-back model does not keep."""
    rolled, retrained, found = result["first order + probe"], result["retrained"], []
    for other, name in (("another order", "forget"), ("trained", "forget"), ("another order", "held-out")):
        ours, theirs = rolled[name][1], result[other][name][1]
        if ours > theirs / 4:
            found.append(f"KL on {name} text is {ours:.2e}, more than a quarter of {theirs:.2e} ({other})")
    for name in ("retain", "held-out"):
        change = rolled[name][0] / retrained[name][0] - 1
        if abs(change) > 0.005:
            found.append(f"loss on {name} text is {change:+.2%} off the retrained model's, more than 0.5 %")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="keep the recorded run here")
    arguments = parser.parse_args()
    seed = arguments.seed
    torch.manual_seed(seed)
    text = Text.read(seed)
    model = new_model()
    say(f"pre-training a Llama of {sum(p.numel() for p in model.parameters()):,} parameters, {PRE_STEPS} steps")
    pre_train(model, text.pre, seed)
    start = copy.deepcopy(model)

    with (
        tempfile.TemporaryDirectory() as folder,
        timstore.open(arguments.store or Path(folder, "run.tim"), "x") as store,
    ):
        say(f"fine-tuning on {SEQUENCES} sequences, {EPOCHS} epochs, recording {FORGET} of {FORGOTTEN}.py")
        with measured() as recording:
            fine_tune(model, text, adamw(model), seed, store)
        lines = (text.tokenizer.decode(text.tuning[one].tolist()).strip().partition("\n")[0] for one in text.forget_ids)
        store.samples.update([{"sample": i, "line": line} for i, line in zip(text.forget_ids, lines, strict=True)])
        ask(store)

        models = {"trained": copy.deepcopy(model), "first order": copy.deepcopy(model), "first order + probe": model}
        say("rolling back, first order only, on a copy")
        with measured() as first_order, warnings.catch_warnings():
            warnings.simplefilter("ignore", timstore.TimstoreWarning)  # it warns that a probe is missing
            store.rollback(models["first order"], text.forget_ids, probe=False)
        say("rolling back, by rows of the training that the store kept")
        with measured() as with_probe:
            report = store.rollback(model, text.forget_ids)
        console.print(str(report), markup=False)

        say("fine-tuning again without the forgotten sequences")
        models["retrained"] = copy.deepcopy(start)
        with measured() as retraining:
            fine_tune(models["retrained"], text, adamw(models["retrained"]), seed, without=text.forget_ids)
        say("and once more, in another order")
        models["another order"] = copy.deepcopy(start)
        fine_tune(models["another order"], text, adamw(models["another order"]), seed + 1000, without=text.forget_ids)

        result = judge(models, text)
        say("writing the same records in other layouts")
        weigh(store)

    table = Table("", "seconds", "peak extra memory, MB", title="Cost", title_justify="left")
    for name, cost in {
        "fine-tuning, recorded": recording,
        "rollback, first order": first_order,
        "rollback, first order + probe": with_probe,
        "retraining": retraining,
    }.items():
        table.add_row(name, f"{cost.seconds:.1f}", f"{cost.peak_bytes / 1e6:.0f}")
    console.print(table)
    steps = EPOCHS * math.ceil(SEQUENCES / BATCH)
    even = with_probe.seconds / retraining.seconds * steps
    console.print(
        f"Retraining grows with the training's length ({steps} steps here), the probe filter does not: it costs "
        f"as much as {even:.0f} steps of retraining.",
    )
    found = failures(result)
    say("done" if not found else "the rolled-back model is not close enough to the retrained one")
    for failure in found:
        print(f"scripts/demo: {failure}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
