"""Every scan on every family in every data type, against the plain Hugging Face model and identities.

What each number means is proven one scan at a time in the modules beside this one, in float32. Here stands the
matrix: nothing depends on a family or a type that was not tried.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from neural_mri.contract.anomalies import AnomalyScan, Lens
from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan
from neural_mri.contract.components import EMBED, Component, Kind
from neural_mri.contract.models import Numerics
from neural_mri.contract.perturbations import (
    Amplify,
    Inject,
    InjectMode,
    Invert,
    MeanAblation,
    Noise,
    Patch,
    PatchingScan,
    PatchSite,
    Perturbation,
    PerturbationScan,
    TracingScan,
    ZeroAblation,
)
from neural_mri.contract.problems import UnknownComponent
from neural_mri.contract.scans import ActivationScan, Aggregation, AttentionScan
from neural_mri.contract.tokens import Tokens
from neural_mri.contract.weights import WeightScan
from tests import models
from worker.scanner.activations import scan_activations
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.attention import scan_attention
from worker.scanner.circuits import scan_circuits
from worker.scanner.interventions import width
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel, load
from worker.scanner.patching import scan_patching
from worker.scanner.perturbation import scan_perturbation
from worker.scanner.references import reference_means
from worker.scanner.topology import scan_topology
from worker.scanner.tracing import scan_tracing
from worker.scanner.weights import scan_weights

TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest difference, as a share of the largest value: a few roundings of that type, layer upon layer."""

TOKENS, OTHER = models.prompt(7), models.prompt(7, seed=5)
ANSWER, FOIL = 7, 9
Tables = dict[str, pa.Table]


class Subject(NamedTuple):
    """A model as it is scanned, and as Hugging Face alone runs it."""

    family: str
    dtype: str
    scanned: LoadedModel
    reference: PreTrainedModel
    tables_of_weights: Tables
    tables_of_topology: Tables

    def close(self, found: Any, expected: Any, *, times: float = 1.0) -> None:
        """Within the type's tolerance, or `times` of it for what rounds more often."""
        found, expected = (np.asarray(value, dtype=np.float64) for value in (found, expected))
        tolerance = times * TOLERANCE[self.dtype]
        largest = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


@pytest.fixture(
    scope="module",
    params=[(family, dtype) for family in models.FAMILIES for dtype in TOLERANCE],
    ids="-".join,
)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    family, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
    reference: Any = models.build(family).to(getattr(torch, dtype))
    reference.save_pretrained(folder)
    model = load(folder, Numerics(dtype=dtype, attention=reference.config._attn_implementation))
    weights = scan_weights(folder, WeightScan(), Silent()).tables
    yield Subject(family, dtype, model, reference, weights, scan_topology(folder))
    model.release()


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: Tokens = TOKENS) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([tokens.ids]), use_cache=False).logits[0]
    return found.float()


def metric(found: Tensor) -> float:
    return (found[-1, ANSWER] - found[-1, FOIL]).item()


def values(table: pa.Table) -> dict[str, Any]:
    return {row["component"]: np.array(row["value"]) for row in table.to_pylist()}


@contextmanager
def severed(subject: Subject, layer: int, head: int) -> Iterator[None]:
    """One head's part of W_O set to zero in the reference's own weights."""
    names, shape = models.NAMES[subject.family], subject.scanned.architecture
    w_o = subject.reference.get_parameter(f"{names.blocks}.{layer}.{names.w_o}.weight")
    mine = slice(head * shape.d_head, (head + 1) * shape.d_head)
    part = w_o[mine] if subject.family == "gpt2" else w_o[:, mine]
    kept = part.detach().clone()
    with torch.no_grad():
        part.zero_()
        try:
            yield
        finally:
            part.copy_(kept)


def fmri(subject: Subject, tokens: Tokens = TOKENS, **asked: Any) -> Tables:
    request = ActivationScan(prompt="x", **asked)
    return scan_activations(subject.scanned, request, tokens, Silent()).tables


