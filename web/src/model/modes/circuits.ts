/** DTI: the effect of each component on an answer, and the paths that carry it. */
import { openTable } from "../../api/frames";
import type { JobEvent, JobView } from "../../api/schema";
import { field, type Field } from "../field";
import { sequence } from "../sequences";
import { acquisitionOf, announced, bare, stored, type Loader, type Series } from "../series";
import { Volume } from "../volume";
import type { Message } from "../../words/words.svelte";

export interface Metric {
  readonly position: number;
  readonly answer: string;
  /** Empty without a foil. */
  readonly foil: string;
  readonly unit: string;
  readonly method: string;
  readonly clean: number;
  readonly corrupted: number;
  readonly probabilityClean: number;
  readonly probabilityCorrupted: number;
}

/** A path from what one component writes straight to what another reads. */
export interface Path {
  readonly source: string;
  readonly target: string;
  readonly strength: number;
}

export interface Circuit {
  /** Null while only effects have arrived. */
  readonly metric: Metric | null;
  /** Strongest first. */
  readonly paths: readonly Path[];
  readonly pathUnit: string;
  /** How many paths there are in all, and the share of their strength that `paths` carries. */
  readonly pathsInAll: number;
  readonly share: number;
  /** Components whose effect was measured, not estimated. */
  readonly exact: ReadonlySet<string>;
}

export const load: Loader = async (manifest, job, read) => {
  const [effects, metric, edges] = await Promise.all([
    read("effects").then((bytes) => openTable(bytes, "effects")),
    read("metric").then((bytes) => openTable(bytes, "metric")),
    stored(manifest, "edges") ? read("edges").then((bytes) => openTable(bytes, "edges")) : null,
  ]);
  const components = effects.texts("component");
  const { unit, method, parameters } = effects.provenance;
  const numbers = (name: string) =>
    new Volume(components, 1, Float32Array.from(effects.numbers(name)));
  const [asked] = metric.rows((row) => ({
    position: row.number("position"),
    answer: row.text("answer"),
    foil: row.text("foil"),
    unit: metric.provenance.unit,
    method: metric.provenance.method,
    clean: row.number("clean"),
    corrupted: row.number("corrupted"),
    probabilityClean: row.number("probability_clean"),
    probabilityCorrupted: row.number("probability_corrupted"),
  }));
  const exact = effects
    .rows((row) => ({ component: row.text("component"), measured: row.flag("exact") }))
    .flatMap(({ component, measured }) => (measured ? component : []));
  const has = (volume: Volume) => volume.data.some((value) => !Number.isNaN(value));
  const estimate = numbers("estimate");
  const effect = numbers("effect");
  return {
    ...bare("DTI", acquisitionOf(manifest, job)),
    fields: [
      ...(has(effect) ? [signed("effect", "Effect", unit, method, effect)] : []),
      ...(has(estimate)
        ? [
            signed(
              "estimate",
              "Estimate",
              unit,
              "attribution patching: first order, from gradients",
              estimate,
            ),
          ]
        : []),
      signed(
        "direct",
        "Direct",
        "logits",
        String(parameters["direct"] ?? ""),
        // What a component writes for the answer itself points the other way: what helps is above 0.
        numbers("direct"),
      ),
    ],
    circuit: {
      metric: asked ?? null,
      paths:
        edges === null
          ? []
          : edges.rows((row) => ({
              source: row.text("source"),
              target: row.text("target"),
              strength: row.number("strength"),
            })),
      pathUnit: edges?.provenance.unit ?? "",
      pathsInAll: Number(edges?.provenance.parameters["total"] ?? 0),
      share: Number(edges?.provenance.parameters["share"] ?? NaN),
      exact: new Set(exact),
    },
    complete: true,
  };
};

function signed(id: string, title: Message, unit: string, method: string, volume: Volume): Field {
  return field({
    id,
    title,
    unit,
    method,
    volume,
    map: sequence("DTI").map,
    signed: true,
    tail: 0.01,
  });
}

/** Effects as they come in: estimates of all components, then what was measured in their place. */
export class GrowingEffects {
  readonly #components: readonly string[];
  readonly #values: Float32Array;
  readonly #exact = new Set<string>();
  #series: Series;

  constructor(job: JobView, components: readonly string[]) {
    this.#components = components;
    this.#values = new Float32Array(components.length).fill(NaN);
    this.#series = bare("DTI", announced(job));
  }

  get series(): Series {
    return this.#series;
  }

  /** Takes in what an event brings. Whether it brought any numbers. */
  take(event: JobEvent): boolean {
    if (event.type !== "effects_frame") return false;
    event.components.forEach((component, index) => {
      const row = this.#components.indexOf(component);
      if (row < 0) return;
      this.#values[row] = event.effects[index] ?? NaN;
      if (event.exact) this.#exact.add(component);
    });
    const volume = new Volume(this.#components, 1, this.#values.slice());
    const method = event.exact ? "estimates, the strongest measured" : "estimates from gradients";
    this.#series = {
      ...this.#series,
      fields: [signed("effect", "Effect", event.unit, method, volume)],
      circuit: {
        metric: null,
        paths: [],
        pathUnit: "",
        pathsInAll: 0,
        share: NaN,
        exact: new Set(this.#exact),
      },
    };
    return true;
  }
}
