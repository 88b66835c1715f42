"""How well FLAIR's channels tell wrong answers from right ones: python -m bench.detection [FOLDER].

Prompts with a known next word: facts (Meng et al. 2022) and relations (Hernandez et al. 2023). An answer, the
model's likeliest next token, is right if it is the first token of the known one. AUROC: the probability that
a wrong answer looks more suspicious than a right one; 0.5 is chance. 95 % intervals by bootstrap over prompts.

*All* holds many wrong answers that are no answers (" the"). *Same relation* are prompts whose answer is right
for another prompt of the same relation: plausible, and wrong or right.

The layers of the support lenses, their penalty and the equal weights come from a pilot on prompts of the same
sources, which may have held some of these, and were looked at again on the even half of the prompts. What is
printed is of the odd half. The lens is fitted on what the model itself writes, as it is when a model is
loaded; beside it stands a fit on as much of TruthfulQA's text.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench import bundled
from neural_mri.contract.anomalies import CalibrationScan, Lens
from neural_mri.contract.tokens import Span, Tokens
from worker.scanner import logit_lens
from worker.scanner.calibrating import calibrate
from worker.scanner.calibration import Calibration
from worker.scanner.channels import LensSet, channels, measure, support
from worker.scanner.conversion import TOKENIZER_FILE
from worker.scanner.lens_maps import applied, support_layers
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel, load, published_numerics
from worker.scanner.residuals import ResidualReading, Residuals

__all__ = ("markdown",)

DATA = Path(__file__).parent / "data"
PER_RELATION = 20
RESAMPLES = 1000
AT_ONCE = 16

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Question(NamedTuple):
    """A prompt, the first token of its right continuation, and what relation it asks about."""

    ids: tuple[int, ...]
    answer: int
    relation: str


class Answers(NamedTuple):
    """What the model answered, and how suspicious each signal finds it."""

    wrong: Flags
    plausible: Flags
    """Whether it is the right answer to some question of the same relation."""
    signals: dict[str, Floats]


def questions(tokenizer: Tokenizer) -> list[Question]:
    """The odd half of the prompts, of the facts and of each relation; no choice was made on it here."""

    def question(prompt: str, answer: str, relation: str) -> Question:
        first = tokenizer.encode(" " + answer.strip(), add_special_tokens=False).ids[0]
        return Question(tuple(tokenizer.encode(prompt).ids), first, relation)

    facts = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))
    relations = json.loads((DATA / "relations.json").read_text(encoding="utf-8"))
    return [
        *(question(fact["prompt"], fact["attribute"], fact["relation_id"]) for fact in facts[1::2]),
        *(
            question(relation["template"].format(subject), answer, name)
            for name, relation in relations.items()
            for subject, answer in relation["samples"][1::2][:PER_RELATION]
        ),
    ]


@torch.inference_mode()
def read(model: LoadedModel, asked: Sequence[Question]) -> Iterator[tuple[list[int], Residuals]]:
    """Residuals at the last position of prompts of one length at a time, and which those are."""
    by_length = defaultdict(list)
    for index, question in enumerate(asked):
        by_length[len(question.ids)].append(index)
    nowhere = torch.empty(0, dtype=torch.int64)
    for length, indices in sorted(by_length.items()):
        for first in range(0, len(indices), AT_ONCE):
            some = indices[first : first + AT_ONCE]
            last = torch.arange(1, len(some) + 1) * length - 1
            reading = ResidualReading(model, last, nowhere, Silent())
            with reading.listening():
                ids = torch.tensor([asked[index].ids for index in some], device=model.device)
                model.plain.base_model(input_ids=ids, use_cache=False)
            yield some, reading.residuals


def answers(
    model: LoadedModel, asked: Sequence[Question], by_text: dict[str, Calibration]
) -> Answers:
    """Ask all questions; the higher a signal, the more suspicious."""
    order: list[int] = []
    tops: list[Tensor] = []
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for some, residuals in read(model, asked):
        order += some
        # The seed's score is of the raw lens.
        nowhere = torch.empty(0, dtype=torch.int64)
        measured = measure(model, residuals, LensSet(None, None, None), nowhere)
        found = channels(measured)
        tops.append(measured.final.top.cpu())
        parts["entropy"].append(found["final_entropy"][0])
        parts["1 - max probability"].append(-found["log_probability"][0].exp())
        parts["-margin"].append(-found["margin"][0])
        parts["seed's 0.6 KL + 0.4 H"].append(found["seed_score"][0])
        for text, calibration in by_text.items():
            gain = found["log_probability"] - _expected(model, residuals, calibration)
            known = calibration.ordinary[Lens.BIAS]
            parts[f"-gain, {text}"].append(-gain[0])
            parts[f"-support, {text}"].append(-support(gain, found["margin"], known)[0])
    top = torch.empty(len(asked), dtype=torch.int64)
    top[order] = torch.cat(tops)
    signals = {}
    for name, values in parts.items():
        signal = np.empty(len(asked))
        signal[order] = torch.cat(values).double().numpy()
        signals[name] = signal
    known_answers: dict[str, set[int]] = defaultdict(set)
    for question in asked:
        known_answers[question.relation].add(question.answer)
    given = list(zip(asked, top.tolist(), strict=True))
    return Answers(
        wrong=np.array([answer != question.answer for question, answer in given]),
        plausible=np.array(
            [answer in known_answers[question.relation] for question, answer in given]
        ),
        signals=signals,
    )


def _expected(model: LoadedModel, residuals: Residuals, calibration: Calibration) -> Tensor:
    """Mean log-probability of the model's answer in the support lenses, `[1 pos]`."""
    layers = support_layers(model.architecture.n_layers)
    mapped = applied(calibration.support, residuals.outer[[layer + 1 for layer in layers]])
    own = logit_lens.read(model, mapped, residuals.outer[-1]).lens.own
    return own.mean(0, keepdim=True).cpu()


