"""A store of which every number is known, and the command line to ask it."""

import json
import os
import subprocess
import sys

import numpy as np
from typer.testing import CliRunner

import timstore
from timstore.cli import app

TOKENS, WIDTH, OUT = 3, 64, 32
# Of eight samples, two are drawn in each of four steps of two epochs; the last two are not recorded.
RECORDED, STEPS, EPOCHS = 6, 4, 2


def fill(path):
    """Record six of eight samples for two epochs, in two commits, and say who owns them."""
    random = np.random.default_rng(0)

    def numbers(*shape):
        return random.standard_normal(shape, np.float32)

    with timstore.open(path, durability="os") as store:
        for epoch in range(EPOCHS):
            for step in range(STEPS):
                ids = [2 * step, 2 * step + 1]
                group = {"optimizer": "SGD", "lr": 0.1}
                store.append_step(epoch, step, [group], sample_ids=ids, consumed_ratio=1.0)
                for sample in ids[: 2 * (step < STEPS - 1)]:
                    gradients = {
                        "fc.weight": timstore.Factors(numbers(TOKENS, WIDTH), numbers(TOKENS, OUT)),
                        "fc.bias": numbers(OUT),
                    }
                    store.append(epoch, step, sample, gradients, loss=1.0, tokens=TOKENS)
            store.commit()
        store.samples.update([{"sample": sample, "owner": f"u-{sample % 3}"} for sample in range(9)])
    return path


def run(*arguments, code=0, given=None):
    """Run the command line in this process, hold it to an exit code and return what it wrote to (stdout, stderr)."""
    environment = {"COLUMNS": "80", "TERM": "dumb"}
    result = CliRunner().invoke(app, list(map(str, arguments)), input=given, env=environment, prog_name="timstore")
    assert result.exit_code == code, (arguments, result.output, result.exception)
    return result.stdout, result.stderr


def json_of(*arguments, code=0, given=None):
    """Return the objects that a command prints with --json; nothing else may be on stdout."""
    stdout, _ = run(*arguments, "--json", code=code, given=given)
    return [json.loads(line) for line in stdout.splitlines()]


def process(*arguments, **options):
    """Run the command line in a process of its own."""
    environment = {**os.environ, "COLUMNS": "80", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "timstore", *map(str, arguments)],
        env=environment,
        text=True,
        timeout=120,
        **{"capture_output": True, "stdin": subprocess.DEVNULL} | options,
    )
