"""What a diagnosis says: scores with intervals, findings with their evidence, pictures' numbers.

A finding is a rule's name and numbers; sentences are made from it in whatever language is asked for.
"""

from datetime import datetime
from enum import StrEnum

import msgspec

from neural_mri.contract.baselines import Subject
from neural_mri.contract.suites import Expectation, Language, Measure

__all__ = (
    "EVERYWHERE",
    "Carrier",
    "CaseOutcome",
    "Diagnosis",
    "Evidence",
    "Finding",
    "GateOutcome",
    "Grid",
    "Interval",
    "Rule",
    "Score",
    "Severity",
    "Trajectory",
)


EVERYWHERE = "all components"
"""The label of what was compared as one, and belongs to no component."""


class Severity(StrEnum):
    """What a finding asks of who reads it."""

    FAILURE = "failure"
    """A gate has failed."""
    WARNING = "warning"
    NOTE = "note"


class Rule(StrEnum):
    """What kind of thing was found."""

    CHANGED_AT = "changed-at"
    """The first component, in the order of computation, whose output left the noise."""
    CHANGED_DOWNSTREAM = "changed-downstream"
    CHANGED_ATTENTION = "changed-attention"
    CHANGED_LENS = "changed-lens"
    CHANGED_RANKS = "changed-ranks"
    CHANGED_ATTRIBUTION = "changed-attribution"
    CHANGED_RISK = "changed-risk"
    CHANGED_SCORE = "changed-score"
    CHANGED_WEIGHTS = "changed-weights"
    WEAK_CASE = "weak-case"
    BIAS = "bias"
    UNAWARE = "unaware"
    CONFIDENT_ERRORS = "confident-errors"
    CARRIED_BY = "carried-by"
    SETTLES_LATE = "settles-late"
    SILENT_HEAD = "silent-head"
    NONFINITE = "nonfinite"
    OUTLYING_TENSOR = "outlying-tensor"


class Interval(msgspec.Struct, frozen=True):
    """A confidence interval, ends included."""

    low: float
    high: float


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A number over many prompts."""

    value: float
    interval: Interval
    n: int
    method: str
    """`wilson`, `student`, `bootstrap`, `welch`; `none` where there are too few for an interval."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """The number that a finding stands on, and where it comes from."""

    measure: Measure
    quantity: str
    scan: str
    """The modality: `fMRI`, `DTI`, `FLAIR`, `attention`, `T2`."""
    component: str | None = None
    layer: int | None = None
    head: int | None = None
    value: float
    unit: str
    interval: Interval | None = None
    p_value: float | None = None
    """Adjusted for everything that was tested beside it (Holm)."""
    noise: float | None = None
    """What rounding alone moves this number by, the margin included."""
    n: int = 0
    """Prompts it stands on."""
    scan_keys: tuple[str, ...] = ()
    """Keys of scans that show it, the strongest first."""
    prompt: str | None = None
    """The prompt that shows it most."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something worth a person's attention."""

    rule: Rule
    severity: Severity
    evidence: Evidence
    case: str | None = None
    strength: float = 0.0
    """What findings of one severity are ranked by; larger first."""
    numbers: dict[str, float | int | str] = {}
    """Further numbers and names that its sentences mention."""


class Carrier(msgspec.Struct, frozen=True, kw_only=True):
    """A component that carries a case's answers."""

    component: str
    label: str
    effect: Score
    """Mean effect of replacing it, over prompts; below 0 where it helps."""
    share: float
    """Of the prompts, the share in which it is among the ten strongest."""


class CaseOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one case says of one checkpoint."""

    id: str
    expectation: Expectation
    title: dict[Language, str]
    about: dict[Language, str]
    source: str
    licence: str
    asked: int
    set_aside: int
    """Prompts that cannot be asked with this tokenizer (`diagnostics.asking.ask`)."""
    score: Score
    chance: float
    baseline: Score | None = None
    change: Score | None = None
    """What the score is more than the baseline's, in its unit."""
    p_value: float | None = None
    margin: Score | None = None
    """Mean log-probability of the answer over the foil's, nats."""
    carriers: tuple[Carrier, ...] = ()
    attributed: int = 0
    """Prompts that carriers stand on."""
    settles: Score | None = None
    """Median depth at which the lens's likeliest token stays the model's, share of layers."""
    support: Score | None = None
    """Mean support of the model's own answer, ordinary standard deviations."""
    entropy: Score | None = None


class GateOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate found over all its components."""

    measure: Measure
    severity: Severity | None = None
    """None where it passed."""
    tested: int
    changed: int
    largest: float
    unit: str
    noise: float
    """Median noise over components, margin included."""
    tolerance: float
    p_value: float
    """The smallest, adjusted."""
    where: str | None = None
    """The component that decides: the first changed one, or the most changed."""


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers by layer and column; what pictures are painted from."""

    name: str
    unit: str
    columns: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]
    """A row a layer, from the first."""
    marked: tuple[tuple[int, int], ...] = ()
    """Row and column of cells to point at."""


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """One curve over layers, with a band."""

    name: str
    unit: str
    median: tuple[float | None, ...]
    low: tuple[float | None, ...]
    """Lower quartile over prompts."""
    high: tuple[float | None, ...]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a report says."""

    version: int = 1
    suite: str
    suite_version: str
    suite_digest: str
    suite_title: dict[Language, str]
    created_at: datetime
    candidate: Subject
    baseline: Subject | None = None
    profile: str | None = None
    passed: bool
    alpha: float
    tests: int
    """How many hypotheses were tested together."""
    cases: tuple[CaseOutcome, ...]
    gates: tuple[GateOutcome, ...] = ()
    findings: tuple[Finding, ...]
    grids: tuple[Grid, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()
    seconds: dict[str, float] = {}
    """What was spent on `candidate` and `baseline`; 0 where the record was there already."""
