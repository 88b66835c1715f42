"""Measuring a model's calibration, once, on reference text.

One pass over the text gives the lenses, the means that mean ablation puts in a component's place, and how
strongly each component is active. Through the lenses, positions of texts that no lens was fitted on then show
what is ordinary in each of FLAIR's channels: a lens is nearer to the text it was fitted on than to any prompt,
and bounds taken there would promise too much. Nothing in it comes from a person's prompt.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neural_mri.contract.anomalies import CalibrationScan, Lens
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scans import ActivationScan, reporting_order
from neural_mri.contract.tokens import Tokens
from worker.scanner.calibration import QUANTILE_LEVELS, Calibration
from worker.scanner.channels import LensSet, channels, derived, measure
from worker.scanner.layer_reading import Reading
from worker.scanner.lens_maps import Affine, Moments, support_layers
from worker.scanner.listening import Listener, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.ordinary import Ordinary, ordinary
from worker.scanner.references import reference_means
from worker.scanner.residuals import ResidualReading, Residuals
from worker.scanner.sampling import given_text, sampled_text

__all__ = ("calibrate", "held_out")

_TOKENS_AT_ONCE = 512
_MOST_QUANTILE_TOKENS = 8192
"""More positions make no better percentiles."""
_MOST_RIDGE_BYTES = 4 << 30


def held_out(n_texts: int) -> Bool[Tensor, " text"]:
    """Which texts no lens is fitted on: every fourth, and one of two."""
    return torch.arange(n_texts) % 4 == 1


@torch.inference_mode()
def calibrate(
    model: LoadedModel,
    request: CalibrationScan,
    listener: Listener,
    *,
    texts: Sequence[Tokens] = (),
    prefix: Sequence[int] = (),
) -> Calibration:
    """Measure a model. Equal requests give equal digits on one machine.

    Args:
        model: The model.
        request: How much text, and which lenses.
        listener: Hears the stages `sampling`, `reading` and `ordinary`, and may stop them.
        texts: Tokens of the request's texts; the model writes its own where there are none.
        prefix: What the tokenizer puts before every prompt; sampled texts begin with it.

    Raises:
        Problem: There is too little text, or a ridge lens that would not fit into memory.
        Cancelled: The listener stopped it.
    """
    request.check(model.architecture)
    _refuse_large_ridge(model, request)
    if texts:
        ids = given_text(model, texts, request.n_tokens)
    else:
        ids = sampled_text(
            model, request.n_tokens, seed=request.seed, prefix=prefix, listener=listener
        )
    text = _Text(model, ids, request, listener)
    # It runs the model on each batch; the text has its own readers in place meanwhile.
    with closing(text.batches()) as batches:
        means = reference_means(model, batches)
    fitted = Calibration(
        architecture=model.architecture,
        source="texts" if texts else "sampled",
        seed=request.seed,
        n_tokens=ids.numel(),
        bias=text.bias(),
        support=text.support.ridge(),
        ridge=None if text.ridge is None else text.ridge.ridge(),
        means=means._replace(
            **{
                name: value.cpu()
                for name, value in means._asdict().items()
                if name != "n_positions"
            }
        ),
        activation_quantiles=text.quantiles(),
        ordinary={},
    )
    kept = text.kept
    return replace(
        fitted,
        ordinary={
            lens: _ordinary(model, kept, fitted.lenses(lens), listener) for lens in request.lenses
        },
    )


def _refuse_large_ridge(model: LoadedModel, request: CalibrationScan) -> None:
    shape = model.architecture
    # Sums of products, in float64, while they are gathered: two square matrices a place.
    needed = 16 * 2 * shape.n_layers * shape.d_model**2
    if Lens.RIDGE in request.lenses and needed > _MOST_RIDGE_BYTES:
        raise Unprocessable(
            f"a ridge lens of this model takes {needed} bytes to fit, of at most {_MOST_RIDGE_BYTES}: "
            "use lens 'bias'"
        )


class _OnlyStopping(Silent):
    """Says nothing of a batch's layers, and stops between two of them."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def checkpoint(self) -> None:
        """The listener's."""
        self._listener.checkpoint()


