"""Which modules are hooked, and how each is captured."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from timstore.recording.modules import ConvKind, EmbeddingKind, Kind, LinearKind, TransposedLinearKind
from timstore.recording.recomputed_modules import BatchNormKind, LayerNormKind, LookUpKind, ReplayedKind

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def hooked_modules(
    model: nn.Module, wanted: Callable[[Any], bool], replaying: Callable[[], Any]
) -> Iterator[Kind | tuple[str, nn.MultiheadAttention]]:
    """Yield every module that holds wanted parameters: its kind, or an attention whose projections are to be seen.

    A parameter that a leaf holds is the leaf's, whoever else holds it too (BERT's decoder and its head hold one bias).

    Raises:
        CoverageError: a module's gradient cannot be seen.
    """
    leaves = {
        id(parameter)
        for module in model.modules()
        if next(module.children(), None) is None
        for parameter in module.parameters(recurse=False)
    }
    for name, module in model.named_modules():
        name = name or type(module).__name__
        own = [parameter for parameter in module.parameters(recurse=False) if wanted(parameter)]
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            if any(wanted(parameter) for parameter in module.parameters()):
                yield name, module
        elif own and next(module.children(), None) is None:
            yield kind_of(name, module, replaying)
        elif any(id(parameter) not in leaves for parameter in own):
            yield ReplayedKind(name, module, replaying, apart=leaves)


def kind_of(name: str, module: nn.Module, replaying: Callable[[], Any]) -> Kind:
    """Return how a module without children is captured.

    Raises:
        CoverageError: its gradient is not a sum over samples.
    """
    forward = None if "forward" in vars(module) else type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return LinearKind(name, module)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return TransposedLinearKind(name, module)
    if any(isinstance(module, one) and forward is one.forward for one in _CONVOLUTIONS):
        return ConvKind(name, module)
    if isinstance(module, nn.Embedding):
        if forward is nn.Embedding.forward:
            return EmbeddingKind(name, module)
        return LookUpKind(name, module, replaying)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return BatchNormKind(name, module)
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return LayerNormKind(name, module)
    return ReplayedKind(name, module, replaying)
