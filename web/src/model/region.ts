/** Numbers over a region: what a person measures by dragging a box over a picture. */
import type { Volume } from "./volume";

/** Components, at some columns of the volume; null: at whichever is looked at. */
export interface Region {
  readonly components: readonly string[];
  readonly columns: readonly [first: number, last: number] | null;
}

export interface Statistics {
  /** Values measured, and places without one. */
  readonly n: number;
  readonly missing: number;
  readonly mean: number;
  /** Of these values themselves (divided by n), not an estimate for others. */
  readonly sd: number;
  readonly min: number;
  readonly max: number;
  /** Sum of sizes: |x|. */
  readonly size: number;
}

export function statistics(values: Iterable<number>): Statistics {
  const all = Float64Array.from(values);
  const measured = all.filter((value) => !Number.isNaN(value));
  const n = measured.length;
  const mean = measured.reduce((sum, value) => sum + value, 0) / n;
  // In two passes: values far from 0 would lose their spread in one.
  const variance = measured.reduce((sum, value) => sum + (value - mean) ** 2, 0) / n;
  return {
    n,
    missing: all.length - n,
    mean,
    sd: Math.sqrt(variance),
    min: n === 0 ? NaN : measured.reduce((a, b) => Math.min(a, b)),
    max: n === 0 ? NaN : measured.reduce((a, b) => Math.max(a, b)),
    size: measured.reduce((sum, value) => sum + Math.abs(value), 0),
  };
}

/** The region's values, component by component; `column` where it names none. */
export function* valuesIn(region: Region, volume: Volume, column: number): Generator<number> {
  const [first, last] = region.columns ?? [column, column];
  for (const component of region.components) {
    for (let at = first; at <= last; at++) yield volume.at(component, at);
  }
}
