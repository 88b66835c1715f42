import { describe, expect, test } from "vitest";

import { readTopology } from "../../src/api/frames";
import { LAYOUT_NAMES, layOut, radiiByParameters } from "../../src/model/layout";
import { topologyOf } from "../../src/model/topology";
import { MODELS, SMOLLM2 } from "./architectures";
import { bytes } from "./fixtures";

/** Axial viewports at 1280x720, 1920x1080, and at 1280x720 enlarged to 200 %. */
const VIEWPORTS = [
  { width: 742, height: 590 },
  { width: 1180, height: 950 },
  { width: 490, height: 316 },
];

const cases = Object.entries(MODELS).flatMap(([name, architecture]) =>
  LAYOUT_NAMES.flatMap((layout) =>
    VIEWPORTS.map((viewport) => ({
      name: `${name}, ${layout}, ${viewport.width}x${viewport.height}`,
      topology: topologyOf(architecture),
      layout,
      viewport,
    })),
  ),
);

describe.each(cases)("$name", ({ topology, layout, viewport }) => {
  const placed = layOut(layout, topology, viewport);

  test("every component is inside the viewport, whole", () => {
    const r = placed.maxRadius;
    for (let node = 0; node < topology.size; node++) {
      const [x = NaN, y = NaN] = [placed.x[node], placed.y[node]];
      expect(x - r).toBeGreaterThanOrEqual(0);
      expect(x + r).toBeLessThanOrEqual(viewport.width);
      expect(y - r).toBeGreaterThanOrEqual(0);
      expect(y + r).toBeLessThanOrEqual(viewport.height);
    }
  });

  test("no two components touch", () => {
    let least = Infinity;
    for (let a = 0; a < topology.size; a++) {
      for (let b = 0; b < a; b++) {
        const dx = (placed.x[a] ?? 0) - (placed.x[b] ?? 0);
        const dy = (placed.y[a] ?? 0) - (placed.y[b] ?? 0);
        least = Math.min(least, Math.hypot(dx, dy));
      }
    }
    expect(least).toBeGreaterThan(2 * placed.maxRadius);
  });

  test("layers run from top to bottom, heads from left to right", () => {
    for (let layer = 1; layer < topology.nLayers; layer++) {
      expect(placed.rows[layer] ?? 0).toBeGreaterThan(placed.rows[layer - 1] ?? 0);
    }
    for (let head = 1; head < topology.nHeads; head++) {
      expect(placed.x[1 + head] ?? 0).toBeGreaterThan(placed.x[head] ?? 0);
    }
    expect(placed.y[0] ?? 0).toBeLessThan(placed.rows[0] ?? 0);
  });
});

test("where rows are far enough apart, T1 radii run from 4 to 10 px with the parameter count", () => {
  const { parameters, components } = readTopology(bytes("topology"));
  const nodes = components.flatMap((name, row) => (name.endsWith(".attn") ? [] : [row]));
  const counts = Float64Array.from(nodes, (row) => parameters[row] ?? NaN);
  const radii = radiiByParameters(counts, { maxRadius: 10 });
  expect(Math.min(...radii)).toBeGreaterThanOrEqual(4);
  expect(radii[0]).toBe(10);
  const byCount = [...counts.keys()].sort((a, b) => (counts[a] ?? 0) - (counts[b] ?? 0));
  for (let i = 1; i < byCount.length; i++) {
    expect(radii[byCount[i] ?? 0]).toBeGreaterThanOrEqual(radii[byCount[i - 1] ?? 0] ?? 0);
  }
});

test("a crowded layout shrinks all T1 radii alike", () => {
  const counts = Float64Array.from([28e6, 1e5, 3e6, 576]);
  const roomy = radiiByParameters(counts, { maxRadius: 10 });
  const crowded = radiiByParameters(counts, { maxRadius: 3 });
  roomy.forEach((radius, node) => {
    expect((crowded[node] ?? 0) / radius).toBeCloseTo((crowded[0] ?? 0) / (roomy[0] ?? 1), 5);
  });
  expect(Math.max(...crowded.subarray(1, -1))).toBeLessThanOrEqual(3.0001);
});

test("a thousand components are placed within a frame", () => {
  const topology = topologyOf({ ...SMOLLM2, n_layers: 32, n_heads: 32, n_kv_heads: 8 });
  const began = performance.now();
  layOut("brain", topology, { width: 742, height: 590 });
  expect(performance.now() - began).toBeLessThan(50);
});
