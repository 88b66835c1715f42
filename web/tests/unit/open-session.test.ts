/** What is done with an open session: by a viewer that nobody looks at, over a service that does as it is told. */
import { readFileSync } from "node:fs";

import { beforeEach, expect, test, vi } from "vitest";

import { Client } from "../../src/api/client";
import type { ModelInfo } from "../../src/api/schema";
import { readNmri } from "../../src/sessions/nmri";
import type * as Nmri from "../../src/sessions/nmri";
import type { Sessions } from "../../src/sessions/sessions.svelte";
import type { Note, SessionDocument } from "../../src/sessions/wire";
import type { Series } from "../../src/model/series";
import { viewOf } from "../../src/state/places";
import { Room } from "../../src/state/room.svelte";
import { decode } from "../../src/state/url";
import { json } from "./fixtures";

const SAID = json("session") as {
  readonly revision: string;
  readonly results: readonly [string, string];
};
const [STRUCTURE, ACTIVITY] = SAID.results;
const ID = "01a208e5-620a-7f6d-98da-3f510d18b436";
const OTHER = "01a208e5-620a-7f6d-98da-3f510d18b437";
const NEW = "01930000-0000-7000-8000-00000000000a";
const FILE = new Uint8Array(readFileSync(new URL("../fixtures/data/session.nmri", import.meta.url)))
  .buffer;

/** Results that nobody had added yet when a file was written. */
let later: readonly string[] = [];
vi.mock("../../src/sessions/nmri", async (original) => {
  const all = await original<typeof Nmri>();
  const readNmri = async (bytes: ArrayBuffer): Promise<Nmri.NmriFile> => {
    const { document, results, ...rest } = await all.readNmri(bytes);
    const scans = document.scans.filter(({ result }) => !later.includes(result));
    const kept = [...results].filter(([result]) => !later.includes(result));
    return { ...rest, document: { ...document, scans }, results: new Map(kept) };
  };
  return { ...all, readNmri };
});

type Answer = (init: RequestInit) => unknown;

/** What the service was asked, but for what any opening asks; and what it answers, by method and path. */
class Service {
  readonly asked: string[] = [];
  readonly answers = new Map<string, Answer>();

  readonly fetch = (async (path: string, init: RequestInit = {}) => {
    const asked = `${init.method ?? "GET"} ${path}`;
    this.asked.push(asked);
    if (path.endsWith("/events")) return this.#events(init);
    const answer = await this.answers.get(asked)?.(init);
    if (answer instanceof Response) return answer;
    if (answer instanceof ArrayBuffer) return new Response(answer);
    return answer === undefined ? problem(404, "No such thing") : Response.json(answer);
  }) as typeof fetch;

  #tell: (event: object) => void = () => undefined;

