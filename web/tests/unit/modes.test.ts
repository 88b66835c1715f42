import { expect, test } from "vitest";

import type { EffectsFrame, JobView, Manifest } from "../../src/api/schema";
import { field, source } from "../../src/model/field";
import { layOut } from "../../src/model/layout";
import { load as loadAnomalies } from "../../src/model/modes/anomalies";
import { GrowingEffects, load as loadCircuits } from "../../src/model/modes/circuits";
import { difference, likeliest, load as loadStimulation } from "../../src/model/modes/stimulation";
import { load as loadTracing } from "../../src/model/modes/tracing";
import { load as loadWeights, outlying } from "../../src/model/modes/weights";
import { asToken, askedOfCircuit, NO_QUESTION } from "../../src/model/question";
import { sectionOf } from "../../src/model/section";
import { countable, injected, named, numbers, positions } from "../../src/model/operations";
import { bare, type Acquisition, type Loader, type Series } from "../../src/model/series";
import { read, written, type Stimulus } from "../../src/model/stimulus";
import { columnOf, topologyOf } from "../../src/model/topology";
import { Volume } from "../../src/model/volume";
import { Crosshair } from "../../src/state/crosshair.svelte";
import { Display } from "../../src/state/display.svelte";
import { Reading } from "../../src/state/reading.svelte";
import type { AllSeries } from "../../src/state/study.svelte";
import { directionOf, shareOf, tractsOf } from "../../src/render/tracts";
import { SMOLLM2 } from "./architectures";
import { bytes, json } from "./fixtures";

type Rows = Readonly<Record<string, Readonly<Record<string, readonly unknown[]>>>>;

const topology = topologyOf(SMOLLM2);

/** The first rows of each table as pyarrow reads them; JSON has no NaN, so it stands there as text. */
function oracle(mode: string): Rows {
  const spelled = JSON.stringify(json(`${mode}/pyarrow`));
  return JSON.parse(spelled, (_, value: unknown) => (value === "NaN" ? NaN : value)) as Rows;
}

/** A scan's stored tables, as the service's manifest names them. */
function stored(mode: string, load: Loader, without = ""): Promise<Series> {
  const manifest = {
    model: "smollm2",
    revision: "ab",
    request: { prompt: "The Eiffel Tower is located in the city of", perturbations: [] },
    numerics: { dtype: "float32", device: "cpu", attention: "eager" },
    created_at: "2026-11-23T14:32:05Z",
    tables: Object.keys(oracle(mode)).flatMap((name) => (name === without ? [] : { name })),
  } as unknown as Manifest;
  return load(manifest, "job", (name) => Promise.resolve(bytes(`${mode}/${name}`)));
}

function fieldOf(series: Series, id: string) {
  const found = series.fields.find((field) => field.id === id);
  if (found === undefined) throw new Error(`there is no field ${id}`);
  return found;
}

/** What a column holds in the first rows, as pyarrow reads it. */
function column(rows: Rows, table: string, name: string): readonly unknown[] {
  return rows[table]?.[name] ?? [];
}

test("T2 shows the stored weights' numbers, bit for bit", async () => {
  const series = await stored("T2", loadWeights);
  const rows = oracle("T2");
  const components = column(rows, "weights", "component") as string[];
  for (const [id, name] of [
    ["rms", "rms"],
    ["outliers", "outlier_share"],
    ["largest", "max_abs"],
  ] as const) {
    components.forEach((component, row) => {
      const shown = fieldOf(series, id).volume.at(component, 0);
      expect(shown).toBe(column(rows, "weights", name)[row]);
    });
  }
});

test("T2 marks the few components whose outliers exceed the median component's by far", async () => {
  const marks = fieldOf(await stored("T2", loadWeights), "rms").marks;
  const marked = topology.addresses.filter((address) => marks?.at(address, 0) === 1);
  expect(marked.length).toBeGreaterThan(0);
  expect(marked.length).toBeLessThan(topology.size / 10);
  expect([...outlying(Float32Array.of(1, 1, 1, 5.5, NaN))]).toEqual([0, 0, 0, 1, 0]);
});

test("a tensor's histogram counts every weight once, and its outliers come farthest first", async () => {
  const { weights } = await stored("T2", loadWeights);
  const tensor = weights?.tensors.find(({ role }) => role === "W_Q");
  const { histogram, outliers } = (await weights?.distribution(tensor?.name ?? "")) ?? {
    histogram: null,
    outliers: [],
  };
  const counted = histogram?.counts.reduce((sum, count) => sum + count, 0);
  expect(counted).toBe((tensor?.shape ?? []).reduce((product, size) => product * size, 1));
  const sizes = outliers.map(({ z }) => Math.abs(z));
  expect(sizes.length).toBeGreaterThan(0);
  expect(sizes).toEqual([...sizes].sort((a, b) => b - a));
});

