/**
 * The placement of layouts in rows: layers from top (embedding) to bottom (output), attention heads
 * left and right of a midline on which the MLPs and the residual stream stand. A layout is only the
 * outline it is fitted into.
 */
import { headsLeft, nodeAt, type Topology } from "../topology";
import {
  clampRadius,
  closest,
  labelled,
  upright,
  type Layout,
  type Mark,
  type Viewport,
} from "./layout";
import { joined } from "./tracts";

export interface Outline {
  /** Half the picture's widest row, in pixels, for the viewport and the height of all rows. */
  readonly halfWidth: (viewport: Viewport, height: number) => number;
  /** Width of a row as a share of the widest; `depth` runs 0 to 1 from first to last layer. */
  readonly taper: (depth: number) => number;
}

/** Rows that embed and unembed keep clear of the layers. */
const END_GAP = 1.5;
/** A head acts before its layer's MLP, so it stands a little higher. */
const HEAD_RISE = 0.2;
const MLP_FALL = 0.22;
/** Extra room between groups of heads that share a key-value head, in columns. */
const GROUP_GAP = 0.35;
const COLUMN_LABEL_ROOM = 24;
const FOLDED_WIDTH = 0.6;

export function place(topology: Topology, viewport: Viewport, outline: Outline): Layout {
  const { nLayers, nHeads } = topology;
  const { top, bottom } = upright(viewport);
  const spans = Math.max(nLayers - 1, 0) + 2 * END_GAP;
  const half = outline.halfWidth(viewport, bottom - top);
  const pitch = (bottom - top) / spans;
  const middle = viewport.width / 2;
  const offsets = columnOffsets(topology);
  const depth = (layer: number) => (nLayers > 1 ? layer / (nLayers - 1) : 0.5);

  const rows = Float32Array.from(
    { length: nLayers },
    (_, layer) => top + (END_GAP + layer) * pitch,
  );
  const x = new Float32Array(topology.size);
  const y = new Float32Array(topology.size);
  x.fill(middle);
  y[0] = top;
  y[topology.size - 1] = bottom;
  for (let layer = 0; layer < nLayers; layer++) {
    const width = half * outline.taper(depth(layer));
    const row = rows[layer] ?? 0;
    for (let column = 0; column <= nHeads; column++) {
      const node = nodeAt(topology, layer, column);
      const offset = offsets[column] ?? 0;
      const isHead = (topology.heads[node] ?? -1) >= 0;
      const shift = topology.parallel ? 0 : isHead ? -HEAD_RISE : MLP_FALL;
      x[node] = middle + offset * width;
      y[node] = row + shift * pitch;
    }
  }

  // Nodes more than three rows apart are never the nearest.
  const maxRadius = clampRadius(closest(x, y, 3 * (nHeads + 1)) * 0.46);
  return {
    ...viewport,
    x,
    y,
    maxRadius,
    rows,
    pitch,
    level: true,
    tracts: joined(topology, x, y, (x0, y0, x1, y1) =>
      Math.abs(x0 - x1) > pitch ? [(x0 + x1) / 2, (y0 + y1) / 2] : [x1, y0],
    ),
    spine: Float32Array.of(middle, top, middle, bottom),
    midline: { x: middle, top, bottom },
    ends: [
      { label: "E", x: middle, y: top - 27 },
      { label: "U", x: middle, y: bottom + 23 },
    ],
    columns: columnLabels(topology, x, y),
    margins: margins(topology, x, y),
    scale: 1,
  };
}

/** Column positions from -1 to 1; the MLP at 0, or across the stream from the attention it is folded with. */
export function columnOffsets({ nHeads, nKvHeads, folded }: Topology): Float32Array {
  if (folded) return Float32Array.of(-FOLDED_WIDTH, FOLDED_WIDTH);
  const left = headsLeft(nHeads);
  const group = nKvHeads > 0 ? Math.max(1, Math.floor(nHeads / nKvHeads)) : 1;
  // Marks only groups that are real: neither one head each nor all heads together.
  const gap = group > 1 && group < nHeads ? GROUP_GAP : 0;
  const distance = (from: number, to: number) => {
    let sum = 1;
    for (let head = from + 1; head <= to; head++) sum += 1 + (head % group === 0 ? gap : 0);
    return sum;
  };
  const offsets = new Float32Array(nHeads + 1);
  const leftEnd = distance(0, left - 1);
  for (let head = 0; head < left; head++) offsets[head] = -distance(head, left - 1) / leftEnd;
  const rightEnd = distance(left, nHeads - 1);
  for (let head = left; head < nHeads; head++) offsets[head + 1] = distance(left, head) / rightEnd;
  return offsets;
}

function columnLabels(topology: Topology, x: Float32Array, y: Float32Array): Mark[] {
  const first = nodeAt(topology, 0, 0);
  const last = nodeAt(topology, 0, topology.nHeads);
  const pitch = ((x[last] ?? 0) - (x[first] ?? 0)) / Math.max(1, topology.nHeads);
  const step = labelled(pitch, COLUMN_LABEL_ROOM);
  return Array.from({ length: topology.nHeads }, (_, head) => head)
    .filter((head) => head % step === 0)
    .map((head) => {
      const node = nodeAt(topology, 0, head < headsLeft(topology.nHeads) ? head : head + 1);
      return { label: topology.folded ? "A" : `H${head}`, x: x[node] ?? 0, y: y[node] ?? 0 };
    });
}

/** Each layer's number stands beside its leftmost node. */
function margins(topology: Topology, x: Float32Array, y: Float32Array): Mark[] {
  return Array.from({ length: topology.nLayers }, (_, layer) => {
    const node = nodeAt(topology, layer, 0);
    return { label: String(layer), x: x[node] ?? 0, y: y[node] ?? 0 };
  });
}