def perturbed(subject: Subject, *perturbations: Perturbation, **more: Any) -> Tables:
    request = PerturbationScan(prompt="x", perturbations=perturbations)
    return scan_perturbation(
        subject.scanned,
        request,
        TOKENS,
        Silent(),
        sources={"y": OTHER, "same": TOKENS},
        answer_id=ANSWER,
        foil_id=FOIL,
        **more,
    ).tables


def circuit(subject: Subject, method: CircuitMethod) -> dict[str, dict[str, Any]]:
    request = CircuitScan(
        prompt="x",
        method=method,
        ablation=Ablation.ZERO,
        include_first_token=True,
        exact=5,
    )
    model = subject.scanned
    tables = scan_circuits(model, request, TOKENS, None, ANSWER, FOIL, Silent(), None).tables
    return {row["component"]: row for row in tables["effects"].to_pylist()}


def test_fmri_shows_the_plain_models_residuals_and_predictions(subject: Subject) -> None:
    tables = fmri(subject)
    found = values(tables["activations"])
    with torch.inference_mode():
        hidden = subject.reference(
            input_ids=torch.tensor([TOKENS.ids]), use_cache=False, output_hidden_states=True
        ).hidden_states
    for layer in range(subject.scanned.architecture.n_layers):
        subject.close(found[f"blocks.{layer}.resid_pre"], hidden[layer][0].float().norm(dim=-1))
    best = tables["predictions"].to_pandas().query("rank == 0")
    subject.close(best["logit"], logits(subject.reference).amax(-1))


def test_fmris_block_outputs_sum_to_the_residual_and_frames_are_runs_of_prefixes(
    subject: Subject,
) -> None:
    tables = fmri(subject, aggregation=Aggregation.RAW)
    vectors = {
        row["component"]: row["value"]
        for name, table in tables.items()
        if name.startswith("vectors.")
        for row in table.to_pylist()
        if row["position"] == len(TOKENS) - 1
    }
    for layer in range(subject.scanned.architecture.n_layers):
        before, attn, mlp, after = (
            np.array(vectors[f"blocks.{layer}.{part}"])
            for part in ("resid_pre", "attn", "mlp", "resid_post")
        )
        subject.close(before + attn + mlp, after)
    whole = values(tables["activations"])
    for length in range(1, len(TOKENS)):
        prefix = Tokens(
            ids=TOKENS.ids[:length], texts=TOKENS.texts[:length], spans=TOKENS.spans[:length]
        )
        for address, row in values(fmri(subject, prefix)["activations"]).items():
            subject.close(row, whole[address][:length])


def test_attention_is_a_distribution_over_what_has_been_read(subject: Subject) -> None:
    layers = tuple(range(subject.scanned.architecture.n_layers))
    tables = scan_attention(
        subject.scanned, AttentionScan(prompt="x", layers=layers), TOKENS, Silent()
    ).tables
    for table in tables.values():
        pattern = np.array(table["value"].to_pylist()).reshape(-1, len(TOKENS), len(TOKENS))
        subject.close(pattern.sum(-1), np.ones(pattern.shape[:2]))
        assert not np.triu(pattern, 1).any()


def test_circuits_exact_effect_of_a_head_is_that_of_severing_it(subject: Subject) -> None:
    exact, fast = circuit(subject, CircuitMethod.ABLATION), circuit(subject, CircuitMethod.FAST)
    clean = logits(subject.reference)
    size = clean.abs().max().item()
    for layer in range(subject.scanned.architecture.n_layers):
        with severed(subject, layer, 1):
            expected = metric(logits(subject.reference)) - metric(clean)
        found = exact[str(Component.head(layer, 1))]["effect"]
        assert found == pytest.approx(expected, abs=2 * TOLERANCE[subject.dtype] * size)
    measured = [address for address, row in fast.items() if row["exact"]]
    assert len(measured) >= 5
    for address in measured:
        assert fast[address]["effect"] == pytest.approx(
            exact[address]["effect"], abs=2 * TOLERANCE[subject.dtype] * size
        )


