/**
 * The model as a graph: every head tied to the stream it reads and the stream it writes, which the MLPs
 * stand on. Forces settle a chain that starts out folded to the shape of the viewport; nothing is drawn by
 * lot, so a model always looks the same.
 */
import { headsLeft, nodeAt, type Topology } from "../topology";
import { clampRadius, clear, closest, type Box, type Layout, type Viewport } from "./layout";
import { joined } from "./tracts";

const ROUNDS = 60;
/** Share of its excess that a spring gives back in a round. */
const STIFFNESS = 0.12;
const SPREAD = 0.86;
/** However few they are, components stay in touch. */
const LONGEST_GAP = 60;
/** Heads of a layer bulge outwards from the chain by this share of their distance from it. */
const BULGE = 0.35;

export function network(topology: Topology, viewport: Viewport): Layout {
  const { nLayers, nHeads, size } = topology;
  const box = clear(viewport);
  const [x, y] = folded(topology, box);
  const gap = spacing(topology, box);
  settle(topology, x, y, gap, box);
  const maxRadius = clampRadius(closest(x, y) * 0.46);
  const middle = headsLeft(nHeads);
  const hubs = Array.from({ length: nLayers }, (_, layer) => nodeAt(topology, layer, middle));
  const centre = { x: viewport.width / 2, top: box.top, bottom: box.bottom };
  return {
    ...viewport,
    x,
    y,
    maxRadius,
    rows: Float32Array.from(hubs, (node) => y[node] ?? 0),
    pitch: gap,
    level: false,
    tracts: joined(topology, x, y, (x0, y0, x1, y1) => [(x0 + x1) / 2, (y0 + y1) / 2]),
    spine: Float32Array.from(
      [0, ...hubs, size - 1].flatMap((node) => [x[node] ?? 0, y[node] ?? 0]),
    ),
    midline: centre,
    ends: [
      { label: "E", x: x[0] ?? 0, y: (y[0] ?? 0) - maxRadius - 7 },
      { label: "U", x: x[size - 1] ?? 0, y: (y[size - 1] ?? 0) - maxRadius - 7 },
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

/** How many lines the chain of layers is folded into: the number that leaves nodes the most room. */
function lines({ nLayers, nHeads }: Topology, { left, top, right, bottom }: Box): number {
  const stations = nLayers + 2;
  let best = 1;
  let most = 0;
  for (let count = 1; count <= stations; count++) {
    const along = (right - left) / Math.ceil(stations / count) / 2;
    const across = ((bottom - top) / count) * (SPREAD / Math.max(1, nHeads - 1));
    const room = Math.min(along, nHeads > 1 ? across : along);
    if (room > most) [best, most] = [count, room];
  }
  return best;
}

function spacing(topology: Topology, box: Box): number {
  const area = (box.right - box.left) * (box.bottom - box.top);
  return Math.min(LONGEST_GAP, Math.sqrt(area / topology.size) * 0.9);
}

/** Where the chain begins: back and forth in level lines, each layer's heads across it. */
function folded(topology: Topology, box: Box): readonly [Float32Array, Float32Array] {
  const { nLayers, nHeads, size } = topology;
  const count = lines(topology, box);
  const stations = Math.ceil((nLayers + 2) / count);
  const height = (box.bottom - box.top) / count;
  const width = (box.right - box.left) / stations;
  const at = (station: number, share: number) => {
    const line = Math.min(count - 1, Math.floor(station / stations));
    const along = station - line * stations + 0.5;
    const forward = line % 2 === 0 ? along : stations - along;
    return [box.left + forward * width, box.top + (line + 0.5 + share * SPREAD) * height] as const;
  };
  const x = new Float32Array(size);
  const y = new Float32Array(size);
  const put = (node: number, [px, py]: readonly [number, number]) => {
    x[node] = px;
    y[node] = py;
  };
  put(0, at(0, 0));
  put(size - 1, at(nLayers + 1, 0));
  const middle = headsLeft(nHeads);
  for (let layer = 0; layer < nLayers; layer++) {
    put(nodeAt(topology, layer, middle), at(layer + 1.25, 0));
    for (let head = 0; head < nHeads; head++) {
      const share = nHeads > 1 ? head / (nHeads - 1) - 0.5 : 0.12;
      const node = nodeAt(topology, layer, head < middle ? head : head + 1);
      put(node, at(layer + 0.75 - BULGE * Math.abs(share), share));
    }
  }
  return [x, y];
}

/** Springs along the wiring, repulsion between what is near, and the viewport's edges. */
function settle(topology: Topology, x: Float32Array, y: Float32Array, gap: number, box: Box): void {
  const { nLayers, nHeads, size } = topology;
  const middle = headsLeft(nHeads);
  const springs: (readonly [from: number, to: number, length: number])[] = [];
  for (let layer = 0; layer <= nLayers; layer++) {
    const hub = layer === nLayers ? size - 1 : nodeAt(topology, layer, middle);
    const before = layer === 0 ? 0 : nodeAt(topology, layer - 1, middle);
    springs.push([before, hub, 2 * gap]);
    if (layer === nLayers) continue;
    for (let column = 0; column <= nHeads; column++) {
      if (column !== middle) springs.push([nodeAt(topology, layer, column), hub, 1.8 * gap]);
    }
  }
  for (let round = 0; round < ROUNDS; round++) {
    const heat = 1 - round / ROUNDS;
    for (const [a, b, length] of springs) pull(x, y, a, b, length, STIFFNESS * heat);
    for (let pass = 0; pass < 2; pass++) push(x, y, gap, box);
  }
  // In the end nothing pulls any more: what is still too near has room made for it.
  for (let pass = 0; pass < ROUNDS / 2; pass++) push(x, y, gap, box);
}

/** Draws two points together where they are farther apart than the spring is long. */
function pull(
  x: Float32Array,
  y: Float32Array,
  a: number,
  b: number,
  length: number,
  share: number,
): void {
  const dx = (x[b] ?? 0) - (x[a] ?? 0);
  const dy = (y[b] ?? 0) - (y[a] ?? 0);
  const distance = Math.hypot(dx, dy);
  if (distance <= length) return;
  const by = ((distance - length) / distance) * share * 0.5;
  x[a] = (x[a] ?? 0) + dx * by;
  y[a] = (y[a] ?? 0) + dy * by;
  x[b] = (x[b] ?? 0) - dx * by;
  y[b] = (y[b] ?? 0) - dy * by;
}

/** Moves points nearer than `gap` apart, found by a grid of that size; then all back into the box. */
function push(x: Float32Array, y: Float32Array, gap: number, box: Box): void {
  const columns = Math.ceil((box.right - box.left) / gap) + 3;
  const cells = new Map<number, number[]>();
  const cellOf = (node: number) =>
    Math.floor(((x[node] ?? 0) - box.left) / gap + 1) +
    columns * Math.floor(((y[node] ?? 0) - box.top) / gap + 1);
  for (let node = 0; node < x.length; node++) {
    const cell = cellOf(node);
    const own = cells.get(cell);
    if (own === undefined) cells.set(cell, [node]);
    else own.push(node);
  }
  for (const [cell, own] of cells) {
    for (const near of [cell, cell + 1, cell + columns - 1, cell + columns, cell + columns + 1]) {
      for (const a of own) {
        for (const b of cells.get(near) ?? []) {
          if (near === cell && b <= a) continue;
          apart(x, y, a, b, gap);
        }
      }
    }
  }
  for (let node = 0; node < x.length; node++) {
    x[node] = Math.min(box.right, Math.max(box.left, x[node] ?? 0));
    y[node] = Math.min(box.bottom, Math.max(box.top, y[node] ?? 0));
  }
}

function apart(x: Float32Array, y: Float32Array, a: number, b: number, gap: number): void {
  const dx = (x[b] ?? 0) - (x[a] ?? 0);
  const dy = (y[b] ?? 0) - (y[a] ?? 0);
  const distance = Math.hypot(dx, dy);
  if (distance >= gap) return;
  // Points in one place part along a line that their numbers choose, always the same.
  const [ux, uy] =
    distance > 1e-6 ? [dx / distance, dy / distance] : [Math.cos(a * 2.4), Math.sin(a * 2.4)];
  const by = (gap - distance) * 0.25;
  x[a] = (x[a] ?? 0) - ux * by;
  y[a] = (y[a] ?? 0) - uy * by;
  x[b] = (x[b] ?? 0) + ux * by;
  y[b] = (y[b] ?? 0) + uy * by;
}
