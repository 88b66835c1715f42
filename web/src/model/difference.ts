/** Two scans of the same thing, subtracted: a further series, NaN wherever the two cannot be compared. */
import type { Message } from "../words/words.svelte";
import { field, type Field } from "./field";
import type { Series } from "./series";
import type { Topology } from "./topology";
import { Volume, besides } from "./volume";

export interface Side {
  readonly series: Series | null;
  readonly field: Field | null;
  readonly topology: Topology | null;
}

/** One quantity under several names: what components write, in a plain run or in either of a stimulation. */
const RUNS: readonly string[] = ["activity", "before", "after"];

/** Why two pictures cannot be subtracted; null where they can. */
export function incomparable(current: Side, prior: Side): Message | null {
  if (current.field === null) return "There is no current scan of this sequence yet.";
  if (prior.field === null) return "There is no prior scan of this sequence yet.";
  if (current.field.unit !== prior.field.unit) return "The two are counted in different units.";
  const [own, other] = [current.field.id, prior.field.id];
  if (own !== other && !(RUNS.includes(own) && RUNS.includes(other))) {
    return "The two show different quantities.";
  }
  const [a, b] = [current.topology, prior.topology];
  if (a?.nLayers !== b?.nLayers || a?.headsInAll !== b?.headsInAll) {
    return "The two models differ in shape: no component of one is a component of the other.";
  }
  return null;
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
