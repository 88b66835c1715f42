import { expect, test } from "vitest";

import { readActivations } from "../../src/api/frames";
import type { ActivationFrame, JobView, LayerFrame } from "../../src/api/schema";
import { Growing } from "../../src/model/modes/activations";
import type { Series } from "../../src/model/series";
import { topologyOf } from "../../src/model/topology";
import { Volume, ranks } from "../../src/model/volume";
import { SMOLLM2 } from "./architectures";
import { bytes, json } from "./fixtures";

const frames = json("frames") as { texts: string[]; values: Record<string, number[]> };
const topology = topologyOf(SMOLLM2);

function shownVolume(series: Series): Volume {
  const [shown] = series.fields;
  if (shown === undefined) throw new Error("the series has nothing to show");
  return shown.volume;
}

const job: JobView = {
  id: "01930000-0000-7000-8000-000000000001",
  kind: "scan",
  state: "running",
  model: "smollm2",
  revision: "ab",
  request: { scan_mode: "fMRI", prompt: "x" },
  cached: false,
  attempt: 1,
  created_at: "2026-11-23T14:00:00Z",
  started_at: null,
  finished_at: null,
  problem: null,
  links: {},
};

function value(component: string, token: number): number {
  return frames.values[component]?.[token] ?? NaN;
}

function heads(layer: number, token: number): number[] {
  return Array.from({ length: 9 }, (_, h) => value(`blocks.${layer}.attn.head_${h}`, token));
}

function tokenFrame(token: number): ActivationFrame {
  return {
    type: "activation_frame",
    token_idx: token,
    token: frames.texts[token] ?? "",
    unit: "L2 norm",
    layers: [
      { layer_id: "embed", type: "embedding", activations: [value("embed", token)] },
      ...Array.from({ length: 30 }, (_, layer) => [
        { layer_id: `blocks.${layer}.attn`, type: "attention", activations: heads(layer, token) },
        {
          layer_id: `blocks.${layer}.mlp`,
          type: "mlp",
          activations: [value(`blocks.${layer}.mlp`, token)],
        },
      ]).flat(),
    ],
  };
}

test("equal values share a rank, and what is not measured has none", () => {
  expect([...ranks(Float64Array.of(3, NaN, 7, 3, 1))]).toEqual([2, 0, 1, 2, 4]);
});

test("a volume refuses data of another size", () => {
  expect(() => new Volume(["embed"], 3, new Float32Array(2))).toThrow(RangeError);
});

test("what a volume does not hold reads as not measured, never as zero", () => {
  const volume = new Volume(["embed"], 2, Float32Array.of(1, 2));
  expect(volume.at("embed", 1)).toBe(2);
  expect(volume.at("embed", 2)).toBeNaN();
  expect(volume.at("blocks.0.mlp", 0)).toBeNaN();
  expect(volume.profile("blocks.0.mlp")).toBeNull();
});

test("a scan put together from its frames equals the stored table", () => {
  const growing = new Growing(job, topology.addresses, frames.texts);
  frames.texts.forEach((_, token) => growing.take(tokenFrame(token)));
  const stored = readActivations(bytes("activations"));
  const table = new Volume(stored.components, stored.width, stored.values);
  for (const component of topology.addresses.slice(0, -1)) {
    for (let token = 0; token < frames.texts.length; token++) {
      expect(shownVolume(growing.series).at(component, token)).toBe(table.at(component, token));
    }
  }
  expect(growing.series.fields[0]?.unit).toBe("L2 norm");
});

test("a layer's frame fills that layer alone, and readers see a new volume", () => {
  const growing = new Growing(job, topology.addresses, frames.texts);
  const before = growing.series;
  const frame: LayerFrame = {
    type: "layer_frame",
    layer: 4,
    token_idx: 9,
    heads: heads(4, 9),
    mlp: value("blocks.4.mlp", 9),
    attn: null,
    resid_post: null,
    unit: "L2 norm",
  };
  growing.take(frame);
  expect(growing.series).not.toBe(before);
  expect(shownVolume(growing.series)).not.toBe(shownVolume(before));
  expect(shownVolume(growing.series).at("blocks.4.mlp", 9)).toBe(value("blocks.4.mlp", 9));
  expect(shownVolume(growing.series).at("blocks.5.mlp", 9)).toBeNaN();
  expect(growing.layer).toBe(4);
});

test("events that bring no numbers leave the scan as it was", () => {
  const growing = new Growing(job, topology.addresses, frames.texts);
  const before = growing.series;
  expect(growing.take({ type: "progress", stage: "forward", done: 1, total: 30 })).toBe(false);
  expect(growing.series).toBe(before);
});

test("a frame for a component or token the prompt does not have is left out", () => {
  const growing = new Growing(job, topology.addresses, ["one"]);
  expect(() => growing.take(tokenFrame(5))).not.toThrow();
  expect(shownVolume(growing.series).at("embed", 0)).toBeNaN();
});