test("a head has a QK and an OV circuit, singular values largest first", async () => {
  const { weights } = await stored("T2", loadWeights);
  const circuits = weights?.circuits.get("blocks.0.attn.head_0") ?? [];
  expect(circuits.map(({ circuit }) => circuit)).toEqual(["QK", "OV"]);
  for (const { singular } of circuits) {
    expect([...singular]).toEqual([...singular].sort((a, b) => b - a));
  }
});

test("DTI shows the stored effects, and says which were measured", async () => {
  const series = await stored("DTI", loadCircuits);
  const rows = oracle("DTI");
  (column(rows, "effects", "component") as string[]).forEach((component, row) => {
    expect(fieldOf(series, "effect").volume.at(component, 0)).toBe(
      column(rows, "effects", "effect")[row],
    );
    expect(series.circuit?.exact.has(component)).toBe(column(rows, "effects", "exact")[row]);
  });
  expect(series.circuit?.metric?.answer).toBe(" Paris");
});

test("effects put together from their frames: estimates, then measurements in their place", async () => {
  const frames = json("DTI/effects_frames") as EffectsFrame[];
  const job = { id: "j", model: "m", revision: "r", request: {} } as JobView;
  const growing = new GrowingEffects(job, topology.addresses);
  const series = await stored("DTI", loadCircuits);
  expect(frames.map(({ exact }) => exact)).toEqual([false, true]);
  for (const frame of frames) {
    expect(growing.take(frame)).toBe(true);
    frame.components.forEach((component, index) => {
      expect(fieldOf(growing.series, "effect").volume.at(component, 0)).toBe(
        Math.fround(frame.effects[index] ?? NaN),
      );
    });
  }
  for (const component of topology.addresses.slice(0, -1)) {
    const shown = fieldOf(growing.series, "effect").volume.at(component, 0);
    expect(shown, component).toBe(fieldOf(series, "effect").volume.at(component, 0));
  }
  expect(growing.series.circuit?.exact).toEqual(series.circuit?.exact);
});

test("tracts join the nodes of their path, thicker where it is stronger, on top of the weaker", async () => {
  const { circuit } = await stored("DTI", loadCircuits);
  const layout = layOut("brain", topology, { width: 740, height: 590 });
  const paths = circuit?.paths ?? [];
  const tracts = tractsOf(paths, 40, topology, layout, -1);
  expect(tracts).toHaveLength(40);
  expect(tracts.at(-1)?.path).toBe(paths[0]);
  tracts.forEach(({ curve, path, width, helps }, index) => {
    const [from = -1, to = -1] = [path.source, path.target].map((at) => topology.indexOf.get(at));
    expect(curve.slice(0, 2)).toEqual([layout.x[from], layout.y[from]]);
    expect(curve.slice(4)).toEqual([layout.x[to], layout.y[to]]);
    expect(width).toBeGreaterThanOrEqual(tracts[index - 1]?.width ?? 0);
    expect(helps).toBe(path.strength < 0);
  });
});

test("what touches the chosen component is lit, the rest dimmed", async () => {
  const { circuit } = await stored("DTI", loadCircuits);
  const layout = layOut("brain", topology, { width: 740, height: 590 });
  const lit = "blocks.0.mlp";
  const node = topology.indexOf.get(lit) ?? -1;
  for (const { path, opacity } of tractsOf(circuit?.paths ?? [], 300, topology, layout, node)) {
    const touches = path.source === lit || path.target === lit;
    expect(opacity > 0.28).toBe(touches);
  }
});

test("where heads are folded, the paths of a layer's heads are lit with it", async () => {
  const { circuit } = await stored("DTI", loadCircuits);
  const folded = topologyOf(SMOLLM2, true);
  const layout = layOut("brain", folded, { width: 740, height: 590 });
  const head = circuit?.paths.find(({ source }) => source.includes(".head_"))?.source ?? "";
  const layer = head.replace(/head_\d+$/, "");
  const node = folded.indexOf.get(layer.slice(0, -1)) ?? -1;
  expect(node).toBeGreaterThan(0);
  for (const { path, opacity } of tractsOf(circuit?.paths ?? [], 300, folded, layout, node)) {
    const touches = path.source.startsWith(layer) || path.target.startsWith(layer);
    expect(opacity > 0.28, path.source).toBe(touches);
  }
});

