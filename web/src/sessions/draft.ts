/** What is to be saved: scans by what names them, and everything that speaks of a scan by its number. */
import { Refusal } from "../api/refusals";
import type { Stimulus } from "../model/stimulus";
import { SAVED, type KeyImage } from "../state/images.svelte";
import { counted } from "../words/words.svelte";
import { isKept } from "./shelf";
import { fragmentOf, jobsIn, viewOf } from "./view";
import type {
  Content,
  Note,
  SavedImage,
  ScanReference,
  SessionDetail,
  SessionDocument,
} from "./wire";

/** What is to be saved, and by which number and name each scan goes in it. */
export interface Draft {
  readonly content: Content;
  /** For every job that the draft speaks of: the number of its scan. */
  readonly numberOf: (job: string) => number;
  /** Scans of other sessions, which this cannot hold. */
  readonly foreign: readonly string[];
  /** Scans, as a person knows them, whose jobs were deleted before anybody saved them. */
  readonly gone: readonly string[];
}

/** What a draft is made of. */
export interface Asked {
  /** As it was read, and what is to be left out of it. */
  readonly document: SessionDocument;
  readonly left: readonly string[];
  /** What stays of it, then what is on the screen. */
  readonly scans: readonly {
    readonly job: string;
    readonly kind: string;
    readonly model: string;
  }[];
  readonly images: readonly KeyImage[];
  readonly notes: readonly Note[];
  readonly stimuli: readonly Stimulus[];
  /** The fragment of what is seen now. */
  readonly view: string;
  readonly labelOf: (job: string) => string;
  /** Whether a revision of this session holds a result. */
  readonly isOurs: (result: string) => boolean;
  /** The job that the service still has of a result; null where it has none. */
  readonly jobOf: (result: string) => string | null;
  /** A new scan's key: one that the session holds already is not held twice. */
  readonly keyOf: (job: string) => Promise<string>;
  /** The job of a model's anatomy, where only another session has it; null where it cannot be had. */
  readonly structure: (model: string) => Promise<string | null>;
}

const GONE: readonly number[] = [404, 410];
/** Gone, or not succeeded. */
const NO_RESULT: readonly number[] = [...GONE, 409];

export async function draftOf(asked: Asked): Promise<Draft> {
  const { document, images, isOurs, jobOf, keyOf, labelOf, left, notes, scans } = asked;
  const { stimuli, structure, view } = asked;

  const wanted: string[] = scans.map(({ job }) => job);
  wanted.push(...jobsIn(view).filter((job) => !isKept(job) || isOurs(job)));
  for (const image of images) wanted.push(...jobsIn(image.view));
  wanted.push(...notes.flatMap(({ scan }) => scan ?? []));
  const held = new Set([...scans.map(({ job }) => job), ...notes.map(({ scan }) => scan)]);
  const named = (job: string) => {
    const known = [labelOf(job), scans.find((scan) => scan.job === job)?.kind ?? "", job];
    return known.filter((text) => text !== "").join(" · ");
  };
  const numbers = new Map<string, number>();
  const keys = new Map<string, number>();
  const references: ScanReference[] = [];
  const foreign: string[] = [];
  const gone: string[] = [];
  for (const { result, scan_key } of document.scans) {
    if (left.includes(result)) continue;
    numbers.set(result, references.length);
    keys.set(scan_key, references.length);
    references.push({ result, label: labelOf(result) });
  }
  for (const job of new Set(wanted)) {
    if (numbers.has(job) || left.includes(job)) continue;
    const label = labelOf(job);
    if (isOurs(job)) {
      numbers.set(job, references.length);
      references.push({ result: job, label });
      continue;
    }
    const anatomy = scans.find((scan) => scan.job === job && scan.kind === "T1");
    let measured: string | null = isKept(job) ? jobOf(job) : job;
    if (measured === null && anatomy !== undefined) measured = await structure(anatomy.model);
    if (measured === null) {
      if (anatomy === undefined) foreign.push(job);
      continue;
    }
    const isHeld = held.has(job);
    const key = await keyOf(measured).catch((error: unknown) =>
      without(isHeld ? GONE : NO_RESULT, error),
    );
    if (key === null) {
      // What was only looked at loses nothing but the look of it; for the rest, all but the scan can be saved.
      if (isHeld) gone.push(named(job));
      continue;
    }
    const known = keys.get(key);
    for (const each of [job, measured]) numbers.set(each, known ?? references.length);
    if (known !== undefined) continue;
    keys.set(key, references.length);
    references.push({ job: measured, label });
  }
  const numberOf = (job: string) => numbers.get(job) ?? -1;
  // In a save a note names its scan as the save itself does.
  const names = references.map((each) => ("job" in each ? each.job : each.result));
  const placed = (scan: string | null) => (scan === null ? null : (names[numberOf(scan)] ?? null));
  const content: Content = {
    scans: references,
    perturbations: stimuli,
    notes: notes.map((note) => ({ ...note, scan: placed(note.scan) })),
    key_images: images.map((image) => savedImage(image, numberOf, placed)),
    view: viewOf(view, numberOf),
  };
  return { content, numberOf, foreign, gone };
}

/** A scan of which there is no result, for a reason that it may have. */
function without(statuses: readonly number[], error: unknown): null {
  if (error instanceof Refusal && statuses.includes(error.status)) return null;
  throw error;
}

function savedImage(
  image: KeyImage,
  numberOf: (job: string) => number,
  placed: (scan: string | null) => string | null,
): SavedImage {
  const scan =
    jobsIn(image.view)
      .map(placed)
      .find((job) => job !== null) ?? null;
  const { at, note, thumbnail, title, view } = image;
  return { caption: note, scan, view: { ...viewOf(view, numberOf), title, thumbnail, at } };
}

/** A key image as the viewer has it. */
export function imageOf(
  { caption, view }: SavedImage,
  index: number,
  of: SessionDocument,
): KeyImage {
  const { at, thumbnail, title, ...rest } = view;
  const said = (text: unknown) => (typeof text === "string" ? text : "");
  const picture = said(thumbnail);
  return {
    id: `${SAVED}${index}`,
    view: fragmentOf(rest, (number) => of.scans[number]?.result),
    title: said(title),
    note: caption,
    // Whatever a file says is a picture: nothing but one made by this viewer is shown.
    thumbnail: picture.startsWith("data:image/png;base64,") ? picture : "",
    at: typeof at === "number" ? at : NaN,
  };
}

/** What a save adds and takes away, for the list of saves where nobody says it better: `+1 scan, −2 notes`. */
export function changes(before: SessionDocument, after: Content): string {
  const kinds = [
    [before.scans, after.scans, "{count} scan", "{count} scans"],
    [before.notes, after.notes, "{count} note", "{count} notes"],
    [before.key_images, after.key_images, "{count} key image", "{count} key images"],
  ] as const;
  return kinds
    .map(([was, is, one, many]) => [is.length - was.length, one, many] as const)
    .filter(([count]) => count !== 0)
    .map(([count, one, many]) => `${count > 0 ? "+" : "−"}${counted(Math.abs(count), one, many)}`)
    .join(", ");
}

/** After a save: every scan is called by its result. */
export function names(
  { content, numberOf }: Draft,
  { document }: SessionDetail,
): { readonly nameOf: (job: string) => string; readonly taken: readonly [string, string][] } {
  const nameOf = (job: string) => document.scans[numberOf(job)]?.result ?? job;
  const taken = content.scans.flatMap((each): [string, string][] =>
    "job" in each ? [[nameOf(each.job), each.job]] : [],
  );
  return { nameOf, taken };
}
