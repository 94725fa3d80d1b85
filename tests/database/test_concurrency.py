"""Four writers, four readers and compactions at once: every answer is held against what was acknowledged before."""

import multiprocessing
import os
import random
import sys
import time

import numpy as np

import timstore

SECONDS = float(os.environ.get("TIMSTORE_STRESS_SECONDS", "10"))
WRITERS = READERS = 4
NOT_YET = -1


def gradient(writer, step):
    """Return what a writer records at a step: numbers that no other step or writer has."""
    return np.arange(6, dtype=np.float32) + 1000 * step + 7 * writer + 1


def write(path, writer, acknowledged, until, seed):
    draw = random.Random(seed)
    step = 0
    while time.time() < until:  # a handle does not live long: each is a writer of its own
        with timstore.open(path) as store:
            for _ in range(draw.randrange(1, 12)):
                for step in range(step, step + draw.randrange(1, 4)):  # noqa: B020 goes on where it stopped
                    gradients = {"w": gradient(writer, step), "v": gradient(writer, step).reshape(2, 3)}
                    store.append(0, step, writer, gradients, lr=0.5, rank=writer)
                step += 1
                store.commit()
                acknowledged[writer] = step - 1


def compact(path, until):
    folded = 0
    while time.time() < until:
        with timstore.open(path) as store:
            folded += store.compact().commits
    if not folded:
        sys.exit("nothing was folded")


def check(store, before, known, draw):
    """Hold one look against the model: what was acknowledged before it, and what an earlier look showed."""
    counts = dict(store.sql("SELECT sample, count(*) FROM records GROUP BY sample").fetchall())
    lasts = dict(store.sql("SELECT sample, max(step) FROM records GROUP BY sample").fetchall())
    rows = dict(store.sql("SELECT sample, count(*) FROM gradients GROUP BY sample").fetchall())
    steps = store.sql("SELECT rank, count(*), max(step) FROM steps GROUP BY rank").fetchall()
    assert {rank: (count, last) for rank, count, last in steps} == {one: (counts[one], lasts[one]) for one in counts}
    for writer, count in counts.items():
        assert lasts[writer] == count - 1, f"writer {writer}: {count} records up to step {lasts[writer]}"
        assert rows[writer] == 2 * count
    for writer, last in enumerate(before):
        assert counts.get(writer, 0) > last, f"writer {writer}: step {last} was acknowledged, {counts} are seen"
        assert counts.get(writer, 0) >= known.get(writer, 0), "what was seen before is gone"
    for writer in draw.sample(sorted(counts), min(2, len(counts))):
        step = draw.randrange(counts[writer])
        (record,) = store.read(f"sample = {writer} AND step = {step}")
        assert record.dense("w").tobytes() == gradient(writer, step).tobytes()
        assert record.dense("v").tobytes() == gradient(writer, step).tobytes()
    return counts


def read(path, acknowledged, until, looks, seed):
    draw = random.Random(seed)
    while time.time() < until:
        known = {}
        with timstore.open(path, "r") as store:
            for _ in range(draw.randrange(1, 8)):
                before = list(acknowledged)
                store.refresh()
                known = check(store, before, known, draw)
                with looks.get_lock():
                    looks.value += 1


def test_writers_readers_and_compactions_at_once_contradict_no_acknowledgement(tmp_path):
    path = tmp_path / "run"
    timstore.open(path).close()
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}, {SECONDS:.0f} s")
    # A child that is forked would share what torch's threads hold.
    context = multiprocessing.get_context("spawn")
    acknowledged = context.Array("q", [NOT_YET] * WRITERS)
    looks = context.Value("q", 0)
    until = time.time() + SECONDS + 5  # it takes a while until all have begun
    work = [(write, (path, one, acknowledged, until, seed + one)) for one in range(WRITERS)]
    work += [(read, (path, acknowledged, until, looks, seed - one)) for one in range(READERS)]
    jobs = [context.Process(target=target, args=given) for target, given in [*work, (compact, (path, until))]]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(SECONDS + 200)
    assert [job.exitcode for job in jobs] == [0] * len(jobs)
    with timstore.open(path, "r") as store:
        counts = check(store, list(acknowledged), {}, random.Random(seed))
        assert [counts[writer] for writer in range(WRITERS)] == [last + 1 for last in acknowledged]
        for record in store.read():
            assert record.dense("w").tobytes() == gradient(record.sample, record.step).tobytes()
        compactions = store.snapshot().view.compaction.number
    print(f"{sum(counts.values())} records, {looks.value} looks, {compactions} compactions")
    assert looks.value >= READERS and compactions > 1
