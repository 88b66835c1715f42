// Maps and sets here are made and read within one deed, or grow with what is reactive itself.
/* eslint-disable svelte/prefer-svelte-reactivity */
/** What is done with sessions: opened, saved, forked, shared, compared, followed. One is open at a time. */
import type { Client } from "../api/client";
import { explain } from "../api/refusals";
import { download } from "../export/download";
import { isSequence } from "../model/sequences";
import type { Series } from "../model/series";
import type { Room } from "../state/room.svelte";
import { seriesNamed } from "../state/study.svelte";
import { START, decode, type Place } from "../state/url";
import { t } from "../words/words.svelte";
import { Beside } from "./beside.svelte";
import { firstOf, grown, promptOf } from "./document";
import { changes, names, type Draft } from "./draft";
import { Following } from "./following.svelte";
import { DamagedFile, readNmri, type NmriFile } from "./nmri";
import { whereOf, whyNot, type Origin } from "./origin";
import { Session } from "./session.svelte";
import { Shelf, isKept } from "./shelf";
import { isBare } from "./view";
import {
  SessionsService,
  conflict,
  type RevisionView,
  type SessionDetail,
  type SessionDocument,
  type Saved,
  type Where,
} from "./wire";

/** A save that was refused, because somebody had saved before. */
interface Conflict {
  /** The save that stands now, where it could be read. */
  readonly theirs: RevisionView | null;
}

export class Sessions {
  readonly #room: Room;
  readonly #client: Client;
  readonly service: SessionsService;
  readonly #shelf = new Shelf();
  open: Session = $state.raw() as Session;
  /** What is being done, in a word; empty for nothing. */
  busy = $state("");
  /** What went wrong, in a sentence, and what has happened. */
  problem = $state("");
  told = $state("");
  conflict = $state.raw<Conflict | null>(null);
  /** What is to be opened once somebody has said what becomes of unsaved changes. */
  pending = $state.raw<(() => Promise<boolean>) | null>(null);
  readonly beside: Beside;
  readonly following: Following;
  /** Results that have arrived since the session was opened here. */
  arrived = $state.raw<readonly string[]>([]);
  /** Whether scans taken here join the session as they finish. */
  joins = $state(false);

