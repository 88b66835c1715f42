"""A scan as it came, understood: its model is there, its texts are tokens, and the model can do it.

Everything that can be refused is refused here, before anything is queued.
"""

import asyncio
from typing import NamedTuple

import msgspec

from api.dependencies import Services
from api.sizes import extent
from neural_mri.backing import jobs
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.stored import load_manifest
from neural_mri.contract.anomalies import Lens
from neural_mri.contract.components import Component
from neural_mri.contract.models import Architecture
from neural_mri.contract.perturbations import PatchSite, TraceKind
from neural_mri.contract.problems import (
    Gone,
    ModelNotLoaded,
    PromptTooLong,
    Unprocessable,
    UnsupportedModel,
)
from neural_mri.contract.results import Manifest
from neural_mri.contract.scan_keys import ANSWERS, calibration_key, scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    PromptScan,
    Scan,
    ScanKind,
    TargetedScan,
    TracingScan,
    WeightScan,
    resolve_positions,
)
from neural_mri.contract.tokens import Operands, Tokens

__all__ = ("LARGEST_RESULT_BYTES", "Prepared", "prepare", "tokens_of_prompt")

LARGEST_RESULT_BYTES = 512 * 2**20
"""Tables of one scan may take as much, by an estimate from shapes alone."""


class Prepared(NamedTuple):
    """A scan as it was understood, for a model that is there."""

    scan: Scan
    model: RegisteredModel
    tokens: Tokens | None
    operands: Operands
    key: str
    """The scan key."""
    forwards: float
    """About how much work it is, in plain forward passes of its prompt."""


async def prepare(services: Services, scan: Scan) -> Prepared:
    """Understand a scan.

    Raises the `Unprocessable` that names what the request, the model or the prompt does not have, and
    `ModelNotLoaded`.
    """
    model = await services.model(scan.model)
    settings = services.settings
    is_kept = model.wanted or model.name in settings.pinned or settings.load_on_demand
    if scan.needs_loaded_model and not is_kept:
        raise ModelNotLoaded(
            f"no worker is asked to hold {model.name}: POST /api/model/load first",
            model=model.name,
        )
    scan.check(model.architecture)
    scan = _plain(msgspec.structs.replace(scan, model=model.name))
    tokens = None
    if isinstance(scan, PromptScan):
        tokens = await tokens_of_prompt(services, model, scan.prompt)
    operands = await _operands(services, model, scan)
    n_tokens = len(tokens) if tokens else sum(map(len, operands.prompts.values()))
    _check_tokens(scan, n_tokens, operands)
    if isinstance(scan, TracingScan) and tokens is not None:
        scan.subject_positions(tokens)
    await _check_calibration(services, model, scan)
    estimate = extent(scan, model.architecture, n_tokens)
    if estimate.result_bytes > LARGEST_RESULT_BYTES:
        raise Unprocessable(
            f"the result would take some {estimate.result_bytes / 2**20:.0f} MiB, "
            f"{LARGEST_RESULT_BYTES >> 20} MiB are allowed: {estimate.mend}",
            bytes=estimate.result_bytes,
            limit=LARGEST_RESULT_BYTES,
        )
    key = scan_key(
        scan,
        token_ids=None if tokens is None else tokens.ids,
        revision=model.revision,
        tokenizer_digest=model.tokenizer_digest,
        numerics=model.numerics,
        operands=operands,
        baseline_revision=await _baseline_revision(services, model.architecture, scan),
    )
    return Prepared(scan, model, tokens, operands, key, estimate.forwards)


async def tokens_of_prompt(
    services: Services, model: RegisteredModel, prompt: str, what: str = "the prompt"
) -> Tokens:
    """A prompt as the model reads it. Raises `PromptTooLong`."""
    tokens = await services.tokenizers.encode(model.tokenizer_digest, prompt)
    n_ctx, bound = model.architecture.n_ctx, services.settings.max_tokens
    if len(tokens) > min(n_ctx, bound):
        limit = f"{model.name} reads {n_ctx}" if n_ctx <= bound else f"this service takes {bound}"
        raise PromptTooLong(
            f"{what} has {len(tokens)} tokens, {limit} at most",
            n_tokens=len(tokens),
            limit=min(n_ctx, bound),
        )
    return tokens


def _plain(scan: Scan) -> Scan:
    """The same scan, written the one way: equal scans then have equal keys."""
    match scan:
        case AttentionScan():
            return msgspec.structs.replace(scan, layers=tuple(sorted(set(scan.layers))))
        case ActivationScan() | WeightScan() if scan.layers != "all":
            layers = tuple(sorted({_canonical(address) for address in scan.layers}))
            return msgspec.structs.replace(scan, layers=layers)
        case PerturbationScan():
            done = tuple(
                msgspec.structs.replace(each, component=_canonical(each.component))
                for each in scan.perturbations
            )
            return msgspec.structs.replace(scan, perturbations=done)
        case PatchingScan():
            sites = tuple(site for site in PatchSite if site in scan.sites)
            return msgspec.structs.replace(scan, sites=sites)
        case TracingScan():
            kinds = tuple(kind for kind in TraceKind if kind in scan.kinds)
            return msgspec.structs.replace(scan, kinds=kinds)
        case CalibrationScan():
            lenses = tuple(lens for lens in Lens if lens in scan.lenses)
            return msgspec.structs.replace(scan, lenses=lenses)
        case _:
            return scan


