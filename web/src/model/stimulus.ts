/** What can be done to a component, as the service takes it and an address has it. */
const NAMES = ["zero", "amplify", "invert", "noise", "ablate", "inject", "patch"] as const;

export type Operation = (typeof NAMES)[number];
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

/** Components that something can be done to: nothing reads the unembedding but the logits. */
export function canStimulate(component: string): boolean {
  return component !== "unembed" && component !== "";
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
  const known = NAMES.find((name) => name === operation);
  if (known === undefined || !canStimulate(component)) return null;
  const places = at === "" ? [] : at.split(".").map(Number);
  if (places.some((position) => !Number.isInteger(position))) return null;
  const own = parameters(known, amount, rest.join("~"));
  if (own === null) return null;
  return {
    operation: known,
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
