/** What is shown while scans run, and after they are given up. */
import { beforeEach, expect, test, vi } from "vitest";

import { Client } from "../../src/api/client";
import type { ModelInfo } from "../../src/api/schema";
import { NO_PRIOR } from "../../src/model/protocols";
import { Comparison } from "../../src/state/comparison.svelte";
import { Crosshair } from "../../src/state/crosshair.svelte";
import { Display } from "../../src/state/display.svelte";
import { Log } from "../../src/state/log.svelte";
import { Study } from "../../src/state/study.svelte";
import { bytes, json } from "./fixtures";

const [OWN] = json("models") as readonly [ModelInfo];
const OTHER = { ...OWN, name: "another", default: false };
const TABLES = ["activations", "tokens", "neurons", "predictions"];

interface Job {
  readonly id: string;
  state: string;
  readonly model: unknown;
  readonly request: Readonly<Record<string, unknown>>;
  readonly links: object;
}

/** A service whose scans are finished when they are asked for, until it is told to be slow. */
class Service {
  isSlow = false;
  /** Whether anatomies have to be measured first. */
  isBusy = false;
  /** Answers that let themselves be waited for, by path. */
  readonly gates = new Map<string, Promise<void>>();
  readonly #jobs: Job[] = [];
  readonly #ends = new Map<string, (state: string) => void>();

