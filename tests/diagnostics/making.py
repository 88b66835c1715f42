"""A suite in the tiny models' own words, checkpoints with known faults, and scans without a process."""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from neural_mri.contract.baselines import Subject
from neural_mri.contract.local import Measured
from neural_mri.contract.results import from_ipc
from neural_mri.contract.scans import Scan, encode_scan
from neural_mri.contract.suites import (
    Case,
    Expectation,
    Gate,
    Item,
    Language,
    Measure,
    Suite,
    Verdict,
)
from neural_mri.contract.tokens import Tokens
from neural_mri.diagnostics import Record, Scanned, measure
from tests import models
from worker.local import LocalScanner, registered_folder

__all__ = ("InProcess", "as_toml", "edited", "measured", "saved", "tiny_suite")

Weights = npt.NDArray[np.float32]


def saved(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A tiny model of a family, with a tokenizer of words w0 to w60."""
    models.save(family, folder, seed=seed)
    words = {f"w{index}": index for index in range(models.D_VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tiny_suite(*, prompts: int = 8, noise: int = 6) -> Suite:
    """Every expectation once."""
    draw = random.Random(5)

    def words(count: int) -> list[str]:
        return [f"w{index}" for index in draw.sample(range(3, models.D_VOCAB), count)]

    def item(group: str | None = None) -> Item:
        *text, answer, foil, other = words(11)
        return Item(
            prompt=" ".join(text),
            answer=f" {answer}",
            foil=f" {foil}",
            corrupt=" ".join([*text[:3], other, *text[4:]]),
            group=group,
        )

    def case(name: str, expectation: Expectation, groups: Sequence[str | None] = (None,)) -> Case:
        return Case(
            id=name,
            title={Language.EN: name.title(), Language.KO: f"{name} 항목"},
            about={Language.EN: f"About {name} & <others>.", Language.KO: "설명"},
            expectation=expectation,
            source="made up",
            licence="CC0-1.0",
            items=tuple(item(groups[number % len(groups)]) for number in range(prompts)),
        )

    return Suite(
        name="tiny",
        version="1.0.0",
        title={Language.EN: "Tiny suite", Language.KO: "작은 검사"},
        noise_prompts=noise,
        gates={Measure.WEIGHTS: Gate(verdict=Verdict.WARN)},
        profiles={"tuned": {each: Gate(tolerance=1e6, verdict=Verdict.IGNORE) for each in Measure}},
        cases=(
            case("preference", Expectation.PREFER),
            case("recall", Expectation.TOP),
            case("balance", Expectation.BALANCE, ("left", "right")),
            case("awareness", Expectation.AWARENESS, ("known", "unknown")),
        ),
    )


def as_toml(suite: Suite) -> str:
    """The suite as a person would have written it, gates left out."""

    def inline(value: object) -> str:
        if isinstance(value, dict):
            pairs = (f"{key} = {inline(each)}" for key, each in value.items() if each is not None)
            return f"{{ {', '.join(pairs)} }}"
        return json.dumps(value, ensure_ascii=False)

    lines = [f"{name} = {inline(getattr(suite, name))}" for name in ("name", "version", "title")]
    lines.append(f"noise_prompts = {suite.noise_prompts}")
    for case in suite.cases:
        fields = msgspec.to_builtins(case)
        items = fields.pop("items")
        lines += ["[[cases]]", *(f"{name} = {inline(value)}" for name, value in fields.items())]
        lines += ["items = [", *(f"  {inline(item)}," for item in items), "]"]
    return "\n".join(lines)


class InProcess:
    """What `LocalScans` does in a process of its own."""

    def __init__(self, folder: Path, store: Path) -> None:
        self._scanner = LocalScanner(registered_folder(folder), store)

    @property
    def subject(self) -> Subject:
        return self._scanner.subject

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        return [self._scanner.tokens(text) for text in texts]

    def scan(self, scans: Sequence[Scan]) -> Iterator[Scanned]:
        for found in self._scanner.scan([encode_scan(scan) for scan in scans]):
            assert isinstance(found, Measured), found
            yield Scanned(found.scan_key, {n: from_ipc(body) for n, body in found.tables.items()})


def measured(suite: Suite, folder: Path, store: Path, *, with_noise: bool = False) -> Record:
    return measure(suite, InProcess(folder, store), with_noise=with_noise)


def edited(source: Path, target: Path, tensor: str, edit: Callable[[Weights], None]) -> Path:
    """A copy of a model with one tensor changed in place, in the file itself."""
    shutil.copytree(source, target)
    path = target / "model.safetensors"
    body = bytearray(path.read_bytes())
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    entry = header[tensor]
    assert entry["dtype"] == "F32"
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    values = np.frombuffer(bytes(body[start:end]), np.float32).reshape(entry["shape"]).copy()
    before = values.copy()
    edit(values)
    assert not np.array_equal(before, values)
    body[start:end] = values.tobytes()
    path.write_bytes(bytes(body))
    return target
