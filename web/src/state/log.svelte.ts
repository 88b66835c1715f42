/** What has happened in this session, as sentences with the time since it began. */

export type Level = "note" | "warning" | "error";

export interface Entry {
  readonly id: number;
  readonly seconds: number;
  readonly level: Level;
  readonly text: string;
}

const KEPT = 200;

export class Log {
  readonly #began = performance.now();
  #next = 0;
  entries = $state.raw<readonly Entry[]>([]);

  add(text: string, level: Level = "note"): void {
    const entry = {
      id: this.#next++,
      seconds: (performance.now() - this.#began) / 1000,
      level,
      text,
    };
    this.entries = [...this.entries.slice(1 - KEPT), entry];
  }
}
