/** Folding, regions and differences: what is computed from stored numbers, held against plain arithmetic. */
import { describe, expect, test } from "vitest";

import type { Manifest } from "../../src/api/schema";
import { moved } from "../../src/colour/window";
import { differenceOf, incomparable, type Side } from "../../src/model/difference";
import { field } from "../../src/model/field";
import { folded, foldingOf } from "../../src/model/fold";
import { statistics, valuesIn } from "../../src/model/region";
import { coronalOf } from "../../src/model/section";
import { bare, loadStructural, type Acquisition } from "../../src/model/series";
import { nodeAt, topologyOf } from "../../src/model/topology";
import { Volume, besides } from "../../src/model/volume";
import { Crosshair } from "../../src/state/crosshair.svelte";
import { Display } from "../../src/state/display.svelte";
import { Reading, type Scene } from "../../src/state/reading.svelte";
import type { AllSeries } from "../../src/state/study.svelte";
import { architecture } from "./architectures";
import { bytes, chance } from "./fixtures";

const TINY = topologyOf(architecture(2, 3));
const HEADS = [0, 1].flatMap((l) => [0, 1, 2].map((h) => `blocks.${l}.attn.head_${h}`));

function quantity(
  components: readonly string[],
  width: number,
  data: readonly number[],
  unit = "u",
) {
  return field({
    id: "activity",
    title: "Activity",
    unit,
    method: "",
    volume: new Volume(components, width, Float32Array.from(data)),
    map: "inferno",
  });
}

function side(
  components: readonly string[],
  width: number,
  data: readonly number[],
  unit = "u",
): Side {
  const own = quantity(components, width, data, unit);
  return {
    series: { ...bare("fMRI", {} as Acquisition), fields: [own] },
    field: own,
    topology: TINY,
  };
}

describe("folded heads", () => {
  const values = [1, -5, 2, 0.5, NaN, -0.25];
  const own = quantity(HEADS, 1, values);

  test("where parts add up, their layer is their sum", () => {
    const volume = folded(own.volume, "sum", 2, 3);
    expect(volume.at("blocks.0.attn", 0)).toBe(-2);
    expect(volume.at("blocks.1.attn", 0)).toBe(0.25);
  });

  test("where they do not, the strongest stands for its layer, sign and all", () => {
    expect(foldingOf(own)).toBe("strongest");
    const volume = folded(own.volume, "strongest", 2, 3);
    expect(volume.at("blocks.0.attn", 0)).toBe(-5);
    expect(volume.at("blocks.1.attn", 0)).toBe(0.5);
    expect(volume.at("blocks.0.attn.head_2", 0)).toBe(2);
  });

  test("a layer that was measured itself keeps its own number", () => {
    const measured = quantity([...HEADS, "blocks.0.attn"], 1, [...values, 9]);
    expect(foldingOf(measured)).toBe("own");
    expect(folded(measured.volume, "own", 2, 3).at("blocks.0.attn", 0)).toBe(9);
  });

  test("where parts add up, what belongs to no head is one of them", () => {
    const counted = { ...quantity([...HEADS, "blocks.0.attn"], 1, [...values, 9]), adds: true };
    expect(foldingOf(counted)).toBe("sum");
    const volume = folded(counted.volume, "sum", 2, 3);
    expect(volume.at("blocks.0.attn", 0)).toBe(7);
    expect(volume.at("blocks.1.attn", 0)).toBe(0.25);
    const side = { series: bare("T1", {} as Acquisition), field: counted, topology: TINY };
    const [difference] = differenceOf(side, side)?.fields ?? [];
    expect(difference?.adds).toBe(true);
  });

  test("a layer's attention has all its parameters", async () => {
    const manifest = { request: {}, numerics: {}, created_at: 0 } as unknown as Manifest;
    const read = (name: string) => Promise.resolve(bytes(name));
    const [parameters] = (await loadStructural(manifest, "job", read)).fields;
    if (parameters === undefined) throw new Error("T1 has no field");
    expect(parameters.volume.at("blocks.0.attn", 0)).toBe(221_760);
    const volume = folded(parameters.volume, foldingOf(parameters), 30, 9);
    expect(volume.at("blocks.0.attn", 0)).toBe(885_312);
  });

  test("nothing measured is still nothing", () => {
    const none = folded(
      quantity(
        HEADS,
        1,
        values.map(() => NaN),
      ).volume,
      "sum",
      2,
      3,
    );
    expect(none.at("blocks.0.attn", 0)).toBeNaN();
  });
});

