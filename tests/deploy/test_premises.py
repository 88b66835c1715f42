import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.embedded import premises
from deploy.embedded.premises import Refusal
from neural_mri.backing.settings import Settings


@pytest.fixture
def listening_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_taken_port_is_refused_with_what_to_do(listening_port: int) -> None:
    with pytest.raises(Refusal, match=rf"port {listening_port} .* taken: .*NEURAL_MRI_PORT="):
        premises.check_port("127.0.0.1", listening_port)


def test_a_port_that_was_left_is_free(listening_port: int) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    premises.check_port("127.0.0.1", port)


def test_the_data_folder_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    premises.prepare_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "logs").is_dir()


def test_a_data_folder_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Refusal, match="NEURAL_MRI_DATA_DIR"):
        premises.prepare_folder(tmp_path / "file" / "data")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_data_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(Refusal, match="Permission denied"):
        premises.prepare_folder(tmp_path / "data")


def test_a_full_disk_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"MB free, and \d+ MB are needed"):
        premises.check_space(tmp_path, 2**60)


def test_a_folder_has_one_launcher(tmp_path: Path) -> None:
    with (
        premises.locked(tmp_path),
        pytest.raises(Refusal, match=f"already running on .* {os.getpid()}"),
        premises.locked(tmp_path),
    ):
        pass


def test_a_killed_launcher_lets_go_of_its_folder(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from deploy.embedded import premises\n"
        "with premises.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Refusal, match=str(process.pid)), premises.locked(tmp_path):
            pass
        process.kill()
    with premises.locked(tmp_path):
        pass


def test_a_short_plain_path_holds_the_socket_itself() -> None:
    settings = Settings(data_dir=Path("/srv/nmri"))
    assert premises.socket_path(settings) == Path("/srv/nmri/valkey.sock")


@pytest.mark.parametrize("name", ["x" * 120, "mine & yours", "두뇌"])
def test_a_path_that_cannot_be_a_socket_gets_a_shelter_of_its_own(
    tmp_path: Path, name: str
) -> None:
    settings = Settings(data_dir=tmp_path / name)
    path = premises.socket_path(settings)
    try:
        assert path == premises.socket_path(settings)
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        assert path != premises.socket_path(Settings(data_dir=tmp_path / (name + "2")))
    finally:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
        with contextlib.suppress(FileNotFoundError):
            premises.socket_path(Settings(data_dir=tmp_path / (name + "2"))).parent.rmdir()


def test_a_shelter_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / ("x" * 120))
    shelter = premises.socket_path(settings).parent
    shelter.chmod(0o755)
    try:
        with pytest.raises(Refusal, match="not a folder of yours alone"):
            premises.socket_path(settings)
    finally:
        shelter.rmdir()
