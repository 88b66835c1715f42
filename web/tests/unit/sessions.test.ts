import { readFileSync } from "node:fs";

import { tableFromIPC } from "apache-arrow";
import { expect, test } from "vitest";

import { Client } from "../../src/api/client";
import { Refusal } from "../../src/api/refusals";
import { loadStructural } from "../../src/model/series";
import { load as loadActivations } from "../../src/model/modes/activations";
import { topologyOf } from "../../src/model/topology";
import { DamagedFile, readNmri } from "../../src/sessions/nmri";
import { Shelf } from "../../src/sessions/shelf";
import { fragmentOf, isBare, renamed, viewOf } from "../../src/sessions/view";
import { conflict } from "../../src/sessions/wire";
import { START, decode } from "../../src/state/url";
import { json } from "./fixtures";

const SAID = json("session") as {
  readonly revision: string;
  readonly results: readonly [string, string];
  readonly tables: Readonly<Record<string, number>>;
};
const [STRUCTURE, ACTIVITY] = SAID.results;

/** The file that Python wrote, in a buffer of its own. */
function file(): Uint8Array<ArrayBuffer> {
  return new Uint8Array(readFileSync(new URL("../fixtures/data/session.nmri", import.meta.url)));
}

/** Where a text stands in the file, from a place on. */
function find(bytes: Uint8Array, text: string, from = 0): number {
  return Buffer.from(bytes.buffer).indexOf(text, from);
}

async function refusal(bytes: Uint8Array<ArrayBuffer>): Promise<DamagedFile> {
  const error: unknown = await readNmri(bytes.buffer).catch((e: unknown) => e);
  if (!(error instanceof DamagedFile)) throw new Error(`Not refused: ${String(error)}`);
  return error;
}

test("a session's file reads as Python wrote it", async () => {
  const found = await readNmri(file().buffer);
  expect(found.name).toBe("Eiffel");
  expect(found.revision).toBe(SAID.revision);
  expect([...found.results.keys()].sort()).toEqual([...SAID.results].sort());
  expect(found.document.scans.map(({ kind, label }) => [kind, label])).toEqual([
    ["T1", ""],
    ["fMRI", "clean"],
  ]);
  expect(found.document.notes[0]).toMatchObject({
    text: "에펠: layer 21 writes the city",
    scan: ACTIVITY,
    component: null,
    position: 2,
  });
  const sizes = [...found.results.values()].flatMap(({ chunks }) =>
    [...chunks].map(([digest, body]) => [`chunks/${digest}.arrow`, body.length] as const),
  );
  expect(Object.fromEntries(sizes)).toEqual(SAID.tables);
});

test("one changed byte of any entry is refused by the entry's name", async () => {
  const entries = [
    "session.json",
    `results/${ACTIVITY}.json`,
    ...Object.keys(SAID.tables).slice(0, 2),
  ];
  for (const entry of entries) {
    const bytes = file();
    const at = find(bytes, entry, find(bytes, "PK\x03\x04", 4)) + entry.length + 10;
    bytes[at] = (bytes[at] ?? 0) ^ 1;
    const error = await refusal(bytes);
    expect(error.entry, entry).toBe(entry);
    expect(error.message).toContain(entry);
  }
});

test("a byte that was changed together with its checksum is still not the one that was named", async () => {
  const bytes = file();
  const entry = "session.json";
  const start = find(bytes, entry, find(bytes, "PK\x03\x04", 4)) + entry.length;
  bytes[start + 10] = (bytes[start + 10] ?? 0) ^ 1;
  const view = new DataView(bytes.buffer);
  const central = find(bytes, entry, find(bytes, "PK\x01\x02")) - 46;
  expect(view.getUint32(central, true)).toBe(0x02014b50);
  const size = view.getUint32(central + 24, true);
  view.setUint32(central + 16, crc(bytes.subarray(start, start + size)), true);
  const error = await refusal(bytes);
  expect(error.entry).toBe(entry);
  expect(error.message).toContain(SAID.revision.slice(0, 12));
});

