"""The way in from Python: ask for scans, follow them, take the numbers away."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Literal, Self
from uuid import UUID

import msgspec

from neural_mri.client.batches import Batches
from neural_mri.client.diagnosing import Progress, ServiceScans, diagnosed, silent
from neural_mri.client.exchange import PARTING_SECONDS, Exchange, once
from neural_mri.client.parting import begun
from neural_mri.client.progress import ShowProgress, both, name_of, place_in_words, shown
from neural_mri.client.result import Result
from neural_mri.client.sessions import Sessions
from neural_mri.client.watching import JobEvent, follow, follow_many, wait_for
from neural_mri.contract.anomalies import Lens, Sublayers
from neural_mri.contract.auth import Usage
from neural_mri.contract.circuits import Ablation, CircuitMethod, Granularity
from neural_mri.contract.cluster import Cluster
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.events import Event
from neural_mri.contract.findings import Diagnosis
from neural_mri.contract.jobs import DeletedJob, JobState, JobView, Lane
from neural_mri.contract.models import ModelInfo, ModelRequest
from neural_mri.contract.perturbations import Direction, PatchSite, Perturbation, TraceKind
from neural_mri.contract.results import Manifest
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
    ScanKind,
    StructuralScan,
    TracingScan,
    WeightScan,
    encode_scan,
    kind_of,
)
from neural_mri.contract.suites import Suite
from neural_mri.contract.tokens import Tokens
from neural_mri.diagnostics import Records, load_suite

__all__ = ("Client",)

OnEvent = Callable[[Event], None]
JobReference = JobView | UUID | str

_PATHS = {
    ScanKind.T1: "/api/scan/structural",
    ScanKind.T2: "/api/scan/weights",
    ScanKind.FMRI: "/api/scan/activation",
    ScanKind.ATTENTION: "/api/scan/attention",
    ScanKind.DTI: "/api/scan/circuits",
    ScanKind.FLAIR: "/api/scan/anomaly",
    ScanKind.PERTURBATION: "/api/perturb",
    ScanKind.PATCHING: "/api/perturb/patching",
    ScanKind.TRACING: "/api/perturb/trace",
    ScanKind.CALIBRATION: "/api/model/calibrate",
}


class Client:
    """A connection to one service. Use it as a context manager, or `close` it.

    `scan_*`, `perturb`, `patching`, `trace`, `calibrate` and `run` wait and give the `Result`; `submit`,
    `load` and `unload` give the job at once, to be followed with `watch` or `wait`. Any method raises
    `Unreachable` when nobody answers and `Refused`, with the service's problem document, when the service says
    no. A service that is restarted, busy or full is asked again first, in its own time and for as long as
    `patience_seconds`, where that cannot do a thing twice.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        timeout_seconds: float | None = None,
        patience_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
        api_key: str | None = None,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            base_url: Where the service is; by default the environment's `NMRI_URL`, or else
                `http://127.0.0.1:8642`. Raises `ValueError` when it is no HTTP address.
            timeout_seconds: How long to wait for an answer to any one request; by default the environment's
                `NMRI_TIMEOUT`, or else 30.
            patience_seconds: How long one call goes on when a service that was there is not, or says that it is
                busy or full; by default the environment's `NMRI_PATIENCE`, or else 60. 0: not at all.
            headers: Sent with every request, for a service behind a gateway of its own.
            api_key: Who asks, where the service wants to know; by default the environment's
                `NMRI_API_KEY`; empty for none whatever the environment says. Raises `ValueError` when it
                is no key.
        """
        self._exchange = Exchange(
            base_url,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
            headers=headers or {},
            api_key=api_key,
        )

    @property
    def batches(self) -> Batches:
        """Many scans in one request."""
        return Batches(self._exchange)

    @property
    def sessions(self) -> Sessions:
        """Scans kept together, opened again, compared and shared."""
        return Sessions(self._exchange)

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return self._exchange.base_url

    def close(self) -> None:
        """Close the connections. What waits, in another thread, ends with `Unreachable`; later calls raise `ClientClosed`."""
        self._exchange.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What there is

    def health(self) -> dict[str, Any]:
        """How the service is, in its own words; also when it is down, which it says with 503."""
        down = (HTTPStatus.SERVICE_UNAVAILABLE,)
        return self._exchange.ask(dict[str, Any], "GET", "/api/health", answers=down)

    def cluster(self) -> Cluster:
        """The whole service now: workers, what they hold, and what waits."""
        return self._exchange.ask(Cluster, "GET", "/api/cluster")

    def usage(self) -> Usage:
        """What you have under way and have computed today, beside what you may."""
        return self._exchange.ask(Usage, "GET", "/api/usage")

    def models(self) -> list[ModelInfo]:
        """Every registered model."""
        return self._exchange.ask(list[ModelInfo], "GET", "/api/models")

    def model(self, name: str | None = None) -> ModelInfo:
        """One model; the service's default where no name is given."""
        query = {} if name is None else {"model": name}
        return self._exchange.ask(ModelInfo, "GET", "/api/model/info", query=query)

    def load(self, name: str) -> JobView:
        """Ask a worker to hold a model, so that scans of it start at once."""
        body = msgspec.json.encode(ModelRequest(model=name))
        return self._exchange.ask(JobView, "POST", "/api/model/load", body=body, headers=once(None))

    def unload(self, name: str) -> JobView:
        """Ask the workers to let a model go. Pinned models are refused."""
        return self._exchange.ask(
            JobView, "DELETE", "/api/model/unload", query={"model": name}, headers=once(None)
        )

    def tokenize(self, prompt: str, *, model: str | None = None) -> Tokens:
        """The prompt as the model reads it."""
        body = msgspec.json.encode({"model": model, "prompt": prompt})
        return self._exchange.ask(Tokens, "POST", "/api/tokenize", body=body, repeatable=True)

    # Scans, start to end

    def scan_structural(
        self,
        *,
        model: str | None = None,
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """T1: structure and exact parameter counts. Needs no loaded model."""
        return self.run(StructuralScan(model=model), on_event, progress=progress)

    def scan_activation(
        self,
        prompt: str,
        *,
        model: str | None = None,
        layers: Literal["all"] | Iterable[str | int] = "all",
        aggregation: Aggregation | str = Aggregation.L2_NORM,
        include_residual: bool = True,
        token_positions: Literal["all"] | Iterable[int] = "all",
        top_neurons: int = 10,
        top_predictions: int = 10,
        calibration: str | None = None,
        canonical: bool = False,
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """fMRI: what each component writes to the residual stream at each token of a prompt.

        `layers` takes addresses (`blocks.3.mlp`) and layer numbers, a number meaning the layer's heads
        and MLP. The other arguments are those of `ActivationScan`.
        """
        scan = ActivationScan(
            model=model,
            prompt=prompt,
            layers="all" if layers == "all" else addresses(layers),
            aggregation=Aggregation(aggregation),
            include_residual=include_residual,
            token_positions=token_positions if token_positions == "all" else tuple(token_positions),
            top_neurons=top_neurons,
            top_predictions=top_predictions,
            calibration=calibration,
            canonical=canonical,
        )
        return self.run(scan, on_event, progress=progress)

    def scan_attention(
        self,
        prompt: str,
        *,
        layers: Iterable[int],
        model: str | None = None,
        canonical: bool = False,
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """Attention patterns of some layers, every head, every pair of tokens."""
        scan = AttentionScan(model=model, prompt=prompt, layers=tuple(layers), canonical=canonical)
        return self.run(scan, on_event, progress=progress)

    def scan_weights(
        self,
        *,
        model: str | None = None,
        layers: Literal["all"] | Iterable[str | int] = "all",
        baseline: str | None = None,
        histogram_bins: int = 64,
        outlier_sigma: float = 6.0,
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """T2: what the published weights are like, and how they differ from a `baseline` model's.

        `layers` is read as by `scan_activation`. Needs no loaded model.
        """
        scan = WeightScan(
            model=model,
            layers="all" if layers == "all" else addresses(layers),
            baseline=baseline,
            histogram_bins=histogram_bins,
            outlier_sigma=outlier_sigma,
        )
        return self.run(scan, on_event, progress=progress)

    def scan_circuits(
        self,
        prompt: str,
        *,
        model: str | None = None,
        answer: str | int | None = None,
        foil: str | int | None = None,
        target_token_idx: int = -1,
        corrupt_prompt: str | None = None,
        method: CircuitMethod | str = CircuitMethod.FAST,
        ablation: Ablation | str | None = None,
        granularity: Granularity | str = Granularity.HEADS,
        include_first_token: bool = False,
        exact: int = 30,
        edges: int = 300,
        steps: int = 5,
        calibration: str | None = None,
        canonical: bool = False,
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """DTI: what replacing each component does to the answer, and the paths between components.

        The arguments are those of `CircuitScan`. `on_event` hears estimates first, then what was measured.
        """
        scan = CircuitScan(
            model=model,
            prompt=prompt,
            answer=answer,
            foil=foil,
            target_token_idx=target_token_idx,
            corrupt_prompt=corrupt_prompt,
            method=CircuitMethod(method),
            ablation=None if ablation is None else Ablation(ablation),
            granularity=Granularity(granularity),
            include_first_token=include_first_token,
            exact=exact,
            edges=edges,
            steps=steps,
            calibration=calibration,
            canonical=canonical,
        )
        return self.run(scan, on_event, progress=progress)

    def scan_anomaly(
        self,
        prompt: str,
        *,
        model: str | None = None,
        answer: str | int | None = None,
        foil: str | int | None = None,
        target_token_idx: int = -1,
        lens: Lens | str = Lens.BIAS,
        token_positions: Literal["target", "all"] | Iterable[int] = "all",
        appearance: bool = True,
        sublayers: Sublayers | str = Sublayers.TARGET,
        kl_weight: float = 0.6,
        entropy_weight: float = 0.4,
        false_alarm_rate: float = 0.01,
        calibration: str | None = None,
        canonical: bool = False,
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """FLAIR: uncertainty, where the answer appears, and whether it is supported.

        The arguments are those of `AnomalyScan`.
        """
        scan = AnomalyScan(
            model=model,
            prompt=prompt,
            answer=answer,
            foil=foil,
            target_token_idx=target_token_idx,
            lens=Lens(lens),
            token_positions=token_positions
            if token_positions == "target" or token_positions == "all"  # noqa: PLR1714 -- mypy's
            else tuple(token_positions),
            appearance=appearance,
            sublayers=Sublayers(sublayers),
            kl_weight=kl_weight,
            entropy_weight=entropy_weight,
            false_alarm_rate=false_alarm_rate,
            calibration=calibration,
            canonical=canonical,
        )
        return self.run(scan, on_event, progress=progress)

    # Stimulation

    def perturb(
        self,
        prompt: str,
        perturbations: Iterable[Perturbation] = (),
        *,
        model: str | None = None,
        answer: str | int | None = None,
        foil: str | int | None = None,
        target_token_idx: int = -1,
        top_predictions: int = 10,
        perturbed_scan: bool = True,
        calibration: str | None = None,
        canonical: bool = False,
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """The model reading a prompt, clean and perturbed, side by side; no weight is ever changed.

        All `perturbations` are applied in one run:
        `perturb(prompt, [ZeroAblation(component="blocks.21.attn.h3"), Amplify(component="blocks.4.mlp")])`.
        """
        scan = PerturbationScan(
            model=model,
            prompt=prompt,
            answer=answer,
            foil=foil,
            target_token_idx=target_token_idx,
            perturbations=tuple(perturbations),
            top_predictions=top_predictions,
            perturbed_scan=perturbed_scan,
            calibration=calibration,
            canonical=canonical,
        )
        return self.run(scan, on_event, progress=progress)

    def patching(
        self,
        prompt: str,
        corrupt_prompt: str,
        *,
        model: str | None = None,
        answer: str | int | None = None,
        foil: str | int | None = None,
        target_token_idx: int = -1,
        direction: Direction | str = Direction.DENOISING,
        sites: Iterable[PatchSite | str] = (
            PatchSite.RESIDUAL,
            PatchSite.ATTENTION,
            PatchSite.MLP,
        ),
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """Activation patching between two prompts of as many tokens: recovery by layer and position."""
        scan = PatchingScan(
            model=model,
            prompt=prompt,
            corrupt_prompt=corrupt_prompt,
            answer=answer,
            foil=foil,
            target_token_idx=target_token_idx,
            direction=Direction(direction),
            sites=tuple(map(PatchSite, sites)),
        )
        return self.run(scan, on_event, progress=progress)

    def trace(
        self,
        prompt: str,
        subject: str,
        *,
        model: str | None = None,
        answer: str | int | None = None,
        foil: str | int | None = None,
        target_token_idx: int = -1,
        sigma: float = 3.0,
        draws: int = 3,
        seed: int = 0,
        window: int = 6,
        kinds: Iterable[TraceKind | str] = (TraceKind.STATE, TraceKind.MLP, TraceKind.ATTENTION),
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """Causal tracing (Meng et al. 2022): noise on the subject's embeddings, then states restored."""
        scan = TracingScan(
            model=model,
            prompt=prompt,
            subject=subject,
            answer=answer,
            foil=foil,
            target_token_idx=target_token_idx,
            sigma=sigma,
            draws=draws,
            seed=seed,
            window=window,
            kinds=tuple(map(TraceKind, kinds)),
        )
        return self.run(scan, on_event, progress=progress)

    def calibrate(
        self,
        *,
        model: str | None = None,
        texts: Iterable[str] = (),
        n_tokens: int = 2048,
        n_ordinary: int = 128,
        seed: int = 0,
        lenses: Iterable[Lens | str] = (Lens.BIAS,),
        on_event: OnEvent | None = None,
        progress: ShowProgress = False,
    ) -> Result:
        """Measure what scans are read against, on `texts` or else on text sampled from the model.

        The result's `manifest.scan_key` is what other scans take as `calibration`.
        """
        scan = CalibrationScan(
            model=model,
            texts=tuple(texts),
            n_tokens=n_tokens,
            n_ordinary=n_ordinary,
            seed=seed,
            lenses=tuple(map(Lens, lenses)),
        )
        return self.run(scan, on_event, progress=progress)

    def run(
        self,
        scan: Scan,
        on_event: OnEvent | None = None,
        *,
        lane: Lane = Lane.INTERACTIVE,
        progress: ShowProgress = False,
    ) -> Result:
        """Submit a scan, wait, and give its result. Interrupted, it cancels the job.

        `progress` shows meanwhile how far it is, as with every method that waits: on a terminal or in a
        notebook, or, if it is `"lines"`, as lines on standard error wherever that leads. Raises `JobFailed` or `JobCancelled` when the job ends without a result.
        """
        with begun() as work:
            job = self.submit(scan, lane=lane)
            work.until(lambda: self.cancel(job, most_seconds=PARTING_SECONDS))
            return self.result(self.wait(job, on_event, progress=progress))

    def diagnose(
        self,
        suite: str | Suite = "quick",
        *,
        model: str | None = None,
        baseline: str | None = None,
        profile: str | None = None,
        records: Records | None = None,
        on_progress: Progress = silent,
        progress: ShowProgress = False,
    ) -> Diagnosis:
        """Examine a model with a suite of prompts, and gate it against a `baseline` where one is named.

        What was measured is kept in `records` under its key, and never measured again;
        `neural_mri.diagnostics.render` makes a report of the answer. Raises `NotComparable` where something
        beside the weights differs.
        """
        asked = load_suite(suite) if isinstance(suite, str) else suite
        there = None if baseline is None else ServiceScans(self, baseline)
        with shown(f"diagnosis {asked.name}", progress, "beginning") as follower:

            def advance(checkpoint: str, done: int, total: int) -> None:
                on_progress(checkpoint, done, total)
                if follower is not None and total:
                    follower.count(checkpoint, done, total)

            return diagnosed(
                asked,
                ServiceScans(self, model),
                there,
                records or Records(),
                profile=profile,
                on_progress=advance,
            )

    # Jobs

    def submit(
        self,
        scan: Scan,
        *,
        lane: Lane = Lane.INTERACTIVE,
        idempotency_key: str | None = None,
    ) -> JobView:
        """Ask for a scan; the job may be finished already, when its result was known.

        `lane` says how soon it should run: many scans at once belong in the batch lane. `idempotency_key` is
        your own word for this request: sent again within a day, also by another program, it makes no second
        job. Without one the client makes one up, so that it may send the request again itself.
        """
        return self._exchange.ask(
            JobView,
            "POST",
            _PATHS[kind_of(scan)],
            body=encode_scan(scan),
            query={"lane": lane.value},
            headers=once(idempotency_key),
        )

    def job(self, job: JobReference) -> JobView:
        """How a job stands now."""
        return self._exchange.ask(JobView, "GET", f"/api/jobs/{_id(job)}")

    def jobs(
        self,
        limit: int = 50,
        *,
        after: JobReference | None = None,
        scan_key: str | None = None,
        state: JobState | str | None = None,
    ) -> list[JobView]:
        """The latest jobs, newest first.

        Args:
            limit: How many at most, up to 200.
            after: Only such as are older than this one, which is the last of the page before.
            scan_key: Only those of this scan: its key, or at least the first 16 digits of it.
            state: Only those in this state, of the latest thousand.
        """
        query = {"limit": str(limit)}
        if after is not None:
            query["after"] = str(_id(after))
        if scan_key is not None:
            query["scan_key"] = scan_key
        if state is not None:
            query["state"] = JobState(state).value
        return self._exchange.ask(list[JobView], "GET", "/api/jobs", query=query)

    def cancel(self, job: JobReference, *, most_seconds: float = math.inf) -> JobView:
        """Ask for a job to be stopped: at once where it is queued, else at its next checkpoint.

        For no longer than `most_seconds`, where that is less than the client's patience.
        """
        path = f"/api/jobs/{_id(job)}"
        return self._exchange.ask(JobView, "DELETE", path, most_seconds=most_seconds)

    def delete(self, job: JobReference) -> DeletedJob:
        """Delete a job that has ended, and its result unless another job has the same.

        What sessions keep stays; the answer names them. Raises `Refused` where the job has not ended.
        """
        path = f"/api/jobs/{_id(job)}/record"
        # Of one that has been deleted by a request whose answer was lost a second one knows nothing.
        return self._exchange.ask(DeletedJob, "DELETE", path, repeatable=False)

    def watch(self, job: JobReference) -> Iterator[Event]:
        """A job's events from its first to `Ended`, each once, through broken connections.

        Raises `Unreachable` when the service stays silent for `patience_seconds`.
        """
        return follow(self._exchange, _id(job))

    def watch_many(self, jobs: Iterable[JobReference]) -> Iterator[JobEvent]:
        """The events of up to 32 jobs on one connection, each with its job's id, until all have `Ended`.

        Raises as `watch` does, and `ValueError` for more jobs.
        """
        return follow_many(self._exchange, map(_id, jobs))

    def wait(
        self,
        job: JobReference,
        on_event: OnEvent | None = None,
        *,
        progress: ShowProgress = False,
    ) -> JobView:
        """The job once it has succeeded. Raises `JobFailed` or `JobCancelled` when it does not."""
        view = job if isinstance(job, JobView) else self.job(job)
        said = place_in_words(view.queue) if view.queue else view.state.value
        with shown(name_of(view), progress, said) as follower:
            return wait_for(self._exchange, view, both(on_event, follower))

    def result(self, job: JobReference) -> Result:
        """The result of a succeeded job; `Refused` before that. Tables are fetched when asked for."""
        job_id = _id(job)
        manifest = self._exchange.ask(Manifest, "GET", f"/api/jobs/{job_id}/manifest")
        return Result(self._exchange, job_id, manifest)


def addresses(layers: Iterable[str | int]) -> tuple[str, ...]:
    """Addresses to report; the number 3 stands for `blocks.3.attn` (with its heads) and `blocks.3.mlp`."""
    listed: list[str] = []
    for layer in layers:
        if isinstance(layer, int):
            listed += (str(Component(kind, layer)) for kind in (Kind.ATTN, Kind.MLP))
        else:
            listed.append(layer)
    return tuple(listed)


def _id(job: JobReference) -> UUID:
    if isinstance(job, JobView):
        return job.id
    if isinstance(job, UUID):
        return job
    try:
        return UUID(job)
    except ValueError:
        raise ValueError(f"{job!r} is not a job's id: expected a UUID") from None
