/**
 * The patient and the scans: which models there are, and each sequence's series with how far it has
 * come. The only state that talks to the service. Knows nothing of windows, crosshairs or pixels.
 */
import type { Client } from "../api/client";
import { Refusal, explain, isAbort, sentence } from "../api/refusals";
import type { JobEvent, JobView, Manifest, ModelInfo, QueuePlace } from "../api/schema";
import { loadStructural, type Loader, type Series, type SeriesId } from "../model/series";
import { SEQUENCES, isSequence, type SequenceId } from "../model/sequences";
import { topologyOf, type Topology } from "../model/topology";
import type { Log } from "./log.svelte";
import { seconds } from "../ui/format";
import { counted, t } from "../words/words.svelte";

export type Loadable<T> =
  | { readonly status: "loading" }
  | { readonly status: "ready"; readonly value: T }
  | { readonly status: "failed"; readonly sentence: string };

export interface Acquiring {
  readonly status: "acquiring";
  readonly job: string | null;
  /** What the service is doing, in a word. */
  readonly stage: string;
  /** 0 to 1 where the service counts, null where it does not. */
  readonly share: number | null;
  /** Where it stands while it waits. */
  readonly queue: QueuePlace | null;
  /** False while the connection to its events is lost, and being made again. */
  readonly connected: boolean;
  /** The layer the sweep has reached; -1 before the first. */
  readonly layer: number;
  /** What has arrived of it, or the last finished scan until something has. */
  readonly series: Series | null;
}

export type SeriesState =
  | { readonly status: "absent" }
  | Acquiring
  | { readonly status: "ready"; readonly series: Series }
  | { readonly status: "failed"; readonly sentence: string; readonly series: Series | null };

export type AllSeries = Readonly<Record<SeriesId, SeriesState>>;

/** What a sequence has to show, finished or not. */
export function shown(state: SeriesState): Series | null {
  return state.status === "absent" ? null : state.series;
}

/** Told of what arrives while a scan runs, so that the crosshair can go along. */
export interface ScanListener {
  readonly tokenReached?: (sequence: SeriesId, column: number) => void;
  /** `isRestored` where it was finished already, and belongs to a place that was gone to. */
  readonly finished?: (series: Series, isRestored: boolean) => void;
}

/** How each series' tables are read. What only one modality needs is fetched with its first scan. */
const LOADERS: Readonly<Record<SeriesId, () => Promise<Loader>>> = {
  T1: () => Promise.resolve(loadStructural),
  T2: () => import("../model/modes/weights").then(({ load }) => load),
  fMRI: () => import("../model/modes/activations").then(({ load }) => load),
  DTI: () => import("../model/modes/circuits").then(({ load }) => load),
  FLAIR: () => import("../model/modes/anomalies").then(({ load }) => load),
  stimulation: () => import("../model/modes/stimulation").then(({ load }) => load),
  tracing: () => import("../model/modes/tracing").then(({ load }) => load),
};

/** Which series a job's request is of; null for jobs that show nothing here. */
function seriesOf(job: JobView): SeriesId | null {
  return seriesNamed(job.request["scan_mode"]);
}

export function seriesNamed(kind: unknown): SeriesId | null {
  if (kind === "perturbation") return "stimulation";
  if (kind === "tracing" || kind === "patching") return "tracing";
  return typeof kind === "string" && isSequence(kind) ? kind : null;
}

/** What is shown of a scan while it runs. */
interface Grows {
  readonly series: Series;
  /** Layer the sweep has reached, and the column that came last. */
  readonly layer?: number;
  readonly token?: number;
  take(event: JobEvent): boolean;
}

export class Study {
  readonly #client: Client;
  readonly #log: Log;
  // Nothing is drawn from it, so it need not be reactive.
  // eslint-disable-next-line svelte/prefer-svelte-reactivity
  readonly #runs = new Map<SeriesId, AbortController>();
  /** When each series and the model were last asked for: an answer that comes late displaces nothing newer. */
  // eslint-disable-next-line svelte/prefer-svelte-reactivity
  readonly #asked = new Map<SeriesId | "model", number>();
  #clock = 0;
  #listener: ScanListener = {};

  models = $state.raw<Loadable<readonly ModelInfo[]>>({ status: "loading" });
  /** The chosen model's name; null means the service's default. */
  chosen = $state<string | null>(null);
  series = $state.raw<AllSeries>(none());
  /** Whether what arrives is held back, so that the picture stands still. */
  held = $state(false);
  /** What is to be shown once nobody holds the picture any more. */
  // eslint-disable-next-line svelte/prefer-svelte-reactivity
  readonly #withheld = new Set<() => void>();

