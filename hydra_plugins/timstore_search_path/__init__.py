"""Lets Hydra find timstore's trainers in a checkout of OpenUnlearning, which stays as it is.

Hydra loads this in every program of the environment. It does nothing without OpenUnlearning's registry of trainers, and
imports timstore, and torch with it, only to make one of them.
"""

import sys
from functools import partial
from importlib import import_module
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

TRAINERS = ("TIMParameterRollback", "TIMRecorder")


class TimstoreSearchPath(SearchPathPlugin):
    """Adds the configurations, and the trainers to the registry: by now src/train.py has imported its own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        registry = getattr(sys.modules.get("trainer"), "TRAINER_REGISTRY", None)
        if not isinstance(registry, dict):
            return
        search_path.append(provider="timstore", path="pkg://timstore.integrations.conf")
        for name in TRAINERS:
            registry.setdefault(name, partial(_made, name))  # one that the checkout has of this name stays


def _made(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(import_module("timstore.integrations.openunlearning"), name)(*args, **kwargs)
