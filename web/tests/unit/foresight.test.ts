import { expect, test } from "vitest";
import { Client } from "../../src/api/client";
import { foreseeing } from "../../src/api/foresight";
import { MODELS, STRUCTURAL as T1, structural } from "../../src/api/requests";
import { firstAsked } from "../../src/state/first";
import { START, decode, encode } from "../../src/state/url";

/** A service that answers each path with what it has there, and refuses what it lacks. */
function service(answers: Readonly<Record<string, unknown>> = {}) {
  const asked: string[] = [];
  const fetcher = ((path: string, init?: RequestInit) => {
    asked.push(`${init?.method ?? "GET"} ${path} ${String(init?.body ?? "")}`.trim());
    const status = path in answers || path === MODELS ? 200 : 404;
    return Promise.resolve(new Response(JSON.stringify(answers[path] ?? []), { status }));
  }) as typeof fetch;
  return { asked, fetcher };
}

/** Lets every answer come that is on its way. */
const rest = () => new Promise((resolve) => setTimeout(resolve));

const DONE = { id: "j1", state: "succeeded" };
const MANIFEST = {
  kind: "fMRI",
  tables: [{ name: "activations" }, { name: "tokens" }, { name: "attention/0" }],
};

test("what is foreseen is asked at once, and once", async () => {
  const { asked, fetcher } = service({ [T1]: { id: "j1", state: "queued" } });
  const client = new Client("", foreseeing([structural(null), { path: MODELS }], fetcher));
  expect(asked).toEqual([`POST ${T1} {}`, `GET ${MODELS}`]);
  expect(await client.structural(null, new AbortController().signal)).toEqual({
    id: "j1",
    state: "queued",
  });
  await client.models();
  expect(asked).toHaveLength(2);
});

test("what is asked again, or otherwise, is asked anew", async () => {
  const { asked, fetcher } = service({ [T1]: DONE });
  const client = new Client("", foreseeing([structural(null)], fetcher));
  await client.structural("another");
  await client.structural(null);
  await client.structural(null);
  expect(asked).toEqual([`POST ${T1} {}`, `POST ${T1} {"model":"another"}`, `POST ${T1} {}`]);
});

test("a foreseen request that fails is told to who needs it", async () => {
  const away = (() => Promise.reject(new TypeError("failed"))) as typeof fetch;
  const client = new Client("", foreseeing([{ path: MODELS }], away));
  await expect(client.models()).rejects.toThrow("The service cannot be reached");
});

test("a finished T1 leads to its manifest and tables, which nobody waits for twice", async () => {
  const tables = ["topology", "parameters"].map((name) => `/api/jobs/j1/result/${name}`);
  const paths = ["/api/jobs/j1/manifest", ...tables];
  const found = Object.fromEntries(paths.map((path) => [path, { of: path }]));
  const { asked, fetcher } = service({ [T1]: DONE, ...found });
  const client = new Client("", foreseeing(firstAsked(""), fetcher));
  await rest();
  const begun = [`POST ${T1} {}`, `GET ${MODELS}`, ...paths.map((path) => `GET ${path}`)];
  expect(asked).toEqual(begun);
  const { id } = await client.structural(null);
  expect(await client.manifest(id)).toEqual({ of: paths[0] });
  const table = await client.table(id, "topology");
  expect(JSON.parse(new TextDecoder().decode(table))).toEqual({ of: tables[0] });
  expect(asked).toEqual(begun);
});

test("a T1 that is not finished leads to nothing", async () => {
  const { asked, fetcher } = service({ [T1]: { id: "j1", state: "queued" } });
  foreseeing(firstAsked(""), fetcher);
  await rest();
  expect(asked).toEqual([`POST ${T1} {}`, `GET ${MODELS}`]);
});

test("a scan in the address leads to the tables that its picture is drawn from", async () => {
  const { asked, fetcher } = service({
    "/api/jobs/s1": { id: "s1", state: "succeeded" },
    "/api/jobs/s1/manifest": MANIFEST,
  });
  foreseeing(firstAsked("#job=s1"), fetcher);
  await rest();
  expect(asked.slice(2)).toEqual([
    "GET /api/jobs/s1",
    "GET /api/jobs/s1/manifest",
    "GET /api/jobs/s1/result/activations",
    "GET /api/jobs/s1/result/tokens",
  ]);
});

test("a manifest that was not there yet is asked for again by who needs it", async () => {
  const { asked, fetcher } = service();
  const answers: Record<string, unknown> = {};
  const changing = ((path: string, init?: RequestInit) =>
    path in answers
      ? Promise.resolve(new Response(JSON.stringify(answers[path])))
      : fetcher(path, init)) as typeof fetch;
  const client = new Client("", foreseeing(firstAsked("job=s1"), changing));
  await rest();
  expect(asked.filter((line) => line === "GET /api/jobs/s1/manifest")).toHaveLength(1);
  // The scan finishes, or who asks signs in, long after.
  answers["/api/jobs/s1/manifest"] = MANIFEST;
  expect(await client.manifest("s1")).toEqual(MANIFEST);
});

test("an address is read as the viewer reads it", () => {
  const fragment = encode({ ...START, model: "a model/b&c", jobs: ["s 1", "s2"] });
  const place = decode(fragment);
  const paths = firstAsked(`#${fragment}`).map(({ path }) => path);
  expect(firstAsked(`#${fragment}`)[0]).toMatchObject(structural(place.model));
  expect(paths.filter((path) => !path.includes("manifest")).slice(2)).toEqual(
    place.jobs.map((job) => `/api/jobs/${encodeURIComponent(job)}`),
  );
});

test("nothing is foreseen where a session is opened", () => {
  expect(firstAsked("session=01a2")).toEqual([]);
  expect(firstAsked("shared=t0k3n")).toEqual([]);
});