  constructor(room: Room, client: Client) {
    this.#room = room;
    this.#client = client;
    this.service = new SessionsService(client);
    this.beside = new Beside(room, this.#shelf, this.service);
    this.following = new Following(this.service, {
      saved: (session, saved) => this.#refresh(session, saved),
      closed: () => {
        this.problem = t(
          "This session has been deleted. What is on the screen stays until you leave.",
        );
      },
      failed: (sentence) => {
        this.problem = sentence;
      },
    });
    client.kept = (path, init) => this.#shelf.answer(path, init);
    this.open = new Session(room, this.#shelf, { kind: "new" });
    this.open.resume();
  }

  /** The open session, as an address names it. */
  readonly where: Pick<Place, "session" | "revision" | "shared" | "beside"> = $derived.by(() => {
    const { origin } = this.open;
    return {
      session: origin.kind === "own" ? origin.id : null,
      revision: origin.kind === "own" ? origin.revision : null,
      shared: origin.kind === "shared" ? origin.token : null,
      beside: this.#room.display.protocol === "prior" ? (this.beside.other?.id ?? null) : null,
    };
  });

  /** Whether something would be lost that is nowhere but here. */
  get isUnsaved(): boolean {
    return this.open.isChanged;
  }

  /** Whether somebody has to be asked first, and asks: what is not saved is not thrown away in passing. */
  asks(work: () => Promise<boolean>): boolean {
    if (!this.isUnsaved) return false;
    this.pending = work;
    this.#room.desk.listing = true;
    return true;
  }

  /** Leaves what is not saved behind, where something else could be opened. */
  async giveUp(work: () => Promise<boolean>): Promise<boolean> {
    const { open } = this;
    const done = await work();
    if (done) open.forget(this.open);
    return done;
  }

  // Opening

  /** Goes where an address says. False, with the reason told, where that cannot be. */
  async arrive(place: Place): Promise<boolean> {
    const { session: id, revision, shared: token } = place;
    if (id === null && token === null) {
      this.#close();
      return false;
    }
    const origin: Origin =
      id !== null ? { kind: "own", id, revision } : { kind: "shared", token: token ?? "" };
    const opened = await this.#opening(origin, () => this.#read(origin), place);
    // Why not stands where sessions are.
    if (!opened) this.#room.display.panel = "session";
    return opened;
  }

  /** Opens one of one's own by its id, or a revision of it. */
  openOwn(id: string, revision: string | null = null): Promise<boolean> {
    return this.arrive({ ...START, session: id, revision });
  }

  /** What somebody typed or pasted: an id, an address with one, or a link. False where it is none. */
  async openNamed(text: string): Promise<boolean> {
    const asked = text.trim();
    const place = decode(asked.slice(asked.indexOf("#") + 1));
    if (asked.includes("#") && (place.session ?? place.shared) !== null) return this.arrive(place);
    const id = /[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/i.exec(asked)?.[0];
    if (id !== undefined) return this.openOwn(id.toLowerCase());
    this.problem = t(
      "“{text}” is no session's ID and no link to one. An ID looks like {example}.",
      {
        text: asked.slice(0, 60),
        example: "01a208e5-620a-7f6d-98da-3f510d18b436",
      },
    );
    return false;
  }

  /** Opens a file from a disk, without the service: nothing of it is sent anywhere. */
  async openFile(file: File): Promise<boolean> {
    const bytes = await file.arrayBuffer();
    const origin: Origin = { kind: "file", file: file.name, bytes };
    return this.#opening(origin, () => readNmri(bytes), null);
  }

  /** A file that was dropped: opened, unless something would be lost by it. */
  async drop(file: File): Promise<void> {
    this.#room.display.panel = "session";
    if (!this.#mayLose()) return;
    await this.openFile(file);
  }

  /** What is not saved is not thrown away in passing. */
  #mayLose(isUnsaved = this.isUnsaved): boolean {
    if (!isUnsaved) return true;
    this.problem = t("What you changed is not saved yet: save it first, or undo the changes.");
    return false;
  }

  /** A revision of the open session, as it was. */
  async openRevision(revision: string | null): Promise<void> {
    const { origin } = this.open;
    if (origin.kind === "own" && this.#mayLose()) await this.openOwn(origin.id, revision);
  }

  /** The open session as it was saved. */
  undo(): void {
    const { open } = this;
    if (open.origin.kind === "new") {
      open.clear();
      return;
    }
    this.#room.stimuli = open.stimuli();
    this.#takeOff(open);
    open.read(open.document, open.revision, true);
  }

  /** Scans that a session does not hold go off the screen; those that stood there when it was saved come back. */
  #takeOff(open: Session): void {
    const { comparison, display, study } = this.#room;
    const taken = open.taken.map(({ job }) => job);
    const isTaken = ({ acquisition }: Series) => taken.includes(acquisition.job);
    for (const { sequence } of comparison?.other.finished().filter(isTaken) ?? []) {
      comparison?.other.clear(sequence);
    }
    const off = study.finished().filter(isTaken);
    for (const { sequence } of off) study.clear(sequence);
    const stood = [...decode(open.place()).jobs, ...(firstOf(open.document)?.jobs ?? [])];
    const back = off.flatMap(({ sequence }) => {
      const scan = open.document.scans.find(
        ({ kind, model, result }) =>
          stood.includes(result) && model === study.model?.name && seriesNamed(kind) === sequence,
      );
      return scan?.result ?? [];
    });
    if (back.length > 0) void study.openAll(back, display.sequence);
  }

  async #opening(
    origin: Origin,
    read: () => Promise<NmriFile>,
    place: Place | null,
  ): Promise<boolean> {
    return this.#doing(t("Opening…"), async () => {
      this.#client.isGuest = origin.kind === "shared";
      const told =
        origin.kind === "file" ? null : this.service.detail(whereOf(origin)).catch(ignored);
      const file = await read();
      this.following.stop();
      const session = new Session(this.#room, this.#shelf, origin);
      session.name = file.name;
      this.#shelf.take(file);
      this.beside.other = null;
      this.arrived = [];
      this.conflict = null;
      // What joins one session has not been asked to join another.
      this.joins = false;
      this.open = session;
      await this.#show(session, file, place);
      session.detail = await told;
      session.name = session.detail?.name ?? file.name;
      this.following.arriving = session.detail?.arriving ?? [];
      this.told = t("Opened “{name}”.", { name: session.name });
      this.#room.announce(this.told);
      this.#later(session);
    });
  }

  /** What the picture does not need: who asks, what else the service has, what happens from now on. */
  #later(session: Session): void {
    if (session.origin.kind === "own") {
      void this.#room.study.refreshModels();
      void this.#room.introduce();
    }
    void this.following.follow(session);
  }

