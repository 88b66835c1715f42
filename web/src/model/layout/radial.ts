/**
 * Layers as rings from the centre (embedding) outwards (unembedding). MLPs and the residual stream run
 * straight down; heads stand round their ring in the order of their row, a gap where key-value heads change.
 */
import { nodeAt, type Topology } from "../topology";
import { INSET, clampRadius, closest, type Layout, type Viewport } from "./layout";
import { columnOffsets } from "./place";
import { joined } from "./tracts";

/** The first ring's radius, in distances between rings: room for one's heads, and never a knot. */
const LEAST_HOLLOW = 3;
const HOLLOW_PER_HEAD = 0.2;
/** Share of a half turn that heads keep clear of the top, where head 0 and the last would meet. */
const OPENING = 0.06;
/** Rings the unembedding stands beyond the last. */
const BEYOND = 1.6;
const TOP = 26;

export function radial(topology: Topology, viewport: Viewport): Layout {
  const { nLayers, nHeads, size } = topology;
  const x0 = viewport.width / 2;
  const room = Math.min(
    (viewport.height - TOP - INSET.bottom) / 2,
    viewport.width / 2 - INSET.side,
  );
  const hollow = Math.max(LEAST_HOLLOW, HOLLOW_PER_HEAD * (nHeads + 1));
  // The unembedding is farther out than the last ring, and below it alone.
  const pitch = Math.max(0.5, room) / (hollow + nLayers - 1 + BEYOND / 2);
  const first = hollow * pitch;
  const last = first + (nLayers - 1) * pitch;
  const y0 = TOP + last + 4;
  const offsets = columnOffsets(topology);

  const x = new Float32Array(size).fill(x0);
  const y = new Float32Array(size).fill(y0);
  const bottom = y0 + last + BEYOND * pitch;
  y[size - 1] = bottom;
  for (let layer = 0; layer < nLayers; layer++) {
    const radius = first + layer * pitch;
    for (let column = 0; column <= nHeads; column++) {
      const node = nodeAt(topology, layer, column);
      const turn = (offsets[column] ?? 0) * Math.PI * (1 - OPENING);
      // From straight down: heads left of the MLP go up the left side, the others up the right.
      x[node] = x0 + radius * Math.sin(turn);
      y[node] = y0 + radius * Math.cos(turn);
    }
  }
  const maxRadius = clampRadius(closest(x, y, 3 * (nHeads + 1)) * 0.46);
  return {
    ...viewport,
    x,
    y,
    maxRadius,
    rows: Float32Array.from({ length: nLayers }, (_, layer) => y0 + first + layer * pitch),
    pitch,
    level: false,
    // Along the ring first, then in: as a head's output reaches the stream.
    tracts: joined(topology, x, y, (xa, ya, xb, yb) => [
      x0 + ((xa + xb) / 2 - x0) * 1.04,
      y0 + ((ya + yb) / 2 - y0) * 1.04,
    ]),
    spine: Float32Array.of(x0, y0, x0, bottom),
    midline: { x: x0, top: y0, bottom },
    ends: [
      { label: "E", x: x0, y: y0 - maxRadius - 6 },
      { label: "U", x: x0 + maxRadius + 12, y: bottom + 4 },
    ],
    columns: [],
    margins: Array.from({ length: nLayers }, (_, layer) => {
      const node = nodeAt(topology, layer, 0);
      return { label: String(layer), x: x[node] ?? 0, y: y[node] ?? 0 };
    }),
    scale: 1,
  };
}
