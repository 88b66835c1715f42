/** What has happened in this session, as sentences with the time since it began. */
import type { SeriesId } from "../model/series";

export type Level = "note" | "warning" | "error";

export interface Entry {
  readonly id: number;
  readonly seconds: number;
  readonly level: Level;
  readonly text: string;
  /** The scan whose end this tells; null for everything else. */
  readonly ended: SeriesId | null;
}

const KEPT = 200;

export class Log {
  readonly #began = performance.now();
  #next = 0;
  entries = $state.raw<readonly Entry[]>([]);

  /** What was told last. That T1 has ended, which comes with every page, is news only where nothing else is shown. */
  latest(looked: SeriesId | null): Entry | undefined {
    const last = this.entries.at(-1);
    if (looked === null || looked === "T1") return last;
    return this.entries.findLast(({ ended }) => ended !== "T1") ?? last;
  }

  add(text: string, level: Level = "note", ended: SeriesId | null = null): void {
    const entry = {
      id: this.#next++,
      seconds: (performance.now() - this.#began) / 1000,
      level,
      text,
      ended,
    };
    this.entries = [...this.entries.slice(1 - KEPT), entry];
  }
}
