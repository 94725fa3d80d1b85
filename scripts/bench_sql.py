"""Opening a large store and asking it: 10,000 commits, 10 million gradient rows, before and after compaction.

The rows are those of a training that records 10 samples of a model of 100 parameters at every step, written through
the library's own log, without tensors, which SQL never reads. Beside it the same rows as a plain directory of Parquet
files, one a commit, and as JSON lines, both asked by DuckDB; JSON lines are a twentieth of the rows, their times
multiplied.

Run: python scripts/bench_sql.py (about 10 minutes on two cores, 3 GB of disk; --quick: 500 commits)
     python scripts/bench_sql.py --sweep (opening against commits, compacted and not)
"""

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import arguments, disk_bytes, show

import timstore
from timstore.format.local_files import LocalObjects
from timstore.format.log import LogWriter, claim_attempt
from timstore.format.schemas import SCHEMAS, write_rows
from timstore.format.settings import read_settings

SAMPLES, PARAMETERS = 10, 100
JSON_SHARE = 20

QUESTIONS = {
    "pull of each sample": "SELECT sample, sum(norm) FROM gradients GROUP BY sample ORDER BY 2 DESC LIMIT 10",
    "norm of each parameter": "SELECT parameter, sqrt(sum(norm * norm)) FROM gradients GROUP BY parameter",
    "saving by encoding": "SELECT encoding, sum(dense_bytes) / sum(bytes) FROM gradients GROUP BY encoding",
    "one sample over time": "SELECT step, sum(norm) FROM gradients WHERE sample = 17 GROUP BY step ORDER BY step",
    "a window of steps": "SELECT count(*), max(norm) FROM gradients WHERE step BETWEEN 100 AND 120",
}


