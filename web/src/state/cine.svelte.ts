/** Plays the tokens like the frames of a film. No timer exists while it stands still. */

export const SLOWEST_FPS = 1;
export const FASTEST_FPS = 30;

export class Cine {
  readonly #step: () => void;
  #timer: ReturnType<typeof setTimeout> | null = null;
  playing = $state(false);
  /** Tokens a second; the specification's half second a token to begin with. */
  fps = $state(2);

  /** `step` shows the next frame. */
  constructor(step: () => void) {
    this.#step = step;
  }

  toggle(): void {
    if (this.playing) this.pause();
    else this.play();
  }

  play(): void {
    if (this.playing) return;
    this.playing = true;
    this.#schedule(performance.now());
  }

  pause(): void {
    this.playing = false;
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
  }

  /** Each frame is due a period after the last was due, not after it came: lateness does not add up. */
  #schedule(lastDue: number): void {
    const now = performance.now();
    const due = Math.max(lastDue + 1000 / clampFps(this.fps), now);
    this.#timer = setTimeout(() => {
      this.#step();
      // There may be nothing more to show.
      if (this.playing) this.#schedule(due);
    }, due - now);
  }
}

export function clampFps(fps: number): number {
  return Math.min(FASTEST_FPS, Math.max(SLOWEST_FPS, Number.isFinite(fps) ? fps : SLOWEST_FPS));
}