test("the share of strength grows to what the service says all told paths carry", async () => {
  const { circuit } = await stored("DTI", loadCircuits);
  const [paths, all] = [circuit?.paths ?? [], circuit?.share ?? NaN];
  expect(shareOf(paths, paths.length, all)).toBeCloseTo(all, 12);
  expect(shareOf(paths, 10, all)).toBeLessThan(shareOf(paths, 11, all));
  expect(shareOf([], 5, all)).toBe(0);
  expect(["unembed", "blocks.1.mlp", "blocks.1.attn.head_2"].map(directionOf)).toEqual([
    "answer",
    "mlp",
    "head",
  ]);
});

test("FLAIR paints each sublayer with its own number; heads show their layer's", async () => {
  const series = await stored("FLAIR", loadAnomalies);
  const rows = oracle("FLAIR");
  const volume = fieldOf(series, "change").volume;
  (column(rows, "nodes", "component") as string[]).forEach((component, row) => {
    if (column(rows, "nodes", "quantity")[row] !== "kl_change") return;
    const values = column(rows, "nodes", "value")[row] as number[];
    // Position 0 is not measured, and stands first.
    values.forEach((value, at) => expect(volume.at(component, at + 1)).toBe(value));
    expect(volume.at(component, 0)).toBeNaN();
  });
  expect(source(volume, "blocks.3.attn.head_4")).toBe("blocks.3.attn");
  expect(source(volume, "unembed")).toBeNull();
});

test("the lens grid has a row a place and says each place's likeliest token", async () => {
  const series = await stored("FLAIR", loadAnomalies);
  const rows = oracle("FLAIR");
  const section = sectionOf(topology, series, series.fields[0] ?? null, 0);
  expect([section?.width, section?.height, section?.top]).toEqual([
    series.tokens.length,
    topology.nLayers + 1,
    -1,
  ]);
  (column(rows, "lens_tokens", "component") as string[]).forEach((place, row) => {
    const at = series.anomalies?.places.indexOf(place) ?? -1;
    const position = column(rows, "lens_tokens", "position")[row] as number;
    expect(section?.word?.(at, position)).toBe(column(rows, "lens_tokens", "text")[row]);
  });
  expect(section?.word?.(topology.nLayers, series.tokens.length - 1)).toBe(" Paris");
});

test("without sublayers the lens is drawn all the same; without its layers nothing is", async () => {
  const series = await stored("FLAIR", loadAnomalies, "nodes");
  const whole = await stored("FLAIR", loadAnomalies);
  const drawn = (one: Series) => sectionOf(topology, one, one.fields[0] ?? null, 0)?.values;
  expect(drawn(series)).toEqual(drawn(whole));
  const { anomalies } = series;
  if (anomalies === null) throw new Error("it found nothing");
  // So it is stored where FLAIR was asked for without `appearance`.
  const last = { ...anomalies, places: anomalies.places.slice(-1) };
  expect(sectionOf(topology, { ...series, anomalies: last }, null, 0)).toBeNull();
});

test("a scan that painted no component is still read token by token", async () => {
  const series = await stored("FLAIR", loadAnomalies, "nodes");
  expect(series.fields).toEqual([]);
  const all = { FLAIR: { status: "ready", series } } as unknown as AllSeries;
  const [display, crosshair] = [new Display(), new Crosshair()];
  display.sequence = "FLAIR";
  const reading = new Reading({ model: null, topology, series: all }, display, crosshair);
  crosshair.token = 4;
  expect([reading.column, reading.token?.position]).toEqual([4, 4]);
  crosshair.token = 99;
  expect(reading.column).toBe(series.tokens.length - 1);
});

test("three channels a token, none at the sink", async () => {
  const { anomalies, tokens } = await stored("FLAIR", loadAnomalies);
  expect(anomalies?.findings).toHaveLength(tokens.length);
  expect(anomalies?.findings[0]?.entropy).toBeNaN();
  expect(anomalies?.findings[0]?.layer).toBe(-1);
  for (const { entropy, depth, support } of anomalies?.findings.slice(1) ?? []) {
    expect(entropy).toBeGreaterThan(0);
    expect(depth).toBeGreaterThan(0);
    expect(depth).toBeLessThanOrEqual(1);
    expect(support).not.toBeNaN();
  }
  expect(anomalies?.asked.map(({ role }) => role)).toEqual(["answer", "foil"]);
});