  /** A model being loaded or unloaded now, and how far that is. */
  loading = $state.raw<{ readonly model: string; readonly share: number | null } | null>(null);

  readonly model: ModelInfo | null = $derived.by(() => this.#named(this.chosen));

  /** The service's default where nothing has the name. */
  #named(name: string | null): ModelInfo | null {
    if (this.models.status !== "ready") return null;
    const { value } = this.models;
    const named = value.find((model) => model.name === name);
    return named ?? value.find((model) => model.default) ?? value[0] ?? null;
  }

  readonly topology: Topology | null = $derived.by(() => {
    const architecture = this.model?.architecture;
    return architecture === undefined ? null : topologyOf(architecture);
  });

  constructor(client: Client, log: Log) {
    this.#client = client;
    this.#log = log;
  }

  listen(listener: ScanListener): void {
    this.#listener = listener;
  }

  /** The models and the T1 image of the chosen one, both at once: the first picture; then stored scans. */
  async begin(jobs: readonly string[] = [], shown: SequenceId = "fMRI"): Promise<void> {
    const stored = async () => {
      await this.refreshModels();
      await this.#open(jobs, shown, true);
    };
    // How the scan is read is fetched beside it.
    if (jobs.length > 0) LOADERS[shown]().catch(() => undefined);
    await Promise.all([this.#structural(), stored()]);
  }

  async refreshModels(): Promise<void> {
    try {
      const listed = await this.#client.models();
      const own = this.#brought.filter(({ name }) => !listed.some((model) => model.name === name));
      const value = [...listed, ...own];
      this.models = { status: "ready", value };
      if (value.length === 0) this.#log.add(t("The service has no registered model."), "warning");
    } catch (error) {
      // A list we already have stays: one failed refresh is no reason to take the picture away.
      if (this.models.status !== "ready") {
        this.models = { status: "failed", sentence: explain(error) };
      }
      this.#log.add(explain(error), "error");
    }
  }

  async choose(name: string, asked = ++this.#clock): Promise<void> {
    this.#asked.set("model", asked);
    if (name === this.model?.name) return;
    this.#turnTo(name);
    await this.#structural(asked);
  }

  /** Goes to a model, without a name to the service's default, and to scans of it that are not there yet. */
  async visit(model: string | null, jobs: readonly string[], shown: SequenceId): Promise<void> {
    const asked = ++this.#clock;
    const name = model ?? (jobs.length === 0 ? this.#named(null)?.name : null);
    if (name != null) await this.choose(name, asked);
    const there = this.jobs();
    await this.#open(
      jobs.filter((job) => !there.includes(job)),
      shown,
      true,
      asked,
    );
  }

  #turnTo(name: string): void {
    // Forgotten as well: a run that is given up alone puts back what there was, which is of the other model here.
    for (const id of this.#runs.keys()) this.#drop(id);
    this.chosen = name;
    this.series = none();
    this.#log.add(t("Model {name}.", { name }));
  }

  /** Models that come with their scans; the service need not have them. */
  #brought: readonly ModelInfo[] = [];

  /** Shows kept scans, T1 among them, and nothing else: nothing is measured for it, and nobody waited for. */
  async restore(
    models: readonly ModelInfo[],
    jobs: readonly string[],
    shown: SequenceId,
  ): Promise<void> {
    this.#brought = models;
    const listed = this.models.status === "ready" ? this.models.value : [];
    const added = models.filter(({ name }) => !listed.some((model) => model.name === name));
    this.models = { status: "ready", value: [...listed, ...added] };
    const [first] = await Promise.all(jobs.slice(0, 1).map((job) => this.#client.job(job)));
    if (first !== undefined) this.#turnTo(first.model);
    await this.#open(jobs, shown, true);
  }

  /** Calls scans by other ids from now on: a session names them by their results. */
  rename(nameOf: (job: string) => string): void {
    for (const [id, state] of Object.entries(this.series) as [SeriesId, SeriesState][]) {
      if (state.status !== "ready") continue;
      const { acquisition } = state.series;
      const job = nameOf(acquisition.job);
      if (job === acquisition.job) continue;
      this.#set(id, {
        status: "ready",
        series: { ...state.series, acquisition: { ...acquisition, job } },
      });
    }
  }

  /** Takes a scan. One of this kind that still runs is given up. */
  async scan(
    id: SeriesId,
    endpoint: string,
    asked: Readonly<Record<string, unknown>>,
  ): Promise<void> {
    await this.#run(id, async (signal) => {
      const model = this.model?.name ?? this.chosen;
      const request = { ...asked, ...(model === null ? {} : { model }) };
      const { prompt } = asked;
      const known = typeof prompt === "string" && model !== null;
      const [job, tokens] = await Promise.all([
        this.#client.submit(endpoint, request, { signal }),
        known ? this.#client.tokenize(model, prompt, signal).catch(() => null) : null,
      ]);
      return this.#follow(id, job, tokens?.texts ?? null, signal);
    });
  }