function crc(bytes: Uint8Array): number {
  let value = 0xffffffff;
  for (const byte of bytes) {
    value ^= byte;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  }
  return ~value >>> 0;
}

test("what was cut short, or is no zip at all, is refused in words", async () => {
  const whole = file();
  for (const length of [0, 10, 200, 5000, whole.length - 1, whole.length - 30]) {
    const error = await refusal(whole.slice(0, length));
    expect(error.message, String(length)).toMatch(/no \.nmri file, or it was cut short/);
  }
  expect((await refusal(new TextEncoder().encode("<html>".repeat(50)))).message).toMatch(
    /no \.nmri/,
  );
});

test("a list of parts that points outside of the file is damage, not a crash", async () => {
  const bytes = file();
  new DataView(bytes.buffer).setUint32(bytes.length - 22 + 16, bytes.length - 8, true);
  expect((await refusal(bytes)).message).toMatch(/points nowhere/);
});

test("names that are no session's are refused, whatever is behind them", async () => {
  const bytes = file();
  for (const before of ["PK\x03\x04", "PK\x01\x02"]) {
    const at = find(bytes, "session.json", find(bytes, before, before === "PK\x03\x04" ? 4 : 0));
    bytes.set(new TextEncoder().encode("../evil.json"), at);
  }
  expect((await refusal(bytes)).message).toMatch(/holds \.\.\/evil\.json/);
});

test("a newer version is refused by its number", async () => {
  const bytes = file();
  const at = find(bytes, '"version":1');
  bytes[at + '"version":'.length] = "7".charCodeAt(0);
  const view = new DataView(bytes.buffer);
  const central = find(bytes, "manifest.json", find(bytes, "PK\x01\x02")) - 46;
  const size = view.getUint32(central + 24, true);
  const start = find(bytes, "manifest.json") + "manifest.json".length;
  view.setUint32(central + 16, crc(bytes.subarray(start, start + size)), true);
  expect((await refusal(bytes)).message).toMatch(/manifest\.json is of version 7/);
});

/** A client that may ask nobody. */
async function onTheShelf(): Promise<{ client: Client; shelf: Shelf; asked: string[] }> {
  const asked: string[] = [];
  const client = new Client("", ((path: string) => {
    asked.push(path);
    return Promise.reject(new TypeError("no network"));
  }) as typeof fetch);
  const shelf = new Shelf();
  shelf.take(await readNmri(file().buffer));
  client.kept = (path, init) => shelf.answer(path, init);
  return { client, shelf, asked };
}

test("kept scans are answered without a service, and equal what apache-arrow reads in them", async () => {
  const { client, asked } = await onTheShelf();
  const job = await client.job(ACTIVITY);
  expect(job).toMatchObject({ id: ACTIVITY, state: "succeeded", request: { scan_mode: "fMRI" } });
  const manifest = await client.manifest(ACTIVITY);
  const table = (name: string) => client.table(ACTIVITY, name);
  const series = await loadActivations(manifest, ACTIVITY, table);
  expect(series.complete).toBe(true);
  const oracle = tableFromIPC(new Uint8Array(await table("activations")));
  const rows = oracle.getChild("component")?.toArray() as string[] | undefined;
  expect(series.fields[0]?.volume.components).toEqual([...(rows ?? [])]);
  expect(series.tokens).toHaveLength(10);
  await loadStructural(await client.manifest(STRUCTURE), STRUCTURE, (name) =>
    client.table(STRUCTURE, name),
  );
  const again = await client.submit("/api/scan/structural", { model: job.model });
  expect(again.id).toBe(STRUCTURE);
  expect(asked).toEqual([]);
});

test("what a session does not keep is said, and what is none of its business is asked for", async () => {
  const { client, asked } = await onTheShelf();
  await expect(client.table(ACTIVITY, "neurons")).rejects.toThrow(/holds no table neurons/);
  await expect(client.attention(ACTIVITY, 3)).rejects.toThrow(/holds no table attention\.3/);
  expect(asked).toEqual([]);
  await expect(client.job("01930000-0000-7000-8000-00000000000a")).rejects.toThrow(Refusal);
  await expect(client.submit("/api/scan/structural", { model: "another" })).rejects.toThrow();
  expect(asked).toHaveLength(2);
});