def _canonical(address: str) -> str:
    return str(Component.parse(address))


async def _operands(services: Services, model: RegisteredModel, scan: Scan) -> Operands:
    prompts = {}
    for text in scan.other_prompts:
        if isinstance(scan, CalibrationScan):
            # Reference text is cut to length; however long, it is only text.
            prompts[text] = await services.tokenizers.encode(model.tokenizer_digest, text)
        else:
            prompts[text] = await tokens_of_prompt(services, model, text, "another prompt")
    token_ids = {}
    if isinstance(scan, TargetedScan):
        for name in ANSWERS:
            token = getattr(scan, name)
            if token is not None:
                token_ids[name] = await _token_id(services, model, name, token)
        if len(token_ids) == len(ANSWERS) and len(set(token_ids.values())) == 1:
            raise Unprocessable(f"answer and foil are both {scan.foil!r}: expected two tokens")
    return Operands(prompts=prompts, token_ids=token_ids)


async def _token_id(services: Services, model: RegisteredModel, name: str, token: str | int) -> int:
    if isinstance(token, str):
        return await services.tokenizers.token_id(model.tokenizer_digest, name, token)
    if token >= model.architecture.d_vocab:
        raise Unprocessable(
            f"{name} is token {token}, but {model.name} has {model.architecture.d_vocab}: expected 0 "
            f"to {model.architecture.d_vocab - 1}"
        )
    return token


def _check_tokens(scan: Scan, n_tokens: int, operands: Operands) -> None:
    """What depends on how many tokens there are."""
    if isinstance(scan, TargetedScan):
        resolve_positions((scan.target_token_idx,), n_tokens)
    match scan:
        case PerturbationScan():
            for perturbation in scan.perturbations:
                resolve_positions(perturbation.token_positions, n_tokens)
        case AnomalyScan() if scan.token_positions != "target":
            resolve_positions(scan.token_positions, n_tokens)
    if isinstance(scan, CircuitScan | PatchingScan | PerturbationScan):
        name = "source_prompt" if isinstance(scan, PerturbationScan) else "corrupt_prompt"
        for tokens in operands.prompts.values():
            if len(tokens) != n_tokens:
                raise Unprocessable(
                    f"{name} has {len(tokens)} {'token' if len(tokens) == 1 else 'tokens'} and the prompt "
                    f"{n_tokens}: expected as many, or positions would not correspond",
                    n_tokens=n_tokens,
                    n_other_tokens=len(tokens),
                )


async def _check_calibration(services: Services, model: RegisteredModel, scan: Scan) -> None:
    """A calibration that is asked for by its key must be there; the model's own is made when needed."""
    wanted = getattr(scan, "calibration", None)
    own = calibration_key(
        revision=model.revision, tokenizer_digest=model.tokenizer_digest, numerics=model.numerics
    )
    lens = scan.lens if isinstance(scan, AnomalyScan) else Lens.BIAS
    if wanted in (None, own):
        lenses = {Lens.RAW, *CalibrationScan().lenses}
    else:
        lenses = {Lens.RAW, Lens.BIAS, *await _fitted_lenses(services, model, wanted)}
    if lens not in lenses:
        raise Unprocessable(
            f"lens {lens.value!r} is not fitted: POST /api/model/calibrate with {lens.value!r} among its "
            "lenses, wait, and give its job's scan_key as calibration",
            lens=lens.value,
        )


async def _fitted_lenses(
    services: Services, model: RegisteredModel, wanted: str
) -> tuple[Lens, ...]:
    """Raises `Unprocessable` where there is no such calibration of the model."""
    manifest = await _calibration(services, wanted)
    if manifest is None or manifest.kind is not ScanKind.CALIBRATION:
        raise Unprocessable(
            f"there is no calibration {wanted}: POST /api/model/calibrate, wait, and give its job's "
            "scan_key",
            calibration=wanted,
        )
    if manifest.revision != model.revision:
        raise Unprocessable(
            f"calibration {wanted} is of {manifest.model}'s weights, not of {model.name}'s: expected one "
            "of the model that is scanned",
            calibration=wanted,
        )
    return tuple(Lens(lens) for lens in manifest.request["lenses"])


async def _calibration(services: Services, wanted: str) -> Manifest | None:
    """What a scan key's job has measured, for as long as a job names it."""
    path = await services.sessions.look(jobs.result_of, wanted)
    if path is None:
        return None
    try:
        return await asyncio.to_thread(load_manifest, services.store, path)
    except Gone:
        return None


async def _baseline_revision(
    services: Services, architecture: Architecture, scan: Scan
) -> str | None:
    if not isinstance(scan, WeightScan) or scan.baseline is None:
        return None
    baseline = await services.model(scan.baseline)
    if baseline.architecture != architecture:
        raise UnsupportedModel(
            f"{baseline.name} is not of the same shape as {scan.model}: their weights cannot be "
            "compared one by one",
            baseline=baseline.name,
        )
    return baseline.revision
