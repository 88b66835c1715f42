from collections.abc import Iterator

import pytest

from tests.client.wire import Wire


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    with Wire() as service:
        monkeypatch.setenv("NMRI_URL", service.url)
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
            monkeypatch.delenv(name, raising=False)
        yield service
