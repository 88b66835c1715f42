/** What can be done to a component, as the service takes it. */
import type { Message } from "../words/words.svelte";

export type Operation = "zero" | "amplify" | "invert" | "noise" | "ablate";

export interface Stimulus {
  readonly operation: Operation;
  readonly component: string;
  /** Positions from 0; all where left out. */
  readonly token_positions?: "all" | readonly number[];
  readonly factor?: number;
  readonly sigma?: number;
  readonly seed?: number;
}

export interface OperationAbout {
  readonly id: Operation;
  readonly title: Message;
  readonly about: Message;
}

export const OPERATIONS: readonly OperationAbout[] = [
  { id: "zero", title: "Zero", about: "its output becomes 0" },
  { id: "amplify", title: "Amplify", about: "its output is multiplied" },
  { id: "invert", title: "Invert", about: "its output changes sign" },
  { id: "noise", title: "Noise", about: "Gaussian noise of σ times its own RMS is added" },
  { id: "ablate", title: "Ablate", about: "its output becomes its mean over reference text" },
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
    default:
      return stimulus.operation;
  }
}

/** Components that something can be done to: nothing reads the unembedding but the logits. */
export function canStimulate(component: string): boolean {
  return component !== "unembed" && component !== "";
}

/** As one field of an address, and back: `amplify~blocks.1.attn~2~4` doubles it at token position 4. */
export function written(stimulus: Stimulus): string {
  const amount = stimulus.factor ?? stimulus.sigma ?? "";
  const positions = stimulus.token_positions;
  const at = positions === undefined || positions === "all" ? "" : positions.join(".");
  return [stimulus.operation, stimulus.component, amount, at].join("~");
}

export function read(text: string): Stimulus | null {
  const [operation, component = "", amount = "", at = ""] = text.split("~");
  const known = OPERATIONS.find(({ id }) => id === operation);
  if (known === undefined || !canStimulate(component)) return null;
  const positions = at === "" ? [] : at.split(".").map(Number);
  if (positions.some((position) => !Number.isInteger(position))) return null;
  const number = Number(amount);
  const has = amount !== "" && Number.isFinite(number);
  return {
    operation: known.id,
    component,
    ...(known.id === "amplify" && has ? { factor: number } : {}),
    ...(known.id === "noise" && has ? { sigma: number } : {}),
    ...(positions.length > 0 ? { token_positions: positions } : {}),
  };
}
