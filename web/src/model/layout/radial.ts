/**
 * Layers as rings from the centre (embedding) outwards (unembedding). Each is turned a little against the
 * one before, so that the residual stream, on which the MLPs stand, winds outwards; heads stand round their
 * ring in the order of their row, a gap where key-value heads change.
 */
import { headsLeft, nodeAt, type Topology } from "../topology";
import { INSET, clampRadius, closest, upright, type Layout, type Viewport } from "./layout";
import { columnOffsets } from "./place";
import { joined } from "./tracts";

/** The first ring's radius, in distances between rings: room for one's heads, and never a knot. */
const LEAST_HOLLOW = 3;
const HOLLOW_PER_HEAD = 0.2;
/** Share of a half turn that heads keep clear opposite the MLP, where head 0 and the last would meet. */
const OPENING = 0.06;
/** Rings the unembedding stands beyond the last. */
const BEYOND = 1.6;
/** About how many times the stream winds round. */
const WINDINGS = 1;

export function radial(topology: Topology, viewport: Viewport): Layout {
  const { nLayers, nHeads, size } = topology;
  const x0 = viewport.width / 2;
  const { top, bottom } = upright(viewport);
  const room = Math.min((bottom - top) / 2 + 12, viewport.width / 2 - INSET.side);
  const hollow = Math.max(LEAST_HOLLOW, HOLLOW_PER_HEAD * (nHeads + 1));
  const pitch = Math.max(0.5, room) / (hollow + nLayers - 1 + BEYOND);
  const first = hollow * pitch;
  const last = first + (nLayers - 1) * pitch;
  const y0 = (top + bottom) / 2;
  const offsets = columnOffsets(topology);

  const x = new Float32Array(size).fill(x0);
  const y = new Float32Array(size).fill(y0);
  // Half a step between heads, so that those of one ring stand between those of the next.
  const step = (2 * Math.PI * (1 - OPENING)) / (nHeads + 1);
  const twist = step * (Math.round((2 * Math.PI * WINDINGS) / nLayers / step - 0.5) + 0.5);
  const begin = Math.PI - nLayers * twist;
  const end = begin + nLayers * twist;
  x[size - 1] = x0 + (last + BEYOND * pitch) * Math.sin(end);
  y[size - 1] = y0 - (last + BEYOND * pitch) * Math.cos(end);
  for (let layer = 0; layer < nLayers; layer++) {
    const radius = first + layer * pitch;
    for (let column = 0; column <= nHeads; column++) {
      const node = nodeAt(topology, layer, column);
      const turn = begin + layer * twist - (offsets[column] ?? 0) * Math.PI * (1 - OPENING);
      x[node] = x0 + radius * Math.sin(turn);
      y[node] = y0 - radius * Math.cos(turn);
    }
  }
  const maxRadius = clampRadius(closest(x, y, 3 * (nHeads + 1)) * 0.46);
  const hubs = Array.from({ length: nLayers }, (_, layer) =>
    nodeAt(topology, layer, headsLeft(nHeads)),
  );
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
    spine: Float32Array.from(
      [0, ...hubs, size - 1].flatMap((node) => [x[node] ?? 0, y[node] ?? 0]),
    ),
    midline: { x: x0, top: y0, bottom: y[size - 1] ?? y0 },
    ends: [
      { label: "E", x: x0, y: y0 - maxRadius - 6 },
      { label: "U", x: (x[size - 1] ?? x0) + maxRadius + 10, y: (y[size - 1] ?? y0) + 4 },
    ],
    columns: [],
    margins: hubs.map((node, layer) => ({
      label: String(layer),
      x: x[node] ?? 0,
      y: y[node] ?? 0,
    })),
    scale: 1,
  };
}
