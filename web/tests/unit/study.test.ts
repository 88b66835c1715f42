/** What is shown while scans run, and after they are given up. */
import { beforeEach, expect, test } from "vitest";

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

/** A service whose scans are finished when they are asked for, until it is told to be slow. */
class Service {
  isSlow = false;
  readonly #jobs: { readonly request: Readonly<Record<string, unknown>> }[] = [];

  readonly fetch = ((path: string, init: RequestInit = {}) =>
    this.#answer(path, init)) as typeof fetch;

  async #answer(path: string, { body, signal }: RequestInit): Promise<Response> {
    if (path === "/api/models") return Response.json([OWN, OTHER]);
    if (path === "/api/tokenize") return Response.json({ ids: [], texts: [], spans: [] });
    if (path.startsWith("/api/scan/")) {
      const mode = path.endsWith("/structural") ? "T1" : "fMRI";
      if (this.isSlow && mode !== "T1") await untilAborted(signal);
      return Response.json(this.#job({ scan_mode: mode, ...JSON.parse(body as string) }));
    }
    const [, , , id = "", , table = ""] = path.split("/");
    if (path.endsWith("/manifest")) return Response.json(this.#manifest(id));
    return new Response(bytes(table));
  }

  #job(request: Readonly<Record<string, unknown>>) {
    const id = String(this.#jobs.push({ request }) - 1);
    return { id, state: "succeeded", model: request["model"] ?? OWN.name, request, links: {} };
  }

  #manifest(id: string) {
    const { request } = this.#jobs[Number(id)] ?? { request: {} };
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
