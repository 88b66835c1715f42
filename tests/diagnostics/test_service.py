"""A diagnosis through a real service: the same record as a process of our own makes."""

from pathlib import Path

import numpy as np

from neural_mri.backing.settings import Settings
from neural_mri.client import Client
from neural_mri.client.diagnosing import ServiceScans
from neural_mri.contract.batches import BatchState
from neural_mri.contract.perturbations import TracingScan
from neural_mri.contract.suites import Measure, Suite
from neural_mri.diagnostics import Record, Records
from tests.servers import on_servers
from tests.system.service import free_port, register, running


def test_a_service_measures_what_a_process_measures_and_a_baseline_once(
    suite: Suite, baseline: Record, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = on_servers(
        Settings(data_dir=tmp_path / "data", port=free_port(), pinned_models="tiny")
    )
    register(settings, "tiny", tiny_folder)
    records = Records(tmp_path / "records")
    heard: list[tuple[str, int, int]] = []
    with running(settings) as service:
        service.wait_until_ready()
        with Client(f"http://{settings.host}:{settings.port}") as mri:
            diagnosis = mri.diagnose(
                suite,
                model="tiny",
                baseline="tiny",
                records=records,
                on_progress=lambda *seen: heard.append(seen),
            )
            named = [key for each in diagnosis.findings for key in each.evidence.scan_keys[:1]]
            opened = [mri.jobs(scan_key=key[:16]) for key in named]
            many = ServiceScans(mri, "tiny").scan(
                [TracingScan(prompt=f"a b c {n}", subject=f"{n}") for n in range(40)]
            )
            first = next(many)
            many.close()
            # A scan on a worker stops where it next can.
            left = mri.batches.wait(mri.batches.list(limit=1)[0])
    assert diagnosis.passed
    assert diagnosis.tests == 60
    assert heard[-1] == ("tiny", 0, 0), "the baseline's record serves the candidate too"
    assert named
    assert all(opened), "a report's keys lead to the scans that it stands on"
    assert first.tables
    assert left.state is BatchState.CANCELLED, "who stops listening leaves nothing running"
    stored = records.get(baseline.key)
    assert stored is not None, "its address is that of the record measured without a service"
    for quantity, block in baseline.blocks.items():
        others = stored.blocks[quantity].rows(block.prompts)
        if quantity.measure is not Measure.RISK:  # support divides by what is ordinary
            assert np.allclose(others, block.values, rtol=1e-4, atol=1e-4, equal_nan=True), quantity
