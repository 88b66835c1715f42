"""Every kind of scan, from a job's row to stored tables, on a real (tiny) model."""

import random
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from sqlalchemy import update

from neural_mri.backing import deletion, jobs, keys, stored
from neural_mri.backing.jobs import Job
from neural_mri.backing.rows import DISCARDS
from neural_mri.contract.circuits import Ablation, CircuitMethod
from neural_mri.contract.events import ActivationFrame
from neural_mri.contract.jobs import JobState
from neural_mri.contract.perturbations import MeanAblation, Patch, ZeroAblation
from neural_mri.contract.scan_keys import scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
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
from tests.backing.stores import paths
from tests.worker.bench import Bench
from worker.reaper import Reaper

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
    manifest = stored.load_manifest(holding_tiny.store, done.manifest or "")
    assert manifest.kind is kind_of(scan)
    assert {ref.name for ref in manifest.tables} >= tables
    read = stored.read_tables(holding_tiny.store, done.manifest or "")
    for ref in manifest.tables:
        assert read[ref.name].num_rows == ref.rows


def test_weights_are_compared_with_a_baselines(holding_tiny: Bench) -> None:
    """A model against itself: nothing differs."""
    scan = WeightScan(model="tiny", baseline="tiny")
    job = holding_tiny.submit(scan, baseline_revision=holding_tiny.tiny.revision)
    holding_tiny.attempts().take(keys.CPU_QUEUE)
    tables = stored.read_tables(holding_tiny.store, holding_tiny.now(job).manifest or "")
    difference = tables["difference"]
    assert max(difference["relative"].to_pylist()) == 0.0


def ablated_against(bench: Bench, key: str | None, **asked: Any) -> Job:
    """A scan that is read against a calibration, once it has ended."""
    scan = CircuitScan(
        model="tiny",
        prompt=PROMPT,
        method=CircuitMethod.ABLATION,
        ablation=Ablation.MEAN,
        calibration=key,
    )
    job = bench.submit(scan, **asked)
    bench.attempts().take(job.queue)
    return bench.now(job)


def test_a_scan_can_be_read_against_a_calibration_of_its_own(holding_tiny: Bench) -> None:
    calibrating = CalibrationScan(model="tiny", n_tokens=512, seed=7)
    fitted = holding_tiny.submit(calibrating)
    holding_tiny.attempts().take(fitted.queue)
    assert holding_tiny.now(fitted).state is JobState.SUCCEEDED
    values = []
    for key in (None, fitted.scan_key):
        done = ablated_against(holding_tiny, key)
        assert done.problem is None
        effects = stored.read_tables(holding_tiny.store, done.manifest or "")["effects"]
        values.append(effects["effect"].to_pylist())
    assert values[0] != values[1], "means of other text are other means"


def test_a_calibration_on_texts_goes_with_its_job_and_what_was_read_against_it_stays(
    holding_tiny: Bench,
) -> None:
    bench, others = holding_tiny, paths(holding_tiny.store)
    texts = tuple(f"a secret of theirs, number {number}" for number in range(60))
    fitting = CalibrationScan(model="tiny", texts=texts, n_tokens=512)

    def calibrated() -> Job:
        fitted = bench.submit(fitting, operands=_operands(fitting))
        bench.attempts().take(fitted.queue)
        bench.calibrations.forget(bench.tiny.revision)
        return bench.now(fitted)

    fitted = calibrated()
    assert fitted.state is JobState.SUCCEEDED
    read = ablated_against(bench, fitted.scan_key)
    assert read.problem is None
    bench.sessions.write(deletion.delete_job, fitted.id)
    bench.calibrations.forget(bench.tiny.revision)
    with bench.sessions.writing() as session:
        session.execute(update(DISCARDS).values(deleted_at=0.0))
    Reaper(bench.settings, bench.sessions, bench.redis, bench.store).round()
    assert set(paths(bench.store)) - set(others) == {read.manifest}
    assert stored.read_tables(bench.store, read.manifest or "")["effects"].num_rows
    late = ablated_against(bench, fitted.scan_key, n_tokens=5)
    assert late.problem is not None
    assert f"calibration {fitted.scan_key} was deleted or is lost" in late.problem["detail"]
    anew = calibrated()
    assert (anew.scan_key, anew.cached) == (fitted.scan_key, False)
    assert ablated_against(bench, anew.scan_key, n_tokens=5).problem is None


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


def _prompt(seed: int, n_tokens: int = 6) -> Tokens:
    generator = random.Random(seed)
    return Tokens(
        ids=tuple(generator.randrange(3, 60) for _ in range(n_tokens)),
        texts=tuple(f"w{index}" for index in range(n_tokens)),
        spans=tuple(Span(3 * index, 3 * index + 2) for index in range(n_tokens)),
    )


def _values(bench: Bench, job: Job) -> np.ndarray[Any, Any]:
    done = bench.now(job)
    assert done.problem is None
    assert done.state is JobState.SUCCEEDED
    activations = stored.read_tables(bench.store, done.manifest or "")["activations"]
    return np.array(activations["value"].to_pylist(), np.float32)


class Forwards:
    """Counts what the model is asked to run."""

    def __init__(self, bench: Bench) -> None:
        resident = bench.residency.get(bench.tiny.revision)
        assert resident is not None
        self.batches: list[int] = []
        resident.model.plain.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.batches.append(len(kwargs["input_ids"]))


