"""A model of transformers as its configuration describes it, without trained weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from timstore.errors import InvalidInputError, NotFoundError, StateError

if TYPE_CHECKING:
    from torch import nn


def untrained(folder: Path) -> "nn.Module":
    """Return the model that a directory's config.json describes, in its precision, on the CPU; always the same one.

    Nothing is downloaded, and no code that comes with a model is run.

    Raises:
        NotFoundError: there is no config.json.
        InvalidInputError: transformers does not understand it, or has no such model.
        StateError: transformers is not installed.
    """
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"there is no config.json in {folder}", path=str(folder))
    import torch

    try:
        import transformers
    except ImportError as error:
        raise StateError(
            f"a forecast builds the model with transformers, which cannot be imported ({error}): "
            "pip install 'timstore[hf]'",
            kind="not-installed",
        ) from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        names = getattr(config, "architectures", None) or ()
        kinds: list[Any] = [kind for name in names if _is_model(kind := getattr(transformers, name, None))]
        causal: Any = transformers.AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kinds[0](config) if kinds else causal.from_config(config)
    except Exception as error:  # transformers has none of its own for what a configuration can be wrong in
        raise InvalidInputError(f"transformers makes no model of {folder / 'config.json'}: {error}") from error
    # `torch_dtype` before transformers 4.56.
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return model.to(dtype).train() if dtype is not None else model.train()  # type: ignore[no-any-return]


def _is_model(kind: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)
