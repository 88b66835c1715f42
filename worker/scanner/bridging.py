"""TransformerLens's loaders and how Hugging Face's models become its bridges. Named here alone.

A bridge wraps a model *in place* and needs eager attention, which costs a third more than a plain
forward. So the model is kept twice, on the same tensors: plain for reading, bridged for intervening.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import (
    build_bridge_config_from_hf,
    build_bridge_from_module,
)
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import UnsupportedModel
from worker.scanner.refusing import refused

__all__ = (
    "adapter",
    "bridge",
    "plain_model",
    "read_configuration",
    "refuse_incomplete",
    "skeleton",
    "understood",
)

# Their signatures are written for readers, not for type checkers.
_AutoConfig: Any = AutoConfig
_AutoModel: Any = AutoModelForCausalLM


def read_configuration(folder: Path) -> PretrainedConfig:
    """The model's `config.json`. Raises `UnsupportedModel` when transformers cannot read it."""
    says = f"{folder.name} has no configuration that transformers can read"
    with refused(says, OSError, ValueError, KeyError):
        found: PretrainedConfig = _AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return found


def skeleton(configuration: PretrainedConfig) -> PreTrainedModel:
    """The model's modules on the meta device: shapes and names, no weights, no memory."""
    says = f"{configuration.model_type} is not a causal language model"
    with refused(says, ValueError), torch.device("meta"):
        model: PreTrainedModel = _AutoModel.from_config(configuration, trust_remote_code=False)
    model.tie_weights()
    return model


def understood(family: str) -> AbstractContextManager[None]:
    """Raises `UnsupportedModel` where TransformerLens does not know a variant of the family.

    It says so in many ways: by what it raises itself, or by shapes that do not fit.
    """
    says = f"TransformerLens cannot bridge {family}"
    return refused(says, AssertionError, RuntimeError, ValueError)


def adapter(model: PreTrainedModel) -> Any:
    """TransformerLens's description of the model's family: which module plays which part."""
    family = type(model).__name__
    with understood(family):
        settings = build_bridge_config_from_hf(model.config, family, family, torch.float32)
        return ArchitectureAdapterFactory.select_architecture_adapter(settings)


def plain_model(
    folder: Path, numerics: Numerics, places: Mapping[str, int] | None = None
) -> PreTrainedModel:
    """The model as Hugging Face runs it, frozen, from the folder's safetensors only.

    Spread over several devices where `places` says so, by accelerate. Raises `UnsupportedModel` where
    transformers does not load it: it says so by `RuntimeError` where shapes are not the configuration's, by
    `ImportError` where the weights are in a form whose library is not here.
    """
    kinds = (OSError, ValueError, SafetensorError, RuntimeError, ImportError)
    with refused(f"{folder.name} cannot be loaded", *kinds):
        model, report = _AutoModel.from_pretrained(
            folder,
            dtype=getattr(torch, numerics.dtype),
            attn_implementation=numerics.attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            # They are refused below, by name.
            ignore_mismatched_sizes=True,
            device_map=None if places is None else dict(places),
        )
    refuse_incomplete(folder.name, report)
    model.requires_grad_(False).eval()
    placed: PreTrainedModel = model if places is not None else model.to(numerics.device)
    return placed


def refuse_incomplete(name: str, report: Mapping[str, Any]) -> None:
    """Raises `UnsupportedModel` when weights were missing: transformers makes up random ones instead."""
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            raise UnsupportedModel(
                f"{name} has {problem.replace('_', ' ')}: {min(report[problem])}"
            )


def bridge(plain: PreTrainedModel) -> TransformerBridge:
    """A bridge over a twin of the model: modules of its own, the very same tensors.

    Raises `UnsupportedModel` for a variant of a family that TransformerLens does not know.
    """
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    twin = copy.deepcopy(plain, shared)
    twin.set_attn_implementation("eager")
    family = type(twin).__name__
    with understood(family):
        bridged = build_bridge_from_module(twin, family, hf_config=twin.config)
    for parameter in bridged.parameters():
        # Fused projections are split into new parameters, which are born wanting gradients.
        parameter.requires_grad_(False)
    return bridged
