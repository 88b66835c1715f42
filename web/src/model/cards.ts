/** What each quantity measures: in words, as a formula, and where in the model it is taken. */
import type { Message } from "../words/words.svelte";
import type { SeriesId } from "./series";

export interface Card {
  readonly measures: Message;
  readonly formula: string;
  /** Hook points by the names of TransformerLens; none where no run is needed. */
  readonly hook: string;
  /** Where the measure comes from, to be read. */
  readonly source: string;
}

const WRITES = "blocks.l.attn.hook_z · W_O[h], blocks.l.hook_mlp_out";
const METRIC = "M = logit(answer) − logit(foil)";

/** By the series and the quantity's id. */
const CARDS: Readonly<Record<string, Card>> = {
  "T1.parameters": {
    measures: "How many numbers of the model belong to the part.",
    formula: "Σ |W|, W ∈ {W_Q, W_K, W_V, W_O}[h]  or  {W_gate, W_in, W_out}",
    hook: "",
    source: "",
  },
  "T2.rms": {
    measures: "How large the part's weights are, as published.",
    formula: "√( Σ w² / N )",
    hook: "",
    source: "",
  },
  "T2.outliers": {
    measures: "Which share of the weights lies far outside of the rest of their tensor.",
    formula: "|{ w : |w − mean| > k · std }| / N",
    hook: "",
    source: "Dettmers 2022",
  },
  "T2.largest": {
    measures: "The part's largest weight.",
    formula: "max |w|",
    hook: "",
    source: "",
  },
  "T2.copying": {
    measures: "Whether the head writes what it reads: 1 copies, −1 writes the opposite.",
    formula: "Σ Re λ / Σ |λ|,  λ of W_V W_O",
    hook: "",
    source: "Elhage 2021",
  },
  "fMRI.activity": {
    measures: "How much the part writes to the residual stream at the token.",
    formula: "‖ z_h W_O[h] ‖₂  or  ‖ mlp_out ‖₂",
    hook: WRITES,
    source: "Elhage 2021",
  },
  "stimulation.difference": {
    measures: "How much more or less the part writes once something was changed.",
    formula: "‖ write after ‖₂ − ‖ write before ‖₂",
    hook: WRITES,
    source: "",
  },
  "stimulation.change": {
    measures: "How far the part's write moved, whichever way.",
    formula: "‖ write after − write before ‖₂",
    hook: WRITES,
    source: "",
  },
  "stimulation.after": {
    measures: "How much the part writes with something changed.",
    formula: "‖ write after ‖₂",
    hook: WRITES,
    source: "",
  },
  "stimulation.before": {
    measures: "How much the part writes with nothing changed.",
    formula: "‖ write before ‖₂",
    hook: WRITES,
    source: "",
  },
  "tracing.trace": {
    measures:
      "How much of the answer one clean value brings back after the subject was drowned or replaced.",
    formula: "M(restored) − M(corrupted)",
    hook: "blocks.l.hook_resid_pre, hook_attn_out, hook_mlp_out",
    source: "Meng 2022; Zhang & Nanda 2024",
  },
  "DTI.effect": {
    measures: "What replacing the part does to the answer.",
    formula: `M(replaced) − M(clean),  ${METRIC}`,
    hook: "blocks.l.attn.hook_z[h], blocks.l.hook_mlp_out",
    source: "Wang 2022; Zhang & Nanda 2024",
  },
  "DTI.estimate": {
    measures: "What replacing the part would do, to first order.",
    formula: `(x′ − x) · ∂M/∂x,  ${METRIC}`,
    hook: "blocks.l.attn.hook_z[h], blocks.l.hook_mlp_out",
    source: "Nanda 2023; Syed 2023",
  },
  "DTI.direct": {
    measures: "What the part writes straight for the answer, past everything that follows.",
    formula: "write · (W_U[answer] − W_U[foil]) / norm",
    hook: `${WRITES}, ln_final`,
    source: "Elhage 2021",
  },
  "FLAIR.z": {
    measures: "How unusual the part's change of the prediction is for this model.",
    formula: "(ΔKL − mean) / std on reference text",
    hook: "blocks.l.hook_resid_mid, blocks.l.hook_resid_post → ln_final → W_U",
    source: "nostalgebraist 2020; Belrose 2023",
  },
  "FLAIR.change": {
    measures:
      "Whether the part brings the prediction nearer to the model's own, or farther from it.",
    formula: "D_KL(p ‖ lens after) − D_KL(p ‖ lens before)",
    hook: "blocks.l.hook_resid_mid, blocks.l.hook_resid_post → ln_final → W_U",
    source: "nostalgebraist 2020; Belrose 2023",
  },
};

/** The card of a quantity; a quantity without one has only what the service says of it. */
export function cardOf(series: SeriesId, quantity: string): Card | null {
  return CARDS[`${series}.${quantity}`] ?? null;
}

/** The quantity a sequence is shown as unless another is asked for. */
export const FIRST_QUANTITY = {
  T1: "parameters",
  T2: "rms",
  fMRI: "activity",
  DTI: "effect",
  FLAIR: "z",
} as const;
