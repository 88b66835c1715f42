/** A session's document: what can be said of it without showing it. */
import { isSequence } from "../model/sequences";
import { seriesNamed } from "../state/study.svelte";
import type { Place } from "../state/url";
import type { Note, SavedScan, SessionDocument } from "./wire";

export const EMPTY: SessionDocument = {
  version: 1,
  parent: null,
  scans: [],
  perturbations: [],
  notes: [],
  key_images: [],
  view: {},
};

export function promptOf({ request }: SavedScan): string | null {
  const { prompt } = request;
  return typeof prompt === "string" ? prompt : null;
}

/** Notes that a document does not hold. */
export function besides(notes: readonly Note[] = [], document: SessionDocument): readonly Note[] {
  const there = new Set(document.notes.map((note) => note.text));
  return notes.filter(({ text }) => !there.has(text));
}

/** Notes to be compared: the order of a note's members means nothing. */
export function noted(notes: readonly Note[]): string {
  return JSON.stringify(
    notes.map(({ author, component, position, scan, text }) => [
      text,
      scan ?? "",
      component ?? "",
      position ?? "",
      author,
    ]),
  );
}

/** Where a session says nothing of what is looked at: the first scan of each kind, the first prompt. */
export function firstOf({
  scans,
}: SessionDocument): Pick<Place, "jobs" | "sequence" | "prompt"> | null {
  const first = new Map<string, SavedScan>();
  const model = scans.find(({ kind }) => kind !== "T1")?.model;
  for (const scan of scans) {
    const id = seriesNamed(scan.kind);
    if (id === null || id === "T1" || scan.model !== model || first.has(id)) continue;
    first.set(id, scan);
  }
  const [shown] = first.values();
  if (shown === undefined) return null;
  const id = seriesNamed(shown.kind);
  return {
    jobs: [...first.values()].map(({ result }) => result),
    sequence: id !== null && isSequence(id) ? id : "fMRI",
    prompt: promptOf(shown) ?? "",
  };
}

/** Whether a document is the other, or the other with scans added, and nothing else. */
export function grown(before: SessionDocument, after: SessionDocument): boolean {
  const rest = ({ key_images, notes, perturbations, view }: SessionDocument) =>
    JSON.stringify(sorted({ key_images, notes, perturbations, view }));
  const results = after.scans.map(({ result }) => result);
  const isThere = before.scans.every(({ result }, index) => results[index] === result);
  return isThere && rest(before) === rest(after);
}

/** The order of members says nothing. */
function sorted(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(sorted);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value)
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([name, inner]) => [name, sorted(inner)]),
  );
}
