/**
 * A scan as a field of numbers: component x column, where a column is a token (fMRI) or the one static
 * image (T1). Values keep their raw unit; nothing here rescales.
 */

export class Volume {
  readonly #rows: ReadonlyMap<string, number>;

  constructor(
    readonly components: readonly string[],
    readonly width: number,
    /** Row-major `[component, column]`. */
    readonly data: Float32Array | Float64Array,
    rows?: ReadonlyMap<string, number>,
  ) {
    if (data.length !== components.length * width) {
      throw new RangeError(
        `A volume of ${components.length} x ${width} needs as many values, got ${data.length}`,
      );
    }
    this.#rows = rows ?? new Map(components.map((component, row) => [component, row]));
  }

  has(component: string): boolean {
    return this.#rows.has(component);
  }

  /** NaN where the component or column was not measured. */
  at(component: string, column: number): number {
    const row = this.#rows.get(component);
    if (row === undefined || column < 0 || column >= this.width) return NaN;
    return this.data[row * this.width + column] ?? NaN;
  }

  /** One component's values over the columns, or null where it was not measured. */
  profile(component: string): Float32Array | Float64Array | null {
    const row = this.#rows.get(component);
    if (row === undefined) return null;
    return this.data.subarray(row * this.width, (row + 1) * this.width);
  }

  /** The values of many components at one column; NaN where not measured. */
  slice(components: readonly string[], column: number): Float64Array {
    const values = new Float64Array(components.length);
    for (let i = 0; i < components.length; i++) values[i] = this.at(components[i] ?? "", column);
    return values;
  }

  /** The same numbers under a new identity: tells readers that a buffer still growing has changed. */
  again(): Volume {
    return new Volume(this.components, this.width, this.data, this.#rows);
  }
}

/**
 * Which column of the prior stands beside a column of the current: prompts of different lengths meet at
 * their ends, where both are about to answer. -1 where there is none. A still image stands beside all.
 */
export function besides(column: number, width: number, priorWidth: number): number {
  if (priorWidth <= 1 && width <= 1) return 0;
  return Math.max(-1, priorWidth - (width - column));
}

/** Ranks of values, 1 the largest; equal values share a rank; 0 for NaN. */
export function ranks(values: Float64Array): Uint32Array {
  const order = [...values.keys()]
    .filter((index) => !Number.isNaN(values[index]))
    .sort((a, b) => (values[b] ?? 0) - (values[a] ?? 0));
  const result = new Uint32Array(values.length);
  let rank = 0;
  order.forEach((index, place) => {
    if (place === 0 || values[index] !== values[order[place - 1] ?? -1]) rank = place + 1;
    result[index] = rank;
  });
  return result;
}
