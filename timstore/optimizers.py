"""Optimizer classes by the names they are recorded under."""

import torch

SGD_FAMILY, ADAM_FAMILY = ("SGD",), ("Adam", "AdamW")

# Their steps treat every element by itself, so that a parameter may be taken in blocks; others need whole matrices.
ELEMENTWISE = frozenset(
    ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
)


def class_name(kind: type) -> str:
    """Return torch's own classes by their name alone; a namesake or a subclass may step differently."""
    return kind.__name__ if getattr(torch.optim, kind.__name__, None) is kind else f"{kind.__module__}.{kind.__name__}"


def class_of(name: str, given: torch.optim.Optimizer | None) -> type[torch.optim.Optimizer] | None:
    """Return the class that was recorded under a name, None if it is not known.

    Args:
        given: an optimizer of that class, if it is not one of torch's own.
    """
    if given is not None and class_name(type(given)) == name:
        return type(given)
    found = getattr(torch.optim, name, None)
    return found if isinstance(found, type) else None