def rows_of(step: int, random: np.random.Generator) -> dict[str, pa.Table]:
    """Return the row tables of one step's commit."""
    samples = random.choice(1000, SAMPLES, replace=False)
    count = SAMPLES * PARAMETERS
    parameter = np.repeat(np.arange(PARAMETERS), SAMPLES)
    columns: dict[str, Any] = {
        "epoch": np.full(count, step // 500),
        "step": np.full(count, step),
        "sample": np.tile(samples, PARAMETERS),
        "parameter": [f"model.layers.{number // 10}.self_attn.proj{number % 10}.weight" for number in parameter],
        "encoding": np.where(parameter % 10 < 8, "factors", "dense"),
        "precision": ["exact"] * count,
        "norm": random.lognormal(size=count),
        "bytes": 4096 + 8 * parameter,
        "dense_bytes": 65536 + 128 * parameter,
    }
    nothing = {name: np.zeros(count, np.int64) for name in ("attempt", "rank", "part", "rel_error")}
    gradients = pa.table(columns | nothing)
    records = {"epoch": step // 500, "step": step, "attempt": 0, "rank": 0, "norm": 1.0, "bytes": 450_000}
    steps = {"epoch": step // 500, "step": step, "attempt": 0, "rank": 0, "group_id": 0, "lr": 0.1, "optimizer": "SGD"}
    return {
        "records": pa.Table.from_pylist([{**records, "sample": int(one)} for one in samples], SCHEMAS["records"]),
        "gradients": gradients.select(SCHEMAS["gradients"].names).cast(SCHEMAS["gradients"]),
        "steps": pa.Table.from_pylist([steps], SCHEMAS["steps"]),
    }


class Filler:
    """Writes commits of rows, into a store and beside it."""

    def __init__(self, path: Path) -> None:
        timstore.open(path, "x", durability="os").close()
        objects = LocalObjects(path, durable=False)
        claim_attempt(objects, 0, 0, "all", 1, first=True)
        self._log = LogWriter(objects, read_settings(objects))
        self._random = np.random.default_rng(0)
        self.step = 0

    def commit(self, parquet: Path | None = None) -> None:
        """Write the next step."""
        tables = rows_of(self.step, self._random)

        def build() -> Iterator[tuple[str, bytes, str, int, int]]:
            for kind, table in tables.items():
                yield f"{kind}.parquet", write_rows(table, kind), kind, table.nbytes, table.num_rows

        at = (self.step // 500, self.step)
        self._log.commit(0, 0, (at, at), SAMPLES, build)
        if parquet is not None:
            pq.write_table(tables["gradients"], parquet / f"{self.step:06d}.parquet", compression="zstd")
        self.step += 1


def timed(action: Callable[[], Any], repeats: int = 1) -> float:
    """Return the median seconds of an action."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def opening(path: Path, repeats: int = 3) -> float:
    """Return the seconds from nothing to the first answer."""

    def look() -> None:
        with timstore.open(path, "r") as store:
            store.sql("SELECT count(*) FROM gradients").fetchall()

    return timed(look, repeats)


def asked(ask: Callable[[str], Any], repeats: int) -> dict[str, float]:
    return {name: timed(lambda query=query: ask(query), repeats) for name, query in QUESTIONS.items()}  # type: ignore[misc]


@contextlib.contextmanager
def committing(filler: Filler) -> Iterator[None]:
    """Commit without pause, in a thread, as a training that runs."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.02):
            filler.commit()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def compare(folder: Path, commits: int) -> list[dict[str, Any]]:
    """Return one row per operation, one column per layout."""
    store_path, parquet, lines = folder / "store.tim", folder / "parquet", folder / "rows.jsonl"
    parquet.mkdir()
    filler = Filler(store_path)
    for _ in range(commits):
        filler.commit(parquet)
    con = duckdb.connect(config={"threads": "2"})
    share = max(1, commits // JSON_SHARE)
    con.execute(f"COPY (FROM read_parquet('{parquet}/*.parquet') WHERE step < {share}) TO '{lines}' (FORMAT json)")

    plain = opening(store_path, 1)
    before = disk_bytes(store_path)
    with timstore.open(store_path) as store:
        folding = timed(store.compact)
    after = opening(store_path)
    with timstore.open(store_path, "r") as store:
        ours = asked(lambda query: store.sql(query).fetchall(), 5)

        def refresh() -> None:
            store.refresh()
            store.sql("SELECT count(*) FROM gradients").fetchall()

        seconds = []
        with committing(filler):
            for _ in range(5):
                begun = filler.step
                while filler.step == begun:
                    time.sleep(0.001)
                seconds.append(timed(refresh))
        refreshing = statistics.median(seconds)
    con.execute(f"CREATE VIEW gradients AS FROM read_parquet('{parquet}/*.parquet')")
    theirs = asked(lambda query: con.execute(query).fetchall(), 1)
    con.execute(f"CREATE OR REPLACE VIEW gradients AS FROM read_json('{lines}')")
    of_some = asked(lambda query: con.execute(query).fetchall(), 1)
    scaled = {name: seconds * commits / share for name, seconds in of_some.items()}
    size = commits * SAMPLES * PARAMETERS
    rows: list[dict[str, Any]] = [
        {"seconds": f"open, {commits:,} commits, {size:,} rows", "timstore": plain, "compacted": after},
        {"seconds": "compaction of all", "compacted": folding},
        {"seconds": "refresh while a writer commits", "compacted": refreshing},
    ]
    for name in QUESTIONS:
        row = {"seconds": name, "compacted": ours[name], "Parquet files": theirs[name], "JSON lines": scaled[name]}
        rows.append({**row, "Parquet : ours": theirs[name] / ours[name]})
    sizes = {"timstore": before / 1e6, "compacted": disk_bytes(store_path) / 1e6}
    rest = {"Parquet files": disk_bytes(parquet) / 1e6, "JSON lines": disk_bytes(lines) / 1e6 * commits / share}
    rows.append({"seconds": "MB on disk", **sizes, **rest})
    columns = ("seconds", "timstore", "compacted", "Parquet files", "JSON lines", "Parquet : ours")
    return [{name: row.get(name) for name in columns} for row in rows]


def sweep(folder: Path, most: int) -> list[dict[str, Any]]:
    """Return the seconds of opening against the number of commits, half of them compacted and none of them."""
    rows = []
    filler = Filler(folder / "store.tim")
    for commits in (most // 8, most // 4, most // 2, most):
        while filler.step < commits:
            filler.commit()
        rows.append({"commits": commits, "not compacted": opening(folder / "store.tim")})
    with timstore.open(folder / "store.tim") as store:
        store.compact()
    rows[-1]["compacted"] = opening(folder / "store.tim")
    for more in (most // 8, most // 4, most // 2, most):
        while filler.step < most + more:
            filler.commit()
        rows.append({"commits": most + more, f"since the compaction at {most}": opening(folder / "store.tim")})
    columns = ("commits", "not compacted", "compacted", f"since the compaction at {most}")
    return [{name: row.get(name) for name in columns} for row in rows]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sweep", action="store_true", help="opening against the number of commits")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.sweep:
            rows = sweep(Path(folder), 200 if given.quick else 4000)
            show("Opening, seconds", rows, as_json=given.json)
        else:
            rows = compare(Path(folder), 500 if given.quick else 10_000)
            show("A large store in SQL", rows, as_json=given.json)


if __name__ == "__main__":
    main()
