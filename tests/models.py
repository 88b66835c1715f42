"""Tiny models of real families: real configuration classes, random weights, built in code.

Small enough that a whole forward takes milliseconds, and irregular on purpose: grouped queries, a head
width that is not d_model / n_heads, tied and untied embeddings, post-norms, parallel blocks, soft-caps,
sliding windows, fused projections. `FAMILIES` are those that every part of the scanner is tried on; `OTHERS`
have one peculiarity each, which some part of it must know.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from neural_mri.contract.tokens import Span, Tokens

__all__ = (
    "D_VOCAB",
    "FAMILIES",
    "NAMES",
    "OTHERS",
    "ModuleNames",
    "build",
    "configuration",
    "prompt",
    "save",
)

# Its signature is written for readers, not for type checkers.
_AutoModel: Any = AutoModelForCausalLM

D_VOCAB = 61

_SHAPE: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _ungrouped(**changes: Any) -> dict[str, Any]:
    return {**_SHAPE, "num_key_value_heads": 4, **changes}


_CONFIGURATIONS: Mapping[str, PretrainedConfig] = MappingProxyType(
    {
        "gpt2": GPT2Config(
            vocab_size=D_VOCAB,
            n_positions=64,
            n_embd=24,
            n_layer=2,
            n_head=3,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "pythia": GPTNeoXConfig(**_ungrouped(rotary_pct=0.5, use_parallel_residual=True)),
        "llama": LlamaConfig(
            **_SHAPE,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        "qwen2": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**_SHAPE, head_dim=10, tie_word_embeddings=False),
        "mistral": MistralConfig(**_SHAPE, head_dim=12, sliding_window=5),
        "phi3": Phi3Config(**_SHAPE),
        "gemma2": Gemma2Config(
            **_SHAPE,
            head_dim=10,
            sliding_window=4,
            query_pre_attn_scalar=10,
            tie_word_embeddings=True,
        ),
        "gemma3": Gemma3TextConfig(
            **_SHAPE,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            head_dim=10,
            sliding_window=4,
            query_pre_attn_scalar=10,
            tie_word_embeddings=True,
        ),
        "olmo2": Olmo2Config(**_SHAPE),
    }
)
FAMILIES = tuple(_CONFIGURATIONS)

_GPT_SHAPE: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_OTHER_CONFIGURATIONS: Mapping[str, PretrainedConfig] = MappingProxyType(
    {
        # Parallel blocks whose sublayers share one norm.
        "phi": PhiConfig(**_ungrouped(partial_rotary_factor=0.5)),
        "gptj": GPTJConfig(**_GPT_SHAPE, rotary_dim=4),
        "codegen": CodeGenConfig(**_GPT_SHAPE, n_ctx=64, rotary_dim=4),
        "cohere": CohereConfig(**_SHAPE, logit_scale=0.25),
        "stablelm": StableLmConfig(**_SHAPE, use_parallel_residual=True),
        # Norms of their own: a gain of 1 + w, and no weights; values that are clipped in place.
        "nemotron": NemotronConfig(**_SHAPE),
        "olmo": OlmoConfig(**_SHAPE, clip_qkv=1.0),
        # Fused projections without biases; attention that asks its cache how long it is.
        "mpt": MptConfig(vocab_size=D_VOCAB, d_model=32, n_heads=4, n_layers=3, max_seq_len=64),
        # A last residual in the shape of what was embedded.
        "gpt_bigcode": GPTBigCodeConfig(**_GPT_SHAPE, multi_query=True),
        # Sliding windows in words of its own.
        "gpt_neo": GPTNeoConfig(
            vocab_size=D_VOCAB,
            max_position_embeddings=64,
            hidden_size=32,
            num_layers=3,
            attention_types=[[["global", "local", "global"], 1]],
            num_heads=4,
            intermediate_size=40,
            window_size=4,
            bos_token_id=1,
            eos_token_id=2,
        ),
        # Scaled logits, as Cohere's are.
        "granite": GraniteConfig(
            **_SHAPE, residual_multiplier=1.0, embedding_multiplier=2.0, logits_scaling=4.0
        ),
    }
)
OTHERS = tuple(_OTHER_CONFIGURATIONS)


def configuration(family: str) -> PretrainedConfig:
    """The family's configuration, a new one each time: models write their data type into theirs."""
    return copy.deepcopy({**_CONFIGURATIONS, **_OTHER_CONFIGURATIONS}[family])


class ModuleNames(NamedTuple):
    """Where a family keeps what tests look at: written down by hand, to check what is derived."""

    blocks: str
    w_o: str
    w_out: str
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None


_LLAMA_LIKE = ModuleNames("model.layers", "self_attn.o_proj", "mlp.down_proj")
_POST_NORMED = _LLAMA_LIKE._replace(
    attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"
)

NAMES: Mapping[str, ModuleNames] = MappingProxyType(
    {
        **dict.fromkeys(
            ("llama", "qwen2", "qwen3", "mistral", "phi3", "cohere", "stablelm"), _LLAMA_LIKE
        ),
        **dict.fromkeys(("nemotron", "olmo", "granite"), _LLAMA_LIKE),
        **dict.fromkeys(("gemma2", "gemma3", "olmo2"), _POST_NORMED),
        "gpt2": ModuleNames("transformer.h", "attn.c_proj", "mlp.c_proj"),
        "pythia": ModuleNames("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
        **dict.fromkeys(
            ("gptj", "codegen"), ModuleNames("transformer.h", "attn.out_proj", "mlp.fc_out")
        ),
        "phi": ModuleNames("model.layers", "self_attn.dense", "mlp.fc2"),
        "mpt": ModuleNames("transformer.blocks", "attn.out_proj", "ffn.down_proj"),
        "gpt_bigcode": ModuleNames("transformer.h", "attn.c_proj", "mlp.c_proj"),
        "gpt_neo": ModuleNames("transformer.h", "attn.attention.out_proj", "mlp.c_proj"),
    }
)


def prompt(n_tokens: int, *, seed: int = 0) -> Tokens:
    """A random prompt for any of these models."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, D_VOCAB, (n_tokens,), generator=generator).tolist()
    return Tokens(
        ids=tuple(ids),
        texts=tuple(f"<{token_id}>" for token_id in ids),
        spans=tuple(Span(position, position + 1) for position in range(n_tokens)),
    )


def build(family: str, *, seed: int = 0) -> PreTrainedModel:
    """The family's model with seeded random weights, float32, not in training.

    Weights, biases and norm gains are drawn wide enough that every component matters: the published
    initialisation leaves biases at 0 and gains at 1, where a test would miss that they were forgotten.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = _AutoModel.from_config(configuration(family))
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    finished: PreTrainedModel = model.eval()
    return finished


def save(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the family's model to a folder, as the model store keeps one."""
    build(family, seed=seed).save_pretrained(folder)
    return folder
