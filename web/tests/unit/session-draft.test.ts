/** What is saved of an open session, and how a document that grew is told from one that was changed. */
import { readFileSync } from "node:fs";

import { beforeAll, expect, test } from "vitest";

import { Refusal } from "../../src/api/refusals";
import { besides, firstOf, grown, noted } from "../../src/sessions/document";
import { changes, draftOf, imageOf, names, type Asked } from "../../src/sessions/draft";
import { readNmri } from "../../src/sessions/nmri";
import type { SessionDetail, SessionDocument } from "../../src/sessions/wire";
import { decode } from "../../src/state/url";
import { json } from "./fixtures";

const SAID = json("session") as { readonly results: readonly [string, string] };
const [STRUCTURE, ACTIVITY] = SAID.results;
const FOREIGN = "fe".repeat(32);
const NEW = "01930000-0000-7000-8000-00000000000a";
const AGAIN = "01930000-0000-7000-8000-00000000000b";

let document: SessionDocument;
beforeAll(async () => {
  const bytes = readFileSync(new URL("../fixtures/data/session.nmri", import.meta.url));
  ({ document } = await readNmri(new Uint8Array(bytes).buffer));
});

/** The session as it was opened, but for what a test changes. */
function asked(change: Partial<Asked> = {}): Asked {
  return {
    document,
    left: [],
    scans: document.scans.map(({ result: job, kind, model }) => ({ job, kind, model })),
    images: document.key_images.map((image, index) => imageOf(image, index, document)),
    notes: document.notes,
    stimuli: [],
    view: `seq=fMRI&job=${ACTIVITY}`,
    labelOf: (job) => document.scans.find(({ result }) => result === job)?.label ?? "",
    isOurs: (job) => job === STRUCTURE || job === ACTIVITY,
    jobOf: () => null,
    keyOf: (job) => Promise.resolve(`key of ${job}`),
    structure: () => Promise.reject(new Error("Nobody is to be asked")),
    ...change,
  };
}

function scan(job: string, kind = "fMRI") {
  return { job, kind, model: "m" };
}

test("kept scans are named by their results, and what speaks of them by number", async () => {
  const { content, foreign } = await draftOf(asked());
  expect(content.scans).toEqual([
    { result: STRUCTURE, label: "" },
    { result: ACTIVITY, label: "clean" },
  ]);
  expect(content.notes).toEqual(document.notes);
  expect(content.view).toEqual({ seq: "fMRI", job: [1] });
  expect(content.key_images[0]).toMatchObject({
    caption: "the first one",
    scan: ACTIVITY,
    view: { seq: "fMRI", job: [1], focus: "blocks.3.attn.head_4", token: [2] },
  });
  expect(foreign).toEqual([]);
});

test("new scans come after by their jobs, an equal one once, and all that speaks of it follows", async () => {
  const { scans } = asked();
  const draft = await draftOf(
    asked({
      scans: [...scans, scan(NEW)],
      notes: [{ text: "here", scan: AGAIN, component: null, position: null, author: "" }],
      keyOf: () => Promise.resolve("one key"),
      view: `job=${NEW}&prior=scan&prior.job=${AGAIN}`,
    }),
  );
  expect(draft.content.scans.slice(2)).toEqual([{ job: NEW, label: "" }]);
  expect(draft.content.view).toMatchObject({ job: [2], "prior.job": [2] });
  expect(draft.content.notes[0]?.scan).toBe(NEW);
  const result = "cd".repeat(32);
  const saved = [...document.scans, { ...document.scans[1], result }];
  const { nameOf, taken } = names(draft, {
    document: { ...document, scans: saved },
  } as unknown as SessionDetail);
  expect([nameOf(NEW), nameOf(AGAIN), nameOf(ACTIVITY)]).toEqual([result, result, ACTIVITY]);
  expect(taken).toEqual([[result, NEW]]);
});

test("a scan that the session has by another name is not held twice", async () => {
  const key = document.scans[1]?.scan_key ?? "";
  const { scans } = asked();
  const { content, numberOf } = await draftOf(
    asked({ scans: [...scans, scan(NEW)], keyOf: () => Promise.resolve(key) }),
  );
  expect(content.scans).toHaveLength(2);
  expect(numberOf(NEW)).toBe(1);
});

test("what is taken out takes no note with it", async () => {
  const scans = asked().scans.slice(0, 1);
  const { content } = await draftOf(asked({ scans, left: [ACTIVITY] }));
  expect(content.scans).toEqual([{ result: STRUCTURE, label: "" }]);
  expect(content.notes).toMatchObject([{ scan: null, text: document.notes[0]?.text, position: 2 }]);
  expect(content.key_images).toMatchObject([{ scan: null, caption: "the first one" }]);
});

test("another session's scan is told, unless its job is known; an anatomy is asked for anew", async () => {
  const { scans } = asked();
  const told = await draftOf(asked({ scans: [...scans, scan(FOREIGN)] }));
  expect(told.foreign).toEqual([FOREIGN]);
  expect(told.content.scans).toHaveLength(2);
  const known = await draftOf(asked({ scans: [...scans, scan(FOREIGN)], jobOf: () => NEW }));
  expect(known.foreign).toEqual([]);
  expect(known.content.scans[2]).toEqual({ job: NEW, label: "" });
  expect(known.numberOf(FOREIGN)).toBe(2);
  const structure = (model: string) => Promise.resolve(model === "m" ? AGAIN : null);
  const anatomy = await draftOf(
    asked({
      scans: [scan(FOREIGN, "T1")],
      document: EMPTY,
      notes: [],
      images: [],
      view: "",
      structure,
    }),
  );
  expect(anatomy.content.scans).toEqual([{ job: AGAIN, label: "" }]);
});