def auroc(signal: Floats, wrong: Flags) -> float:
    """Probability that a wrong answer's signal is above a right one's; ties count half."""
    values, ranks = np.unique(signal, return_inverse=True)
    wrongs = np.bincount(ranks[wrong], minlength=len(values)).astype(float)
    rights = np.bincount(ranks[~wrong], minlength=len(values)).astype(float)
    below = np.cumsum(rights) - rights / 2
    return float((wrongs * below).sum() / (wrongs.sum() * rights.sum()))


class Interval(NamedTuple):
    """An AUROC, or a difference of two, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.2f} to {self.high:.2f})"


def interval(signal: Floats, wrong: Flags, beside: Floats | None = None) -> Interval:
    """AUROC of a signal, or how far it is above that of the one beside it on the same prompts."""

    def value(chosen: npt.NDArray[np.int64]) -> float:
        found = auroc(signal[chosen], wrong[chosen])
        return found if beside is None else found - auroc(beside[chosen], wrong[chosen])

    generator = np.random.default_rng(0)
    drawn = (generator.integers(len(wrong), size=len(wrong)) for _ in range(RESAMPLES))
    spread = [value(chosen) for chosen in drawn if 0 < wrong[chosen].sum() < len(wrong)]
    low, high = np.percentile(spread, (2.5, 97.5))
    return Interval(value(np.arange(len(wrong))), float(low), float(high))


def calibrations(model: LoadedModel, tokenizer: Tokenizer) -> dict[str, Calibration]:
    """The product's default, and one on as much text that people wrote."""
    encoded = tokenizer.encode((DATA / "truthfulqa.txt").read_text(encoding="utf-8"))
    text = Tokens(
        ids=tuple(encoded.ids),
        texts=tuple(encoded.tokens),
        spans=tuple(Span(*offsets) for offsets in encoded.offsets),
    )
    asked = CalibrationScan()
    return {
        "own text": calibrate(model, asked, Silent()),
        "TruthfulQA": calibrate(model, asked, Silent(), texts=[text]),
    }


def markdown(model: LoadedModel, folder: Path) -> str:
    """The table, and what it is of."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    found = answers(model, questions(tokenizer), calibrations(model, tokenizer))
    groups = {"all": np.ones_like(found.wrong), "same relation": found.plausible}
    rows = [
        f"| {name} | "
        + " | ".join(str(interval(signal[kept], found.wrong[kept])) for kept in groups.values())
        + " |"
        for name, signal in found.signals.items()
    ]
    ours, other = found.signals["-support, own text"], found.signals["1 - max probability"]
    above = [interval(ours[kept], found.wrong[kept], other[kept]) for kept in groups.values()]
    sizes = [
        f"{name}: {kept.sum()} prompts, {(~found.wrong[kept]).sum()} answered rightly"
        for name, kept in groups.items()
    ]
    return "\n".join(
        (
            "### Wrong answers, told by FLAIR\n",
            (
                f"AUROC with 95 % intervals, on the odd half of the prompts ({'; '.join(sizes)}); first-token "
                f"scoring; {CalibrationScan().n_tokens} tokens of calibration text.\n"
            ),
            f"| signal | {' | '.join(groups)} |",
            "|---|" + "---|" * len(groups),
            *rows,
            f"| support above max probability | {' | '.join(map(str, above))} |",
            "",
        )
    )


def main() -> None:
    """Print it."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else bundled.folder()
    print(markdown(load(folder, published_numerics(folder)), folder))


if __name__ == "__main__":
    main()
