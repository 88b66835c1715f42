/**
 * A second study beside the first, and what lies between them: another prompt, another model, a stored
 * scan, or the run before a stimulation. All pictures go along with the one crosshair.
 */
import type { Client } from "../api/client";
import type { ModelInfo } from "../api/schema";
import { differenceOf, incomparable } from "../model/difference";
import { NO_PRIOR, type PriorKind, type PriorPlace } from "../model/protocols";
import type { SequenceId } from "../model/sequences";
import type { Series } from "../model/series";
import type { Topology } from "../model/topology";
import type { Message } from "../words/words.svelte";
import type { Crosshair } from "./crosshair.svelte";
import type { Display } from "./display.svelte";
import type { Log } from "./log.svelte";
import { Reading, type Scene } from "./reading.svelte";
import { Study, shown, type AllSeries, type SeriesState } from "./study.svelte";

export class Comparison {
  readonly #study: Study;
  readonly #display: Display;
  /** The other study: its model, its scans. */
  readonly other: Study;
  kind = $state<PriorKind>(NO_PRIOR.kind);
  /** What the other study's model is to read, where prompts are compared. */
  prompt = $state("");

  readonly current: Reading;
  readonly prior: Reading;
  readonly difference: Reading;

  constructor(client: Client, log: Log, study: Study, display: Display, crosshair: Crosshair) {
    this.#study = study;
    this.#display = display;
    this.other = new Study(client, log);
    const seen = (series: () => AllSeries): Scene =>
      scene(
        () => study.model,
        () => study.topology,
        series,
      );
    this.current = new Reading(
      seen(() => this.#own),
      display,
      crosshair,
    );
    const { other } = this;
    const before = scene(
      () => (this.isOfStimulation ? study.model : other.model),
      () => (this.isOfStimulation ? study.topology : other.topology),
      () => (this.isOfStimulation ? this.#stimulated("before") : other.series),
    );
    this.prior = new Reading(before, display, crosshair, { leader: this.current });
    this.difference = new Reading(
      seen(() => this.#subtracted),
      display,
      crosshair,
      { view: "difference" },
    );
  }

  /** Whether the two runs of one stimulation are compared. */
  readonly isOfStimulation: boolean = $derived.by(() => this.kind === "stimulation");

  readonly #own: AllSeries = $derived.by(() =>
    this.isOfStimulation ? this.#stimulated("after") : this.#study.series,
  );

  /** The stimulation with one of its runs alone, in the place of the plain scan. */
  #stimulated(field: "before" | "after"): AllSeries {
    const { series } = this.#study;
    const state = series.stimulation;
    const found = shown(state);
    const only: Series | null =
      found === null ? null : { ...found, fields: found.fields.filter(({ id }) => id === field) };
    const run: SeriesState =
      state.status === "absent" || only === null
        ? { status: "absent" }
        : { status: "ready", series: only };
    return { ...series, fMRI: run, stimulation: ABSENT, tracing: ABSENT };
  }

  /** Why the two cannot be subtracted; null where they can. */
  readonly incomparable: Message | null = $derived.by(() => incomparable(this.current, this.prior));

  readonly #subtracted: AllSeries = $derived.by(() => {
    const series = differenceOf(this.current, this.prior);
    const state: SeriesState = series === null ? ABSENT : { status: "ready", series };
    return {
      ...this.#study.series,
      [this.#display.sequence]: state,
      stimulation: ABSENT,
      tracing: ABSENT,
    };
  });

  place(): PriorPlace {
    return {
      kind: this.kind,
      prompt: this.prompt,
      model: this.kind === "model" ? this.other.chosen : null,
      jobs: this.kind === "stimulation" ? [] : this.other.jobs(),
    };
  }

  /** What an address asks to be compared with. */
  async restore(
    place: PriorPlace,
    shownNow: SequenceId,
    models: readonly ModelInfo[] = [],
  ): Promise<void> {
    this.kind = place.kind;
    this.prompt = place.prompt;
    this.#share();
    if (models.length > 0 && place.jobs.length > 0) {
      await this.other.restore(models, place.jobs, shownNow);
      return;
    }
    const there = this.other.jobs();
    const missing = place.jobs.filter((job) => !there.includes(job));
    if (missing.length > 0) await this.other.openAll(missing, shownNow);
    else if (place.model !== null) await this.other.choose(place.model);
    if (this.kind === "model" && models.length === 0) await this.#anatomy();
  }

  /** Another kind of prior: what belonged to the one before is taken away. */
  async choose(kind: PriorKind): Promise<void> {
    if (kind === this.kind) return;
    this.kind = kind;
    this.#share();
    if (kind === "prompt") await this.#sameModel();
    else if (kind === "model") await this.#anatomy();
  }

  /** The model that the prior is of; its structure is there at once. */
  async chooseModel(name: string): Promise<void> {
    this.#share();
    await this.other.choose(name);
  }

  /** Takes the prior scan: what is asked, of the other prompt or the other model. */
  async scan(
    id: SequenceId,
    endpoint: string,
    request: Readonly<Record<string, unknown>>,
  ): Promise<void> {
    this.#share();
    if (this.kind === "prompt") await this.#sameModel();
    if (id === "T1") return;
    const changed = this.kind === "prompt" && "prompt" in request ? { prompt: this.prompt } : {};
    await this.other.scan(id, endpoint, { ...request, ...changed });
  }

  /** Opens a stored scan as the prior. */
  async open(job: string): Promise<void> {
    this.kind = "scan";
    this.#share();
    await this.other.openAll([job], this.#display.sequence);
  }

  /** Both choose from the same models. */
  #share(): void {
    this.other.models = this.#study.models;
  }

  async #sameModel(): Promise<void> {
    const name = this.#study.model?.name;
    if (name === undefined) return;
    if (this.other.model?.name === name && this.other.series.T1.status !== "absent") return;
    this.other.chosen = null;
    await this.other.choose(name);
    await this.#anatomy();
  }

  /** The structure of the model that stands there already: nobody can choose it once more. */
  async #anatomy(): Promise<void> {
    if (this.other.series.T1.status !== "absent") return;
    // By its name, as if it had been chosen: the address says it, and a saved page answers for it.
    this.other.chosen ??= this.other.model?.name ?? null;
    await this.other.begin();
  }
}

const ABSENT: SeriesState = { status: "absent" };

function scene(
  model: () => ModelInfo | null,
  topology: () => Topology | null,
  series: () => AllSeries,
): Scene {
  return {
    get model() {
      return model();
    },
    get topology() {
      return topology();
    },
    get series() {
      return series();
    },
  };
}
