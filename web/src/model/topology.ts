/**
 * The places every picture shows, in reading order (embed, each layer's heads and MLP, unembed), as
 * parallel arrays. A node is an index into them. Made from the architecture alone; knows no pixels.
 */
import type { Architecture } from "../api/schema";

export type NodeKind = "embed" | "head" | "attn" | "mlp" | "unembed";

export interface Topology {
  readonly size: number;
  readonly nLayers: number;
  /** Nodes beside the MLP in each layer: its heads, or 1 where they are folded into the layer's attention. */
  readonly nHeads: number;
  readonly nKvHeads: number;
  /** Whether a layer's attention stands for its heads. */
  readonly folded: boolean;
  /** Heads each layer has, folded or not. */
  readonly headsInAll: number;
  /** Attention and MLP read the same residual. */
  readonly parallel: boolean;
  readonly addresses: readonly string[];
  /** What a person calls each: `L3H7`, `L3 MLP`. */
  readonly labels: readonly string[];
  readonly kinds: readonly NodeKind[];
  /** Layer of each node; -1 for embed, `nLayers` for unembed. */
  readonly layers: Int16Array;
  /** Head number; -1 for every other kind. */
  readonly heads: Int16Array;
  readonly indexOf: ReadonlyMap<string, number>;
}

export type Direction = "up" | "down" | "left" | "right";

export function topologyOf(architecture: Architecture, folded = false): Topology {
  const { n_layers: nLayers, n_heads: headsInAll } = architecture;
  const nHeads = folded ? 1 : headsInAll;
  const addresses: string[] = ["embed"];
  const labels: string[] = ["Embed"];
  const kinds: NodeKind[] = ["embed"];
  const layers: number[] = [-1];
  const heads: number[] = [-1];
  for (let layer = 0; layer < nLayers; layer++) {
    for (let head = 0; head < nHeads; head++) {
      addresses.push(folded ? `blocks.${layer}.attn` : `blocks.${layer}.attn.head_${head}`);
      labels.push(folded ? `L${layer} Attn` : `L${layer}H${head}`);
      kinds.push(folded ? "attn" : "head");
      layers.push(layer);
      heads.push(folded ? -1 : head);
    }
    addresses.push(`blocks.${layer}.mlp`);
    labels.push(`L${layer} MLP`);
    kinds.push("mlp");
    layers.push(layer);
    heads.push(-1);
  }
  addresses.push("unembed");
  labels.push("Unembed");
  kinds.push("unembed");
  layers.push(nLayers);
  heads.push(-1);
  return {
    size: addresses.length,
    nLayers,
    nHeads,
    nKvHeads: folded ? 1 : architecture.n_kv_heads,
    folded,
    headsInAll,
    parallel: architecture.parallel_blocks,
    addresses,
    labels,
    kinds,
    layers: Int16Array.from(layers),
    heads: Int16Array.from(heads),
    indexOf: new Map(addresses.map((address, node) => [address, node])),
  };
}

/** Heads drawn left of the midline; the MLP stands on it, the other heads right of it. */
export function headsLeft(nHeads: number): number {
  return Math.ceil(nHeads / 2);
}

/** The node at a column of a layer, columns counted in picture order (left heads, MLP, right heads). */
export function nodeAt(topology: Topology, layer: number, column: number): number {
  if (layer < 0) return 0;
  if (layer >= topology.nLayers) return topology.size - 1;
  const first = 1 + layer * (topology.nHeads + 1);
  const left = headsLeft(topology.nHeads);
  if (column < left) return first + column;
  return column === left ? first + topology.nHeads : first + column - 1;
}

/** The column of a node in its row; embed and unembed stand on the midline. */
export function columnOf(topology: Topology, node: number): number {
  const left = headsLeft(topology.nHeads);
  if (topology.kinds[node] === "attn") return 0;
  const head = topology.heads[node] ?? -1;
  if (head < 0) return left;
  return head < left ? head : head + 1;
}

/**
 * The node that an address means here; -1 for none. Folded, a head is its layer's attention; unfolded,
 * that attention is its first head. An address of another model's topology means the place at the same
 * relative depth and the same share of the way along the heads.
 */
export function nodeOf(topology: Topology, address: string, of: Topology = topology): number {
  const alike = of.nLayers === topology.nLayers && of.headsInAll === topology.headsInAll;
  const own = alike ? topology.indexOf.get(address) : undefined;
  if (own !== undefined) return own;
  if (address === "embed") return 0;
  if (address === "unembed") return topology.size - 1;
  const place = /^blocks\.(\d+)\.(attn|mlp)(?:\.head_(\d+))?/.exec(address);
  if (place === null) return -1;
  const layer = alike ? Number(place[1]) : rescaled(Number(place[1]), of.nLayers, topology.nLayers);
  if (layer >= topology.nLayers) return -1;
  const first = 1 + layer * (topology.nHeads + 1);
  if (place[2] === "mlp") return first + topology.nHeads;
  const head = Number(place[3] ?? 0);
  if (topology.folded) return first;
  return (
    first +
    (alike ? Math.min(head, topology.nHeads - 1) : rescaled(head, of.headsInAll, topology.nHeads))
  );
}

/** The place among `to` that stands where `at` does among `from`. */
function rescaled(at: number, from: number, to: number): number {
  return from < 2 ? 0 : Math.min(to - 1, Math.round((at / (from - 1)) * (to - 1)));
}

/** The next node in a direction; the same one at the edge. */
export function neighbour(topology: Topology, node: number, direction: Direction): number {
  const layer = topology.layers[node] ?? -1;
  const column = columnOf(topology, node);
  switch (direction) {
    case "up":
      return layer < 0 ? node : nodeAt(topology, layer - 1, column);
    case "down":
      return layer >= topology.nLayers ? node : nodeAt(topology, layer + 1, column);
    case "left":
    case "right": {
      if (layer < 0 || layer >= topology.nLayers) return node;
      const next = column + (direction === "left" ? -1 : 1);
      return next < 0 || next > topology.nHeads ? node : nodeAt(topology, layer, next);
    }
  }
}

/** Addresses of one column through the layers: a head's, `mlp`, `attn` or `resid_post`. */
export function columnAddresses(
  topology: Topology,
  column: "attn" | "mlp" | "resid_post" | number,
): readonly string[] {
  const place = typeof column === "number" ? `attn.head_${column}` : column;
  return Array.from({ length: topology.nLayers }, (_, layer) => `blocks.${layer}.${place}`);
}
