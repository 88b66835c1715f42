import shutil
from pathlib import Path

import msgspec
import psutil
import pytest

from neural_mri.backing import keys, models, storage
from neural_mri.backing.database import Sessions
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from neural_mri.contract.models import ModelState
from neural_mri.contract.problems import Unavailable, UnknownModel, UnsupportedModel
from worker import modelstore
from worker.calibrations import Calibrations
from worker.residency import Residency
from worker.scanner import loading


def residency(settings: Settings, sessions: Sessions) -> Residency:
    return Residency(settings, sessions, Calibrations(storage.open_store(settings)))


def resident_bytes() -> int:
    memory: int = psutil.Process().memory_info().rss
    return memory


def test_what_is_held_is_served(
    settings: Settings, sessions: Sessions, tiny: RegisteredModel
) -> None:
    held = residency(settings, sessions)
    assert held.queues() == {keys.CPU_QUEUE, keys.CONTROL_QUEUE}
    held.load("tiny")
    assert keys.scan_queue(tiny.revision) in held.queues()
    (model,) = held.held()
    assert (model.name, model.state) == ("tiny", ModelState.RESIDENT)
    assert model.memory_bytes is not None
    assert model.memory_bytes >= tiny.n_parameters * 4
    held.release(tiny.revision)
    assert held.held() == ()
    assert held.get(tiny.revision) is None


def test_two_names_of_equal_weights_are_one_model_in_memory(
    settings: Settings, sessions: Sessions, tiny: RegisteredModel, tiny_folder: Path
) -> None:
    twin = modelstore.add(settings, "twin", f"folder:{tiny_folder}")
    assert twin.revision == tiny.revision
    held = residency(settings, sessions)
    assert held.load("tiny") is held.load("twin")
    assert len(held.held()) == 1


def test_while_a_model_is_loading_others_can_see_it(
    settings: Settings, sessions: Sessions, tiny: RegisteredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = residency(settings, sessions)
    seen = []
    load = loading.load

    def watched(folder: Path, *rest: object) -> object:
        seen.append(held.held()[0].state)
        return load(folder, *rest)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(loading, "load", watched)
    held.load("tiny")
    assert seen == [ModelState.LOADING]


def test_a_model_that_does_not_load_is_not_held(
    settings: Settings, sessions: Sessions, tiny: RegisteredModel
) -> None:
    shutil.rmtree(settings.models_dir / tiny.folder)
    held = residency(settings, sessions)
    with pytest.raises(UnsupportedModel):
        held.load("tiny")
    assert held.held() == ()


def test_a_model_that_is_not_registered_is_refused(settings: Settings, sessions: Sessions) -> None:
    with pytest.raises(UnknownModel, match="unheard-of"):
        residency(settings, sessions).load("unheard-of")


def test_another_data_type_is_published_with_the_model_that_has_it(
    settings: Settings, sessions: Sessions, tiny: RegisteredModel
) -> None:
    half = msgspec.structs.replace(settings, dtype="bfloat16")
    resident = residency(half, sessions).load("tiny")
    registered = sessions.read(models.get, "tiny")
    assert registered is not None
    assert registered.numerics == resident.model.numerics
    assert registered.numerics.dtype == "bfloat16"


def test_a_model_that_is_loaded_and_cannot_be_published_gives_its_memory_back(
    settings: Settings, sessions: Sessions, tiny: RegisteredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = list[loading.LoadedModel]()

    def away(*_: object, **__: object) -> None:
        raise Unavailable("away")

    def release(self: loading.LoadedModel) -> None:
        released.append(self)

    monkeypatch.setattr(loading.LoadedModel, "release", release)
    monkeypatch.setattr(Sessions, "write", away)
    held = residency(msgspec.structs.replace(settings, dtype="bfloat16"), sessions)
    with pytest.raises(Unavailable):
        held.load("tiny")
    assert (len(released), held.held()) == (1, ())


@pytest.mark.smollm2
def test_a_released_model_gives_its_memory_back_to_the_system(
    settings: Settings,
    sessions: Sessions,
    smollm2_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is ordinary for it takes half a minute to measure, and is no part of the model.
    monkeypatch.setattr(Calibrations, "prepare", lambda *_: None)
    model = modelstore.add(settings, "smollm2", f"folder:{smollm2_folder}")
    held = residency(settings, sessions)
    before = resident_bytes()
    held.load("smollm2")
    with_model = resident_bytes()
    held.release(model.revision)
    after = resident_bytes()
    shutil.rmtree(settings.models_dir)  # half a gigabyte that nobody looks at again
    assert with_model - before > model.n_parameters * 4 * 0.9
    assert with_model - after > model.n_parameters * 4 * 0.9
