"""The reaper's probes, as the chart and the compose file ask: of a reaper that goes on, is frozen, or never began."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from neural_mri.backing.settings import Settings
from tests.deploy.charts import render, values
from tests.deploy.composition import services
from tests.deploy.test_compose import SECRETS
from tests.servers import database_copy, migrated_database

ROOT = Path(__file__).parents[2]


def of_the_chart() -> tuple[list[str], str]:
    (deployment,) = render("reaper.yaml", values())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    file = environment["NEURAL_MRI_REAPER_BEAT_FILE"]
    assert isinstance(file, str)
    return container["livenessProbe"]["exec"]["command"], file


def of_the_compose_file() -> tuple[list[str], str]:
    service = services(SECRETS)["reaper"]
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    return command, service["environment"]["NEURAL_MRI_REAPER_BEAT_FILE"]


PROBES = {"chart": of_the_chart, "compose": of_the_compose_file}


class Probe:
    """One of them, of a reaper whose file is elsewhere."""

    def __init__(self, kind: str, beat: Path) -> None:
        command, file = PROBES[kind]()
        assert command[0] == "python"
        assert command[-1].count(file) == 1
        self._command = [sys.executable, *command[1:-1], command[-1].replace(file, str(beat))]

    def succeeds(self) -> bool:
        return subprocess.run(self._command, capture_output=True, check=False).returncode == 0

    def comes_to(self, *, success: bool) -> bool:
        until = time.monotonic() + 60
        while self.succeeds() is not success:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return msgspec.structs.replace(
        database_copy(migrated_database(tmp_path / "template"), tmp_path / "data"),
        redis_url=f"unix://{tmp_path}/nobody.sock",
        reaper_interval_seconds=0.05,
        reaper_hung_seconds=3.0,
        reaper_beat_file=str(tmp_path / "reaper.beat"),
    )


@pytest.fixture
def reaper(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "worker.reaper"],
        env={**os.environ, **settings.environment()},
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("kind", PROBES)
def test_a_reaper_that_is_frozen_is_seen_and_one_that_goes_on_is_left_alone(
    kind: str, settings: Settings, reaper: subprocess.Popen[bytes]
) -> None:
    probe = Probe(kind, Path(settings.reaper_beat_file))
    assert probe.comes_to(success=True)
    reaper.send_signal(signal.SIGSTOP)
    assert probe.comes_to(success=False)


@pytest.mark.parametrize("kind", PROBES)
def test_one_that_never_began_is_not_alive(kind: str, tmp_path: Path) -> None:
    assert not Probe(kind, tmp_path / "none.beat").succeeds()
