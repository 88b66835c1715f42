// Maps here are made and read within one deed.
/* eslint-disable svelte/prefer-svelte-reactivity */
/** Another session beside the open one: prior, current, what lies between, and a list of what differs. */
import { explain } from "../api/refusals";
import { isSequence } from "../model/sequences";
import type { Room } from "../state/room.svelte";
import { seriesNamed } from "../state/study.svelte";
import { t } from "../words/words.svelte";
import { promptOf } from "./document";
import { readNmri } from "./nmri";
import type { Session } from "./session.svelte";
import type { Shelf } from "./shelf";
import type { SavedScan, SessionDifference, SessionDocument, SessionsService } from "./wire";

/** What stands beside the open session. */
interface Other {
  readonly name: string;
  /** None of a file's. */
  readonly id: string | null;
  readonly difference: SessionDifference | null;
  /** Why there is no list of what differs. */
  readonly why: string | null;
}

export class Beside {
  readonly #room: Room;
  readonly #shelf: Shelf;
  readonly #service: SessionsService;
  other = $state.raw<Other | null>(null);

  constructor(room: Room, shelf: Shelf, service: SessionsService) {
    this.#room = room;
    this.#shelf = shelf;
    this.#service = service;
  }

  /** Reads another session, so that its scans can be shown. */
  async fetch(id: string): Promise<SessionDocument> {
    const found = await readNmri(await this.#service.file({ id, revision: null }));
    this.#shelf.take(found);
    this.other = { name: found.name, id, difference: null, why: null };
    return found.document;
  }

  /** Hangs another session beside the open one. */
  async compare(open: Session, id: string, name: string): Promise<void> {
    await this.#hang(await this.fetch(id));
    this.other = { name, id, ...(await this.#difference(open, id)) };
  }

  /** The same with a file, which the service does not know. */
  async compareFile(file: File): Promise<void> {
    const found = await readNmri(await file.arrayBuffer());
    this.#shelf.take(found);
    await this.#hang(found.document);
    const why = t("The list of what differs is the service's, which has not this file.");
    this.other = { name: found.name, id: null, difference: null, why };
  }

  async #difference(
    { origin, revision }: Session,
    id: string,
  ): Promise<Pick<Other, "difference" | "why">> {
    if (origin.kind !== "own") {
      const why = t("The list of what differs is the service's, which compares sessions of yours.");
      return { difference: null, why };
    }
    try {
      const before = { id, revision: null };
      const after = { id: origin.id, revision };
      return { difference: await this.#service.difference(before, after), why: null };
    } catch (error) {
      return { difference: null, why: explain(error) };
    }
  }

  /** Of each kind the scan that was asked the same, else the first. */
  async #hang({ scans }: SessionDocument): Promise<void> {
    const mine = this.#room.study.finished();
    const chosen = new Map<string, SavedScan>();
    for (const scan of scans) {
      const id = seriesNamed(scan.kind);
      if (id === null || id === "T1") continue;
      const own = mine.find(({ sequence }) => sequence === id)?.acquisition.prompt ?? null;
      if (!chosen.has(id) || promptOf(scan) === own) chosen.set(id, scan);
    }
    const jobs = [...chosen.values()].map(({ result }) => result);
    if (jobs.length === 0) {
      throw new Error(t("That session holds no scan that a picture can be made of."));
    }
    const { display } = this.#room;
    const both = [...chosen.keys()].find((id) => mine.some(({ sequence }) => sequence === id));
    const hangs = chosen.has(display.sequence) ? display.sequence : (both ?? [...chosen.keys()][0]);
    if (hangs !== undefined && isSequence(hangs)) this.#room.show(hangs);
    const structure = scans.find(({ kind }) => kind === "T1");
    const all = structure === undefined ? jobs : [structure.result, ...jobs];
    await this.#room.beside(this.#shelf.models(), all);
  }
}