test("a stimulation's difference is its two scans', exactly", async () => {
  const series = await stored("perturbation", loadStimulation);
  const [before, after] = [fieldOf(series, "before"), fieldOf(series, "after")];
  for (const component of topology.addresses) {
    for (let column = 0; column < series.tokens.length; column++) {
      expect(fieldOf(series, "difference").volume.at(component, column)).toBe(
        after.volume.at(component, column) - before.volume.at(component, column),
      );
    }
  }
  // Nothing upstream of what was stimulated can have changed.
  expect(fieldOf(series, "change").volume.at("blocks.0.mlp", 5)).toBe(0);
  expect(fieldOf(series, "change").volume.at("blocks.1.mlp", 5)).toBeGreaterThan(0);
  expect([...difference(Float32Array.of(3), Float32Array.of(1))]).toEqual([2]);
});

test("the comparison says what the service stored", async () => {
  const { lesion } = await stored("perturbation", loadStimulation);
  const rows = oracle("perturbation");
  expect(lesion?.comparison?.before).toBe(column(rows, "comparison", "metric_before")[0]);
  expect(lesion?.comparison?.after).toBe(column(rows, "comparison", "metric_after")[0]);
  expect(lesion?.shifts.map(({ kl }) => kl)).toEqual(column(rows, "shift", "kl"));
});

test("either run's likeliest tokens meet by what they are, not by how they are written", async () => {
  const { lesion } = await stored("perturbation", loadStimulation);
  const rows = oracle("perturbation");
  if (lesion == null) throw new Error("there is no lesion");
  const ids = (table: string) => column(rows, table, "token_id").slice(0, 6) as number[];
  const [first] = likeliest(lesion, 0, 6);
  expect(first).toMatchObject({
    key: ids("predictions")[0],
    before: column(rows, "predictions", "probability")[0],
    after: column(rows, "predictions_after", "probability")[
      column(rows, "predictions_after", "token_id").indexOf(ids("predictions")[0])
    ],
  });

  const one = (id: number, probability: number) =>
    ({ position: 3, rank: 0, id, text: "\ufffd", logit: 0, probability }) as const;
  const either = (before: readonly number[], after: readonly number[]) =>
    likeliest(
      { before: before.map((id) => one(id, 0.5)), after: after.map((id) => one(id, 0.25)) },
      3,
      6,
    ).map((row) => [row.before, row.after]);
  // Bytes of a character are different tokens with one text.
  expect(either([7, 8], [8, 9])).toEqual([
    [0.5, NaN],
    [0.5, 0.25],
    [NaN, 0.25],
  ]);
  // Where a share hides what they are, none is taken for another.
  expect(either([-1], [-1, -1])).toEqual([
    [0.5, NaN],
    [NaN, 0.25],
    [NaN, 0.25],
  ]);
});

test("a dense image of a static scan has every component where the axial plane has it", async () => {
  const series = await stored("DTI", loadCircuits);
  const effect = fieldOf(series, "effect");
  const section = sectionOf(topology, series, effect, 0);
  for (let node = 1; node < topology.size - 1; node++) {
    const at = (topology.layers[node] ?? 0) * (section?.width ?? 0) + columnOf(topology, node);
    expect(section?.values[at]).toBe(effect.volume.at(topology.addresses[node] ?? "", 0));
  }
});

test("where a layer's attention was taken as a whole, each of its heads shows that number", () => {
  const whole = field({
    id: "effect",
    title: "Effect",
    unit: "",
    method: "",
    volume: new Volume(["blocks.4.attn", "blocks.4.mlp"], 1, Float32Array.of(3, 5)),
    map: "inferno",
  });
  const series = { ...bare("DTI", {} as Acquisition), fields: [whole] };
  const section = sectionOf(topology, series, whole, 0);
  const row = [...(section?.values.slice(4 * 10, 5 * 10) ?? [])];
  expect(row).toEqual(section?.names.map((name) => (name === "MLP" ? 5 : 3)));
});

