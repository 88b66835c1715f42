"""Suites: which prompts a diagnosis reads, what is expected of them, and what is measured.

Written in TOML. A case is one ability or tendency, asked about by many prompts, never by one: what it
says is a score with an interval. Equal suites have equal digests, however they are laid out.
"""

import hashlib
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from neural_mri.contract.problems import InvalidRequest
from neural_mri.contract.scan_base import Prompt

__all__ = (
    "GATED",
    "Case",
    "Expectation",
    "Gate",
    "Item",
    "Language",
    "Limits",
    "Measure",
    "Reference",
    "Suite",
    "Verdict",
    "decode_suite",
)

T = TypeVar("T")

Slug = Annotated[str, Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60)]


class Language(StrEnum):
    """What a report is written in."""

    EN = "en"
    KO = "ko"


class Measure(StrEnum):
    """What is measured of a model reading a suite's prompts."""

    SCORES = "scores"
    """How the answer fares against the foil, and among all tokens."""
    NORMS = "norms"
    """What each component writes (fMRI): RMS of the L2 norm over positions 1 and later."""
    ATTENTION = "attention"
    """How evenly each head attends: entropy over its log of keys, mean over queries 1 and later."""
    LENS = "lens"
    """The logit lens's way to the answer, layer by layer (FLAIR, raw lens)."""
    ATTRIBUTION = "attribution"
    """What replacing each component by its value on the corrupt prompt does to the answer (DTI)."""
    RISK = "risk"
    """FLAIR's channels at the position asked about: uncertainty and support."""
    WEIGHTS = "weights"
    """T2: statistics of every component's matrices and of every tensor."""


GATED = tuple(Measure)
"""In the order in which a report lists them."""


class Expectation(StrEnum):
    """What a case asks of its prompts."""

    PREFER = "prefer"
    """The answer is likelier than the foil."""
    TOP = "top"
    """The answer is the likeliest of all tokens."""
    BALANCE = "balance"
    """Whether answer or foil is preferred does not depend on the group a prompt belongs to."""
    AWARENESS = "awareness"
    """FLAIR's support is lower where nothing can be known (group `unknown`) than where it can (`known`)."""


class Verdict(StrEnum):
    """What a gate does with a change that noise does not explain."""

    FAIL = "fail"
    WARN = "warn"
    IGNORE = "ignore"


class Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt."""

    prompt: Prompt
    answer: Annotated[str, Meta(min_length=1, max_length=200)]
    """Text that follows; its first token is asked about."""
    foil: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    """Text whose first token the answer is compared with."""
    corrupt: Prompt | None = None
    """A prompt of as many tokens that asks for the foil; where there is none, nothing is attributed."""
    group: Slug | None = None


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Many prompts that ask one thing."""

    id: Slug
    title: dict[Language, str]
    about: dict[Language, str]
    expectation: Expectation
    chance: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """The score of a model that knows nothing."""
    source: str
    """Where the prompts come from."""
    licence: str
    items: Annotated[tuple[Item, ...], Meta(min_length=2, max_length=1000)]


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may change before a gate says so. What is left out is as `Suite.gate` finds it."""

    tolerance: Annotated[float, Meta(ge=0)] | None = None
    """In the measure's own unit; a change within it passes, however certain it is. Of attributions, one number
    for both units: 1 - rank correlation, and shares of the prompt's RMS effect."""
    share_tolerance: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Of scores alone, whose `tolerance` is in nats: how much the share of a case's right answers may change."""
    verdict: Verdict | None = None


class Limits(NamedTuple):
    """A gate with nothing left out."""

    tolerance: float
    share_tolerance: float
    verdict: Verdict


class Reference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The text that FLAIR's channels are read against: the same for every model, so that they compare."""

    n_tokens: Annotated[int, Meta(ge=256, le=100_000)] = 256
    n_ordinary: Annotated[int, Meta(ge=32, le=4096)] = 32