class _Text:
    """Reference text, and what is gathered as the model reads it."""

    support: Moments
    ridge: Moments | None

    def __init__(
        self,
        model: LoadedModel,
        ids: Int[Tensor, "text pos"],
        request: CalibrationScan,
        listener: Listener,
    ) -> None:
        shape = model.architecture
        n_texts, self._length = ids.shape
        self._model, self._ids, self._listener = model, ids, listener
        self._texts_at_once = max(1, _TOKENS_AT_ONCE // self._length)
        width, device = shape.d_model, model.device
        n_places = 2 * shape.n_layers
        self._after_support = [layer + 1 for layer in support_layers(shape.n_layers)]
        self._bias = Moments(n_places, width, products=False, device=device)
        self.support = Moments(len(self._after_support), width, products=True, device=device)
        self.ridge = None
        if Lens.RIDGE in request.lenses:
            self.ridge = Moments(n_places, width, products=True, device=device)
        self._held_out = held_out(n_texts)
        measured = int(self._held_out.sum()) * (self._length - 1)
        n_ordinary = min(request.n_ordinary, measured)
        # Evenly spread, by whole numbers: each position at most once.
        self._ordinary = torch.arange(n_ordinary) * measured // n_ordinary
        self._kept: list[Residuals] = []
        self._norms: list[Float[Tensor, "component pos"]] = []
        self._measured = 0

    def batches(self) -> Generator[Int[Tensor, "text pos"], None, None]:
        """The text, a batch at a time. Whoever asks for a batch runs the model on it before the next."""
        for first in range(0, len(self._ids), self._texts_at_once):
            batch = self._ids[first : first + self._texts_at_once]
            with ExitStack() as reading:
                residuals = self._residuals(batch.shape, reading)
                activity = self._activity(batch.shape, reading)
                yield batch
            held_out_here = self._held_out[first : first + len(batch)]
            self._add(residuals.residuals, held_out_here.repeat_interleave(self._length - 1))
            if activity is not None:
                by_text = activity.summaries.values().view(-1, *batch.shape)
                self._norms.append(by_text[:, :, 1:].flatten(1))
            done = first + len(batch)
            self._listener.progress("reading", done, len(self._ids))
            self._listener.pause()

    def bias(self) -> Affine:
        """The bias lens, once the model has read the text."""
        return self._bias.bias()

    def quantiles(self) -> Float[Tensor, "component level"]:
        """Quantiles of each component's norms, once the model has read the text."""
        ordered = torch.cat(self._norms, dim=1).sort(1).values
        at = torch.tensor(QUANTILE_LEVELS, dtype=torch.float64) * (ordered.shape[1] - 1)
        return ordered[:, at.round().long()]

    @property
    def kept(self) -> Residuals:
        """Residuals at the positions that ordinary values are taken from."""
        return Residuals(
            torch.cat([part.outer for part in self._kept], dim=1),
            torch.cat([part.inner for part in self._kept], dim=1),
        )

    def _residuals(self, shape: Sequence[int], reading: ExitStack) -> ResidualReading:
        n_texts, length = shape
        positions = torch.arange(n_texts * length).view(n_texts, length)[:, 1:].flatten()
        residuals = ResidualReading(
            self._model, positions, positions, _OnlyStopping(self._listener)
        )
        reading.enter_context(residuals.listening())
        return residuals

    def _activity(self, shape: Sequence[int], reading: ExitStack) -> Reading | None:
        if sum(norms.shape[1] for norms in self._norms) >= _MOST_QUANTILE_TOKENS:
            return None
        asked = ActivationScan(prompt="-", top_neurons=0)
        n_texts, length = shape
        activity = Reading(
            self._model,
            asked,
            reporting_order(self._model.architecture),
            tuple(range(n_texts * length)),
            Silent(),
        )
        reading.enter_context(activity.listening())
        return activity

    def _add(self, read: Residuals, is_held_out: Bool[Tensor, " pos"]) -> None:
        fitted = (~is_held_out).nonzero().squeeze(1).to(read.outer.device)
        outer, final = read.outer[:-1, fitted], read.outer[-1, fitted]
        places = torch.cat([outer, read.inner[:, fitted]])
        self._bias.add(places, final)
        self.support.add(read.outer[self._after_support][:, fitted], final)
        if self.ridge is not None:
            self.ridge.add(places, final)
        others = is_held_out.nonzero().squeeze(1)
        last = self._measured + len(others)
        mine = (self._ordinary >= self._measured) & (self._ordinary < last)
        at = others[self._ordinary[mine] - self._measured].to(read.outer.device)
        self._kept.append(Residuals(read.outer[:, at], read.inner[:, at]))
        self._measured = last


def _ordinary(
    model: LoadedModel, residuals: Residuals, lenses: LensSet, listener: Listener
) -> dict[str, Ordinary]:
    n_positions = residuals.outer.shape[1]

    def after_chunk(done: int) -> None:
        listener.progress("ordinary", done, n_positions)
        listener.pause()

    everywhere = torch.arange(n_positions)
    measured = measure(model, residuals, lenses, everywhere, after_chunk=after_chunk)
    found = channels(measured)
    known = {name: ordinary(values) for name, values in found.items()}
    return known | {name: ordinary(values) for name, values in derived(found, known).items()}
