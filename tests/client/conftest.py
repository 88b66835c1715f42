from collections.abc import Iterator

import pytest

from neural_mri.client import Client
from tests.client.wire import Wire


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as service:
        yield service


@pytest.fixture
def client(wire: Wire) -> Iterator[Client]:
    with Client(wire.url, patience_seconds=2.0) as connected:
        yield connected
