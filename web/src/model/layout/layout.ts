/** Where each node of a topology stands in a viewport, in CSS pixels. Pure: numbers in, numbers out. */
export interface Viewport {
  readonly width: number;
  readonly height: number;
}

export interface Layout extends Viewport {
  readonly x: Float32Array;
  readonly y: Float32Array;
  /** Largest radius a node may have without touching its neighbours, at most 10 unless enlarged. */
  readonly maxRadius: number;
  /** Height of each layer's row at the midline, where layers stand in rows; its band is one `pitch` high. */
  readonly rows: Float32Array;
  readonly pitch: number;
  /** Whether layers stand in level rows. */
  readonly level: boolean;
  /** Tracts: quadratic curves `x0 y0 cx cy x1 y1`, each a component writing to or reading from the residual stream. */
  readonly tracts: Float32Array;
  /** The residual stream itself, from embedding to unembedding: `x y` of each bend. */
  readonly spine: Float32Array;
  /** What paths bow away from. */
  readonly midline: { readonly x: number; readonly top: number; readonly bottom: number };
  /** The orientation letters, E and U. */
  readonly ends: readonly [Mark, Mark];
  /** Heads, where there is room to name them, above the first layer. */
  readonly columns: readonly Mark[];
  /** Layers, each beside one of its nodes. */
  readonly margins: readonly Mark[];
  /** How much it is enlarged. */
  readonly scale: number;
}

/** A node that carries a label. */
export interface Mark {
  readonly label: string;
  readonly x: number;
  readonly y: number;
}

export type LayoutName = "stack" | "brain" | "network" | "radial";

/** Room kept free of nodes, for orientation letters and labels. */
export const INSET = { top: 44, bottom: 30, side: 34 } as const;

/** One of several pictures that is tall enough: its texts stand above and below it. */
const SEVERAL_WIDTH = 460;
const TALL = 420;
/** Where there is room for corner texts and the colour bar beside a picture that has no round shape. */
const ROOMY_WIDTH = 560;

export interface Box {
  readonly left: number;
  readonly top: number;
  readonly right: number;
  readonly bottom: number;
}

/** The part of a viewport for nodes, between labels above and below. */
export function upright({ width, height }: Viewport): Pick<Box, "top" | "bottom"> {
  const several = width < SEVERAL_WIDTH && height > TALL;
  const top = several ? 92 : INSET.top;
  return { top, bottom: Math.max(top + 1, height - (several ? 64 : INSET.bottom)) };
}

/** The part of a viewport for nodes that may stand anywhere: clear of corners and colour bar. */
export function clear(viewport: Viewport): Box {
  const { width } = viewport;
  const { top, bottom } = upright(viewport);
  const roomy = width >= ROOMY_WIDTH;
  const over = roomy ? top + 56 : top;
  return {
    left: INSET.side,
    top: over,
    right: Math.max(INSET.side + 1, width - (roomy ? 118 : INSET.side)),
    bottom: Math.max(over + 1, bottom - (roomy ? 86 : 0)),
  };
}

/** The seed's largest node. */
const LARGEST_RADIUS = 10;
const SMALLEST_RADIUS = 4;

/**
 * Radius of each node by its parameter count: 4 to 10 px where rows are far enough apart, in the same
 * proportion where they are not. The disc's extent beyond the smallest grows with the count's root.
 * Embed and unembed stand clear of the rows, so they may be larger than a row allows.
 */
export function radiiByParameters(
  parameters: Float64Array,
  layout: Pick<Layout, "maxRadius"> & Partial<Pick<Layout, "scale">>,
): Float32Array {
  const most = parameters.reduce((a, b) => Math.max(a, b || 0), 0);
  const radii = Float32Array.from(parameters, (count) => {
    const share = most > 0 && count > 0 ? Math.sqrt(count / most) : 0;
    return SMALLEST_RADIUS + (LARGEST_RADIUS - SMALLEST_RADIUS) * share;
  });
  const widest = radii.subarray(1, -1).reduce((a, b) => Math.max(a, b), 0);
  const fit = Math.min(layout.scale ?? 1, layout.maxRadius / Math.max(widest, 1));
  return radii.map((radius) => radius * fit);
}

export function clampRadius(radius: number): number {
  return Math.max(0.75, Math.min(LARGEST_RADIUS, radius));
}

/** Every how many columns one is labelled, when a label needs `room` pixels. */
export function labelled(pitch: number, room: number): number {
  const every = Math.ceil(room / Math.max(pitch, 1));
  return [1, 2, 4, 8, 16, 32].find((step) => step >= every) ?? 64;
}

/** Least distance between two points of which `within` that follow each other may be the nearest. */
export function closest(x: Float32Array, y: Float32Array, within = x.length): number {
  let least = Infinity;
  for (let node = 0; node < x.length; node++) {
    const end = Math.min(x.length, node + within);
    for (let other = node + 1; other < end; other++) {
      const dx = (x[node] ?? 0) - (x[other] ?? 0);
      const dy = (y[node] ?? 0) - (y[other] ?? 0);
      least = Math.min(least, dx * dx + dy * dy);
    }
  }
  return Math.sqrt(least);
}