  /** Shows scans by their jobs' ids, finished or not; what cannot be found is told where `shown` stands. */
  openAll(jobs: readonly string[], shown: SequenceId): Promise<void> {
    return this.#open(jobs, shown, false);
  }

  /** Those that still run are not waited for. */
  async #open(
    jobs: readonly string[],
    shown: SequenceId,
    isPlace: boolean,
    asked = ++this.#clock,
  ): Promise<void> {
    const isLate = (id: SeriesId | "model") => (this.#asked.get(id) ?? 0) > asked;
    const found = await Promise.all(
      jobs.map(async (id) => {
        try {
          return await this.#client.job(id);
        } catch (error) {
          const text = error instanceof Refusal && error.status === 404 ? gone() : explain(error);
          this.#log.add(text, "error");
          if (!isLate("model") && !isLate(shown)) {
            this.#set(shown, { status: "failed", sentence: text, series: null });
          }
          return null;
        }
      }),
    );
    const known = found.filter((job) => job !== null);
    const [first] = known;
    if (first === undefined || isLate("model")) return;
    if (first.model !== this.model?.name) {
      // What somebody has begun meanwhile is of the model that they see.
      if ([...this.#asked.keys()].some(isLate)) return;
      this.#turnTo(first.model);
      // Without a worker it may be long in coming; what is stored is shown meanwhile.
      if (!known.some((job) => seriesOf(job) === "T1")) void this.#structural(asked);
    }
    await Promise.all(
      known.map((job) => {
        const id = seriesOf(job);
        if (id === null || job.model !== first.model || isLate(id)) return null;
        const isFinished = job.state === "succeeded";
        const follow = (signal: AbortSignal) => this.#follow(id, job, null, signal);
        const run = this.#run(id, follow, isPlace && isFinished, asked);
        return isFinished ? run : null;
      }),
    );
  }

  /** Forgets a series, as if it had never been taken. */
  clear(id: SeriesId): void {
    this.#asked.set(id, ++this.#clock);
    this.#drop(id);
    this.#set(id, { status: "absent" });
  }

  /** Gives up what runs of a series. With the last that runs, nothing is held back any more. */
  #drop(id: SeriesId): void {
    this.#runs.get(id)?.abort();
    this.#runs.delete(id);
    if (this.#runs.size === 0) this.hold(false);
  }

  /** Ids of the jobs behind everything that is shown but T1, which is always taken anew. */
  jobs(): readonly string[] {
    return Object.entries(this.series).flatMap(([id, state]) => {
      if (id === "T1") return [];
      if (state.status === "acquiring") return state.job ?? [];
      return state.status === "ready" ? state.series.acquisition.job : [];
    });
  }

  /** Every finished scan, T1 first. */
  finished(): readonly Series[] {
    return Object.values(this.series).flatMap((state) =>
      state.status === "ready" ? state.series : [],
    );
  }

  /** Asks the service to stop the running scan; the event stream tells when it has. */
  async cancel(id: SeriesId): Promise<void> {
    const state = this.series[id];
    if (state.status !== "acquiring") return;
    if (state.job === null) {
      this.#runs.get(id)?.abort();
      return;
    }
    this.#set(id, { ...state, stage: "cancelling" });
    try {
      await this.#client.cancel(state.job);
    } catch (error) {
      this.#log.add(explain(error), "error");
    }
  }

  /** Lets the picture stand still while the scan goes on; then shows all that has come. */
  hold(yes: boolean): void {
    this.held = yes;
    if (yes) return;
    for (const show of this.#withheld) show();
    this.#withheld.clear();
  }

  /** Takes a failure as read: what there was before stands again. */
  dismiss(id: SeriesId): void {
    const state = this.series[id];
    if (state.status !== "failed") return;
    const { series } = state;
    this.#set(id, series === null ? { status: "absent" } : { status: "ready", series });
  }

  async load(name: string): Promise<void> {
    this.loading = { model: name, share: null };
    this.#log.add(t("Loading {name}.", { name }));
    try {
      const job = await this.#client.submit("/api/model/load", { model: name });
      await this.#untilEnd(job, new AbortController().signal, (event) => {
        if (event.type === "progress" && event.total > 0) {
          this.loading = { model: name, share: event.done / event.total };
        }
      });
      this.#log.add(t("{name} is resident.", { name }));
    } catch (error) {
      this.#log.add(explain(error), "error");
    } finally {
      this.loading = null;
      await this.refreshModels();
    }
  }

  /** A table of a finished scan as it is stored, and the list of them. */
  table(job: string, name: string): Promise<ArrayBuffer> {
    return this.#client.table(job, name);
  }

  manifest(job: string): Promise<Manifest> {
    return this.#client.manifest(job);
  }

  /** A layer's attention patterns for the prompt of a finished scan, as Arrow bytes. */
  attention(job: string, layer: number, signal: AbortSignal): Promise<ArrayBuffer> {
    return this.#client.attention(job, layer, signal);
  }

  /** T1 of the model. Where it has to be measured first, it is not waited for. */
  #structural(asked?: number): Promise<void> {
    return new Promise((resolve) => {
      const work = async (signal: AbortSignal) => {
        const job = await this.#client.structural(this.chosen, signal);
        if (job.state !== "succeeded") resolve();
        return this.#follow("T1", job, null, signal);
      };
      void this.#run("T1", work, false, asked).then(resolve);
    });
  }

  /** Runs one acquisition of a sequence, and puts whatever comes of it into `series`. */
  async #run(
    id: SeriesId,
    work: (signal: AbortSignal) => Promise<Series>,
    isRestored = false,
    asked = ++this.#clock,
  ): Promise<void> {
    this.#drop(id);
    this.#asked.set(id, asked);
    const run = new AbortController();
    this.#runs.set(id, run);
    const before = shown(this.series[id]);
    this.#set(id, {
      status: "acquiring",
      job: null,
      stage: "asking",
      share: null,
      queue: null,
      connected: true,
      layer: -1,
      series: before,
    });
    try {
      const series = await work(run.signal);
      if (run.signal.aborted) return;
      this.#set(id, { status: "ready", series });
      this.#log.add(finishedSentence(series), "note", id);
      this.#listener.finished?.(series, isRestored);
    } catch (error) {
      if (this.#runs.get(id) !== run) return;
      const kept = before?.complete === true ? before : null;
      if (isAbort(error)) {
        this.#set(id, kept === null ? { status: "absent" } : { status: "ready", series: kept });
      } else {
        this.#set(id, { status: "failed", sentence: explain(error), series: kept });
        this.#log.add(explain(error), "error");
      }
    } finally {
      if (this.#runs.get(id) === run) this.#drop(id);
    }
  }

  /** From a job to its series, painting what arrives on the way. */
  async #follow(
    id: SeriesId,
    job: JobView,
    texts: readonly string[] | null,
    signal: AbortSignal,
  ): Promise<Series> {
    const loader = LOADERS[id]();
    if (job.state !== "succeeded") {
      this.#update(id, { job: job.id, stage: job.state, queue: job.queue ?? null });
      const growing = await this.#growing(id, job, texts);
      const show = growing === null ? null : inNextPicture(() => this.#grown(id, growing, signal));
      const arrived = (event: JobEvent) => {
        this.#arrived(id, event);
        if (growing?.take(event) !== true || show === null) return;
        if (this.held) this.#withheld.add(show);
        else show();
      };
      await this.#untilEnd(job, signal, arrived, (connected) => this.#update(id, { connected }));
      await this.#released(signal);
    }
    if (signal.aborted) throw new DOMException("The scan was given up", "AbortError");
    this.#update(id, { job: job.id, stage: "fetching", share: null });
    const manifest = await this.#client.manifest(job.id);
    const load = await loader;
    return load(manifest, job.id, (name) => this.#client.table(job.id, name));
  }

  async #growing(
    id: SeriesId,
    job: JobView,
    texts: readonly string[] | null,
  ): Promise<Grows | null> {
    const { topology } = this;
    if (topology === null) return null;
    if (id === "fMRI" && texts !== null) {
      const { Growing } = await import("../model/modes/activations");
      return new Growing(job, [...topology.addresses, ...residuals(topology)], texts);
    }
    if (id !== "DTI") return null;
    const { GrowingEffects } = await import("../model/modes/circuits");
    const attention = residuals(topology).filter((address) => address.endsWith(".attn"));
    return new GrowingEffects(job, [...topology.addresses, ...attention]);
  }

  /** Waits until nobody holds the picture back. */
  async #released(signal: AbortSignal): Promise<void> {
    if (!this.held) return;
    await new Promise<void>((resolve) => {
      this.#withheld.add(resolve);
      signal.addEventListener("abort", () => resolve(), { once: true });
    });
  }

  #arrived(id: SeriesId, event: JobEvent): void {
    if (event.type === "state" || event.type === "reset") {
      const queue = event.state === "queued" ? {} : { queue: null };
      this.#update(id, { stage: event.state, share: null, ...queue });
    } else if (event.type === "queue") {
      const { position, estimated_start_seconds } = event;
      this.#update(id, { queue: { position, estimated_start_seconds } });
    } else if (event.type === "progress") {
      const share = event.total > 0 ? event.done / event.total : null;
      this.#update(id, { stage: event.stage, share });
    }
  }

  #grown(id: SeriesId, growing: Grows, signal: AbortSignal): void {
    if (signal.aborted || this.series[id].status !== "acquiring") return;
    this.#update(id, { series: growing.series, layer: growing.layer ?? -1 });
    if (growing.token !== undefined) this.#listener.tokenReached?.(id, growing.token);
  }

  /** Reads a job's events to the last. Throws the job's own problem unless it succeeded. */
  async #untilEnd(
    job: JobView,
    signal: AbortSignal,
    arrived: (event: JobEvent) => void,
    connected?: (yes: boolean) => void,
  ): Promise<void> {
    let end: Pick<JobView, "state" | "problem"> | null = job.state === "succeeded" ? job : null;
    if (end === null) {
      for await (const event of this.#client.events(job, signal, connected)) {
        arrived(event);
        if (event.type === "ended") end = event;
      }
    }
    end ??= await this.#client.job(job.id);
    if (end.state === "succeeded") return;
    if (end.state === "cancelled") {
      this.#log.add(t("The scan was cancelled."), "warning");
      throw new DOMException("The scan was cancelled", "AbortError");
    }
    throw new Refusal(end.problem ?? { title: `The job ended as ${end.state}`, status: 409 });
  }

  #set(id: SeriesId, state: SeriesState): void {
    this.series = { ...this.series, [id]: state };
  }

  #update(id: SeriesId, change: Partial<Omit<Acquiring, "status">>): void {
    const state = this.series[id];
    if (state.status === "acquiring") this.#set(id, { ...state, ...change });
  }
}

