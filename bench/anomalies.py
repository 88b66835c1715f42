"""What FLAIR costs beside a plain forward, and what a model's calibration costs once."""

from collections.abc import Callable, Iterator

from bench.timing import Row, median_seconds, plain_forward, prompt
from neural_mri.contract.anomalies import AnomalyScan, CalibrationScan, Sublayers
from neural_mri.contract.scans import ActivationScan
from worker.scanner.activations import scan_activations
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.calibrating import calibrate
from worker.scanner.calibration import Calibration
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel

__all__ = ("rows",)

_TOKENS = 10
_SCANS = {
    "FLAIR at the answer": (
        AnomalyScan(prompt="x", token_positions="target", sublayers=Sublayers.NONE),
        1.2,
    ),
    "FLAIR at the answer, sublayers too": (AnomalyScan(prompt="x", token_positions="target"), None),
    "FLAIR, every layer and position": (AnomalyScan(prompt="x", sublayers=Sublayers.NONE), 4.0),
    "FLAIR, the same, the answer's sublayers too": (AnomalyScan(prompt="x"), None),
}
"""What is asked, and the highest ratio that is good enough."""


def rows(model: LoadedModel, *, rounds: int) -> Iterator[Row]:
    """FLAIR of a short prompt, fMRI beside ordinary activity, and the calibration that both need."""
    tokens = prompt(model, _TOKENS)
    plain = plain_forward(model, tokens)
    calibration, seconds = _calibrated(model)

    def flair(asked: AnomalyScan) -> Callable[[], object]:
        return lambda: scan_anomalies(model, asked, tokens, Silent(), calibration=calibration)

    def fmri() -> object:
        asked = ActivationScan(prompt="x")
        return scan_activations(model, asked, tokens, Silent(), calibration=calibration)

    measured = median_seconds(
        {
            "plain": plain,
            **{what: flair(asked) for what, (asked, _) in _SCANS.items()},
            "fMRI scan with percentiles": fmri,
        },
        rounds=rounds,
    )
    for what, (_, goal) in _SCANS.items():
        yield Row(what, _TOKENS, measured[what], measured["plain"], goal)
    percentiles = "fMRI scan with percentiles"
    yield Row(percentiles, _TOKENS, measured[percentiles], measured["plain"], 1.10)
    yield Row("calibration, once a model", CalibrationScan().n_tokens, seconds, measured["plain"])


def _calibrated(model: LoadedModel) -> tuple[Calibration, float]:
    """The default calibration, and the seconds it took: once, for it is measured in forwards by the hundred."""
    made: list[Calibration] = []
    seconds = median_seconds(
        {"": lambda: made.append(calibrate(model, CalibrationScan(), Silent()))},
        rounds=1,
        warm_up=0,
    )
    return made[0], seconds[""]
