"""How much memory a worker takes itself to have."""

import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from neural_mri.backing.settings import Settings
from worker.memory import Memory, Reading, control_group, least, room_of_each

GIB = 1 << 30


def test_what_is_stated_is_what_there_is() -> None:
    stated = Memory(Settings(memory_bytes=10 * GIB), "cpu")
    assert stated.reading() == (10 * GIB, 10 * GIB)
    assert stated.reading(held_bytes=4 * GIB) == (10 * GIB, 6 * GIB)
    assert stated.for_models(held_bytes=4 * GIB) == (8 * GIB, 4 * GIB)
    assert stated.for_models(held_bytes=9 * GIB) == (8 * GIB, 0)


def test_what_a_scan_has_lent_is_known_until_it_ends() -> None:
    memory = Memory(Settings(memory_bytes=GIB), "cpu")
    with memory.lent(), memory.lent():
        assert not memory.is_resting
    assert memory.is_resting


def test_on_the_cpu_it_is_no_more_than_the_machine_has() -> None:
    found = Memory(Settings(), "cpu").reading()
    assert 0 < found.available <= found.total <= psutil.virtual_memory().total


def test_the_tightest_limit_counts() -> None:
    assert least(Reading(8, 5), Reading(6, 6)) == (6, 5)
    assert least(Reading(8, -1)) == (8, 0)


def group(folder: Path, limit: str, used: int, files: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\nactive_file 7\n")


@pytest.fixture
def process(tmp_path: Path) -> Path:
    """What the kernel says of a process in two nested groups."""
    file = tmp_path / "cgroup"
    file.write_text("0::/service/worker\n")
    return file


def test_a_containers_limit_is_found_wherever_above_it_is_set(
    tmp_path: Path, process: Path
) -> None:
    root = tmp_path / "fs"
    group(root / "service", str(4 * GIB), 3 * GIB, files=GIB)
    group(root / "service/worker", "max", GIB)
    assert control_group(root, process) == (4 * GIB, 2 * GIB)


def test_without_a_limit_there_is_none(tmp_path: Path, process: Path) -> None:
    root = tmp_path / "fs"
    assert control_group(root, process) is None
    group(root / "service/worker", "max", GIB)
    assert control_group(root, process) is None
    assert control_group(root, tmp_path / "nothing") is None


def test_version_one_is_read_at_its_root(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    (root / "memory").mkdir(parents=True)
    for name, text in (
        ("memory.limit_in_bytes", str(2 * GIB)),
        ("memory.usage_in_bytes", str(GIB)),
        ("memory.stat", f"total_inactive_file {GIB // 2}\n"),
    ):
        (root / "memory" / name).write_text(text)
    assert control_group(root, tmp_path / "nothing") == (2 * GIB, 3 * GIB // 2)
    (root / "memory/memory.limit_in_bytes").write_text("9223372036854771712")
    assert control_group(root, tmp_path / "nothing") is None


def test_a_limit_on_addresses_is_a_limit() -> None:
    code = """
import resource, sys
from neural_mri.backing.settings import Settings
from worker.memory import Memory
resource.setrlimit(resource.RLIMIT_AS, (1 << 35, resource.RLIM_INFINITY))
found = Memory(Settings(), "cpu").reading()
sys.exit(found.total > 1 << 35 or found.available >= 1 << 35)
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != 1 << 35


class Gpus:
    """What torch says of two GPUs."""

    @staticmethod
    def device_count() -> int:
        return 2

    @staticmethod
    def mem_get_info(index: int) -> tuple[int, int]:
        return (10 * GIB, 80 * GIB) if index == 0 else (70 * GIB, 80 * GIB)

    @staticmethod
    def memory_reserved(index: int) -> int:
        return 5 * GIB

    @staticmethod
    def memory_allocated(index: int) -> int:
        return 3 * GIB


def test_gpus_count_together_where_models_may_be_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Gpus)
    together, alone = Settings(), msgspec.structs.replace(Settings(), spread="off")
    assert Memory(together, "cuda").reading() == (160 * GIB, 84 * GIB)
    assert Memory(alone, "cuda").reading() == (80 * GIB, 12 * GIB)


def test_a_model_that_is_spread_has_of_each_gpu_what_torch_keeps_for_itself_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "cuda", Gpus)
    together, alone = Settings(), msgspec.structs.replace(Settings(), spread="off")
    free = (int(12 * GIB * 0.8), int(72 * GIB * 0.8))
    assert room_of_each(together, "cuda") == tuple((64 * GIB, each) for each in free)
    assert room_of_each(alone, "cuda") == ()
    assert room_of_each(together, "cpu") == ()


def test_scans_have_the_first_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", Gpus)
    together, alone = Settings(), msgspec.structs.replace(Settings(), spread="off")
    assert Memory(together, "cuda").is_of_several
    assert Memory(together, "cuda").for_scans() == (80 * GIB, 12 * GIB)
    assert not Memory(together, "cuda").has_amply(GIB // 2, 0), "of 84 GiB it would be little"
    assert Memory(alone, "cuda").for_scans() == (80 * GIB, 12 * GIB)
    stated = Memory(msgspec.structs.replace(together, memory_bytes=10 * GIB), "cuda")
    assert (stated.is_of_several, stated.for_scans(4 * GIB)) == (False, (10 * GIB, 6 * GIB))
