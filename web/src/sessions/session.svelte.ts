// Maps and sets here are made and read within one deed, or grow with what is reactive itself.
/* eslint-disable svelte/prefer-svelte-reactivity */
/** The open session: the document that was read, and what has been changed of it since, before it is saved. */
import type { Series } from "../model/series";
import { read, written, type Stimulus } from "../model/stimulus";
import type { Room } from "../state/room.svelte";
import { keep, kept } from "../state/tab";
import { viewOf as seen } from "../state/places";
import { EMPTY, besides, noted, promptOf } from "./document";
import { draftOf, imageOf, type Asked, type Draft } from "./draft";
import type { Origin } from "./origin";
import { isKept, type Shelf } from "./shelf";
import { fragmentOf } from "./view";
import type { Note, SavedScan, SessionDetail, SessionDocument } from "./wire";

/** A scan of the session, or on the screen and about to be one. */
export interface Listed {
  /** The result's hash, or the job that measured it. */
  readonly job: string;
  readonly kind: string;
  readonly model: string;
  readonly prompt: string | null;
  readonly isSaved: boolean;
  /** Another session keeps it, and this one cannot. */
  readonly isForeign: boolean;
}

/** Each session's by itself: a page that is loaded with another takes nothing from it. */
const KEPT_AS = "session ";

interface Kept {
  readonly revision: string;
  readonly notes: readonly Note[];
  /** Those that the revision does not hold. */
  readonly added: readonly Note[];
  readonly labels: Readonly<Record<string, string>>;
  readonly left: readonly string[];
}

export class Session {
  readonly #room: Room;
  readonly #shelf: Shelf;
  readonly origin: Origin;
  /** Other things that the service knows of it; none of a file's, and until it has answered. */
  detail = $state.raw<SessionDetail | null>(null);
  name = $state("");
  document = $state.raw<SessionDocument>(EMPTY);
  /** The hash of the document. */
  revision = $state("");
  notes = $state.raw<readonly Note[]>([]);
  /** What scans are called, where that is not what the document says. */
  labels = $state.raw<Readonly<Record<string, string>>>({});
  /** Scans that are to be left out. */
  left = $state.raw<readonly string[]>([]);
  /** What the stimulations are compared with to tell whether they have changed. */
  #stimuli = $state("");

  constructor(room: Room, shelf: Shelf, origin: Origin) {
    this.#room = room;
    this.#shelf = shelf;
    this.origin = origin;
  }

  /** Whether it can be saved as it stands: it is one's own, or there is none yet. */
  readonly canSave: boolean = $derived.by(
    () => this.origin.kind === "new" || this.origin.kind === "own",
  );

  /** Scans of the document that stay, then those on the screen that it does not hold. */
  readonly scans: readonly Listed[] = $derived.by(() => {
    const kept = this.document.scans
      .filter(({ result }) => !this.left.includes(result))
      .map((scan) => listed(scan));
    return [...kept, ...this.#fresh];
  });

  readonly #fresh: readonly Listed[] = $derived.by(() => {
    const { comparison, display, study } = this.#room;
    const isBeside = display.protocol === "prior" || display.protocol === "models";
    const beside = isBeside && comparison?.kind !== "stimulation" ? comparison : null;
    const there = new Set([...this.document.scans.map(({ result }) => result), ...this.left]);
    const fresh: Listed[] = [];
    const look = (all: readonly Series[], isMain: boolean) => {
      for (const { sequence, acquisition } of all) {
        const { job, model, prompt } = acquisition;
        const isForeign = this.#isForeign(job) && sequence !== "T1";
        // What another session has hangs beside this one, and is not taken into it.
        if (there.has(job) || (!isMain && isKept(job) && !this.#ours.has(job))) continue;
        there.add(job);
        fresh.push({ job, kind: sequence, model, prompt, isSaved: false, isForeign });
      }
    };
    look(study.finished(), true);
    look(beside?.other.finished() ?? [], false);
    return fresh;
  });

  #isForeign(job: string): boolean {
    return isKept(job) && !this.#ours.has(job) && this.#shelf.jobOf(job) === null;
  }

  /** Results that a revision of it holds, as far as they have been read. */
  // It only grows together with the document, which is reactive.
  readonly #ours = new Set<string>();

  /** Scans that were taken since, and that it could hold. The anatomy comes along with everything that is opened. */
  readonly taken: readonly Listed[] = $derived.by(() =>
    this.origin.kind === "new"
      ? []
      : this.#fresh.filter(({ kind, isForeign }) => kind !== "T1" && !isForeign),
  );

  /** Whether something is written here that the document does not say. Where one looks is no change. */
  readonly isEdited: boolean = $derived.by(() => {
    const { images, stimuli } = this.#room;
    if (images.isChanged) return true;
    if (noted(this.notes) !== noted(this.document.notes)) return true;
    if (this.origin.kind === "new") return false;
    return (
      this.left.length > 0 ||
      Object.keys(this.labels).length > 0 ||
      stimulated(stimuli) !== this.#stimuli
    );
  });

