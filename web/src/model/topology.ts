/**
 * The places every picture shows, in reading order (embed, each layer's heads and MLP, unembed), as
 * parallel arrays. A node is an index into them. Made from the architecture alone; knows no pixels.
 */
import type { Architecture } from "../api/schema";

export type NodeKind = "embed" | "head" | "mlp" | "unembed";

export interface Topology {
  readonly size: number;
  readonly nLayers: number;
  readonly nHeads: number;
  readonly nKvHeads: number;
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

export function topologyOf(architecture: Architecture): Topology {
  const { n_layers: nLayers, n_heads: nHeads } = architecture;
  const addresses: string[] = ["embed"];
  const labels: string[] = ["Embed"];
  const kinds: NodeKind[] = ["embed"];
  const layers: number[] = [-1];
  const heads: number[] = [-1];
  for (let layer = 0; layer < nLayers; layer++) {
    for (let head = 0; head < nHeads; head++) {
      addresses.push(`blocks.${layer}.attn.head_${head}`);
      labels.push(`L${layer}H${head}`);
      kinds.push("head");
      layers.push(layer);
      heads.push(head);
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
    nKvHeads: architecture.n_kv_heads,
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
  const head = topology.heads[node] ?? -1;
  if (head < 0) return left;
  return head < left ? head : head + 1;
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
