"""Jobs of every kind that may be rows of one forward: they are, keep their numbers, and fail or stop alone."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from neural_mri.backing import jobs, keys, stored
from neural_mri.backing.jobs import Job
from neural_mri.contract.anomalies import Lens, Sublayers
from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan, Granularity
from neural_mri.contract.events import ActivationFrame, Ended, Progress
from neural_mri.contract.jobs import JobState
from neural_mri.contract.perturbations import (
    Amplify,
    MeanAblation,
    Noise,
    Patch,
    Perturbation,
    ZeroAblation,
)
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    AttentionScan,
    PerturbationScan,
    Scan,
)
from neural_mri.contract.tokens import Operands, Span, Tokens
from tests.worker.bench import Bench
from worker import admission, keeper
from worker.scanner import circuits, logit_lens, sweep
from worker.scanner.anomalies import AnomalyRows
from worker.scanner.loading import LoadedModel

S = JobState
PROMPT = "w0 w1 w2 w3 w4 w5"


def prompt(seed: int, n_tokens: int = 6) -> Tokens:
    chance = random.Random(seed)
    return Tokens(
        ids=tuple(chance.randrange(3, 60) for _ in range(n_tokens)),
        texts=tuple(f"w{index}" for index in range(n_tokens)),
        spans=tuple(Span(3 * index, 3 * index + 2) for index in range(n_tokens)),
    )


def perturbation(*done: Perturbation, **changes: Any) -> PerturbationScan:
    return PerturbationScan(model="tiny", prompt=PROMPT, perturbations=done, **changes)


OTHER = prompt(99)
FLAIR = AnomalyScan(model="tiny", prompt=PROMPT)
AT_ANSWER = msgspec.structs.replace(FLAIR, token_positions="target")
FMRI = ActivationScan(model="tiny", prompt=PROMPT)
COMPANIES: dict[str, list[Scan]] = {
    "answer": [
        AT_ANSWER,
        msgspec.structs.replace(AT_ANSWER, answer=7, foil=9),
        msgspec.structs.replace(AT_ANSWER, appearance=False),
        msgspec.structs.replace(AT_ANSWER, lens=Lens.RAW, sublayers=Sublayers.NONE),
    ],
    "attention": [
        AttentionScan(model="tiny", prompt=PROMPT, layers=layers)
        for layers in ((0,), (0, 1, 2), (2,), (1,))
    ],
    "perturbation": [
        perturbation(ZeroAblation(component="blocks.2.attn.head_1"), answer=7),
        perturbation(Noise(component="blocks.1.mlp", draws=3), Amplify(component="blocks.0.mlp")),
        perturbation(Patch(component="blocks.1.resid_pre", source_prompt="other")),
        perturbation(MeanAblation(component="blocks.1.attn"), perturbed_scan=False, foil=4),
        perturbation(),
    ],
    "circuits": [
        CircuitScan(model="tiny", prompt=PROMPT, ablation=Ablation.ZERO, exact=4, edges=5),
        CircuitScan(model="tiny", prompt=PROMPT, corrupt_prompt="other", answer=7, foil=9),
        CircuitScan(
            model="tiny",
            prompt=PROMPT,
            method=CircuitMethod.ATTRIBUTION_PATCHING,
            corrupt_prompt="other",
            granularity=Granularity.BLOCKS,
            include_first_token=True,
            answer=11,
            edges=0,
        ),
        CircuitScan(model="tiny", prompt=PROMPT, exact=0, foil=4),  # ablates to the mean
    ],
    "mixed": [
        FMRI,
        AT_ANSWER,
        msgspec.structs.replace(FMRI, top_neurons=2, include_residual=False),
        msgspec.structs.replace(AT_ANSWER, answer=7, kl_weight=1.0),
    ],
}
"""Scans that share a forward, some asking otherwise than the others."""


def operands(scan: Scan) -> Operands:
    answers = {name: getattr(scan, name, None) for name in ("answer", "foil")}
    return Operands(
        prompts=dict.fromkeys(scan.other_prompts, OTHER),
        token_ids={name: token for name, token in answers.items() if token is not None},
    )


def submitted(bench: Bench, scan: Scan, tokens: Tokens, **changes: Any) -> Job:
    return bench.submit(scan, tokens=tokens, operands=operands(scan), **changes)


def tables(bench: Bench, job: Job) -> dict[str, pa.Table]:
    done = bench.now(job)
    assert (done.state, done.problem) == (S.SUCCEEDED, None)
    return stored.read_tables(bench.store, done.manifest or "")


def agree(one: dict[str, pa.Table], other: dict[str, pa.Table]) -> None:
    """All but the last digits."""
    assert one.keys() == other.keys()
    for name, table in one.items():
        for column, mate in zip(table.columns, other[name].columns, strict=True):
            if not (pa.types.is_floating(column.type) or pa.types.is_fixed_size_list(column.type)):
                assert column.equals(mate), name
                continue
            found, expected = np.array(column.to_pylist()), np.array(mate.to_pylist())
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5, err_msg=name)


def resident(bench: Bench) -> LoadedModel:
    found = bench.residency.get(bench.tiny.revision)
    assert found is not None
    return found.model


class Forwards:
    """Counts the rows that the plain model, and its bridge, are begun with."""

    def __init__(self, bench: Bench) -> None:
        self.batches: list[int] = []
        model = resident(bench)
        model.plain.base_model.register_forward_pre_hook(self._count, with_kwargs=True)
        model.bridge.embed.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batches.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))


@pytest.mark.parametrize("company", COMPANIES)
def test_scans_of_different_people_share_a_forward_and_keep_their_numbers(
    holding_tiny: Bench, company: str
) -> None:
    bench, scans = holding_tiny, COMPANIES[company]
    together = [
        submitted(bench, scan, prompt(seed), owner=f"user-{seed}")
        for seed, scan in enumerate(scans)
    ]
    forwards = Forwards(bench)
    assert bench.attempts().take(bench.queue) == len(scans)
    n_sources = sum(len(scan.other_prompts) for scan in scans)
    assert forwards.batches == [len(scans) + n_sources]
    for seed, (scan, job) in enumerate(zip(scans, together, strict=True)):
        canonical = msgspec.structs.replace(scan, canonical=True)
        alone = submitted(bench, canonical, prompt(seed))
        assert bench.attempts().take(bench.queue) == 1
        agree(tables(bench, job), tables(bench, alone))
        heard = [e.done for e in bench.told(job.id) if isinstance(e, Progress)]
        assert heard, "nobody told its owner how far it has come"


def test_a_prompt_that_is_asked_about_twice_is_run_once(holding_tiny: Bench) -> None:
    """fMRI and FLAIR of one prompt, by two users; a third asks about another."""
    bench, own = holding_tiny, prompt(0)
    asked: list[tuple[Scan, Tokens]] = [(FMRI, own), (AT_ANSWER, own), (FMRI, prompt(1))]
    together = [
        submitted(bench, scan, tokens, owner=f"user-{index}")
        for index, (scan, tokens) in enumerate(asked)
    ]
    forwards = Forwards(bench)
    assert bench.attempts().take(bench.queue) == 3
    assert forwards.batches == [2]
    for job, (scan, tokens) in zip(together, asked, strict=True):
        canonical = msgspec.structs.replace(scan, canonical=True)
        alone = submitted(bench, canonical, tokens)
        bench.attempts().take(bench.queue)
        agree(tables(bench, job), tables(bench, alone))
    activations = tables(bench, together[0])["activations"]["value"].to_pylist()
    frames = [e for e in bench.told(together[0].id) if isinstance(e, ActivationFrame)]
    assert [frame.layers[0].activations[0] for frame in frames] == activations[0]
    assert not any(isinstance(e, ActivationFrame) for e in bench.told(together[1].id))


def test_one_clean_run_serves_everything_that_is_done_to_a_prompt(holding_tiny: Bench) -> None:
    bench, own = holding_tiny, prompt(0)
    heads = [ZeroAblation(component=f"blocks.{layer}.attn.head_1") for layer in (2, 0, 1)]
    together = [submitted(bench, perturbation(head), own) for head in heads]
    forwards = Forwards(bench)
    assert bench.attempts().take(bench.queue) == 3
    assert forwards.batches == [1]
    for job, head in zip(together, heads, strict=True):
        alone = submitted(bench, perturbation(head, canonical=True), own)
        bench.attempts().take(bench.queue)
        agree(tables(bench, job), tables(bench, alone))


def test_who_asks_for_another_forward_does_not_share(holding_tiny: Bench) -> None:
    """One of each company, one that is longer, and some of each that are canonical; FLAIR of everything."""
    bench = holding_tiny
    scans = [FLAIR, *(scans[0] for name, scans in COMPANIES.items() if name != "mixed")]
    for seed, scan in enumerate(scans):
        submitted(bench, scan, prompt(seed))
        submitted(bench, scan, prompt(seed, 7))
        for mate in range(2):
            canonical = msgspec.structs.replace(scan, canonical=True)
            submitted(bench, canonical, prompt(10 + 2 * seed + mate))
    forwards, taken = Forwards(bench), []
    while n_taken := bench.attempts().take(bench.queue):
        taken.append(n_taken)
    assert taken == [1] * (4 * len(scans))
    assert forwards.batches == taken


@pytest.mark.parametrize("company", ["answer", "attention", "perturbation", "circuits"])
def test_a_canonical_scan_is_the_same_to_the_last_bit_in_any_company(
    holding_tiny: Bench, company: str
) -> None:
    bench, scans, chance = holding_tiny, COMPANIES[company], random.Random(company)
    canonical = msgspec.structs.replace(scans[0], canonical=True)
    seen = set()
    for number in range(4):
        for mate in range(number):
            submitted(bench, chance.choice(scans), prompt(100 + 10 * number + mate))
        job = submitted(bench, canonical, prompt(0), scan_key=None)
        while bench.attempts().take(bench.queue):
            pass
        manifest = stored.load_manifest(bench.store, bench.now(job).manifest or "")
        seen.add(frozenset((ref.name, ref.chunk) for ref in manifest.tables))
    assert len(seen) == 1


@pytest.mark.parametrize("company", COMPANIES)
def test_a_row_that_spoils_its_batch_fails_alone(holding_tiny: Bench, company: str) -> None:
    bench, scans = holding_tiny, COMPANIES[company]
    beyond = msgspec.structs.replace(prompt(9), ids=(3, 4, 5, 6, 7, 10**6))
    good = [submitted(bench, scan, prompt(seed)) for seed, scan in enumerate(scans)]
    bad = submitted(bench, scans[0], beyond)
    assert bench.attempts().take(bench.queue) == len(scans) + 1
    assert {bench.now(job).state for job in good} == {S.SUCCEEDED}
    failed = bench.now(bad)
    assert failed.state is S.FAILED
    assert failed.problem is not None
    assert "1000000" in failed.problem["detail"]


def cancel(bench: Bench, job: Job) -> None:
    bench.sessions.write(jobs.request_cancel, job.id)
    bench.redis.set(keys.cancel_flag(job.id), 1, ex=60)
    time.sleep(0.4)  # the keeper looks every tenth of a second


@contextmanager
def once(module: Any, event: Callable[[], None], *, at_call: int = 1) -> Iterator[None]:
    """Something happens before a module's call of that number."""
    calls = 0

    def before(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at_call:
            event()

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
    assert calls >= at_call


@pytest.mark.parametrize("company", COMPANIES)
def test_a_job_that_is_cancelled_among_mates_is_the_only_one_that_stops(
    holding_tiny: Bench, company: str
) -> None:
    bench, scans = holding_tiny, COMPANIES[company]
    mates = [submitted(bench, scan, prompt(seed)) for seed, scan in enumerate(scans)]
    model = resident(bench)
    module = model.bridge.embed if company == "attention" else model.modules.embed
    forwards = Forwards(bench)
    with once(module, lambda: cancel(bench, mates[1])):
        bench.attempts().take(bench.queue)
    states = [bench.now(job).state for job in mates]
    assert states == [S.SUCCEEDED, S.CANCELLED, *[S.SUCCEEDED] * (len(mates) - 2)]
    assert len(forwards.batches) == 1, "nobody's work is done again"


def test_one_that_stops_while_the_lens_is_read_takes_nobody_along(holding_tiny: Bench) -> None:
    bench = holding_tiny
    mates = [submitted(bench, AT_ANSWER, prompt(seed)) for seed in range(3)]
    forwards = Forwards(bench)
    # Called once in the forward, then for each chunk that the lens is held to.
    with once(resident(bench).modules.final_norm, lambda: cancel(bench, mates[1]), at_call=2):
        bench.attempts().take(bench.queue)
    states = [bench.now(job).state for job in mates]
    assert states == [S.SUCCEEDED, S.CANCELLED, S.SUCCEEDED]
    assert forwards.batches == [3]


def test_one_that_stops_before_its_turn_with_the_lens_is_not_taken_for_deaf(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, given_up = holding_tiny, list[None]()
    monkeypatch.setattr(bench.keeper, "_give_up", lambda: given_up.append(None))
    monkeypatch.setattr(keeper, "STOP_SECONDS", 0.7)
    monkeypatch.setattr(logit_lens, "_PRODUCT_BYTES", {"cpu": 1})  # a chunk a position
    another = msgspec.structs.replace(AT_ANSWER, kl_weight=1.0)
    mates = [submitted(bench, AT_ANSWER, prompt(seed)) for seed in range(4)]
    last = submitted(bench, another, prompt(4))
    forwards, final_norm = Forwards(bench), resident(bench).modules.final_norm
    with (
        once(final_norm, lambda: cancel(bench, last), at_call=2),
        once(final_norm, lambda: time.sleep(0.5), at_call=3),
        once(final_norm, lambda: time.sleep(0.5), at_call=4),
    ):
        assert bench.attempts().take(bench.queue) == 5
    assert not given_up, "others are measured before it"
    assert [bench.now(job).state for job in mates] == [S.SUCCEEDED] * 4
    assert bench.now(last).state is S.CANCELLED
    assert forwards.batches == [5]


def test_an_fmri_scan_does_not_wait_for_the_lens_of_its_mates(holding_tiny: Bench) -> None:
    bench = holding_tiny
    flair, fmri = submitted(bench, AT_ANSWER, prompt(0)), submitted(bench, FMRI, prompt(1))
    forwards, seen = Forwards(bench), list[tuple[S, S]]()

    def look() -> None:
        seen.append((bench.now(fmri).state, bench.now(flair).state))

    # Called once in the forward, then for each chunk that the lens is held to.
    with once(resident(bench).modules.final_norm, look, at_call=2):
        assert bench.attempts().take(bench.queue) == 2
    assert seen == [(S.SUCCEEDED, S.RUNNING)]
    assert forwards.batches == [2]
    assert "activations" in tables(bench, fmri)
    mine, mates = (
        stored.load_manifest(bench.store, bench.now(job).manifest or "") for job in (fmri, flair)
    )
    assert 0 < mine.compute_seconds < mates.compute_seconds, "the lens is its mate's alone"


def test_what_fails_after_an_fmri_scan_is_stored_leaves_it_alone(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = holding_tiny
    flair = [submitted(bench, AT_ANSWER, prompt(seed)) for seed in range(2)]
    fmri = submitted(bench, FMRI, prompt(2))

    def broken(*_: Any) -> None:
        raise RuntimeError("the lens is broken")

    monkeypatch.setattr(AnomalyRows, "outcomes", broken)
    forwards = Forwards(bench)
    assert bench.attempts().take(bench.queue) == 3
    assert [bench.now(job).state for job in (*flair, fmri)] == [S.FAILED, S.FAILED, S.SUCCEEDED]
    assert forwards.batches == [3, 2, 1, 1], "only those without a result are tried again"
    ends = [event for event in bench.told(fmri.id) if isinstance(event, Ended)]
    assert len(ends) == 1


def test_a_pass_is_so_much_work_at_the_most(bench: Bench) -> None:
    """Who asks for little waits for what is measured beside it."""
    bench.settings = msgspec.structs.replace(bench.settings, batch_jobs=12)
    bench.residency.load("tiny")
    for seed in range(5):
        submitted(bench, AT_ANSWER, prompt(seed), forwards=9.0)
    forwards = Forwards(bench)
    assert [bench.attempts().take(bench.queue) for _ in range(4)] == [2, 2, 1, 0], "of one claim"
    assert forwards.batches == [2, 2, 1]


def sweeps(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
    """Something happens before each circuit is measured."""
    measured = sweep.sweep

    def swept(*arguments: Any) -> Any:
        before()
        return measured(*arguments)

    monkeypatch.setattr(circuits, "sweep", swept)


CIRCUIT = CircuitScan(model="tiny", prompt=PROMPT, ablation=Ablation.ZERO, exact=4, edges=0)


def test_while_circuits_are_measured_one_by_one_a_short_scan_is_let_in(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, seen = holding_tiny, list[S]()
    mine = [submitted(bench, CIRCUIT, prompt(seed), forwards=6.0) for seed in range(6)]
    short = list[Job]()

    def look() -> None:
        if not short:
            short.append(submitted(bench, FMRI, prompt(50), owner="bob"))
        time.sleep(0.06)
        seen.append(bench.now(short[0]).state)

    sweeps(monkeypatch, look)
    bench.settings = msgspec.structs.replace(bench.settings, batch_jobs=16)
    assert bench.attempts().take(bench.queue) == 4, "no more than make one pass"
    assert seen == [S.QUEUED, *[S.SUCCEEDED] * 3]
    states = [bench.now(job).state for job in mine]
    assert states == [*[S.SUCCEEDED] * 4, *[S.QUEUED] * 2]


def test_each_circuit_of_a_pass_costs_what_it_took(
    holding_tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = holding_tiny
    sweeps(monkeypatch, lambda: time.sleep(0.1))
    together = [submitted(bench, CIRCUIT, prompt(seed)) for seed in range(5)]
    assert bench.attempts().take(bench.queue) == 5
    made = [stored.load_manifest(bench.store, bench.now(job).manifest or "") for job in together]
    for each in made:
        assert 0.1 < each.forward_seconds <= each.compute_seconds
    # Whoever is last is given what was left: the pass's own beginning and end.
    assert max(each.compute_seconds for each in made[:-1]) < 0.3


def test_a_pass_takes_no_more_memory_than_there_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little there is, one scan at a time is tried."""
    bench.residency.load("tiny")
    held = bench.residency.get(bench.tiny.revision)
    assert held is not None
    needed = admission.estimate(AT_ANSWER, held.registered.architecture, n_tokens=6, itemsize=4)
    for left, batches in ((2.5 * needed, [2, 2, 1]), (0.5 * needed, [1, 1])):
        monkeypatch.setattr(bench.placing, "left", lambda left=left: int(left))
        for seed in range(sum(batches)):
            submitted(bench, AT_ANSWER, prompt(seed + int(left)))
        forwards = Forwards(bench)
        assert bench.attempts().take(bench.queue) == sum(batches)
        assert forwards.batches == batches


def test_perturbed_rows_count_against_the_token_budget(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(bench.settings, batch_tokens=6 * 8)
    bench.residency.load("tiny")
    done = Noise(component="blocks.0.mlp", draws=3)
    for seed in range(5):
        submitted(bench, perturbation(done), prompt(seed))
    forwards = Forwards(bench)
    assert bench.attempts().take(bench.queue) == 5
    assert forwards.batches == [2, 2, 1]
