"""Directories of the older layout, written and looked at."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import timstore

Held = dict[tuple[int, int, int, str], np.ndarray]


def written(folder: Path, epochs: dict[int, Any], **info: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for epoch, samples in epochs.items():
        text = samples if isinstance(samples, str) else json.dumps({"sample_gradients": samples})
        (folder / f"epoch_{epoch}.json").write_text(text)
    if info:
        (folder / "global_info.json").write_text(json.dumps(info))
    return folder


def held(path: Path) -> Held:
    with timstore.open(path, "r") as store:
        return {
            (one.epoch, one.step, one.sample, name): one.dense(name) for one in store.read() for name in one.gradients
        }


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