class Suite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a diagnosis asks."""

    name: Slug
    version: Annotated[str, Meta(pattern=r"^\d+\.\d+\.\d+$")]
    title: dict[Language, str]
    measures: Annotated[tuple[Measure, ...], Meta(min_length=1)] = tuple(Measure)
    exact: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Of each prompt's components, how many of the strongest are measured and not only estimated."""
    attention_prompts: Annotated[int, Meta(ge=2, le=10_000)] = 10_000
    """Prompts on which attention patterns are read, spread evenly over the suite: they are large."""
    noise_prompts: Annotated[int, Meta(ge=2, le=1000)] = 6
    """Prompts on which numerical noise is measured, spread evenly over the suite."""
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] = 0.01
    """Chance of any false alarm in a whole comparison (family-wise, Holm)."""
    noise_margin: Annotated[float, Meta(ge=1, le=1000)] = 4.0
    """Factor on the noise that was measured: another machine of the same class rounds otherwise."""
    reference: Reference = Reference()
    gates: dict[Measure, Gate] = {}
    profiles: dict[Slug, dict[Measure, Gate]] = {}
    """Other gates by name, such as for a checkpoint that is meant to differ. What they leave out is as in `gates`."""
    cases: Annotated[tuple[Case, ...], Meta(min_length=1, max_length=200)]

    def __post_init__(self) -> None:
        ids = [case.id for case in self.cases]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"case {twice[0]!r} is there twice: expected each id once")
        for case in self.cases:
            _check(case)
        for gates in (self.gates, *self.profiles.values()):
            for measure, gate in gates.items():
                if gate.share_tolerance is not None and measure is not Measure.SCORES:
                    raise ValueError(f"gate {measure.value}: only scores have a share_tolerance")

    @property
    def digest(self) -> str:
        """SHA-256 over what is asked and measured; how it is told and judged is no part of it."""
        asked = {
            "measures": self.measures,
            "exact": self.exact,
            "attention_prompts": self.attention_prompts,
            "noise_prompts": self.noise_prompts,
            "reference": self.reference,
            "cases": [(case.id, case.expectation, case.items) for case in self.cases],
        }
        return hashlib.sha256(msgspec.json.encode(asked, order="sorted")).hexdigest()

    @property
    def n_items(self) -> int:
        """Prompts in all."""
        return sum(len(case.items) for case in self.cases)

    def gate(self, measure: Measure, profile: str | None = None) -> Limits:
        """The gate of a measure: as the profile has it, else the suite, else nothing is tolerated and a change fails.

        Weights only warn unless one of the two says otherwise: files may differ that compute the same. Raises
        `InvalidRequest` for a profile that the suite does not have.
        """
        written = [self.gates.get(measure, Gate())]
        if profile is not None:
            if profile not in self.profiles:
                known = ", ".join(sorted(self.profiles)) or "none"
                raise InvalidRequest(
                    f"suite {self.name} has no profile {profile!r}: it has {known}", profile=profile
                )
            written.insert(0, self.profiles[profile].get(measure, Gate()))
        usual = Verdict.WARN if measure is Measure.WEIGHTS else Verdict.FAIL
        return Limits(
            tolerance=_first((gate.tolerance for gate in written), 0.0),
            share_tolerance=_first((gate.share_tolerance for gate in written), 0.0),
            verdict=_first((gate.verdict for gate in written), usual),
        )

    def case(self, case_id: str) -> Case:
        """The case of that id. Raises `KeyError`."""
        return next(case for case in self.cases if case.id == case_id)


def _first(said: Iterable[T | None], otherwise: T) -> T:
    return next((each for each in said if each is not None), otherwise)


def _check(case: Case) -> None:
    groups = {item.group for item in case.items}
    if case.expectation is Expectation.AWARENESS and groups != {"known", "unknown"}:
        raise ValueError(
            f"case {case.id}: expected every item in group 'known' or 'unknown', and both to occur"
        )
    if case.expectation is Expectation.BALANCE and (None in groups or len(groups) != 2):
        raise ValueError(f"case {case.id}: expected every item in one of two groups")
    if case.expectation in (Expectation.PREFER, Expectation.BALANCE):
        for number, item in enumerate(case.items):
            if item.foil is None:
                raise ValueError(f"case {case.id}, item {number}: expected a foil")
    for number, item in enumerate(case.items):
        if item.corrupt is not None and item.foil is None:
            raise ValueError(f"case {case.id}, item {number}: a corrupt prompt needs a foil")


def decode_suite(body: bytes | str, name: str) -> Suite:
    """A suite as it was written. Raises `InvalidRequest` that names `name` and the place."""
    try:
        text = body.decode() if isinstance(body, bytes) else body
        read: Any = msgspec.toml.decode(text, type=Suite)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "is not a suite"
        raise InvalidRequest(f"{name} {what}: {error}", suite=name) from error
    suite: Suite = read
    return suite
