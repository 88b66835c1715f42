"""Every kind of scan, from a job's row to stored tables, on a real (tiny) model."""

import msgspec
import pytest

from neural_mri.backing import keys, storage
from neural_mri.contract.circuits import Ablation, CircuitMethod
from neural_mri.contract.jobs import JobState
from neural_mri.contract.perturbations import MeanAblation, Patch, ZeroAblation
from neural_mri.contract.scan_keys import scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    Scan,
    StructuralScan,
    TracingScan,
    WeightScan,
    kind_of,
)
from neural_mri.contract.tokens import Operands, Span, Tokens
from tests.worker.bench import Bench

OTHER = Tokens(
    ids=(9, 4, 8, 6, 7, 5),
    texts=("v0", "v1", "v2", "v3", "v4", "v5"),
    spans=tuple(Span(3 * index, 3 * index + 2) for index in range(6)),
)
PROMPT = "w0 w1 w2 w3 w4 w5"

SCANS: list[tuple[Scan, set[str]]] = [
    (StructuralScan(model="tiny"), {"topology", "parameters"}),
    (WeightScan(model="tiny"), {"weights", "tensors", "histograms", "circuits"}),
    (ActivationScan(model="tiny", prompt=PROMPT), {"activations", "percentile", "neurons"}),
    (AttentionScan(model="tiny", prompt=PROMPT, layers=(0,)), {"attention.0"}),
    (CircuitScan(model="tiny", prompt=PROMPT), {"effects", "metric", "edges"}),
    (
        CircuitScan(model="tiny", prompt=PROMPT, corrupt_prompt="other", answer=3, foil=4, exact=2),
        {"effects", "metric", "edges"},
    ),
    (AnomalyScan(model="tiny", prompt=PROMPT), {"lens", "uncertainty", "support", "depth"}),
    (
        PerturbationScan(
            model="tiny",
            prompt=PROMPT,
            perturbations=(
                ZeroAblation(component="blocks.0.attn.head_1"),
                MeanAblation(component="blocks.1.mlp"),
                Patch(component="embed", source_prompt="other"),
            ),
        ),
        {"comparison", "shift", "predictions_after", "change"},
    ),
    (PatchingScan(model="tiny", prompt=PROMPT, corrupt_prompt="other"), {"recovery"}),
    (TracingScan(model="tiny", prompt=PROMPT, subject="w1 w2"), {"trace"}),
    (CalibrationScan(model="tiny", n_tokens=512, seed=3), {"calibration_means"}),
]


def _operands(scan: Scan) -> Operands:
    answers = {
        name: value
        for name in ("answer", "foil")
        if isinstance(value := getattr(scan, name, None), int)
    }
    return Operands(prompts=dict.fromkeys(scan.other_prompts, OTHER), token_ids=answers)


@pytest.mark.parametrize(("scan", "tables"), SCANS, ids=lambda value: type(value).__name__)
def test_every_kind_of_scan_ends_whole_in_the_store(
    holding_tiny: Bench, scan: Scan, tables: set[str]
) -> None:
    job = holding_tiny.submit(scan, operands=_operands(scan))
    holding_tiny.attempts().take(job.queue)
    done = holding_tiny.now(job)
    assert done.problem is None
    assert done.state is JobState.SUCCEEDED
    manifest = storage.load_manifest(holding_tiny.store, done.manifest or "")
    assert manifest.kind is kind_of(scan)
    assert {ref.name for ref in manifest.tables} >= tables
    for ref in manifest.tables:
        table = storage.read_table(holding_tiny.store, ref)
        assert table.num_rows == ref.rows


def test_weights_are_compared_with_a_baselines(holding_tiny: Bench) -> None:
    """A model against itself: nothing differs."""
    scan = WeightScan(model="tiny", baseline="tiny")
    job = holding_tiny.submit(scan, baseline_revision=holding_tiny.tiny.revision)
    holding_tiny.attempts().take(keys.CPU_QUEUE)
    manifest = storage.load_manifest(holding_tiny.store, holding_tiny.now(job).manifest or "")
    ref = manifest.table("difference")
    assert ref is not None
    difference = storage.read_table(holding_tiny.store, ref)
    assert max(difference["relative"].to_pylist()) == 0.0


def test_a_scan_can_be_read_against_a_calibration_of_its_own(holding_tiny: Bench) -> None:
    calibrating = CalibrationScan(model="tiny", n_tokens=512, seed=7)
    fitted = holding_tiny.submit(calibrating)
    holding_tiny.attempts().take(fitted.queue)
    assert holding_tiny.now(fitted).state is JobState.SUCCEEDED
    values = []
    for key in (None, fitted.scan_key):
        scan = CircuitScan(
            model="tiny",
            prompt=PROMPT,
            method=CircuitMethod.ABLATION,
            ablation=Ablation.MEAN,
            calibration=key,
        )
        job = holding_tiny.submit(scan)
        holding_tiny.attempts().take(job.queue)
        done = holding_tiny.now(job)
        assert done.problem is None
        ref = storage.load_manifest(holding_tiny.store, done.manifest or "").table("effects")
        assert ref is not None
        values.append(storage.read_table(holding_tiny.store, ref)["effect"].to_pylist())
    assert values[0] != values[1], "means of other text are other means"


def test_numbers_of_other_operands_than_the_keys_are_never_made(holding_tiny: Bench) -> None:
    scan = CircuitScan(model="tiny", prompt=PROMPT, corrupt_prompt="other")
    job = holding_tiny.submit(scan, operands=_operands(scan), scan_key="0" * 64)
    holding_tiny.attempts().take(job.queue)
    done = holding_tiny.now(job)
    assert done.state is JobState.FAILED
    assert done.problem is not None
    assert done.problem["type"] == "urn:neural-mri:problem:model-changed"
    changed = msgspec.structs.replace(scan, foil=3)
    assert scan_key(
        changed,
        token_ids=(1,),
        revision="a",
        tokenizer_digest="b",
        numerics=holding_tiny.tiny.numerics,
    ) != scan_key(
        scan,
        token_ids=(1,),
        revision="a",
        tokenizer_digest="b",
        numerics=holding_tiny.tiny.numerics,
    )
