/** A model reading a prompt clean and with parts of it changed, side by side. */
import {
  openTable,
  readActivations,
  readPredictions,
  readTokens,
  type ActivationTable,
  type Prediction,
} from "../../api/frames";
import { field, type Field } from "../field";
import { acquisitionOf, bare, stored, type Loader } from "../series";
import type { Stimulus } from "../stimulus";
import { Volume } from "../volume";
import { activity, reported } from "./activations";

export interface Comparison {
  readonly position: number;
  readonly answer: string;
  readonly foil: boolean;
  readonly unit: string;
  readonly method: string;
  readonly before: number;
  readonly after: number;
  /** Over draws of noise; NaN where there was none. */
  readonly sd: number;
  readonly probabilityBefore: number;
  readonly probabilityAfter: number;
}

export interface Shift {
  readonly position: number;
  readonly kl: number;
  readonly entropyBefore: number;
  readonly entropyAfter: number;
}

export interface Lesion {
  readonly stimuli: readonly Stimulus[];
  readonly comparison: Comparison | null;
  readonly shifts: readonly Shift[];
  readonly before: readonly Prediction[];
  readonly after: readonly Prediction[];
}

/** A likely next token with its probability in either run; NaN where it is not among a run's top. */
export interface Likely {
  /** Different for each row. */
  readonly key: number;
  readonly text: string;
  readonly before: number;
  readonly after: number;
}

/** The likeliest of either run after a position, each token once. Hidden tokens are nobody's match. */
export function likeliest(
  { before, after }: Pick<Lesion, "before" | "after">,
  position: number,
  most: number,
): readonly Likely[] {
  const here = (all: readonly Prediction[]) => all.filter((one) => one.position === position);
  const [clean, changed] = [here(before), here(after)];
  const of = (id: number, run: readonly Prediction[]) =>
    (id < 0 ? undefined : run.find((one) => one.id === id))?.probability ?? NaN;
  const rows = new Map<number, Likely>();
  const add = (id: number, row: Omit<Likely, "key">) => {
    const key = id < 0 ? -1 - rows.size : id;
    rows.set(key, { key, ...row });
  };
  for (const { id, text, probability } of clean.slice(0, most)) {
    add(id, { text, before: probability, after: of(id, changed) });
  }
  for (const { id, text, probability } of changed.slice(0, most)) {
    add(id, { text, before: of(id, clean), after: probability });
  }
  return [...rows.values()];
}

export const load: Loader = async (manifest, job, read) => {
  const table = (name: string) => read(name).then((bytes) => openTable(bytes, name));
  const scanned = stored(manifest, "change");
  const activations = (name: string) => (scanned ? read(name).then(readActivations) : null);
  const [comparison, shift, before, after, tokens, clean, changed, change] = await Promise.all([
    table("comparison"),
    table("shift"),
    read("predictions").then(readPredictions),
    read("predictions_after").then(readPredictions),
    scanned ? read("tokens").then(readTokens) : [],
    activations("activations"),
    activations("activations_after"),
    activations("change"),
  ]);
  const [compared] = comparison.rows((row) => ({
    position: row.number("position"),
    answer: row.text("answer"),
    // Of a redacted session the id is hidden; the unit tells all the same.
    foil: comparison.provenance.unit === "logits",
    unit: comparison.provenance.unit,
    method: comparison.provenance.method,
    before: row.number("metric_before"),
    after: row.number("metric_after"),
    sd: row.number("metric_sd"),
    probabilityBefore: row.number("probability_before"),
    probabilityAfter: row.number("probability_after"),
  }));
  return {
    ...bare("stimulation", acquisitionOf(manifest, job)),
    fields: clean && changed && change ? fieldsOf(clean, changed, change) : [],
    tokens: reported(clean?.provenance.positions ?? null, tokens),
    predictions: after,
    lesion: {
      stimuli: (manifest.request["perturbations"] ?? []) as readonly Stimulus[],
      comparison: compared ?? null,
      shifts: shift.rows((row) => ({
        position: row.number("position"),
        kl: row.number("kl"),
        entropyBefore: row.number("entropy_before"),
        entropyAfter: row.number("entropy_after"),
      })),
      before,
      after,
    },
    complete: true,
  };
};

/** The pictures of a stimulation: what changed first, then either run by itself. */
function fieldsOf(
  clean: ActivationTable,
  changed: ActivationTable,
  change: ActivationTable,
): Field[] {
  return [
    field({
      id: "difference",
      title: "Difference",
      unit: `Δ ${clean.provenance.unit}`,
      method: "how much more (orange) or less (blue) each component writes: perturbed minus clean",
      volume: new Volume(clean.components, clean.width, difference(changed.values, clean.values)),
      map: "blue-orange",
      signed: true,
    }),
    activity(change, "change", "Size of change"),
    activity(changed, "after", "Perturbed"),
    activity(clean, "before", "Clean"),
  ];
}

/** In float64: the difference of two float32 values is then exact. */
export function difference(after: Float32Array, before: Float32Array): Float64Array {
  return Float64Array.from(after, (value, index) => value - (before[index] ?? NaN));
}