def test_flairs_last_lens_is_the_output(subject: Subject) -> None:
    request = AnomalyScan(prompt="x", lens=Lens.RAW, answer=ANSWER)
    tables = scan_anomalies(
        subject.scanned, request, TOKENS, Silent(), calibration=None, answer_id=ANSWER
    ).tables
    log_p = logits(subject.reference)[1:].log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    found = tables["uncertainty"].to_pandas().query("position > 0")["entropy"]
    subject.close(found, entropies)
    lens = tables["lens"].to_pandas().query("quantity == 'kl'")
    last = lens[lens["layer"] == lens["layer"].max()]["value"].to_list()
    kl = np.array(last[-1])
    assert np.nanmax(np.abs(kl)) < TOLERANCE[subject.dtype] * entropies.max().item()


def test_ablating_a_head_is_severing_it_from_the_residual_stream(subject: Subject) -> None:
    table = perturbed(subject, ZeroAblation(component="blocks.1.attn.head_2"))["comparison"]
    row = table.to_pylist()[0]
    clean = logits(subject.reference)
    with severed(subject, 1, 2):
        expected = logits(subject.reference)
    size = clean.abs().max().item()
    for name, run in (("metric_before", clean), ("metric_after", expected)):
        assert row[name] == pytest.approx(metric(run), abs=TOLERANCE[subject.dtype] * size)


def places(subject: Subject) -> list[Component]:
    """One component of each kind that can be perturbed in this family."""
    kinds = [Kind.RESID_PRE, Kind.ATTN, Kind.MLP, Kind.RESID_POST]
    if not subject.scanned.architecture.parallel_blocks:
        kinds.append(Kind.RESID_MID)
    inner = [Component(kind, 1) for kind in kinds]
    return [EMBED, *inner, Component.head(1, 2), Component.neuron(1, 3)]


