/** What can be done to a component, as the service takes it. */
import type { Architecture } from "../api/schema";
import type { Message } from "../words/words.svelte";

export type Operation = "zero" | "amplify" | "invert" | "noise" | "ablate" | "inject" | "patch";
export type InjectMode = "add" | "replace";

export interface Stimulus {
  readonly operation: Operation;
  readonly component: string;
  /** Positions from 0; all where left out. */
  readonly token_positions?: "all" | readonly number[];
  /** Of `amplify`. */
  readonly factor?: number;
  /** Of `noise`: in units of the component's own RMS; over how many draws, from which seed. */
  readonly sigma?: number;
  readonly draws?: number;
  readonly seed?: number;
  /** Of `inject`. */
  readonly values?: readonly number[];
  readonly mode?: InjectMode;
  /** Of `patch`: a prompt of as many tokens, whose run the values come from. */
  readonly source_prompt?: string;
}

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

/** Components that something can be done to: nothing reads the unembedding but the logits. */
export function canStimulate(component: string): boolean {
  return component !== "unembed" && component !== "";
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

/** As one field of an address, and back: `amplify~blocks.1.attn~2~4` doubles it at token position 4. */
export function written(stimulus: Stimulus): string {
  const { operation, component, token_positions: where } = stimulus;
  const at = where === undefined || where === "all" ? "" : where.join(".");
  const amount = stimulus.factor ?? stimulus.sigma ?? stimulus.mode ?? "";
  const more =
    operation === "inject"
      ? (stimulus.values ?? []).join("_")
      : operation === "patch"
        ? (stimulus.source_prompt ?? "")
        : operation === "noise"
          ? [stimulus.draws ?? "", stimulus.seed ?? ""].join("_").replace(/^_$/, "")
          : "";
  return [operation, component, amount, at, ...(more === "" ? [] : [more])].join("~");
}

export function read(text: string): Stimulus | null {
  const [operation, component = "", amount = "", at = "", ...rest] = text.split("~");
  const known = OPERATIONS.find(({ id }) => id === operation);
  if (known === undefined || !canStimulate(component)) return null;
  const places = at === "" ? [] : at.split(".").map(Number);
  if (places.some((position) => !Number.isInteger(position))) return null;
  const own = parameters(known.id, amount, rest.join("~"));
  if (own === null) return null;
  return {
    operation: known.id,
    component,
    ...own,
    ...(places.length > 0 ? { token_positions: places } : {}),
  };
}

function parameters(operation: Operation, amount: string, more: string): Partial<Stimulus> | null {
  const number = Number(amount);
  const has = amount !== "" && Number.isFinite(number);
  switch (operation) {
    case "amplify":
      return has ? { factor: number } : {};
    case "noise": {
      const [draws = "", seed = ""] = more.split("_");
      const whole = (part: string) => /^\d+$/.test(part);
      return {
        ...(has ? { sigma: number } : {}),
        ...(whole(draws) ? { draws: Number(draws) } : {}),
        ...(whole(seed) ? { seed: Number(seed) } : {}),
      };
    }
    case "inject": {
      const values = more.split("_").map(Number);
      if (more === "" || !values.every(Number.isFinite)) return null;
      return { mode: amount === "replace" ? "replace" : "add", values };
    }
    case "patch":
      return more === "" ? null : { source_prompt: more };
    default:
      return {};
  }
}