function gone(): string {
  return sentence({
    title: t("The scan in this address is gone"),
    detail: t("the service knows no such job; scan the prompt again"),
  });
}

function none(): AllSeries {
  const ids: readonly SeriesId[] = [...SEQUENCES.map(({ id }) => id), "stimulation", "tracing"];
  return Object.fromEntries(ids.map((id) => [id, { status: "absent" }])) as unknown as AllSeries;
}

/** Frames can come faster than pictures are drawn: what arrives between two is shown in one. */
function inNextPicture(show: () => void): () => void {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      show();
    });
  };
}

/** Places a scan reports beside the nodes: whole attention layers and the residual stream. */
function residuals(topology: Topology): string[] {
  return Array.from({ length: topology.nLayers }, (_, layer) => [
    `blocks.${layer}.attn`,
    `blocks.${layer}.resid_post`,
  ]).flat();
}

/** What a person calls a series. */
export function titleOf(id: SeriesId): string {
  if (id === "stimulation") return t("Stimulation");
  return id === "tracing" ? t("Tracing") : t("{id} scan", { id });
}

function finishedSentence(series: Series): string {
  const { forwardSeconds } = series.acquisition;
  const facts = [
    ...(series.tokens.length > 0
      ? [counted(series.tokens.length, "{count} token", "{count} tokens")]
      : []),
    ...(forwardSeconds ? [t("{time} forward", { time: seconds(forwardSeconds) })] : []),
  ];
  const complete = t("{what} complete", { what: titleOf(series.sequence) });
  return `${complete}${facts.length > 0 ? `: ${facts.join(", ")}` : ""}.`;
}