OPERATIONS: dict[str, Callable[[str, int], Perturbation]] = {
    "zero": lambda address, _: ZeroAblation(component=address, token_positions=(2, 4)),
    "amplify": lambda address, _: Amplify(component=address, factor=1.5),
    "invert": lambda address, _: Invert(component=address, token_positions=(3,)),
    "noise": lambda address, _: Noise(component=address, sigma=0.5, draws=2),
    "ablate": lambda address, _: MeanAblation(component=address),
    "inject": lambda address, n: Inject(
        component=address, values=(0.5,) * n, mode=InjectMode.REPLACE
    ),
    "patch": lambda address, _: Patch(component=address, source_prompt="y"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_changes_every_place_and_nothing_before_it(
    subject: Subject, operation: str
) -> None:
    shape = subject.scanned.architecture
    means = reference_means(subject.scanned, [torch.tensor([OTHER.ids])])
    for place in places(subject):
        made = OPERATIONS[operation](str(place), width(place.kind, shape))
        tables = perturbed(subject, made, means=means)
        assert np.isfinite(tables["shift"]["kl"].to_numpy()).all()
        change = values(tables["change"])
        # A neuron has no row of its own: its MLP's shows it.
        shown = str(Component(Kind.MLP, 1)) if place.kind is Kind.NEURON else str(place)
        assert change[shown].max() > 0, place
        assert all(np.isfinite(row).all() for row in change.values())
        if place is not EMBED:
            upstream = [row for address, row in change.items() if address.startswith("blocks.0.")]
            largest = max(np.abs(row).max() for row in values(tables["activations"]).values())
            # A batch of several prompts may round otherwise than a batch of one.
            assert np.max(upstream) <= TOLERANCE[subject.dtype] * largest


def test_patching_a_run_with_itself_changes_nothing(subject: Subject) -> None:
    patches = [Patch(component=str(place), source_prompt="same") for place in places(subject)]
    row = perturbed(subject, *patches)["comparison"].to_pylist()[0]
    subject.close([row["logit_after"]], [row["logit_before"]])
    request = PatchingScan(prompt="x", corrupt_prompt="y", sites=tuple(PatchSite))
    tables = scan_patching(
        subject.scanned, request, TOKENS, TOKENS, Silent(), answer_id=ANSWER, foil_id=FOIL
    ).tables
    clean = logits(subject.reference)
    patched = np.array(tables["patched"]["value"].to_pylist())
    size = clean.abs().max().item()
    assert np.abs(patched - metric(clean)).max() <= 2 * TOLERANCE[subject.dtype] * size


def test_patching_where_the_model_begins_is_exchanging_a_token(subject: Subject) -> None:
    request = PatchingScan(prompt="x", corrupt_prompt="y", sites=(PatchSite.RESIDUAL,))
    tables = scan_patching(
        subject.scanned, request, TOKENS, OTHER, Silent(), answer_id=ANSWER, foil_id=FOIL
    ).tables
    patched = values(tables["patched"])["blocks.0.resid_pre"]
    for position in range(len(TOKENS)):
        ids = (*OTHER.ids[:position], TOKENS.ids[position], *OTHER.ids[position + 1 :])
        run = logits(subject.reference, Tokens(ids=ids, texts=OTHER.texts, spans=OTHER.spans))
        tolerance = 2 * TOLERANCE[subject.dtype] * run.abs().max().item()
        assert patched[position] == pytest.approx(metric(run), abs=tolerance)


def test_tracing_restores_all_at_the_end_and_nothing_before_the_subject(subject: Subject) -> None:
    request = TracingScan(prompt="0123456", subject="12", draws=2, window=2)
    tables = scan_tracing(
        subject.scanned, request, TOKENS, Silent(), answer_id=ANSWER, foil_id=FOIL
    ).tables
    effect = {
        row["component"]: row["value"]
        for row in tables["trace"].to_pylist()
        if row["quantity"] == "indirect_effect"
    }
    (contrast,) = tables["contrast"].to_pylist()
    clean = logits(subject.reference)
    tolerance = 2 * TOLERANCE[subject.dtype] * clean.abs().max().item()
    last = Component(Kind.RESID_POST, subject.scanned.architecture.n_layers - 1)
    gap = metric(clean) - contrast["corrupted"]
    assert effect[str(last)][-1] == pytest.approx(gap, abs=tolerance)
    assert max(abs(row[0]) for row in effect.values()) <= tolerance


def test_t1_and_t2_count_and_measure_every_weight_as_it_is_stored(subject: Subject) -> None:
    parameters: dict[str, Tensor] = dict(subject.reference.named_parameters())
    count = sum(parameter.numel() for parameter in parameters.values())
    assert sum(subject.tables_of_topology["topology"]["parameters"].to_pylist()) == count
    stored = [
        row for row in subject.tables_of_weights["tensors"].to_pylist() if row["role"] != "buffer"
    ]
    assert sum(row["numel"] for row in stored) == count
    for row in stored:
        exact = parameters[row["name"]].detach().double().numpy()
        assert row["mean"] == pytest.approx(exact.mean(), rel=1e-6, abs=1e-9)
        assert row["frobenius"] == pytest.approx(np.linalg.norm(exact), rel=1e-6)
        assert row["max_abs"] == pytest.approx(np.abs(exact).max(), rel=1e-6)


def test_a_parallel_block_has_no_middle_and_says_so(subject: Subject) -> None:
    address = "blocks.1.resid_mid"
    if not subject.scanned.architecture.parallel_blocks:
        assert address in values(fmri(subject)["activations"])
        return
    with pytest.raises(UnknownComponent, match=r"blocks\.1\.resid_mid"):
        fmri(subject, layers=(address,))
    with pytest.raises(UnknownComponent, match=r"blocks\.1\.resid_mid"):
        perturbed(subject, ZeroAblation(component=address))
