"""What workers hold, by their own account: heartbeats, put beside the registry's rows."""

from collections.abc import Sequence

from neural_mri.backing.broker import AWAY, AsyncRedis
from neural_mri.backing.events import HeldModel, WorkerBeat, heartbeats_async
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from neural_mri.contract.models import ModelInfo, ModelState

__all__ = ("Holdings", "holdings")

_FOREMOST = (ModelState.RESIDENT, ModelState.LOADING, ModelState.UNLOADING)
"""Of several workers' states the one that says most about what can be scanned."""


class Holdings:
    """Workers heard of lately. `is_known` is False while Redis is away: then nothing can be said."""

    def __init__(self, beats: Sequence[WorkerBeat], *, is_known: bool) -> None:
        self.beats = tuple(beats)
        self.is_known = is_known

    def workers(self, revision: str) -> tuple[str, ...]:
        """Workers that hold these weights, or are about to."""
        return tuple(
            beat.worker
            for beat in self.beats
            if any(model.revision == revision for model in beat.models)
        )

    def state(self, revision: str) -> ModelState:
        """What can be done with these weights now."""
        states = {model.state for model in self._held(revision)}
        return next((state for state in _FOREMOST if state in states), ModelState.AVAILABLE)

    def has_room(self, memory_bytes: int) -> bool:
        """Whether a worker could load so much without letting anything go."""
        return any((beat.free_bytes or 0) >= memory_bytes for beat in self.beats)

    def memory_bytes(self, revision: str) -> int | None:
        """Memory these weights take on one worker's device."""
        sizes = (model.memory_bytes for model in self._held(revision))
        return max((size for size in sizes if size is not None), default=None)

    def info(self, model: RegisteredModel, settings: Settings) -> ModelInfo:
        """A registered model, and where it stands."""
        return ModelInfo(
            name=model.name,
            source=model.source,
            revision=model.revision,
            tokenizer_digest=model.tokenizer_digest,
            architecture=model.architecture,
            n_parameters=model.n_parameters,
            weights_bytes=model.weights_bytes,
            quantization=model.quantization,
            numerics=model.numerics,
            state=self.state(model.revision),
            pinned=model.name in settings.pinned,
            default=model.name == settings.default_model,
            workers=self.workers(model.revision),
            memory_bytes=self.memory_bytes(model.revision),
        )

    def _held(self, revision: str) -> list[HeldModel]:
        return [model for beat in self.beats for model in beat.models if model.revision == revision]


async def holdings(redis: AsyncRedis) -> Holdings:
    """What workers hold now."""
    try:
        return Holdings(await heartbeats_async(redis), is_known=True)
    except AWAY:
        return Holdings((), is_known=False)
