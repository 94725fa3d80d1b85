"""Stores that earlier versions wrote are read, and written on in today's format."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import timstore

WRITTEN = Path(__file__).parent / "written"
MOMENTS = [(step, sample) for step in range(2) for sample in (3, 5)]


@pytest.fixture
def store_of_1_1(tmp_path: Path) -> Path:
    with zipfile.ZipFile(WRITTEN / "format-1.1.zip") as archive:
        archive.extractall(tmp_path / "run.tim")
    for path in (tmp_path / "run.tim", *(tmp_path / "run.tim").rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return tmp_path / "run.tim"


def recorded() -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """Return the dense gradients that were appended when the store of format 1.1 was made."""
    random = np.random.default_rng(7)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    gradients = {}
    for moment in MOMENTS:
        inputs, outputs, embedding = draw(6, 40), draw(6, 24), np.zeros((300, 40), np.float32)
        outputs[0] = 0
        embedding[[2, 9]] = draw(2, 40)
        gradients[moment] = {"fc.weight": outputs.T @ inputs, "embed.weight": embedding, "fc.bias": draw(24)}
    return gradients


def test_a_store_of_format_1_1_reads_as_it_was_written(store_of_1_1: Path) -> None:
    assert b'"lz4"' in next(store_of_1_1.rglob("z/w40-float32/zarr.json")).read_bytes()
    with timstore.open(store_of_1_1, "r") as store:
        assert store.sql("SELECT count(*) FROM gradients").fetchall() == [(12,)]
        for (step, sample), gradients in recorded().items():
            for name, gradient in gradients.items():
                found = store.gradient(0, step, sample, name)
                np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5)
                if name != "fc.weight":
                    assert np.array_equal(found, gradient)


def test_what_is_added_to_a_store_of_format_1_1_asks_its_readers_for_the_new_codec(store_of_1_1: Path) -> None:
    before = set(store_of_1_1.glob("log/*/*.json"))
    added = np.arange(12, dtype=np.float32).reshape(3, 4)
    with timstore.open(store_of_1_1) as store:
        store.append(0, 2, 3, {"new.weight": added}, lr=0.1)
    with timstore.open(store_of_1_1, "r") as store:
        assert np.array_equal(store.gradient(0, 2, 3, "new.weight"), added)
        bias = recorded()[1, 5]["fc.bias"]
        assert np.array_equal(store.gradient(0, 1, 5, "fc.bias"), bias)
    for path in set(store_of_1_1.glob("log/*/*.json")) - before:
        assert json.loads(path.read_bytes().splitlines()[0])["reader_features"] == ["blosc-zstd"]
