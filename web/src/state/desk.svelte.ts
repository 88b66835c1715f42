/** What is done with a reading beside reading it: the tour, the export, the recording; which of them is open. */
import type { Client } from "../api/client";
import type { Archive } from "../export/archive";
import type { Recorder } from "../export/recording.svelte";

export class Desk {
  readonly #client: Client;
  exporting = $state(false);
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
    if (saved !== null && saved.recording.length > 0) {
      const recorder = await this.recording();
      recorder.steps = saved.recording;
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