test("a scan that still runs, or was cancelled, is no scan of a view and of a key image", async () => {
  const [image] = asked().images;
  if (image === undefined) throw new Error("There is no key image");
  const refused = (status: number) => () =>
    Promise.reject(new Refusal({ title: "The job has no result", status }));
  for (const status of [404, 409, 410]) {
    const { content } = await draftOf(
      asked({
        images: [{ ...image, view: `seq=fMRI&job=${NEW}&token=2` }],
        view: `job=${ACTIVITY}&job=${AGAIN}`,
        keyOf: refused(status),
      }),
    );
    expect(content.scans).toHaveLength(2);
    expect(content.view).toEqual({ job: [1] });
    expect(content.key_images).toMatchObject([{ scan: null, view: { job: [], token: [2] } }]);
  }
  // What the session is to hold, and what nobody could tell, is no matter of looks.
  const { scans } = asked();
  const holding = asked({ scans: [...scans, scan(NEW)], view: `job=${NEW}`, keyOf: refused(409) });
  await expect(draftOf(holding)).rejects.toThrow(/no result/);
  await expect(draftOf(asked({ view: `job=${NEW}`, keyOf: refused(0) }))).rejects.toThrow();
});

test("a scan that was deleted before anybody saved it is left out and told, and its note stays", async () => {
  const { scans } = asked();
  const about = (scan: string) => ({
    text: "here",
    scan,
    component: "blocks.1.mlp",
    position: 2,
    author: "",
  });
  for (const status of [404, 410]) {
    const { content, gone } = await draftOf(
      asked({
        scans: [...scans, scan(NEW)],
        notes: [about(ACTIVITY), about(NEW), about(AGAIN)],
        keyOf: () => Promise.reject(new Refusal({ title: "There is no such job", status })),
        labelOf: (job) => (job === AGAIN ? "corrupt" : ""),
      }),
    );
    expect(gone).toEqual([`fMRI · ${NEW}`, `corrupt · ${AGAIN}`]);
    expect(content.scans).toHaveLength(2);
    expect(content.notes.map((note) => note.scan)).toEqual([ACTIVITY, null, null]);
    expect(content.notes[1]).toMatchObject({ component: "blocks.1.mlp", position: 2 });
  }
});

const EMPTY: SessionDocument = {
  version: 1,
  parent: null,
  scans: [],
  perturbations: [],
  notes: [],
  key_images: [],
  view: {},
};

test("a save says what it adds and takes away", async () => {
  const { scans, notes } = asked();
  const { content } = await draftOf(
    asked({ scans: [...scans, scan(NEW)], notes: [...notes, ...notes], images: [] }),
  );
  expect(changes(document, content)).toBe("+1 scan, +1 note, −1 key image");
  expect(changes(document, (await draftOf(asked())).content)).toBe("");
});

test("a key image comes back with its scans, and with no picture but the viewer's own", () => {
  const at = 1_764_158_400_000;
  const view = { seq: "fMRI", job: [1], title: "fMRI", at, thumbnail: "https://else.where/x.png" };
  const image = imageOf({ caption: "c", scan: null, view }, 3, document);
  expect(image).toMatchObject({ note: "c", title: "fMRI", at, thumbnail: "" });
  expect(decode(image.view)).toMatchObject({ jobs: [ACTIVITY], sequence: "fMRI" });
});

test("scans that were added are no change of anything else, whatever order members stand in", () => {
  const [first] = document.scans;
  if (first === undefined) throw new Error("The file has a scan");
  const more = { ...document, scans: [...document.scans, { ...first, result: FOREIGN }] };
  const turned = Object.fromEntries(Object.entries(document.view).reverse());
  expect(grown(document, { ...more, view: turned })).toBe(true);
  expect(grown(document, { ...more, notes: [] })).toBe(false);
  expect(grown(more, document)).toBe(false);
  expect(grown(document, { ...document, scans: [...document.scans].reverse() })).toBe(false);
});

test("notes are equal by what they say and where, and unsaved ones are found again", () => {
  const [note] = document.notes;
  if (note === undefined) throw new Error("The file has a note");
  const { text, scan: of, component, position, author } = note;
  expect(noted([{ author, position, component, scan: of, text }])).toBe(noted(document.notes));
  expect(noted([{ ...note, position: 3 }])).not.toBe(noted(document.notes));
  expect(besides([note, { ...note, text: "new" }], document)).toEqual([{ ...note, text: "new" }]);
});

test("a session that says nothing of what is looked at shows the first scan of each kind", () => {
  expect(firstOf(document)).toEqual({
    jobs: [ACTIVITY],
    sequence: "fMRI",
    prompt: "The Eiffel Tower is located in the city of",
  });
  expect(firstOf({ ...document, scans: document.scans.slice(0, 1) })).toBeNull();
  const [, activity] = document.scans;
  if (activity === undefined) throw new Error("The file has an fMRI scan");
  const more = ["DTI", "fMRI", "calibration", "perturbation"].map((kind, index) => ({
    ...activity,
    kind,
    result: String(index),
  }));
  expect(firstOf({ ...document, scans: [...document.scans, ...more] })?.jobs).toEqual([
    ACTIVITY,
    "0",
    "3",
  ]);
});