  async #read(origin: Origin): Promise<NmriFile> {
    try {
      return await readNmri(await this.service.file(whereOf(origin)));
    } catch (error) {
      throw new Error(whyNot(origin, error), { cause: error });
    }
  }

  /** Its view as it was saved, or as an address has it. */
  async #show(session: Session, { document, revision }: NmriFile, place: Place | null) {
    session.document = document;
    const bare = place === null || isBare(place, START);
    const saved = decode(session.place());
    const stimuli = saved.stimuli.length > 0 ? saved.stimuli : session.stimuli();
    const wanted: Place = bare ? { ...saved, stimuli } : place;
    const first = firstOf(document);
    // Nobody has looked at what programs save: it opens as a scan that is finished does.
    const unseen = bare && wanted.jobs.length === 0 && first !== null;
    const shown = wanted.jobs.length > 0 || first === null ? wanted : { ...wanted, ...first };
    if (document.scans.length > 0) {
      const beside = bare ? null : place.beside;
      if (beside !== null) await this.beside.fetch(beside);
      const jobs = [...this.#structureFor(document, shown.jobs), ...shown.jobs];
      await this.#room.restore(shown, this.#shelf.models(), jobs);
      if (unseen) this.#room.reset();
    } else {
      this.told = t("The session holds no scans yet.");
      await this.#room.study.begin();
    }
    session.read(document, revision);
  }

  /** T1 of the model that the shown scans are of, first; of any where only structure is kept. */
  #structureFor({ scans }: SessionDocument, jobs: readonly string[]): readonly string[] {
    const shown = scans.find(({ result }) => jobs.includes(result));
    const found = scans.find(
      ({ kind, model }) => kind === "T1" && (shown === undefined || shown.model === model),
    );
    return found === undefined ? [] : [found.result];
  }

  /** Nothing is open any more; scans stay on the screen. */
  #close(): void {
    this.following.stop();
    this.#client.isGuest = false;
    this.following.arriving = [];
    this.beside.other = null;
    this.conflict = null;
    this.joins = false;
    this.open = new Session(this.#room, this.#shelf, { kind: "new" });
    this.open.resume();
  }

  /** An empty session, for what is on the screen. */
  begin(): void {
    // Scans stay on the screen, and can be saved as a session from there.
    if (!this.#mayLose(this.open.isEdited)) return;
    this.#close();
    this.told = t("Nothing is open. What is on the screen can be saved as a session.");
  }

  // Saving

  /** Saves the open session, or what is on the screen as one. While anything is being done, nothing is. */
  async save(): Promise<boolean> {
    if (this.busy !== "") return false;
    const { open } = this;
    if (!open.canSave) return this.saveAs(open.name);
    const name = open.name.trim() || (open.detail?.name ?? this.suggestedName());
    return this.#doing(t("Saving…"), async () => {
      const draft = await this.#draft();
      const message = changes(open.document, draft.content);
      const { notes } = open;
      const images = this.#room.images.all;
      let saved: SessionDetail;
      try {
        const { origin, detail } = open;
        if (origin.kind !== "own") saved = await this.service.create(name, draft.content, message);
        else {
          const over = origin.revision === null ? open.revision : (detail?.head ?? open.revision);
          saved = await this.service.save(origin.id, over, draft.content, message);
          if (saved.name !== name) {
            saved = { ...saved, ...(await this.service.change(origin.id, { name })) };
          }
        }
      } catch (error) {
        if (conflict(error) === null) throw error;
        await this.#clash();
        return;
      }
      await this.#takeOthers(saved, draft);
      const isSettled = open.notes === notes && this.#room.images.all === images;
      this.#saved(saved, draft, isSettled);
    });
  }

  /** As a session of one's own, whatever is open: begun where that stands. */
  async saveAs(name: string): Promise<boolean> {
    if (this.busy !== "") return false;
    const { open } = this;
    if (open.origin.kind === "new") {
      open.name = name;
      return this.save();
    }
    const forked = await this.#doing(t("Saving…"), async () => {
      const isChanged = open.isChanged;
      this.#client.isGuest = false;
      let made = await this.#beginning(open, name);
      // What was changed here goes on top: the fork begins where the other stands.
      const draft = await this.#draft();
      const message = changes(open.document, draft.content);
      if (isChanged) made = await this.service.save(made.id, made.head, draft.content, message);
      await this.#takeOthers(made, draft);
      this.#saved(made, draft, true);
      this.#later(this.open);
    });
    return forked;
  }

  async #beginning({ origin, revision }: Session, name: string): Promise<SessionDetail> {
    if (origin.kind === "file") {
      const made = await this.service.take(origin.bytes);
      return name === "" || name === made.name
        ? made
        : { ...made, ...(await this.service.change(made.id, { name })) };
    }
    const where: Where = origin.kind === "own" ? { id: origin.id, revision } : whereOf(origin);
    return this.service.fork(where, name === "" ? null : name);
  }

  #draft(): Promise<Draft> {
    return this.open.draft({
      keyOf: async (job) => (await this.#room.study.manifest(job)).scan_key,
      structure: (model) => this.service.structure(model),
    });
  }

  /** Results that came in with a save, because somebody else had added them: fetched, to be shown as any other. */
  async #takeOthers(saved: SessionDetail, draft: Draft): Promise<void> {
    const own = names(draft, saved).taken.map(([result]) => result);
    const others = saved.document.scans
      .map(({ result }) => result)
      .filter((result) => !own.includes(result) && !this.#shelf.has(result));
    if (others.length === 0) return;
    try {
      const file = await this.service.file({ id: saved.id, revision: saved.opened });
      this.#shelf.take(await readNmri(file));
    } catch (error) {
      // It has been saved all the same.
      this.problem = explain(error);
    }
    this.arrived = [...this.arrived, ...others];
  }

  #saved(saved: SessionDetail, draft: Draft, isSettled: boolean): void {
    const { nameOf, taken } = names(draft, saved);
    for (const [result, job] of taken) this.#shelf.name(result, job);
    this.#rename(nameOf);
    const { origin } = this.open;
    const stays = origin.kind === "own" && origin.id === saved.id && origin.revision === null;
    const session = stays
      ? this.open
      : new Session(this.#room, this.#shelf, { kind: "own", id: saved.id, revision: null });
    session.detail = saved;
    session.name = saved.name;
    this.conflict = null;
    if (!stays) {
      this.joins = false;
      this.open.forget(session);
    }
    if (isSettled) session.read(saved.document, saved.opened, true);
    else {
      session.notes = this.open.notes;
      session.grow(saved.document, saved.opened);
    }
    this.open = session;
    const { foreign, gone } = draft;
    this.told = [
      t("Saved as revision {number}.", { number: saved.revision }),
      ...(foreign.length === 0
        ? []
        : [t("Left out: {count} that another session keeps.", { count: foreign.length })]),
      ...gone.map((scan) => t("Left out: {scan}, which the service has no more.", { scan })),
    ].join(" ");
    this.#room.announce(this.told);
    if (!stays) void this.following.follow(session);
  }

  /** Calls what is on the screen by other ids. */
  #rename(nameOf: (job: string) => string): void {
    this.#room.study.rename(nameOf);
    this.#room.comparison?.other.rename(nameOf);
  }

  async #clash(): Promise<void> {
    const { origin } = this.open;
    const id = origin.kind === "own" ? origin.id : "";
    const [theirs = null] = await this.service.revisions(id).catch(() => []);
    this.conflict = { theirs };
    this.#room.announce(t("Not saved: somebody else has saved this session since."));
  }

  /** Gives up what is not saved, for what stands now. */
  async reload(): Promise<void> {
    const { origin } = this.open;
    if (origin.kind === "own") {
      this.open.read(this.open.document, this.open.revision, true);
      await this.openOwn(origin.id);
    }
  }

  suggestedName(): string {
    const { study, prompt } = this.#room;
    const said = study.finished().find(({ acquisition }) => acquisition.prompt !== null);
    return (said?.acquisition.prompt ?? prompt.trim()).slice(0, 80) || t("Untitled");
  }

  // What else is done with one

  async rename(name: string): Promise<void> {
    const { origin } = this.open;
    this.open.name = name;
    if (origin.kind !== "own" || name.trim() === "") return;
    await this.#doing("", async () => {
      const changed = await this.service.change(origin.id, { name: name.trim() });
      const { detail } = this.open;
      if (detail !== null) this.open.detail = { ...detail, ...changed };
    });
  }

  /** The open session as a file: as it was saved, byte for byte what the service holds. */
  async export(): Promise<void> {
    const { origin, name, revision } = this.open;
    if (origin.kind === "new") return;
    await this.#doing(t("Exporting…"), async () => {
      const where = origin.kind === "own" ? { id: origin.id, revision } : null;
      const bytes =
        origin.kind === "file" ? origin.bytes : await this.service.file(where ?? whereOf(origin));
      const called = `${name.replaceAll(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "session"}.nmri`;
      download(called, new Blob([bytes]));
      this.told = t("Saved {name}.", { name: called });
    });
  }

  /** Deletes one for good; where it is the open one, nothing is open then. */
  async remove(id: string): Promise<void> {
    await this.service.remove(id);
    const { origin } = this.open;
    if (origin.kind === "own" && origin.id === id) this.#close();
  }

  // Beside each other

  /** Shows a scan of the open session, in the place of the one of its kind. */
  async show(job: string): Promise<void> {
    const scan = this.open.document.scans.find(({ result }) => result === job);
    const { study, display } = this.#room;
    if (scan !== undefined) {
      const other = study.model?.name !== scan.model;
      const structure = other ? this.#structureFor(this.open.document, [job]) : [];
      await (other
        ? study.restore(this.#shelf.models(), [...structure, job], display.sequence)
        : study.openAll([job], display.sequence));
    }
    const id = seriesNamed(scan?.kind);
    if (id !== null) this.#room.show(isSequence(id) ? id : "fMRI");
    const prompt = scan === undefined ? null : promptOf(scan);
    if (prompt !== null) this.#room.prompt = prompt;
  }

  /** Hangs a scan of the session beside the shown one. */
  async hangBeside(job: string): Promise<void> {
    const scan = this.open.document.scans.find(({ result }) => result === job);
    this.beside.other = null;
    if (scan !== undefined && isSequence(scan.kind)) this.#room.show(scan.kind);
    await this.#room.beside(this.#shelf.models(), [job]);
  }

  /** Hangs another session's scans beside this one's: prior, current, and what lies between. */
  async compare(id: string, name: string): Promise<boolean> {
    return this.#comparing(name, () => this.beside.compare(this.open, id, name));
  }

  async compareFile(file: File): Promise<boolean> {
    return this.#comparing(file.name, () => this.beside.compareFile(file));
  }

  #comparing(name: string, work: () => Promise<void>): Promise<boolean> {
    return this.#doing(t("Comparing…"), async () => {
      await work();
      this.told = t("Compared with “{name}”.", { name });
      this.#room.announce(this.told);
    });
  }

  // Together

  /** Lets the scans taken here join the session as they finish, or no longer. */
  join(yes: boolean): void {
    this.joins = yes;
    // Who adds something has to be somebody.
    if (yes) this.#client.isGuest = false;
  }

  /** Told of every scan that finishes here. */
  scanned({ sequence, acquisition: { job } }: Series): void {
    const { origin } = this.open;
    if (!this.joins || (origin.kind !== "own" && origin.kind !== "shared")) return;
    // The anatomy comes along with a model, and what is kept was measured before: nobody took these.
    if (sequence === "T1" || isKept(job)) return;
    void this.#doing("", async () => {
      const { document } = await this.service.add(whereOf(origin), job);
      const { scan_key } = await this.#room.study.manifest(job);
      const joined = document.scans.find((scan) => scan.scan_key === scan_key);
      if (joined === undefined || this.open.origin !== origin) return;
      // The session has it by its result: what is on the screen is that scan, and not another beside it.
      this.#shelf.name(joined.result, job);
      this.#rename((other) => (other === job ? joined.result : other));
    });
  }

  /** Somebody has saved: scans that were added join; other changes do too, unless something is changed here. */
  async #refresh(session: Session, { author, number, revision }: Saved): Promise<void> {
    await this.#saving;
    if (revision === session.revision || number <= (session.detail?.revision ?? 0)) return;
    const where = whereOf(session.origin);
    // The file second: it then holds what the other names, whoever saves in between.
    const detail = await this.service.detail(where);
    this.#shelf.take(await readNmri(await this.service.file(where)));
    await this.#saving;
    // What was saved or opened here meanwhile is newer.
    if (session !== this.open || detail.revision <= (session.detail?.revision ?? 0)) return;
    const { document } = detail;
    const isGrown = grown(session.document, document);
    if (!isGrown && session.isChanged) {
      this.conflict = { theirs: null };
      await this.#clash();
      return;
    }
    const known = new Set(session.document.scans.map(({ result }) => result));
    const added = document.scans.filter(({ result }) => !known.has(result));
    session.detail = detail;
    session.name = detail.name;
    if (isGrown) session.grow(document, detail.opened);
    else session.read(document, detail.opened, true);
    this.following.arriving = detail.arriving;
    this.arrived = [...this.arrived, ...added.map(({ result }) => result)];
    const [first] = added;
    this.told =
      first === undefined
        ? t("{author} saved revision {number}.", { author: author || t("Somebody"), number })
        : t("A {kind} scan arrived: {what}", {
            kind: first.kind,
            what: promptOf(first) ?? first.model,
          });
    this.#room.announce(this.told);
  }

  /** The save that is under way. */
  #saving: Promise<unknown> = Promise.resolve();

  /** Runs one deed after the other; what goes wrong is told. */
  async #doing(word: string, work: () => Promise<void>): Promise<boolean> {
    const before = this.#saving;
    let release: () => void = () => undefined;
    this.#saving = new Promise<void>((resolve) => (release = resolve));
    // Said before it is waited for: who asks twice means it once.
    if (word !== "") this.busy = word;
    await before;
    if (word !== "") this.busy = word;
    this.problem = "";
    this.told = "";
    try {
      await work();
      return true;
    } catch (error) {
      this.problem =
        error instanceof DamagedFile
          ? `${t("The file was not opened.")} ${error.message}`
          : explain(error);
      this.#room.announce(this.problem);
      return false;
    } finally {
      if (word !== "") this.busy = "";
      release();
    }
  }
}

/** A session can be read without what else the service knows of it. */
function ignored(): null {
  return null;
}
