/**
 * An exploration as it happened: addresses with the time since it began, and their playback. What stands
 * in an address is everything that can be seen, so a recording needs nothing else.
 */
import type { Room } from "../state/room.svelte";
import { viewOf } from "../state/places";
import type { Step } from "./archive";

/** Changes that follow each other faster than this are one. */
const APART_MILLISECONDS = 40;
/** As long as somebody thought; nobody wants to see all of it. */
const LONGEST_PAUSE = 2500;

export class Recorder {
  state = $state<"idle" | "recording" | "playing">("idle");
  steps = $state.raw<readonly Step[]>([]);
  /** Step that playback has come to. */
  at = $state(0);
  #stop: () => void = () => undefined;

  start(room: Room): void {
    this.stop();
    const began = performance.now();
    this.steps = [];
    this.state = "recording";
    this.#stop = $effect.root(() => {
      $effect(() => this.#saw(viewOf(room), performance.now() - began));
    });
  }

  #saw(fragment: string, milliseconds: number): void {
    const last = this.steps.at(-1);
    if (last?.fragment === fragment) return;
    const replaces = last !== undefined && milliseconds - last.milliseconds < APART_MILLISECONDS;
    const kept = replaces ? this.steps.slice(0, -1) : this.steps;
    this.steps = [...kept, { milliseconds: Math.round(milliseconds), fragment }];
  }

  play(room: Room): void {
    this.stop();
    if (this.steps.length === 0) return;
    this.state = "playing";
    let timer: ReturnType<typeof setTimeout>;
    const show = (at: number) => {
      const step = this.steps[at];
      if (step === undefined) {
        this.stop();
        return;
      }
      this.at = at;
      const next = this.steps[at + 1];
      void room.revisit(step.fragment).then(() => {
        if (this.state !== "playing") return;
        const pause = next === undefined ? 0 : next.milliseconds - step.milliseconds;
        timer = setTimeout(() => show(at + 1), Math.min(LONGEST_PAUSE, pause));
      });
    };
    this.#stop = () => clearTimeout(timer);
    show(0);
  }

  stop(): void {
    this.#stop();
    this.#stop = () => undefined;
    this.state = "idle";
  }
}
