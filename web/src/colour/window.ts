/**
 * Window and level: which values the colour map is spread over. Only colour depends on it, never a
 * number. Follows DICOM's LINEAR_EXACT: t = (u - level) / width + 1/2, where u is the value, or its
 * decimal logarithm on a log scale, or its size alone where only the size is shown.
 */
export type Scale = "linear" | "log" | "size";

export interface Window {
  /** Centre, in units of the value (linear) or decades (log). */
  readonly level: number;
  /** Extent, same unit, above 0. */
  readonly width: number;
}

const NARROWEST = 1e-9;

/** A value's coordinate on the scale: -Infinity for a log of 0, NaN for what has none. */
export function coordinate(value: number, scale: Scale): number {
  switch (scale) {
    case "log":
      return Math.log10(value);
    case "size":
      return Math.abs(value);
    case "linear":
      return value;
  }
}

export function valueAt(u: number, scale: Scale): number {
  return scale === "log" ? 10 ** u : u;
}

/** Where a value stands in the window, clamped to 0..1; NaN when it was not measured. */
export function position(value: number, window: Window, scale: Scale): number {
  const t = (coordinate(value, scale) - window.level) / window.width + 0.5;
  return t < 0 ? 0 : t > 1 ? 1 : t;
}

/** Lowest and highest value of the window, in the value's own unit. */
export function bounds(window: Window, scale: Scale): readonly [low: number, high: number] {
  return [
    valueAt(window.level - window.width / 2, scale),
    valueAt(window.level + window.width / 2, scale),
  ];
}

export function between(low: number, high: number): Window {
  return { level: (low + high) / 2, width: Math.max(high - low, NARROWEST) };
}

/** The finite coordinates of values, sorted. A log scale has none for zero. */
export function coordinates(values: Iterable<number>, scale: Scale): Float64Array {
  const all: number[] = [];
  for (const value of values) {
    const u = coordinate(value, scale);
    if (Number.isFinite(u)) all.push(u);
  }
  return Float64Array.from(all).sort();
}

/** The value below which a share of sorted numbers lies, interpolated between neighbours. */
export function quantile(sorted: Float64Array, share: number): number {
  const place = (sorted.length - 1) * share;
  const below = sorted[Math.floor(place)] ?? NaN;
  const above = sorted[Math.ceil(place)] ?? NaN;
  return below + (above - below) * (place - Math.floor(place));
}

/**
 * The window that leaves out `tail` of the sorted coordinates at either end: with 0.02, the 2nd to the
 * 98th percentile. A handful of outliers a thousand times the rest, as at attention sinks, does not
 * move it.
 */
export function automatic(sorted: Float64Array, tail: number): Window {
  if (sorted.length === 0) return { level: 0.5, width: 1 };
  const low = quantile(sorted, tail);
  const high = quantile(sorted, 1 - tail);
  if (high - low < NARROWEST) {
    // All values alike: a window round them shows them in the map's middle.
    return { level: low, width: Math.max(Math.abs(low), 1) };
  }
  return between(low, high);
}

/**
 * The same about 0: the middle of a diverging map is where nothing happens. Where nothing happens exactly,
 * as upstream of what was changed, there is nothing to be spread over the map.
 */
export function symmetric(sorted: Float64Array, tail: number): Window {
  const sizes = sorted
    .filter((value) => value !== 0)
    .map(Math.abs)
    .sort();
  const most = sizes.length === 0 ? 1 : quantile(sizes, 1 - tail);
  return { level: 0, width: Math.max(2 * most, NARROWEST) };
}

/** Wider or narrower by a factor, so that one drag works over decades. */
export function widened(window: Window, factor: number): Window {
  return { level: window.level, width: Math.max(window.width * factor, NARROWEST) };
}

/** Moved by a share of its own width. */
export function moved(window: Window, share: number): Window {
  return { level: window.level + window.width * share, width: window.width };
}

/** Counts of sorted coordinates in equal bins over [low, high]. */
export function histogram(
  sorted: Float64Array,
  low: number,
  high: number,
  bins: number,
): Uint32Array {
  const counts = new Uint32Array(bins);
  const extent = high - low;
  for (const u of sorted) {
    if (u < low || u > high || extent <= 0) continue;
    const bin = Math.min(bins - 1, Math.floor(((u - low) / extent) * bins));
    counts[bin] = (counts[bin] ?? 0) + 1;
  }
  return counts;
}