test("a trace is a map of layer x position, and brings the answer back at the subject's last token", async () => {
  const series = await stored("tracing", loadTracing);
  const rows = oracle("tracing");
  const { volume } = fieldOf(series, "trace");
  (column(rows, "trace", "component") as string[]).forEach((component, row) => {
    if (column(rows, "trace", "quantity")[row] !== "indirect_effect") return;
    const values = column(rows, "trace", "value")[row] as number[];
    values.forEach((value, at) => expect(volume.at(component, at)).toBe(value));
  });
  const section = sectionOf(topology, series, series.fields[0] ?? null, "resid_post");
  const across = section?.width ?? 0;
  const early = [...(section?.values.slice(5 * across, 6 * across) ?? [])];
  expect(early.indexOf(Math.max(...early))).toBe(2);
  // A head stands for its layer's attention, as it does in the other planes.
  const [head, whole] = [3, "attn" as const].map((cut) =>
    sectionOf(topology, series, series.fields[0] ?? null, cut),
  );
  expect(head?.values.every(Number.isNaN)).toBe(false);
  expect(head?.values).toEqual(whole?.values);
  const { clean = NaN, corrupted = NaN } = series.trace ?? {};
  expect(clean).toBeGreaterThan(corrupted);
});

test("a component's own number goes before its layer's", () => {
  const volume = new Volume(["blocks.0.attn", "blocks.0.attn.head_1"], 1, Float32Array.of(1, 2));
  expect(source(volume, "blocks.0.attn.head_1")).toBe("blocks.0.attn.head_1");
  expect(source(volume, "blocks.0.attn.head_0")).toBe("blocks.0.attn");
  expect(source(volume, "blocks.0.mlp")).toBeNull();
});

test("stimuli read as they are written, in words and in addresses", () => {
  const stimuli: readonly Stimulus[] = [
    { operation: "amplify", component: "embed", factor: 3 },
    { operation: "noise", component: "blocks.2.attn", sigma: 0.25 },
    { operation: "ablate", component: "blocks.2.mlp", token_positions: [4] },
  ];
  for (const stimulus of stimuli) expect(read(written(stimulus))).toEqual(stimulus);
  expect(stimuli.map(named)).toEqual(["× 3", "noise 0.25 σ", "mean"]);
  expect(read("zero~unembed~~")).toBeNull();
  expect(read("zero~blocks.1.mlp~~x")).toBeNull();
});

test("a word is asked about with the space before it, and what is empty is not asked", () => {
  expect(["Paris", " Paris", "?"].map(asToken)).toEqual([" Paris", " Paris", "?"]);
  expect(askedOfCircuit(NO_QUESTION)).toEqual({ method: "fast" });
  expect(askedOfCircuit({ ...NO_QUESTION, answer: "Paris", corrupt: "x" })).toEqual({
    method: "fast",
    answer: " Paris",
    corrupt_prompt: "x",
  });
});

test("tokens are counted from 1 by people and from 0 by the service", () => {
  expect(positions("", 9)).toBe("all");
  expect(positions("0-2, 6", 9)).toEqual([0, 1, 2, 6]);
  expect(positions("8 1 1", 9)).toEqual([1, 8]);
  for (const wrong of ["9", "10", "3-1", "x", "1-", "-1"]) expect(positions(wrong, 9)).toBeNull();
});

test("tokens are bounded by a scan of all of the prompt, else by what the model reads", async () => {
  const series = await stored("FLAIR", loadAnomalies);
  const { prompt } = series.acquisition;
  const narrow = {
    ...series,
    acquisition: { ...series.acquisition, request: { token_positions: [3] } },
    tokens: series.tokens.slice(3, 4),
  };
  const count = (one: Series | null, text = prompt ?? "", reads?: number) =>
    countable(one, text, reads);
  expect(count(series, undefined, 2048)).toBe(series.tokens.length);
  expect(count(series, "another", 2048)).toBe(2048);
  expect(count({ ...series, sequence: "tracing" }, undefined, 2048)).toBe(2048);
  expect(positions("9", count(narrow, undefined, 2048))).toEqual([9]);
  for (const reads of [undefined, NaN, 1e12]) {
    expect(positions("0-999999999", count(null, "", reads))).toBeNull();
  }
});

test("numbers are read as somebody pastes them, and nothing else is", () => {
  expect(numbers("[0.5, -1e-3,\n 7]")).toEqual([0.5, -1e-3, 7]);
  expect(numbers("1 2 x")).toBeNull();
  expect(numbers("  ")).toEqual([]);
});

test("an injection has as many values as the service expects", () => {
  expect(injected("blocks.3.mlp.neuron_8", "replace", SMOLLM2)).toBe(1);
  expect(injected("blocks.3.attn.head_8", "replace", SMOLLM2)).toBe(64);
  expect(injected("blocks.3.attn.head_8", "add", SMOLLM2)).toBe(576);
  expect(injected("blocks.3.resid_mid", "replace", SMOLLM2)).toBe(576);
});