def test_scans_of_different_people_share_a_forward_and_keep_their_numbers(
    holding_tiny: Bench,
) -> None:
    scan = ActivationScan(model="tiny", prompt=PROMPT)
    alone = ActivationScan(model="tiny", prompt=PROMPT, canonical=True)
    prompts = [_prompt(seed) for seed in range(5)]
    together = [
        holding_tiny.submit(scan, tokens=tokens, owner=f"user-{index}")
        for index, tokens in enumerate(prompts)
    ]
    forwards = Forwards(holding_tiny)
    assert holding_tiny.attempts().take(holding_tiny.queue) == 5
    assert forwards.batches == [5]
    for job, tokens in zip(together, prompts, strict=True):
        single = holding_tiny.submit(alone, tokens=tokens)
        holding_tiny.attempts().take(holding_tiny.queue)
        np.testing.assert_allclose(
            _values(holding_tiny, job), _values(holding_tiny, single), rtol=1e-5, atol=1e-6
        )
        frames = [e for e in holding_tiny.told(job.id) if isinstance(e, ActivationFrame)]
        assert [frame.token_idx for frame in frames] == list(range(6))
        assert frames[2].layers[0].activations[0] == _values(holding_tiny, job)[0, 2]
    assert forwards.batches == [5, 1, 1, 1, 1, 1]


def test_what_is_longer_or_changes_what_a_forward_gives_does_not_share(
    holding_tiny: Bench,
) -> None:
    companions: list[tuple[dict[str, Any], int]] = [
        ({}, 6),
        ({}, 7),
        ({"token_positions": (0,)}, 6),
        ({"aggregation": Aggregation.RAW}, 6),
        ({"canonical": True}, 6),
        ({"canonical": True}, 6),
    ]
    asked = [
        holding_tiny.submit(
            ActivationScan(model="tiny", prompt=PROMPT, **changes), tokens=_prompt(seed, length)
        )
        for seed, (changes, length) in enumerate(companions)
    ]
    forwards = Forwards(holding_tiny)
    while holding_tiny.attempts().take(holding_tiny.queue):
        pass
    assert forwards.batches == [1] * len(companions)
    assert {holding_tiny.now(job).state for job in asked} == {JobState.SUCCEEDED}


def test_a_canonical_scan_is_the_same_to_the_last_bit_in_any_company(holding_tiny: Bench) -> None:
    tokens = _prompt(0)
    seen = set()
    for company in range(4):
        for mate in range(company):
            holding_tiny.submit(
                ActivationScan(model="tiny", prompt=PROMPT),
                tokens=_prompt(100 + 10 * company + mate),
            )
        job = holding_tiny.submit(
            ActivationScan(model="tiny", prompt=PROMPT, canonical=True),
            tokens=tokens,
            scan_key=None,
        )
        while holding_tiny.attempts().take(holding_tiny.queue):
            pass
        seen.add(_values(holding_tiny, job).tobytes())
    assert len(seen) == 1


def test_a_row_that_spoils_its_batch_fails_alone(holding_tiny: Bench) -> None:
    scan = ActivationScan(model="tiny", prompt=PROMPT)
    good = [holding_tiny.submit(scan, tokens=_prompt(seed)) for seed in range(4)]
    beyond = msgspec.structs.replace(_prompt(9), ids=(3, 4, 5, 6, 7, 10**6))
    bad = holding_tiny.submit(scan, tokens=beyond)
    holding_tiny.attempts().take(holding_tiny.queue)
    for job in good:
        assert _values(holding_tiny, job).shape[1] == 6
    failed = holding_tiny.now(bad)
    assert failed.state is JobState.FAILED
    assert failed.problem is not None
    assert "1000000" in failed.problem["detail"]


def test_a_job_that_is_cancelled_among_mates_is_the_only_one_that_stops(
    holding_tiny: Bench,
) -> None:
    scan = ActivationScan(model="tiny", prompt=PROMPT)
    mates = [holding_tiny.submit(scan, tokens=_prompt(seed)) for seed in range(3)]
    resident = holding_tiny.residency.get(holding_tiny.tiny.revision)
    assert resident is not None

    def cancel(*_: Any, **__: Any) -> None:
        holding_tiny.sessions.write(jobs.request_cancel, mates[1].id)
        cancel_flag = keys.cancel_flag(mates[1].id)
        holding_tiny.redis.set(cancel_flag, 1, ex=60)
        time.sleep(0.5)  # the keeper looks every tenth of a second

    handle = resident.model.plain.register_forward_pre_hook(cancel)
    holding_tiny.attempts().take(holding_tiny.queue)
    handle.remove()
    states = [holding_tiny.now(job).state for job in mates]
    assert states == [JobState.SUCCEEDED, JobState.CANCELLED, JobState.SUCCEEDED]


def test_a_claim_takes_no_more_than_one_pass_has_tokens_for(bench: Bench) -> None:
    """Others have the rest meanwhile."""
    bench.settings = msgspec.structs.replace(bench.settings, batch_tokens=13)
    bench.residency.load("tiny")
    for seed in range(5):
        bench.submit(ActivationScan(model="tiny", prompt=PROMPT), tokens=_prompt(seed))
    forwards = Forwards(bench)
    assert [bench.attempts().take(bench.queue) for _ in range(4)] == [2, 2, 1, 0]
    assert forwards.batches == [2, 2, 1]
