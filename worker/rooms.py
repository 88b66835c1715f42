"""Workers and the models that they hold as placement sees them: from heartbeats, costs and what waits."""

from collections.abc import Iterable, Mapping

from neural_mri.backing.events import HeldModel, WorkerBeat
from neural_mri.backing.placement import Cost, Held, WorkerRoom
from neural_mri.contract.models import ModelState

__all__ = ("are_all_loaded", "held_as", "room_of")


def room_of(
    beat: WorkerBeat, waiting: Mapping[str, int], costs: Mapping[str, Cost]
) -> WorkerRoom | None:
    """A worker as its heartbeat tells of it; None where it tells nothing of its memory."""
    if beat.budget_bytes is None or beat.free_bytes is None:
        return None
    held = tuple(held_as(model, waiting, costs) for model in beat.models)
    resting = beat.resting and are_all_loaded(beat.models)
    return WorkerRoom(beat.worker, beat.budget_bytes, beat.free_bytes, held, resting)


def are_all_loaded(models_held: Iterable[HeldModel]) -> bool:
    """Whether no model is on its way in or out."""
    return all(model.state is ModelState.RESIDENT for model in models_held)


def held_as(model: HeldModel, waiting: Mapping[str, int], costs: Mapping[str, Cost]) -> Held:
    """A model in a worker's memory; one that says nothing of itself yet takes what it is known to cost."""
    cost = costs.get(model.revision, Cost(0, 0.0))
    is_loaded = model.state is ModelState.RESIDENT
    return Held(
        revision=model.revision,
        memory_bytes=model.memory_bytes or cost.memory_bytes,
        held_seconds=model.held_seconds or 0.0,
        load_seconds=model.load_seconds or cost.load_seconds,
        pinned=model.pinned,
        settled=is_loaded and (model.has_served or not waiting.get(model.revision)),
    )
