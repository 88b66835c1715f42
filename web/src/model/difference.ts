/** Two scans of the same thing, subtracted: a further series, NaN wherever the two cannot be compared. */
import type { Message } from "../words/words.svelte";
import { field, type Field } from "./field";
import type { Series } from "./series";
import type { Topology } from "./topology";
import { Volume } from "./volume";

export interface Side {
  readonly series: Series | null;
  readonly field: Field | null;
  readonly topology: Topology | null;
}

/** Why two pictures cannot be subtracted; null where they can. */
export function incomparable(current: Side, prior: Side): Message | null {
  if (current.field === null) return "There is no current scan of this sequence yet.";
  if (prior.field === null) return "There is no prior scan of this sequence yet.";
  if (current.field.unit !== prior.field.unit) return "The two are counted in different units.";
  const [a, b] = [current.topology, prior.topology];
  if (a?.nLayers !== b?.nLayers || a?.headsInAll !== b?.headsInAll) {
    return "The two models differ in shape: no component of one is a component of the other.";
  }
  return null;
}

/**
 * Which column of the prior stands beside a column of the current: prompts of different lengths meet at
 * their ends, where both are about to answer. -1 where there is none. A still image stands beside all.
 */
export function besides(column: number, width: number, priorWidth: number): number {
  if (priorWidth <= 1 && width <= 1) return 0;
  return Math.max(-1, priorWidth - (width - column));
}

/** Current minus prior, component by component. In float64: of two float32 values it is exact. */
export function differenceOf(current: Side, prior: Side): Series | null {
  const [own, other] = [current.field, prior.field];
  if (current.series === null || own === null || other === null) return null;
  if (incomparable(current, prior) !== null) return null;
  const { volume } = own;
  const { width } = volume;
  const data = new Float64Array(volume.components.length * width);
  volume.components.forEach((component, row) => {
    for (let column = 0; column < width; column++) {
      const before = other.volume.at(component, besides(column, width, other.volume.width));
      data[row * width + column] = volume.at(component, column) - before;
    }
  });
  return {
    ...current.series,
    fields: [
      field({
        id: "difference",
        title: "Difference",
        unit: `Δ ${own.unit}`,
        method: "current minus prior, component by component",
        volume: new Volume(volume.components, width, data),
        map: "blue-orange",
        signed: true,
        adds: own.adds,
      }),
    ],
    // What one modality alone has belongs to either picture, not to what lies between them.
    neurons: [],
    predictions: [],
    parameters: [],
    weights: null,
    circuit: null,
    anomalies: null,
    lesion: null,
    trace: null,
  };
}