describe("a region", () => {
  test("has the mean and spread that the textbook has", () => {
    const random = chance(5);
    const values = Array.from({ length: 400 }, () => random() * 1e-3 + 1e4);
    const found = statistics(values);
    const mean = values.reduce((a, b) => a + b) / 400;
    const sd = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / 400);
    expect(found.n).toBe(400);
    expect(found.mean).toBeCloseTo(mean, 9);
    expect(found.sd).toBeCloseTo(sd, 9);
    expect(found.min).toBe(Math.min(...values));
    expect(found.max).toBe(Math.max(...values));
  });

  test("counts what was not measured apart", () => {
    expect(statistics([1, NaN, 3])).toMatchObject({ n: 2, missing: 1, mean: 2, sd: 1 });
    expect(statistics([NaN]).mean).toBeNaN();
  });

  test("reaches over components and tokens, or follows the token", () => {
    const { volume } = quantity(HEADS.slice(0, 2), 3, [1, 2, 3, 4, 5, 6]);
    const components = HEADS.slice(0, 2);
    expect([...valuesIn({ components, columns: [1, 2] }, volume, 0)]).toEqual([2, 3, 5, 6]);
    expect([...valuesIn({ components, columns: null }, volume, 0)]).toEqual([1, 4]);
  });
});

describe("a window", () => {
  const reading = (signed: boolean) => {
    const own = { ...quantity(["embed"], 1, [-3]), signed };
    const series = { ...bare("DTI", {} as Acquisition), fields: [own] };
    const all = { DTI: { status: "ready", series } } as unknown as AllSeries;
    const display = new Display();
    display.sequence = "DTI";
    const scene = { model: null, topology: TINY, series: all };
    return new Reading(scene, display, new Crosshair());
  };

  test("lies about 0 where values have a direction, however it was moved", () => {
    const [signed, plain] = [reading(true), reading(false)];
    expect(signed.window).toEqual({ level: 0, width: 6 });
    for (const one of [signed, plain]) one.change({ window: moved({ level: 0, width: 4 }, 0.5) });
    expect(signed.window).toEqual({ level: 0, width: 4 });
    expect(plain.window).toEqual({ level: 2, width: 4 });
  });
});