  /** Whether something is here that the document does not hold. */
  readonly isChanged: boolean = $derived.by(() => this.isEdited || this.taken.length > 0);

  labelOf(job: string): string {
    const saved = this.document.scans.find(({ result }) => result === job);
    return this.labels[job] ?? saved?.label ?? "";
  }

  /** Where nothing was saved yet: what was noted and marked before the page was loaded again. */
  resume(): void {
    const before = kept<Kept>(KEPT_AS + this.#tag);
    this.notes = before?.notes ?? [];
    this.labels = before?.labels ?? {};
    this.#room.images.adopt(this.#tag, "", []);
  }

  /** Where nothing was saved yet: nothing is noted or marked any more. */
  clear(): void {
    this.notes = [];
    this.#room.images.adopt(this.#tag, "", [], []);
    this.#keep();
  }

  /** The document as it was read. What was noted in it before the page was loaded again stays. */
  read(document: SessionDocument, revision: string, anew = false): void {
    this.document = document;
    this.revision = revision;
    for (const { result } of document.scans) this.#ours.add(result);
    this.#stimuli = stimulated(this.#room.stimuli);
    const before = anew ? null : kept<Kept>(KEPT_AS + this.#tag);
    const stays = before?.revision === revision;
    this.notes = stays ? before.notes : [...document.notes, ...besides(before?.added, document)];
    this.labels = stays ? before.labels : {};
    this.left = stays ? before.left : [];
    const images = document.key_images.map((image, index) => imageOf(image, index, document));
    this.#room.images.adopt(this.#tag, revision, images, anew ? images : undefined);
    this.#keep();
  }

  /** What others have added is taken in; what is changed here stays changed. */
  grow(document: SessionDocument, revision: string): void {
    this.document = document;
    this.revision = revision;
    for (const { result } of document.scans) this.#ours.add(result);
    this.#room.images.move(this.#tag, revision);
    this.#keep();
  }

  /** Everything as a place, the stimulations among it. */
  place(): string {
    const jobOf = (index: number) => this.document.scans[index]?.result;
    return fragmentOf(this.document.view, jobOf);
  }

  stimuli(): readonly Stimulus[] {
    const all = this.document.perturbations as readonly Stimulus[];
    return all.flatMap((stimulus) => read(written(stimulus)) ?? []);
  }

  get #tag(): string {
    const { origin } = this;
    if (origin.kind === "own") return `${origin.id} ${origin.revision ?? ""}`;
    return origin.kind === "shared" ? origin.token : origin.kind;
  }

  add(note: Note): void {
    this.notes = [...this.notes, note];
    this.#keep();
  }

  rewrite(index: number, text: string): void {
    this.notes = this.notes.map((note, at) => (at === index ? { ...note, text } : note));
    this.#keep();
  }

  erase(index: number): void {
    this.notes = this.notes.filter((_, at) => at !== index);
    this.#keep();
  }

  call(job: string, label: string): void {
    const saved = this.document.scans.find(({ result }) => result === job)?.label ?? "";
    const others = Object.entries(this.labels).filter(([other]) => other !== job);
    this.labels = Object.fromEntries([...others, ...(label === saved ? [] : [[job, label]])]);
    this.#keep();
  }

  leave(job: string): void {
    this.left = [...this.left, job];
    this.#keep();
  }

  /** What is to be saved. */
  draft(service: Pick<Asked, "keyOf" | "structure">): Promise<Draft> {
    return draftOf({
      ...service,
      document: this.document,
      left: this.left,
      scans: this.scans,
      images: this.#room.images.all,
      notes: this.notes,
      stimuli: this.#room.stimuli,
      view: seen(this.#room),
      labelOf: (job) => this.labelOf(job),
      isOurs: (job) => this.#ours.has(job),
      jobOf: (result) => this.#shelf.jobOf(result),
    });
  }

  #keep(): void {
    const { document, labels, left, notes, revision } = this;
    const added = besides(notes, document);
    const isSaved =
      noted(notes) === noted(document.notes) &&
      left.length === 0 &&
      Object.keys(labels).length === 0;
    keep(KEPT_AS + this.#tag, isSaved ? null : { revision, notes, added, labels, left });
  }

  /** What is not saved of it is given up, or has been saved as another. */
  forget(instead: Session): void {
    if (this.#tag === instead.#tag) return;
    keep(KEPT_AS + this.#tag, null);
    this.#room.images.forget(this.#tag);
  }
}

function listed(scan: SavedScan): Listed {
  const { result: job, kind, model } = scan;
  return { job, kind, model, prompt: promptOf(scan), isSaved: true, isForeign: false };
}

function stimulated(stimuli: readonly Stimulus[]): string {
  return stimuli.map(written).join();
}
