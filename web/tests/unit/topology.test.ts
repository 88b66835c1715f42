import { describe, expect, test } from "vitest";

import { readTopology } from "../../src/api/frames";
import {
  columnOf,
  neighbour,
  nodeAt,
  nodeOf,
  topologyOf,
  type Direction,
} from "../../src/model/topology";
import { MODELS, SMOLLM2 } from "./architectures";
import { bytes } from "./fixtures";

const DIRECTIONS: readonly Direction[] = ["up", "down", "left", "right"];

test("SmolLM2 has 302 nodes, in the order the service reports them", () => {
  const topology = topologyOf(SMOLLM2);
  const reported = readTopology(bytes("topology")).components;
  expect(topology.size).toBe(302);
  expect(topology.addresses).toEqual(reported.filter((name) => !name.endsWith(".attn")));
});

describe.each(Object.entries(MODELS))("%s", (_, architecture) => {
  const topology = topologyOf(architecture);

  test("arrow keys reach every component", () => {
    const reached = new Set([0]);
    const waiting = [0];
    for (let node = waiting.pop(); node !== undefined; node = waiting.pop()) {
      for (const direction of DIRECTIONS) {
        const next = neighbour(topology, node, direction);
        if (!reached.has(next)) waiting.push(next);
        reached.add(next);
      }
    }
    expect(reached.size).toBe(topology.size);
  });

  test("a node's layer and column lead back to it", () => {
    for (let node = 0; node < topology.size; node++) {
      expect(nodeAt(topology, topology.layers[node] ?? 0, columnOf(topology, node))).toBe(node);
    }
  });

  test("left undoes right, and up undoes down inside the layers", () => {
    for (let node = 1; node < topology.size - 1; node++) {
      const right = neighbour(topology, node, "right");
      if (right !== node) expect(neighbour(topology, right, "left")).toBe(node);
      const down = neighbour(topology, node, "down");
      if (down < topology.size - 1) expect(neighbour(topology, down, "up")).toBe(node);
    }
  });
});

test("folded and unfolded, an address means the same layer", () => {
  const heads = topologyOf(SMOLLM2);
  const folded = topologyOf(SMOLLM2, true);
  expect(folded.addresses[nodeOf(folded, "blocks.7.attn.head_4")]).toBe("blocks.7.attn");
  expect(heads.addresses[nodeOf(heads, "blocks.7.attn")]).toBe("blocks.7.attn.head_0");
  for (const address of ["embed", "blocks.0.mlp", "blocks.29.mlp", "unembed"]) {
    expect(folded.addresses[nodeOf(folded, address)]).toBe(address);
  }
  expect(nodeOf(heads, "blocks.30.mlp")).toBe(-1);
  expect(nodeOf(heads, "nonsense")).toBe(-1);
});

test("in a model of another shape the crosshair stands at the same relative depth", () => {
  const deep = topologyOf(MODELS["Mistral-7B"]);
  const flat = topologyOf(MODELS["GPT-2 small"]);
  const address = (from: string) => flat.addresses[nodeOf(flat, from, deep)];
  expect(address("embed")).toBe("embed");
  expect(address("blocks.0.attn.head_0")).toBe("blocks.0.attn.head_0");
  expect(address("blocks.31.attn.head_31")).toBe("blocks.11.attn.head_11");
  expect(address("blocks.31.mlp")).toBe("blocks.11.mlp");
  expect(address("blocks.16.mlp")).toBe("blocks.6.mlp");
});

test("arrows walk a folded model as they do an unfolded one", () => {
  const folded = topologyOf(SMOLLM2, true);
  const walk = (from: string, ...steps: Direction[]) =>
    folded.addresses[
      steps.reduce((node, step) => neighbour(folded, node, step), nodeOf(folded, from))
    ];
  expect(walk("blocks.3.mlp", "left")).toBe("blocks.3.attn");
  expect(walk("blocks.3.attn", "left")).toBe("blocks.3.attn");
  expect(walk("blocks.3.attn", "down")).toBe("blocks.4.attn");
  expect(walk("blocks.29.attn", "down")).toBe("unembed");
});
