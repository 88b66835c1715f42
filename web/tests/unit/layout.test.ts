import { describe, expect, test } from "vitest";

import { readTopology } from "../../src/api/frames";
import type { Architecture } from "../../src/api/schema";
import { LAYOUT_NAMES, layOut, radiiByParameters } from "../../src/model/layout";
import {
  WHOLE,
  clampZoom,
  enlarged,
  following,
  inSight,
  zoomedAbout,
  type Zoom,
} from "../../src/model/layout/zoom";
import { headsLeft, nodeAt, topologyOf } from "../../src/model/topology";
import { MODELS, SMOLLM2 } from "./architectures";
import { bytes } from "./fixtures";

/** Axial viewports at 1280x720, 1920x1080, at 1280x720 enlarged to 200 %, and one of five at 1280x720. */
const VIEWPORTS = [
  { width: 660, height: 590 },
  { width: 1180, height: 950 },
  { width: 490, height: 316 },
  { width: 300, height: 290 },
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

  test.runIf(placed.level)("layers run from top to bottom, heads from left to right", () => {
    for (let layer = 1; layer < topology.nLayers; layer++) {
      expect(placed.rows[layer] ?? 0).toBeGreaterThan(placed.rows[layer - 1] ?? 0);
    }
    for (let head = 1; head < topology.nHeads; head++) {
      expect(placed.x[1 + head] ?? 0).toBeGreaterThan(placed.x[head] ?? 0);
    }
    expect(placed.y[0] ?? 0).toBeLessThan(placed.rows[0] ?? 0);
  });
});

describe.each(Object.entries(MODELS))("%s", (_, architecture) => {
  const topology = topologyOf(architecture);
  const [viewport] = VIEWPORTS;
  if (viewport === undefined) throw new Error("no viewport");

  test("radial: each layer is a ring, farther out than the one before", () => {
    const { x, y, midline } = layOut("radial", topology, viewport);
    const radius = (node: number) =>
      Math.hypot((x[node] ?? NaN) - midline.x, (y[node] ?? NaN) - midline.top);
    let before = 0;
    for (let layer = 0; layer < topology.nLayers; layer++) {
      const ring = radius(nodeAt(topology, layer, 0));
      expect(ring).toBeGreaterThan(before + 1);
      for (let column = 1; column <= topology.nHeads; column++) {
        expect(radius(nodeAt(topology, layer, column))).toBeCloseTo(ring, 2);
      }
      before = ring;
    }
    expect(radius(topology.size - 1)).toBeGreaterThan(before);
  });

  test("network: what is wired together stands nearer than what is not", () => {
    const { x, y } = layOut("network", topology, viewport);
    const apart = (a: number, b: number) =>
      Math.hypot((x[a] ?? NaN) - (x[b] ?? NaN), (y[a] ?? NaN) - (y[b] ?? NaN));
    const hub = (layer: number) => nodeAt(topology, layer, headsLeft(topology.nHeads));
    let [own, others] = [0, 0];
    for (let layer = 0; layer < topology.nLayers; layer++) {
      const head = nodeAt(topology, layer, 0);
      own += apart(head, hub(layer));
      for (let other = 0; other < topology.nLayers; other++) {
        others += apart(head, hub(other)) / topology.nLayers;
      }
    }
    expect(own).toBeLessThan(others);
  });

  test("network: a model always looks the same", () => {
    expect(layOut("network", topology, viewport)).toEqual(layOut("network", topology, viewport));
  });

  test("folded, a layer's attention stands for its heads and is inside the picture", () => {
    const folded = topologyOf(architecture, true);
    expect(folded.size).toBe(2 + 2 * architecture.n_layers);
    for (const name of LAYOUT_NAMES) {
      const { x, y, maxRadius } = layOut(name, folded, viewport);
      for (let node = 0; node < folded.size; node++) {
        expect(x[node]).toBeGreaterThanOrEqual(maxRadius);
        expect(x[node]).toBeLessThanOrEqual(viewport.width - maxRadius);
        expect(y[node]).toBeGreaterThanOrEqual(maxRadius);
        expect(y[node]).toBeLessThanOrEqual(viewport.height - maxRadius);
      }
    }
  });
});

test.each(LAYOUT_NAMES)("%s: 302 and 1,058 components are marks one can point at", (name) => {
  const [viewport] = VIEWPORTS;
  if (viewport === undefined) throw new Error("no viewport");
  const radius = (architecture: Architecture) =>
    layOut(name, topologyOf(architecture), viewport).maxRadius;
  expect(radius(SMOLLM2)).toBeGreaterThan(3.5);
  expect(radius(MODELS["Mistral-7B"])).toBeGreaterThan(1.6);
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

describe("zoom", () => {
  const layout = layOut("brain", topologyOf(SMOLLM2), { width: 700, height: 600 });

  test("what is under the pointer stays there", () => {
    let zoom: Zoom = WHOLE;
    const at = (z: Zoom) => enlarged(layout, z).x[77] ?? NaN;
    const height = (z: Zoom) => enlarged(layout, z).y[77] ?? NaN;
    const [x, y] = [at(WHOLE), height(WHOLE)];
    for (let step = 0; step < 6; step++) zoom = zoomedAbout(zoom, 1.3, x / 700, y / 600);
    expect(zoom.scale).toBeCloseTo(1.3 ** 6, 5);
    expect(at(zoom)).toBeCloseTo(x, 2);
    expect(height(zoom)).toBeCloseTo(y, 2);
  });

  test("nothing beyond the picture comes into sight, however it is moved", () => {
    for (const [x, y] of [
      [-3, 9],
      [0.5, 2],
      [1, 0],
    ] as const) {
      const { left, top, size } = inSight(clampZoom({ scale: 3, x, y }));
      expect(left).toBeGreaterThanOrEqual(-1e-9);
      expect(top).toBeGreaterThanOrEqual(-1e-9);
      expect(left + size).toBeLessThanOrEqual(1 + 1e-9);
      expect(top + size).toBeLessThanOrEqual(1 + 1e-9);
    }
  });

  test("as far out as it goes, it is the layout itself", () => {
    const closer = zoomedAbout(WHOLE, 4, 0.2, 0.9);
    expect(enlarged(layout, zoomedAbout(closer, 0.1, 0.7, 0.1))).toBe(layout);
  });

  test("the view follows the crosshair just as far as it must", () => {
    const zoom = clampZoom({ scale: 4, x: 0.3, y: 0.3 });
    expect(following(zoom, 0.3, 0.32)).toEqual(zoom);
    const { left, size } = inSight(following(zoom, 0.9, 0.3));
    expect(0.9).toBeGreaterThan(left);
    expect(0.9).toBeLessThan(left + size);
  });
});
