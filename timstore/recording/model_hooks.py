"""All hooks on a model and its parameters, made in an order in which each is given what it needs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from torch import nn

from timstore.options import RecordOptions
from timstore.recording.capture import Capture
from timstore.recording.forward_hooks import Forwards
from timstore.recording.pending import OwnPass, Pending, Running
from timstore.recording.per_sample_backward import Passes
from timstore.recording.reservoir import Reservoir
from timstore.recording.standstill import Standstill


class ModelHooks:
    """What sees a model's forward and backward passes.

    Args:
        parameters: those that each optimizer trains, by name.
        samples: the ids to record, None for all.
        processes: how many average their gradients.
        whole: keep whole gradients until they are consumed.
        keys, reservoir, keep_hashes, stills: as `Forwards` takes them.

    Attributes:
        awaiting: what each optimizer has pending.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Mapping[str, nn.Parameter]],
        samples: frozenset[int] | None,
        options: RecordOptions,
        *,
        processes: int = 1,
        whole: bool = False,
        keys: Mapping[str, int] | None = None,
        reservoir: Reservoir | None = None,
        keep_hashes: Callable[[Mapping[int, str]], None] = lambda _: None,
        stills: Sequence[Standstill] = (),
    ) -> None:
        scale = 1 / processes
        together = {name: parameter for trained in parameters for name, parameter in trained.items()}
        own = OwnPass()
        with ExitStack() as made:
            self.awaiting = [Pending(trained, own, whole=whole, averaged=processes > 1) for trained in parameters]
            for pending in self.awaiting:
                made.callback(pending.clip.remove)
            self.running = Running(self.awaiting, samples)
            self.capture = Capture(model, together, self.running, own, mode=options.capture, scale=scale)
            made.callback(self.capture.remove)
            passes = Passes(together, self.capture, self.running, axis=options.batch_axis, scale=scale)
            self.forwards = Forwards(
                model,
                self.running,
                self.capture,
                passes,
                samples=samples,
                axis=options.batch_axis,
                keys=keys,
                by_content=options.by_content,
                reservoir=reservoir,
                keep_hashes=keep_hashes,
                stills=stills,
            )
            made.callback(self.forwards.remove)
            self._handles = made.pop_all()

    def remove(self) -> None:
        """Leave no hook behind, and let go of what awaits a step."""
        self.running.discard()
        self.running.end()
        self._handles.close()
