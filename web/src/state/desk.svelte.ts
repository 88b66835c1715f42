/** What is done with a reading beside reading it: the tour, the export, the recording; which of them is open. */
import type { Client } from "../api/client";
import type { Archive } from "../export/archive";
import type { Recorder } from "../export/recording.svelte";
import type { KeyMap } from "./keymaps";
import type { Action } from "./keys";

const KEYS_REMEMBERED = "neural-mri.keys";
const NO_KEYS: ReadonlyMap<string, Action> = new Map();

export class Desk {
  readonly #client: Client;
  exporting = $state(false);
  /** Whether the list of sessions is open. */
  listing = $state(false);
  /** What keys mean beside their own meaning, where somebody chose other ones. */
  keys = $state.raw(NO_KEYS);
  touring = $state(false);
  /** Made when something is first recorded, or comes with a saved page. */
  recorder = $state.raw<Recorder | null>(null);
  /** The saved page that this shows; null while a service stands behind it. */
  saved = $state.raw<Archive | null>(null);
  /** Shows what a saved page holds in place of this. */
  reopen: (archive: Archive) => void = () => undefined;

  constructor(client: Client) {
    this.#client = client;
  }

  /** Told by the page what it is. */
  async open(saved: Archive | null, reopen: (archive: Archive) => void): Promise<void> {
    this.saved = saved;
    this.reopen = reopen;
    void this.#rememberKeys();
    if (saved !== null && saved.recording.length > 0) {
      const recorder = await this.recording();
      recorder.steps = saved.recording;
    }
  }

  /** The keys somebody chose before. Few did, so the maps are fetched for them alone. */
  async #rememberKeys(): Promise<void> {
    let chosen: string | null = null;
    try {
      chosen = localStorage.getItem(KEYS_REMEMBERED);
    } catch {
      // A browser may forbid storage: the keys are then the viewer's own.
    }
    if (chosen === null) return;
    const { keyMap } = await import("./keymaps");
    this.keys = keyMap(chosen).differs;
  }

  chooseKeys({ id, differs }: KeyMap): void {
    this.keys = differs;
    try {
      localStorage.setItem(KEYS_REMEMBERED, id);
    } catch {
      // As when remembering.
    }
  }

  /** The service's answer, byte for byte: what a saved page is made of. */
  answer(path: string): Promise<{ type: string; body: Uint8Array<ArrayBuffer> }> {
    return this.#client.answer(path);
  }

  /** The recorder. Its code comes with the first. */
  async recording(): Promise<Recorder> {
    const { Recorder: Made } = await import("../export/recording.svelte");
    this.recorder ??= new Made();
    return this.recorder;
  }
}