describe("the difference of two scans", () => {
  test("is exact in float64, and not a number wherever one has none", () => {
    const a = side(["embed", "blocks.0.mlp", "unembed"], 1, [0.1, 3e8, 1]);
    const b = side(["embed", "blocks.0.mlp"], 1, [0.3, 1]);
    const volume = differenceOf(a, b)?.fields[0]?.volume;
    expect(volume?.at("embed", 0)).toBe(Math.fround(0.1) - Math.fround(0.3));
    expect(volume?.at("blocks.0.mlp", 0)).toBe(3e8 - 1);
    expect(volume?.at("unembed", 0)).toBeNaN();
  });

  test("a scan less itself is 0 everywhere", () => {
    const a = side(
      HEADS,
      2,
      Array.from({ length: 12 }, (_, i) => i / 7),
    );
    const { data } = differenceOf(a, a)?.fields[0]?.volume ?? { data: [NaN] };
    expect([...data].every((value) => value === 0)).toBe(true);
  });

  test("prompts of different lengths meet at their ends", () => {
    expect(besides(9, 10, 12)).toBe(11);
    expect(besides(0, 10, 12)).toBe(2);
    expect(besides(0, 12, 10)).toBe(-1);
    expect(besides(0, 1, 1)).toBe(0);
    const long = side(["embed"], 3, [1, 2, 4]);
    const short = side(["embed"], 2, [1, 1]);
    expect([...(differenceOf(long, short)?.fields[0]?.volume.data ?? [])]).toEqual([NaN, 1, 3]);
  });

  test("other units, other quantities and other shapes are refused, and say so", () => {
    const a = side(["embed"], 1, [1]);
    expect(incomparable(a, side(["embed"], 1, [1], "nats"))).toMatch(/units/);
    expect(incomparable(a, { ...a, topology: topologyOf(architecture(2, 4)) })).toMatch(/shape/);
    // A prior by direct attribution has no effect, and what helps the answer has the other sign there.
    const of = (id: string): Side => ({ ...a, field: { ...quantity(["embed"], 1, [1]), id } });
    expect(incomparable(of("effect"), of("direct"))).toMatch(/quantities/);
    expect(incomparable(of("change"), of("activity"))).toMatch(/quantities/);
    expect(incomparable(of("after"), of("before"))).toBeNull();
    expect(incomparable(of("after"), of("activity"))).toBeNull();
    expect(incomparable(a, { ...a, field: null })).toMatch(/prior/);
    expect(differenceOf(a, { ...a, topology: topologyOf(architecture(3, 3)) })).toBeNull();
  });
});

describe("the coronal plane", () => {
  test("is one layer's rows of the volume, in the picture's order", () => {
    const components = [...HEADS, "blocks.0.mlp", "blocks.1.mlp"];
    const own = quantity(
      components,
      2,
      Array.from({ length: 16 }, (_, i) => i),
    );
    const token = (position: number) => ({ position, id: 0, text: "a", sink: false });
    const plane = coronalOf(TINY, own, [token(0), token(1)], 1);
    expect(plane.names).toEqual(["H0", "H1", "MLP", "H2"]);
    expect(plane.nodes).toEqual([0, 1, 2, 3].map((column) => nodeAt(TINY, 1, column)));
    plane.sources.forEach((source, row) => {
      for (const column of [0, 1]) {
        expect(plane.values[row * 2 + column]).toBe(own.volume.at(source, column));
      }
    });
  });

  test("attention that was taken as a whole is one row", () => {
    const whole = quantity(["blocks.0.attn", "blocks.0.mlp"], 1, [4, 5]);
    const plane = coronalOf(TINY, whole, [], 0);
    expect(plane.names).toEqual(["Attn", "MLP"]);
    expect([...plane.values]).toEqual([4, 5]);
    expect(plane.tokens).toBe(false);
  });
});

describe("a picture of a larger model beside a smaller one", () => {
  const scene = (layers: number, heads: number): Scene => ({
    model: null,
    topology: topologyOf(architecture(layers, heads)),
    series: {} as AllSeries,
  });

  test("reads what was pointed at in it, and after another model is hung there the same depth of that", () => {
    let other = scene(30, 9);
    const [display, crosshair] = [new Display(), new Crosshair()];
    const current = new Reading(scene(2, 4), display, crosshair);
    const changing: Scene = {
      get model() {
        return other.model;
      },
      get topology() {
        return other.topology;
      },
      series: other.series,
    };
    const prior = new Reading(changing, display, crosshair, { leader: current });
    const read = () => prior.topology?.addresses[prior.locked];
    const at = other.topology?.indexOf.get("blocks.10.mlp") ?? -1;
    crosshair.lock(prior.addressOf(at) ?? "");
    expect([crosshair.locked, read()]).toEqual(["blocks.0.mlp", "blocks.10.mlp"]);
    other = scene(12, 12);
    expect(read()).toBe("blocks.0.mlp");
  });
});
