import { describe, expect, test } from "vitest";

import { readTopology } from "../../src/api/frames";
import { columnOf, neighbour, nodeAt, topologyOf, type Direction } from "../../src/model/topology";
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
