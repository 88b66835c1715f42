import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from neural_mri.backing.settings import Settings
from tests.servers import on_servers
from tests.system.service import Service, free_port, ready, register

SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Iterator[Service]:
    """The service with its default model, ready; every test leaves it so."""
    folder = tmp_path_factory.mktemp("service") / "data"
    settings = on_servers(Settings(data_dir=folder, port=free_port()))
    register(settings, SMOLLM2, smollm2_folder)
    with ready(settings) as service:
        yield service
    shutil.rmtree(settings.folder)  # half a gigabyte that nobody looks at again