  readonly fetch = ((path: string, init: RequestInit = {}) =>
    this.#answer(path, init)) as typeof fetch;

  async #answer(path: string, { body, signal }: RequestInit): Promise<Response> {
    await this.gates.get(path);
    if (path === "/api/models") return Response.json([OWN, OTHER]);
    if (path === "/api/tokenize") return Response.json({ ids: [], texts: [], spans: [] });
    if (path.startsWith("/api/scan/")) {
      const mode = path.endsWith("/structural") ? "T1" : "fMRI";
      if (this.isSlow && mode !== "T1") await untilAborted(signal);
      const request = { scan_mode: mode, ...(JSON.parse(body as string) as object) };
      return Response.json(this.job(request, this.isBusy ? "queued" : "succeeded"));
    }
    const [, , , id = "", what, table = ""] = path.split("/");
    if (what === undefined) return Response.json(this.#jobs[Number(id)]);
    if (what === "manifest") return Response.json(this.#manifest(id));
    if (what === "events") return this.#events(id, signal);
    return new Response(bytes(table));
  }

  job(request: Readonly<Record<string, unknown>>, state = "succeeded"): Job {
    const id = String(this.#jobs.length);
    const job = { id, state, model: request["model"] ?? OWN.name, request, links: {} };
    this.#jobs.push(job);
    return job;
  }

  #events(id: string, signal: AbortSignal | null | undefined): Response {
    const body = new ReadableStream<Uint8Array>({
      start: (stream) => {
        signal?.addEventListener("abort", () => stream.error(signal.reason));
        this.#ends.set(id, (state) => {
          const event = { type: "ended", state, problem: null };
          stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\n\n`));
        });
      },
    });
    return new Response(body);
  }

  /** Ends a job, once somebody reads along. */
  async end(job: Job, state: string): Promise<void> {
    await vi.waitFor(() => expect(this.#ends.has(job.id)).toBe(true));
    job.state = state;
    this.#ends.get(job.id)?.(state);
  }

  /** Lets the answers at a path wait until they are let go. */
  hold(path: string): () => void {
    let release: () => void = () => undefined;
    this.gates.set(path, new Promise((resolve) => (release = resolve)));
    return release;
  }

  #manifest(id: string) {
    const request = this.#jobs[Number(id)]?.request ?? {};
    const { revision, numerics } = OWN;
    const kind = request["scan_mode"];
    const tables = (kind === "T1" ? ["topology", "parameters"] : TABLES).map((name) => ({ name }));
    return { kind, model: request["model"], revision, numerics, request, tables };
  }
}

function untilAborted(signal: AbortSignal | null | undefined): Promise<never> {
  return new Promise((_, reject) => {
    const stop = () => reject(new DOMException("Given up", "AbortError"));
    signal?.addEventListener("abort", stop, { once: true });
  });
}

let service: Service;
let study: Study;

/** A finished scan, and one on its way. */
async function begun(): Promise<{ readonly running: Promise<void> }> {
  await study.scan("fMRI", "/api/scan/activation", { prompt: "one" });
  expect(study.series.fMRI.status).toBe("ready");
  service.isSlow = true;
  return { running: study.scan("fMRI", "/api/scan/activation", { prompt: "two" }) };
}

beforeEach(async () => {
  service = new Service();
  study = new Study(new Client("", service.fetch), new Log());
  await study.begin();
});

test("a scan that is given up for another model leaves nothing of the old model behind", async () => {
  const { running } = await begun();
  await study.choose(OTHER.name);
  await running;
  expect(study.model?.name).toBe(OTHER.name);
  expect(study.series.fMRI).toEqual({ status: "absent" });
  expect(study.series.T1.status).toBe("ready");
  expect(study.jobs()).toEqual([]);
});

test("a series that is forgotten while it is taken again stays forgotten", async () => {
  const { running } = await begun();
  study.clear("fMRI");
  await running;
  expect(study.series.fMRI).toEqual({ status: "absent" });
});

test("a scan that is cancelled leaves the picture there was", async () => {
  const { running } = await begun();
  await study.cancel("fMRI");
  await running;
  expect(study.series.fMRI).toMatchObject({
    status: "ready",
    series: { acquisition: { prompt: "one" } },
  });
});

test("of two models that one is there as well which stands chosen before anybody chooses", async () => {
  const made = () =>
    new Comparison(new Client("", service.fetch), new Log(), study, new Display(), new Crosshair());
  const [hung, turned] = [made(), made()];
  await hung.restore({ ...NO_PRIOR, kind: "model" }, "T1");
  await turned.choose("model");
  for (const comparison of [hung, turned]) {
    const { other, prior } = comparison;
    expect(comparison.place().model).toBe(OWN.name);
    expect(other.series.T1.status).toBe("ready");
    expect(prior.field?.id).toBe("parameters");
  }
});

function scanned(prompt: string, change: object = {}): Job {
  return service.job({ scan_mode: "fMRI", prompt, ...change });
}

function shownPrompt(): unknown {
  const { fMRI } = study.series;
  return fMRI.status === "ready" ? fMRI.series.acquisition.prompt : fMRI.status;
}

test("what still runs is not waited for, and counts as taken here when it ends", async () => {
  const heard: unknown[] = [];
  study.listen({ finished: ({ sequence }, isRestored) => heard.push([sequence, isRestored]) });
  const running = service.job({ scan_mode: "fMRI", prompt: "one" }, "running");
  await study.visit(null, [running.id], "fMRI");
  expect(study.series.fMRI).toMatchObject({ status: "acquiring", job: running.id });
  await service.end(running, "succeeded");
  await vi.waitFor(() => expect(shownPrompt()).toBe("one"));
  await study.visit(null, [scanned("two").id], "fMRI");
  expect(heard).toEqual([
    ["fMRI", false],
    ["fMRI", true],
  ]);
});

test("an anatomy that has to be measured first is not waited for", async () => {
  service.isBusy = true;
  await study.choose(OTHER.name);
  expect(study.series.T1.status).toBe("acquiring");
});

test.each(["failed", "cancelled", "left for another model", "succeeded"])(
  "what holds the picture back ends with a scan that has %s",
  async (end) => {
    const running = service.job({ scan_mode: "fMRI", prompt: "one" }, "running");
    await study.visit(null, [running.id], "fMRI");
    study.hold(true);
    if (end.startsWith("left")) await study.choose(OTHER.name);
    else await service.end(running, end);
    if (end === "succeeded") study.hold(false);
    await vi.waitFor(() => expect(study.series.fMRI.status).not.toBe("acquiring"));
    expect(study.held).toBe(false);
  },
);

test("a scan that is taken in the place of one that was held back is seen", async () => {
  const running = service.job({ scan_mode: "fMRI", prompt: "one" }, "running");
  await study.visit(null, [running.id], "fMRI");
  study.hold(true);
  await study.scan("fMRI", "/api/scan/activation", { prompt: "two" });
  expect(study.held).toBe(false);
  expect(shownPrompt()).toBe("two");
});

test.each([0, 1])(
  "of two places gone to at once the last one stands, answer %i late",
  async (late) => {
    const jobs = [scanned("one"), scanned("two")].map(({ id }) => id);
    const release = service.hold(`/api/jobs/${jobs[late]}`);
    const visits = jobs.map((job) => study.visit(null, [job], "fMRI"));
    await visits[1 - late];
    release();
    await Promise.all(visits);
    expect(shownPrompt()).toBe("two");
  },
);

test.each([0, 1])("and where they are of two models, answer %i late", async (late) => {
  const jobs = [scanned("one"), scanned("two", { model: OTHER.name })].map(({ id }) => id);
  const release = service.hold(`/api/jobs/${jobs[late]}`);
  const visits = jobs.map((job) => study.visit(null, [job], "fMRI"));
  await visits[1 - late];
  release();
  await Promise.all(visits);
  expect([study.model?.name, shownPrompt()]).toEqual([OTHER.name, "two"]);
});

test("a scan that is begun while a place is asked for is not given up for it", async () => {
  for (const model of [OWN.name, OTHER.name]) {
    const { id } = scanned("kept", { model });
    const release = service.hold(`/api/jobs/${id}`);
    const visit = study.visit(null, [id], "fMRI");
    await study.scan("fMRI", "/api/scan/activation", { prompt: "new" });
    release();
    await visit;
    expect([study.model?.name, shownPrompt()]).toEqual([OWN.name, "new"]);
  }
});

test("a model that is chosen while a place is asked for stays", async () => {
  const { id } = scanned("kept", { model: OTHER.name });
  const release = service.hold("/api/scan/structural");
  const visit = study.visit(OTHER.name, [id], "fMRI");
  expect(study.chosen).toBe(OTHER.name);
  const chosen = study.choose(OWN.name);
  release();
  await Promise.all([visit, chosen]);
  expect(study.model?.name).toBe(OWN.name);
  expect(study.series.fMRI.status).toBe("absent");
});

test("a place of no model is the default model's, unless its scans are another's", async () => {
  await study.choose(OTHER.name);
  await study.visit(null, [], "T1");
  expect(study.model?.name).toBe(OWN.name);
  const { id } = scanned("one", { model: OTHER.name });
  for (const model of [null, OWN.name]) {
    await study.choose(OWN.name);
    await study.visit(model, [id], "fMRI");
    expect([study.model?.name, shownPrompt()]).toEqual([OTHER.name, "one"]);
  }
  // Whatever an address says of the model, a scan is of its own.
  const own = scanned("two");
  await study.choose(OWN.name);
  await study.visit(OTHER.name, [own.id], "fMRI");
  expect([study.model?.name, shownPrompt()]).toEqual([OWN.name, "two"]);
});
