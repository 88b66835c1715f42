/** Shapes of real models, for tests that must hold for all of them. */
import type { Architecture } from "../../src/api/schema";

export function architecture(
  n_layers: number,
  n_heads: number,
  n_kv_heads = n_heads,
  parallel_blocks = false,
): Architecture {
  return {
    family: "llama",
    n_layers,
    n_heads,
    n_kv_heads,
    d_model: 576,
    d_head: 64,
    d_mlp: 1536,
    d_vocab: 49152,
    n_ctx: 8192,
    activation: "silu",
    gated_mlp: true,
    norm: "rms",
    parallel_blocks,
    tied_embeddings: true,
    positions: "rotary",
  };
}

export const SMOLLM2 = architecture(30, 9, 3);

export const MODELS = {
  tiny: architecture(2, 4, 2),
  "one head": architecture(3, 1),
  "GPT-2 small": architecture(12, 12),
  "GPT-2 medium": architecture(24, 16),
  "Pythia-1.4B": architecture(24, 16, 16, true),
  "SmolLM2-135M": SMOLLM2,
  "Llama-3.2-3B": architecture(28, 24, 8),
  "Mistral-7B": architecture(32, 32, 8),
} as const;
