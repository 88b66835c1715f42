/** What can be done to a component, as a person asks for it: in words, and out of what they type. */
import type { Architecture } from "../api/schema";
import type { Message } from "../words/words.svelte";
import type { Series } from "./series";
import type { InjectMode, Operation, Stimulus } from "./stimulus";

export interface OperationAbout {
  readonly id: Operation;
  readonly title: Message;
  readonly about: Message;
  /** Whether it needs to be told more than a number that has a usual value. */
  readonly asks: boolean;
}

export const OPERATIONS: readonly OperationAbout[] = [
  { id: "zero", title: "Zero", about: "its output becomes 0", asks: false },
  { id: "amplify", title: "Amplify", about: "its output is multiplied", asks: false },
  { id: "invert", title: "Invert", about: "its output changes sign", asks: false },
  {
    id: "noise",
    title: "Noise",
    about: "Gaussian noise of σ times its own RMS is added",
    asks: false,
  },
  {
    id: "ablate",
    title: "Mean",
    about: "its output becomes its mean over reference text",
    asks: false,
  },
  {
    id: "inject",
    title: "Inject…",
    about: "given values are added to its output, or replace it",
    asks: true,
  },
  {
    id: "patch",
    title: "Patch…",
    about: "its output becomes that in the run of another prompt",
    asks: true,
  },
];

/** In a few characters, as a list names it: `× 2`, `zero`, `noise 1 σ`. */
export function named(stimulus: Stimulus): string {
  switch (stimulus.operation) {
    case "amplify":
      return `× ${stimulus.factor ?? 2}`;
    case "noise":
      return `noise ${stimulus.sigma ?? 1} σ`;
    case "invert":
      return "× −1";
    case "ablate":
      return "mean";
    case "inject":
      return `${stimulus.mode === "replace" ? "=" : "+"} ${stimulus.values?.length ?? 0} values`;
    case "patch":
      return `← “${(stimulus.source_prompt ?? "").slice(0, 14)}…”`;
    default:
      return stimulus.operation;
  }
}

/** How many values an injection has to have. */
export function injected(component: string, mode: InjectMode, architecture: Architecture): number {
  if (component.includes(".neuron_")) return 1;
  const head = component.includes(".head_") && mode === "replace";
  return head ? architecture.d_head : architecture.d_model;
}

/** Numbers as somebody pastes them, apart by commas or white space; null where something is none. */
export function numbers(text: string): readonly number[] | null {
  const parts = text
    .replaceAll(/[[\]]/g, " ")
    .split(/[\s,;]+/)
    .filter((part) => part !== "");
  const all = parts.map(Number);
  return all.every(Number.isFinite) ? all : null;
}

/** As many tokens as are ever read at once, where a model does not say how many it reads. */
const MOST = 2 ** 17;

/**
 * How many tokens there are to choose from: the prompt's, where a scan of all of it has told them, else as many
 * as the model reads.
 */
export function countable(
  series: Series | null,
  prompt: string,
  reads: number | undefined,
): number {
  // A trace reads no further than what it traces.
  if (series !== null && series.sequence !== "tracing" && series.tokens.length > 0) {
    const { acquisition, tokens } = series;
    const asked = acquisition.request["token_positions"] ?? "all";
    if (asked === "all" && acquisition.prompt === prompt) return tokens.length;
  }
  return reads !== undefined && reads < MOST ? reads : MOST;
}

/**
 * Tokens by their numbers, which count from 0 wherever one is shown or asked for: `0-2, 6`. In order, each once;
 * "all" where nothing is said; null where it cannot be read or there is no such token.
 */
export function positions(text: string, count: number): "all" | readonly number[] | null {
  if (text.trim() === "") return "all";
  const found = new Set<number>();
  for (const part of text.split(/[\s,]+/).filter((piece) => piece !== "")) {
    const range = /^(\d+)(?:[-–](\d+))?$/.exec(part);
    if (range === null) return null;
    const [first, last] = [Number(range[1]), Number(range[2] ?? range[1])];
    if (last < first || last >= count) return null;
    for (let at = first; at <= last; at++) found.add(at);
  }
  return [...found].sort((a, b) => a - b);
}