  #events({ signal }: RequestInit): Response {
    const body = new ReadableStream<Uint8Array>({
      start: (stream) => {
        this.#tell = (event) =>
          stream.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\n\n`));
        signal?.addEventListener("abort", () => stream.close());
      },
    });
    return new Response(body);
  }

  /** Tells whoever follows that somebody has saved. */
  saved(number: number, revision: string): void {
    this.#tell({ type: "saved", number, revision, name: "Eiffel", author: "ada", added: [] });
  }

  on(asked: string, answer: Answer): void {
    this.answers.set(asked, answer);
  }

  /** Keeps a session, as `session.nmri` has it. */
  async keep(id: string): Promise<void> {
    const { document } = await readNmri(FILE);
    this.on(`GET /api/sessions/${id}`, () => detail(id, document));
    this.on(`GET /api/sessions/${id}/export`, () => FILE.slice(0));
  }

  /** How often something was asked. */
  count(asked: string): number {
    return this.asked.filter((each) => each === asked).length;
  }
}

function problem(status: number, title: string): Response {
  const headers = { "Content-Type": "application/problem+json" };
  return new Response(JSON.stringify({ title, status }), { status, headers });
}

function detail(id: string, document: SessionDocument, change: object = {}): object {
  const [opened, head] = [SAID.revision, SAID.revision];
  return { id, name: "Eiffel", document, opened, head, revision: 1, arriving: [], ...change };
}

/** Revision 2 of the session, with what a save sends in it. */
function second({ body }: RequestInit, document: SessionDocument): object {
  const { notes } = JSON.parse(body as string) as SessionDocument;
  const opened = "02".repeat(32);
  return detail(ID, { ...document, notes }, { revision: 2, opened, head: opened });
}

interface Opened {
  readonly room: Room;
  readonly sessions: Sessions;
}

/** A viewer, as a page that is loaded makes one. */
async function viewer(service: Service): Promise<Opened> {
  const room = new Room(new Client("", service.fetch));
  // Nobody listens, and outside of a browser nothing that is derived is remembered: it would take seconds.
  room.describe = () => "";
  room.reading.hottest = () => -1;
  return { room, sessions: await room.withSessions() };
}

async function opened(service: Service, id = ID): Promise<Opened> {
  await service.keep(id);
  const made = await viewer(service);
  expect(await made.sessions.openOwn(id), made.sessions.problem).toBe(true);
  return made;
}

/** A scan that has just been taken, of what the session's own is of. */
function took(room: Room, job = NEW): Series {
  const state = room.study.series.fMRI;
  if (state.status !== "ready") throw new Error("There is no scan to take again");
  const acquisition = { ...state.series.acquisition, job };
  const series = { ...state.series, acquisition };
  room.study.series = { ...room.study.series, fMRI: { status: "ready", series } };
  return series;
}

function note(text: string): Note {
  return { text, scan: null, component: null, position: null, author: "" };
}

/** Waits until the viewer hears what happens to the session. */
async function followed(of: Service): Promise<void> {
  await vi.waitFor(() => expect(of.count(`GET /api/sessions/${ID}/events`)).toBe(1));
}

/** Lets everything that can go on go on. */
async function soon(): Promise<void> {
  for (let turn = 0; turn < 10; turn++) await new Promise((resolve) => setTimeout(resolve));
}

let service: Service;
beforeEach(() => {
  later = [];
  service = new Service();
  const kept = new Map<string, string>();
  vi.stubGlobal("requestAnimationFrame", () => 0);
  vi.stubGlobal("sessionStorage", {
    getItem: (name: string) => kept.get(name) ?? null,
    setItem: (name: string, value: string) => kept.set(name, value),
    removeItem: (name: string) => kept.delete(name),
    clear: () => kept.clear(),
  });
});

const ADDED = `POST /api/sessions/${ID}/scans`;

test("scans that were taken here join, and those that were only shown do not", async () => {
  const { room, sessions } = await opened(service);
  sessions.join(true);
  await sessions.show(ACTIVITY);
  const { T1 } = room.study.series;
  if (T1.status !== "ready") throw new Error("There is no anatomy");
  const acquisition = { ...T1.series.acquisition, job: NEW };
  sessions.scanned({ ...T1.series, acquisition });
  await soon();
  expect(service.count(ADDED)).toBe(0);
  expect(sessions.problem).toBe("");
  sessions.scanned(took(room));
  await vi.waitFor(() => expect(service.count(ADDED)).toBe(1));
});

test("scans that join one session join no other", async () => {
  const { room, sessions } = await opened(service);
  await service.keep(OTHER);
  sessions.join(true);
  await sessions.openOwn(OTHER);
  expect(sessions.joins).toBe(false);
  sessions.scanned(took(room));
  await soon();
  expect(service.asked.filter((asked) => asked.startsWith("POST"))).toEqual([]);
  sessions.join(true);
  service.on(`DELETE /api/sessions/${OTHER}`, () => ({}));
  await sessions.remove(OTHER);
  expect(sessions.joins).toBe(false);
});

test("what was noted before anything was saved outlives a reload of the page, until it is undone", async () => {
  const before = await viewer(service);
  before.sessions.open.add(note("not saved anywhere"));
  before.sessions.open.call(NEW, "clean");
  const after = await viewer(service);
  expect(after.sessions.open.notes).toEqual([note("not saved anywhere")]);
  expect(after.sessions.open.labelOf(NEW)).toBe("clean");
  expect(after.sessions.isUnsaved).toBe(true);
  after.sessions.undo();
  expect((await viewer(service)).sessions.open.notes).toEqual([]);
});

test("what was noted in a session outlives a page that was loaded with another", async () => {
  const before = await opened(service);
  before.sessions.open.add(note("mine"));
  await opened(service, OTHER);
  const after = await opened(service);
  expect(after.sessions.open.notes).toContainEqual(note("mine"));
  expect(after.sessions.isUnsaved).toBe(true);
  // What was given up for another session is given up.
  await after.sessions.giveUp(() => after.sessions.openOwn(OTHER));
  expect((await opened(service)).sessions.isUnsaved).toBe(false);
});

test("what was marked outlives a page that was loaded with another session, until it is given up", async () => {
  const mark = (room: Room, title: string) =>
    room.images.mark({ view: "seq=fMRI", title, thumbnail: "" });
  const marked = ({ room }: Opened) => room.images.all.map(({ title }) => title);
  const before = await viewer(service);
  mark(before.room, "of no session");
  const first = await opened(service);
  expect(marked(first)).toHaveLength(1);
  expect(first.sessions.isUnsaved).toBe(false);
  mark(first.room, "mine");
  expect(marked(await opened(service, OTHER))).not.toContain("mine");
  const again = await opened(service);
  expect(marked(again)).toContain("mine");
  expect(again.sessions.isUnsaved).toBe(true);
  // What is nowhere saved is there once more where no session is, also without another load.
  await again.sessions.giveUp(() => again.sessions.openOwn(OTHER));
  again.sessions.begin();
  expect(marked(again)).toEqual(["of no session"]);
  const given = await opened(service);
  expect(marked(given)).not.toContain("mine");
  expect(given.sessions.isUnsaved).toBe(false);
  const after = await viewer(service);
  expect(marked(after)).toEqual(["of no session"]);
  after.sessions.undo();
  expect(marked(await viewer(service))).toEqual([]);
});

test("what was marked while others add to a session is marked still after a reload", async () => {
  const { document } = await readNmri(FILE);
  later = [ACTIVITY];
  const { room, sessions } = await opened(service);
  await followed(service);
  room.images.mark({ view: "seq=fMRI", title: "mine", thumbnail: "" });
  later = [];
  service.on(`GET /api/sessions/${ID}`, () => detail(ID, document, { revision: 2, opened: "02" }));
  service.saved(2, "02");
  await vi.waitFor(() => expect(sessions.arrived).toEqual([ACTIVITY]));
  expect(sessions.isUnsaved).toBe(true);
  const after = await opened(service);
  expect(after.room.images.all.map(({ title }) => title)).toContain("mine");
});

test("what was noted before a first save is in what was saved, and nowhere else", async () => {
  const { sessions } = await viewer(service);
  sessions.open.add(note("mine"));
  const { document } = await readNmri(FILE);
  service.on("POST /api/sessions", () =>
    detail(ID, { ...document, scans: [], notes: [note("mine")], key_images: [] }),
  );
  expect(await sessions.save(), sessions.problem).toBe(true);
  expect((await viewer(service)).sessions.isUnsaved).toBe(false);
});

test("a view says of which model it is, also where that is the service's own", async () => {
  const { room } = await viewer(service);
  const value = json("models") as readonly ModelInfo[];
  room.study.models = { status: "ready", value };
  expect(room.place().model).toBeNull();
  expect(decode(viewOf(room)).model).toBe(value[0]?.name);
});

test("a note that is written while the first save is under way loses none", async () => {
  const { sessions } = await viewer(service);
  sessions.open.add(note("before"));
  const { document } = await readNmri(FILE);
  service.on("POST /api/sessions", () => {
    sessions.open.add(note("meanwhile"));
    return detail(ID, { ...document, scans: [], notes: [note("before")], key_images: [] });
  });
  expect(await sessions.save(), sessions.problem).toBe(true);
  expect(sessions.open.notes.map(({ text }) => text)).toEqual(["before", "meanwhile"]);
  expect(sessions.isUnsaved).toBe(true);
});

test("a scan that came in with one's own save is shown as any other", async () => {
  const { document } = await readNmri(FILE);
  later = [ACTIVITY];
  const { sessions } = await opened(service);
  expect(sessions.open.document.scans.map(({ result }) => result)).toEqual([STRUCTURE]);
  sessions.open.add(note("mine"));
  later = [];
  service.on(`PUT /api/sessions/${ID}`, (init) => second(init, document));
  service.on(`GET /api/sessions/${ID}/export?revision=${"02".repeat(32)}`, () => FILE.slice(0));
  expect(await sessions.save(), sessions.problem).toBe(true);
  expect(sessions.arrived).toEqual([ACTIVITY]);
  await sessions.show(ACTIVITY);
  expect(service.asked.filter((asked) => asked.includes("/api/jobs"))).toEqual([]);
});

test("a save that ends while another's is being read stands", async () => {
  const { sessions } = await opened(service);
  const { document } = await readNmri(FILE);
  await followed(service);
  let read: (answer: object) => void = () => undefined;
  service.on(`GET /api/sessions/${ID}`, () => new Promise((resolve) => (read = resolve)));
  service.saved(2, "01".repeat(32));
  await vi.waitFor(() => expect(service.count(`GET /api/sessions/${ID}`)).toBe(2));
  sessions.open.add(note("mine"));
  service.on(`PUT /api/sessions/${ID}`, (init) => ({ ...second(init, document), revision: 3 }));
  expect(await sessions.save(), sessions.problem).toBe(true);
  read(detail(ID, document, { revision: 2, opened: "01".repeat(32) }));
  await vi.waitFor(() => expect(service.count(`GET /api/sessions/${ID}/export`)).toBe(2));
  await soon();
  expect(sessions.open.revision).toBe("02".repeat(32));
  expect(sessions.open.notes).toContainEqual(note("mine"));
  expect(sessions.isUnsaved).toBe(false);
});

test("who asks twice for a save gets one, whatever it has to wait for", async () => {
  const document = { ...(await readNmri(FILE)).document, scans: [] };
  const { sessions } = await viewer(service);
  sessions.open.add(note("mine"));
  service.on("POST /api/sessions", () => detail(ID, document));
  const made = await Promise.all([sessions.save(), sessions.save()]);
  expect(made, sessions.problem).toEqual([true, false]);
  expect(service.count("POST /api/sessions")).toBe(1);
  expect(sessions.busy).toBe("");

  // A name that is on its way to the service is nothing that a person sees.
  let named: (answer: object) => void = () => undefined;
  service.on(`PATCH /api/sessions/${ID}`, () => new Promise((resolve) => (named = resolve)));
  service.on(`PUT /api/sessions/${ID}`, (init) => second(init, document));
  const renamed = sessions.rename("Eiffel");
  const [first, again] = [sessions.save(), sessions.save()];
  await vi.waitFor(() => expect(service.count(`PATCH /api/sessions/${ID}`)).toBe(1));
  named({ name: "Eiffel" });
  await renamed;
  expect(await Promise.all([first, again]), sessions.problem).toEqual([true, false]);
  expect(service.count(`PUT /api/sessions/${ID}`)).toBe(1);
  expect(sessions.problem).toBe("");
});

test("who asks twice for a fork gets one", async () => {
  const { sessions } = await opened(service);
  const { document } = await readNmri(FILE);
  service.on(`POST /api/sessions/${ID}/fork`, () => detail(OTHER, document));
  expect(await Promise.all([sessions.saveAs("Mine"), sessions.saveAs("Mine")])).toEqual([
    true,
    false,
  ]);
  expect(service.count(`POST /api/sessions/${ID}/fork`)).toBe(1);
});

test("a scan that was taken in a session is undone, and what stood in its place is back", async () => {
  const { room, sessions } = await opened(service);
  took(room);
  expect(sessions.isUnsaved).toBe(true);
  sessions.undo();
  expect(sessions.isUnsaved).toBe(false);
  await vi.waitFor(() => expect(room.study.jobs()).toEqual([ACTIVITY]));
});

test("a session closes with scans that it does not hold: they stay on the screen", async () => {
  const { room, sessions } = await opened(service);
  took(room);
  sessions.open.add(note("written"));
  sessions.begin();
  expect(sessions.problem).toMatch(/not saved yet/);
  sessions.open.erase(1);
  sessions.begin();
  expect(sessions.open.origin.kind).toBe("new");
  expect(room.study.jobs()).toEqual([NEW]);
});

test("a scan that joined is the one that the session has, and not another beside it", async () => {
  const { document } = await readNmri(FILE);
  const other = await opened(new Service());
  const series = took(other.room);
  sessionStorage.clear();
  later = [ACTIVITY];
  const { room, sessions } = await opened(service);
  await followed(service);
  sessions.join(true);
  service.on(ADDED, () => detail(ID, document));
  const scan_key = document.scans.find(({ result }) => result === ACTIVITY)?.scan_key;
  service.on(`GET /api/jobs/${NEW}/manifest`, () => ({ scan_key }));
  room.study.series = { ...room.study.series, fMRI: { status: "ready", series } };
  expect(sessions.isUnsaved).toBe(true);
  sessions.scanned(series);
  await vi.waitFor(() => expect(room.study.jobs(), sessions.problem).toEqual([ACTIVITY]));
  later = [];
  service.on(`GET /api/sessions/${ID}`, () => detail(ID, document, { revision: 2, opened: "02" }));
  service.saved(2, "02");
  await vi.waitFor(() => expect(sessions.arrived).toEqual([ACTIVITY]));
  expect(sessions.open.scans.map(({ job }) => job)).toEqual([STRUCTURE, ACTIVITY]);
  expect(sessions.isUnsaved).toBe(false);
});