test("a result that was just saved is read where its job has it", async () => {
  const { client, shelf, asked } = await onTheShelf();
  const digest = "ab".repeat(32);
  shelf.name(digest, "01930000-0000-7000-8000-00000000000a");
  await client.table(digest, "tokens").catch(() => null);
  expect(asked).toEqual(["/api/jobs/01930000-0000-7000-8000-00000000000a/result/tokens"]);
});

test("the model's shape is T1's, or what the rows of another scan tell", async () => {
  const { shelf } = await onTheShelf();
  const [model] = json("models") as [{ name: string; architecture: { n_kv_heads: number } }];
  const [known] = shelf.models();
  expect(known).toMatchObject({ name: model.name, architecture: model.architecture });
  const found = await readNmri(file().buffer);
  const less = new Shelf();
  const scans = found.document.scans.filter(({ kind }) => kind === "fMRI");
  less.take({ ...found, document: { ...found.document, scans } });
  const [told] = less.models();
  if (told === undefined || known === undefined) throw new Error("No model was told");
  expect(topologyOf(told.architecture).addresses).toEqual(topologyOf(known.architecture).addresses);
});

test("a view goes into a session and comes back with its scans by number", () => {
  const jobs = ["aa".repeat(32), "01930000-0000-7000-8000-00000000000a"];
  const fragment =
    `seq=fMRI&model=m&job=${jobs[1]}&job=gone&prompt=1%2C2+%26+%22quoted%22&token=3&` +
    `focus=blocks.3.mlp&zoom=2%2C0.25%2C0.5&prior=scan&prior.job=${jobs[0]}&fMRI.wl=2.5%2C-1e-7&` +
    "do=zero~blocks.1.mlp&do=noise~embed~0.5~";
  const view = viewOf(fragment, (job) => jobs.indexOf(job));
  expect(view).toMatchObject({ job: [1], "prior.job": [0], token: [3], zoom: [2, 0.25, 0.5] });
  const back = decode(fragmentOf(view, (index) => jobs[index]));
  expect(back).toEqual({ ...decode(fragment), jobs: [jobs[1]] });
});

test("no secret and no session's id goes into a view", () => {
  const view = viewOf("seq=T2&session=s&revision=r&shared=token&prior.session=p", () => 0);
  expect(view).toEqual({ seq: "T2" });
});

test("a view whose texts were taken out is what its numbers and plain words still say", () => {
  const view = {
    seq: "fMRI",
    job: [0],
    prompt: "[redacted]",
    zoom: [2, 0.5, 0.5],
    do: "[redacted]",
    "[redacted]": "[redacted]",
    layer: { of: "another program" },
  };
  const place = decode(fragmentOf(view, () => "digest"));
  expect(place).toMatchObject({ sequence: "fMRI", jobs: ["digest"], stimuli: [] });
  expect(place.zoom.scale).toBe(2);
});

test("an address that only names a session is one, and one with a view in it is not", () => {
  expect(isBare(decode("session=01a208e5-620a-7f6d-98da-3f510d18b436"), START)).toBe(true);
  expect(isBare(decode("shared=abc&revision=def"), START)).toBe(true);
  expect(isBare(decode("session=a&token=3"), START)).toBe(false);
});

test("scans in an address are called by their results, those beside among them", () => {
  const there = renamed("seq=fMRI&job=a&job=b&prior=scan&prior.job=c", (job) => job.toUpperCase());
  expect(decode(there).jobs).toEqual(["A", "B"]);
  expect(decode(there).prior.jobs).toEqual(["C"]);
});

test("a refused save names the revision that stands now", () => {
  const refused = new Refusal({ title: "Saved since", status: 412, head: "ab" } as never);
  expect(conflict(refused)).toBe("ab");
  expect(conflict(new Refusal({ title: "Not found", status: 404 }))).toBeNull();
  expect(conflict(new Error("x"))).toBeNull();
});
