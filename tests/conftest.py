"""Models for every test that needs one. torch is imported by the fixtures, not by who asks for none."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from tests.servers import Bucket
    from worker.scanner.loading import LoadedModel

_CACHE = Path(__file__).parents[1] / ".cache" / "models"


@pytest.fixture(scope="session")
def shared_postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    from tests.servers import postgresql

    with postgresql() as url:
        yield url


@pytest.fixture(scope="session")
def shared_bucket() -> Iterator["Bucket"]:
    """A bucket, and credentials for it in the environment."""
    from tests.servers import bucket

    with bucket() as shared:
        yield shared


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as the model store keeps it; converted by whichever test run comes first."""
    from worker.scanner import conversion

    folder = _CACHE / "smollm2-135m-instruct"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if conversion.origin(folder) is None:
            conversion.convert_gguf(conversion.bundled_smollm2(), folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Iterator["LoadedModel"]:
    """SmolLM2-135M-Instruct, ready to be scanned."""
    from worker.scanner import loading

    model = loading.load(smollm2_folder, loading.published_numerics(smollm2_folder))
    yield model
    model.release()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, "LoadedModel"]:
    """A loaded model of each family, tiny and random."""
    from tests import models
    from worker.scanner import loading

    loaded = {}
    for family in models.FAMILIES:
        folder = models.save(family, tmp_path_factory.mktemp(family))
        loaded[family] = loading.load(folder, loading.published_numerics(folder))
    return loaded


@pytest.fixture(scope="session")
def other_models(
    tmp_path_factory: pytest.TempPathFactory,
) -> "Callable[[str], LoadedModel]":
    """Gives a loaded model of one of the other families, tiny and random; each is loaded once."""
    from functools import cache

    from tests import models
    from worker.scanner import loading

    @cache
    def loaded(family: str) -> "LoadedModel":
        folder = models.save(family, tmp_path_factory.mktemp(family))
        return loading.load(folder, loading.published_numerics(folder))

    return loaded


_NAMES = (
    "gemma2",
    "gemma3",
    "gpt2",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "pythia",
    "qwen2",
    "qwen3",
)


@pytest.fixture(params=_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name in turn."""
    return str(request.param)


@pytest.fixture
def tiny_model(family: str, tiny_models: dict[str, "LoadedModel"]) -> "LoadedModel":
    """Each family's model in turn."""
    return tiny_models[family]
