"""The library's messages name arguments as Python spells them; a command line has options."""

import re

_SPELLED = {
    "missing='skip'": "--skip-missing",
    'probe="auto"': "--probe kept",
    "names its class: pass model=, an nn.Module of the recorded class; its parameters are then read from the "
    "checkpoint": "names its class: pass the model's folder, with a config.json that does",
    "pass model=": "roll back in Python, and pass model=",
    "dry_run=True": "--dry-run",
    "in_place=True": "--in-place",
    "force=True": "--force",
    "allow_pickle=True": "--allow-pickle",
    **{f"{name}=": f"--{name}" for name in ("probe", "output", "where", "strength", "method", "lr", "scale")},
}
# `name=` alone, or `name=value` where that is an option of its own; not the `name=` of an example in Python.
_ARGUMENT = re.compile("(?<![a-z_])(" + "|".join(map(re.escape, _SPELLED)) + r")(?=[\s,.:;)]|$)")


def spelled(message: str) -> str:
    """Return a message with the options in the place of the arguments."""
    return _ARGUMENT.sub(lambda found: _SPELLED[found[1]], message)
