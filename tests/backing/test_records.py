import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from neural_mri.backing.records import new_id
from neural_mri.contract.circuits import CircuitMethod
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AnomalyScan,
    AttentionScan,
    CircuitScan,
    PerturbationScan,
    Scan,
    encode_scan,
)
from tests.backing.making import submission, tokens


def test_ids_are_uuids_of_version_seven_that_say_when_they_were_made() -> None:
    made = new_id()
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert made.int >> 80 == pytest.approx(time.time() * 1000, abs=1000)


def test_ids_of_one_process_stand_in_the_order_they_were_made() -> None:
    made = [new_id() for _ in range(5000)]
    assert made == sorted(made)


def test_threads_never_make_the_same_id() -> None:
    with ThreadPoolExecutor(4) as threads:
        made: list[UUID] = list(threads.map(lambda _: new_id(), range(4000)))
    assert len(set(made)) == 4000


def test_a_job_without_a_prompt_costs_one() -> None:
    assert submission(tokens=None).estimated_cost == 1.0
    assert submission(tokens=tokens(7)).estimated_cost == 7.0


def test_jobs_share_a_pass_when_their_forward_weights_and_length_are_equal() -> None:
    first, second = uuid4(), uuid4()
    for mate in (
        ActivationScan(prompt="Goodbye"),
        ActivationScan(prompt="Hello", top_neurons=3),
        AnomalyScan(prompt="Hello", token_positions="target"),
    ):
        shared = submission(owner="bob", request=encode_scan(mate)).batch_key(second)
        assert submission().batch_key(first) == shared
    for other in (
        submission(tokens=tokens(9)),
        submission(revision="f" * 64),
        *(
            submission(request=encode_scan(scan))
            for scan in (
                ActivationScan(prompt="Hello", canonical=True),
                ActivationScan(prompt="Hello", token_positions=(0,)),
                ActivationScan(prompt="Hello", aggregation=Aggregation.RAW),
                AnomalyScan(prompt="Hello", token_positions="target", canonical=True),
                AnomalyScan(prompt="Hello"),
                AttentionScan(prompt="Hello", layers=(0,)),
                PerturbationScan(prompt="Hello"),
                CircuitScan(prompt="Hello"),
            )
        ),
    ):
        assert other.batch_key(first) != submission().batch_key(first)


@pytest.mark.parametrize(
    ("scan", "changes"),
    [
        (ActivationScan(prompt="Hello"), {"layers": ("blocks.0.mlp",)}),
        (AnomalyScan(prompt="Hello", token_positions="target"), {"appearance": False}),
        (AttentionScan(prompt="Hello", layers=(0,)), {"layers": (1, 2)}),
        (PerturbationScan(prompt="Hello"), {"perturbed_scan": False}),
        (CircuitScan(prompt="Hello"), {"method": CircuitMethod.ATTRIBUTION_PATCHING, "edges": 3}),
    ],
    ids=["fMRI", "FLAIR", "attention", "perturbation", "DTI"],
)
def test_whatever_mates_ask_for_who_is_canonical_is_alone(
    scan: Scan, changes: dict[str, Any]
) -> None:
    first, second = uuid4(), uuid4()

    def batch_key(job_id: UUID, **differing: Any) -> str:
        request = encode_scan(msgspec.structs.replace(scan, **differing))
        return submission(request=request).batch_key(job_id)

    assert batch_key(first) == batch_key(second, prompt="Goodbye", **changes)
    assert batch_key(first, canonical=True) != batch_key(second, canonical=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": CircuitMethod.ABLATION},
        {"method": CircuitMethod.INTEGRATED_GRADIENTS},
        {"method": CircuitMethod.DIRECT},
        {"target_token_idx": 3},
    ],
)
def test_circuits_that_take_no_gradient_after_the_last_token_are_alone(
    changes: dict[str, Any],
) -> None:
    request = encode_scan(CircuitScan(prompt="Hello", corrupt_prompt="Howdy", **changes))
    keys = {submission(request=request).batch_key(uuid4()) for _ in range(2)}
    assert len(keys) == 2


def test_a_job_that_reads_no_prompt_shares_with_none() -> None:
    load = submission(kind=JobKind.LOAD, tokens=None)
    assert load.batch_key(uuid4()) != load.batch_key(uuid4())
