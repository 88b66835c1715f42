"""What the runbook tells operators to set."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from neural_mri.backing.settings import PREFIX, Settings

__all__ = ("RUNBOOK", "SAMPLES", "settings_named")

RUNBOOK = Path(__file__).parents[2] / "deploy/RUNBOOK.md"
SAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "NEURAL_MRI_ALLOWED_HOSTS": "mri.example.net",
        "NEURAL_MRI_DEVICE": "cuda",
        "NEURAL_MRI_DEFAULT_MODEL": "other",
        "NEURAL_MRI_LOG_LEVEL": "DEBUG",
        "NEURAL_MRI_MODEL_SOURCES": "mine=hf:acme/mine",
        "NEURAL_MRI_PINNED_MODELS": "other",
        "NEURAL_MRI_TRACES_ENDPOINT": "http://other:4318",
        "NEURAL_MRI_TRUSTED_PROXIES": "10.0.0.0/8",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.1",
    }
)
"""Values that settings can have which are no numbers."""


def settings_named() -> set[str]:
    """Every setting that the runbook or the README names, with its prefix or without, and OpenTelemetry's."""
    text = RUNBOOK.read_text() + (RUNBOOK.parents[1] / "README.md").read_text()
    known = {field.name.upper() for field in msgspec.structs.fields(Settings)}
    words = set(re.findall(r"`(?:NEURAL_MRI_)?([A-Z][A-Z_]+)(?:=[^`]*)?`", text))
    named = {PREFIX + word for word in words & known}
    named |= {word for word in re.findall(r"OTEL_[A-Z_]+\b", text) if not word.endswith("_")}
    on_one_machine = {"NEURAL_MRI_DATA_DIR"}
    return named - on_one_machine
