"""Processes of this machine's own: forked or started, they measure the same and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from neural_mri.backing.settings import Settings
from neural_mri.client import local
from neural_mri.client.errors import Refused
from neural_mri.client.local import LocalScans, LocalWorkers, WorkerEnded, WorkerMissing
from neural_mri.contract.anomalies import AnomalyScan, CalibrationScan, Lens
from neural_mri.contract.scans import (
    ActivationScan,
    AttentionScan,
    Scan,
    StructuralScan,
    WeightScan,
)
from neural_mri.contract.suites import Measure, Suite
from neural_mri.diagnostics import Record, measure
from tests.diagnostics.making import InProcess
from worker import forge


@pytest.fixture(scope="module")
def workers() -> Iterator[LocalWorkers]:
    with LocalWorkers() as workers:
        yield workers


def forked(workers: LocalWorkers) -> list[psutil.Process]:
    """Processes that scan: who has loaded a checkpoint, and who was forked from that one."""
    if workers._forge is None:
        return []
    found: list[psutil.Process] = psutil.Process(workers._forge.pid).children(recursive=True)
    return found


def soon(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def test_forked_processes_measure_what_this_one_measures_and_end_with_their_input(
    suite: Suite, baseline: Record, tiny_folder: Path, workers: LocalWorkers
) -> None:
    with LocalScans(str(tiny_folder), processes=2, threads=1, workers=workers) as scans:
        found = measure(suite, scans, with_noise=True)
        assert len(forked(workers)) == 2
    assert soon(lambda: not forked(workers))
    assert found.key == baseline.key
    assert found.scan_keys == baseline.scan_keys
    for here, there in ((found.blocks, baseline.blocks), (found.noise, baseline.noise)):
        assert set(here) == set(there)
        for quantity, block in there.items():
            assert here[quantity][:2] == block[:2]
            if quantity.measure is not Measure.RISK:  # support divides by what is ordinary
                values = here[quantity].values
                assert np.allclose(values, block.values, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_where_nothing_can_be_forked_processes_make_their_own_imports(tiny_folder: Path) -> None:
    asked = (StructuralScan(), ActivationScan(prompt="w3 w4 w5", canonical=True))
    with (
        LocalWorkers(forks=False) as workers,
        LocalScans(str(tiny_folder), processes=1, threads=1, workers=workers) as scans,
    ):
        started, _ = scans.scan(asked)
        assert started.tables
        assert scans.subject.model == "main"
        assert forked(workers) == []


def test_where_there_may_be_a_gpu_each_process_loads_for_itself(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forge.may_share_weights(Settings(device="cpu"))
    assert not forge.may_share_weights(Settings(device="cuda:1"))
    assert not forge.may_share_weights(Settings(device="auto")) or not Path("/dev/nvidia0").exists()
    for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"):
        with monkeypatch.context() as there:
            there.setattr(os.path, "exists", driver.__eq__)
            assert not forge.may_share_weights(Settings(device="auto"))
            assert forge.may_share_weights(Settings(device="cpu"))
    apart = "from worker import forge as f; f.may_share_weights = lambda _: False; f.main(['{}'])"
    monkeypatch.setattr(
        local,
        "_started",
        lambda _module, end, **how: subprocess.Popen(
            [sys.executable, "-c", apart.format(end)], cwd=local._tree(), **how
        ),
    )
    scan = ActivationScan(prompt="w3 w4 w5", canonical=True)
    with (
        LocalWorkers() as workers,
        LocalScans(str(tiny_folder), processes=3, threads=2, workers=workers) as scans,
    ):
        found = [each.tables["activations"] for each in scans.scan([scan] * 6)]
        assert len(forked(workers)) == 3
    assert all(each["value"] == found[0]["value"] for each in found)


def test_prompts_of_one_length_are_read_from_one_forward(tiny_folder: Path, tmp_path: Path) -> None:
    scanner = InProcess(tiny_folder, tmp_path)
    texts = tuple(" ".join(f"w{3 + i * (7 + n) % 50}" for i in range(60)) for n in range(10))
    [calibration] = scanner.scan([CalibrationScan(texts=texts, n_tokens=512, lenses=(Lens.RAW,))])
    read = calibration.scan_key
    wanted: list[Scan] = []
    for prompt in ("w3 w4 w5 w6", "w7 w8 w9 w10"):
        wanted += [
            ActivationScan(prompt=prompt, calibration=read),
            AttentionScan(prompt=prompt, layers=(0, 1)),
            AnomalyScan(prompt=prompt, lens=Lens.RAW, token_positions="target", calibration=read),
        ]
    forwards = {"plain": 0, "bridge": 0}

    def count(which: str) -> Callable[..., None]:
        def counted(*_: object) -> None:
            forwards[which] += 1

        return counted

    model = scanner._scanner._resident().model
    model.modules.blocks[0].block.register_forward_hook(count("plain"))
    model.bridge.blocks[0].register_forward_hook(count("bridge"))
    together = list(scanner.scan(wanted))
    assert forwards == {"plain": 1, "bridge": 1}
    alone = [found for scan in wanted for found in scanner.scan([scan])]
    assert forwards == {"plain": 1 + 4, "bridge": 1 + 2}
    for one, other in zip(together, alone, strict=True):
        assert one.scan_key == other.scan_key
        for name in set(one.tables) & {"activations", "attention.0", "attention.1", "uncertainty"}:
            column = "entropy" if name == "uncertainty" else "value"
            here, there = (
                np.array(each.tables[name][column].to_pylist(), np.float64) for each in (one, other)
            )
            assert np.allclose(here, there, rtol=1e-4, atol=1e-6, equal_nan=True), name


def test_a_scan_that_is_refused_takes_nobody_along(
    tiny_folder: Path, workers: LocalWorkers
) -> None:
    with LocalScans(str(tiny_folder), processes=1, threads=1, workers=workers) as scans:
        found = scans.scan(
            [
                ActivationScan(prompt="w3 w4", canonical=True),
                AttentionScan(prompt="w3 w4", layers=(0,)),
                AttentionScan(prompt="w3 w4", layers=(99,)),
                WeightScan(),
            ]
        )
        assert "activations" in next(found).tables
        assert "attention.0" in next(found).tables
        with pytest.raises(Refused, match=r"blocks\.99\.attn does not exist"):
            next(found)


def test_what_a_refused_or_left_scan_has_still_to_measure_is_nobody_elses_answer(
    tiny_folder: Path, workers: LocalWorkers
) -> None:
    def reads(*prompts: str) -> list[Scan]:
        return [ActivationScan(prompt=prompt, canonical=True) for prompt in prompts]

    with LocalScans(str(tiny_folder), processes=1, threads=1, workers=workers) as scans:
        nowhere = AttentionScan(prompt="w3 w4", layers=(99,))
        with pytest.raises(Refused):
            list(scans.scan([nowhere, *reads("w3", "w3 w4")]))
        assert [len(tokens) for tokens in scans.tokenize(["w3 w4 w5"])] == [3]
        left = scans.scan(reads("w3", "w3 w4", "w3 w4 w5"))
        next(left)
        with pytest.raises(RuntimeError, match="expected one at a time"):
            scans.tokenize(["w3"])
        del left
        found = scans.scan(reads("w3 w4 w5 w6", "w3 w4 w5 w6 w7"))
        assert [each.tables["tokens"].num_rows for each in found] == [4, 5]


def test_a_machine_without_the_worker_says_so_however_often_it_is_asked(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "find_spec", lambda _name: None)
    with LocalWorkers() as workers:
        for _ in range(2):
            with pytest.raises(WorkerMissing, match="the worker, which is not installed here"):
                workers.start()
        with (
            pytest.raises(WorkerMissing),
            LocalScans(str(tiny_folder), workers=workers) as scans,
        ):
            scans.tokenize(["w3"])


def test_what_a_library_prints_while_it_scans_does_not_stand_in_who_asks_output(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loud = (
        "from worker import forge, local; opened = local.opened; "
        "local.opened = lambda *a: (print('loaded', flush=True), opened(*a))[1]; forge.main(['{}'])"
    )
    monkeypatch.setattr(
        local,
        "_started",
        lambda _module, end, **how: subprocess.Popen(
            [sys.executable, "-c", loud.format(end)], cwd=local._tree(), **how
        ),
    )
    with (
        LocalWorkers() as workers,
        LocalScans(str(tiny_folder), processes=1, threads=1, workers=workers) as scans,
    ):
        assert scans.tokenize(["w3"])
    out, err = capfd.readouterr()
    assert (out, "loaded" in err) == ("", True)


def test_a_process_that_is_killed_is_told_of_the_others_go_on_and_none_outlives_whoever_asked(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with LocalWorkers() as workers:
        killed = LocalScans(str(tiny_folder), processes=1, threads=1, workers=workers)
        other = LocalScans(str(tiny_folder), processes=2, threads=1, workers=workers)
        subject = killed.subject
        [victim] = forked(workers)
        assert other.subject == subject
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(WorkerEnded, match=r"scans .*main has ended"):
            killed.tokenize(["w3"])
        killed.close()
        said = ""

        def told() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return "main ended by SIGKILL" in said

        assert soon(told)
        under_way = other.scan([WeightScan()] * 40)
        assert next(under_way).tables
        running = forked(workers)
        assert len(running) == 2
    other.close()
    assert soon(lambda: not any(each.is_running() for each in running))


def test_a_process_that_was_forked_from_another_is_named_too_when_it_is_killed(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = ""

    def told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "main ended by SIGKILL" in said

    with LocalWorkers() as workers:
        with LocalScans(str(tiny_folder), processes=3, threads=1, workers=workers) as scans:
            assert next(scans.scan([StructuralScan()])).tables
            running = forked(workers)
            victim = next(each for each in running if each.parent() in running)
            victim.kill()
            assert soon(told)
            assert set(forked(workers)) == set(running) - {victim}, "the others go on"
        assert soon(lambda: not forked(workers))
    told()
    assert said.count("ended by") == 1


@pytest.mark.parametrize("processes", [65, 0, -1])
def test_more_processes_than_one_message_asks_for_are_refused(
    tiny_folder: Path, processes: int
) -> None:
    with pytest.raises(ValueError, match=f"processes is {processes}: expected 1 to 64"):
        LocalScans(str(tiny_folder), processes=processes)
