/** What a scan is asked about: one next token, what it is compared with, and where the comparison comes from. */
import type { Message } from "../words/words.svelte";

export type MethodId =
  "fast" | "ablation" | "attribution_patching" | "integrated_gradients" | "direct";

export interface Question {
  /** The next token as typed; the model's likeliest where empty. */
  readonly answer: string;
  readonly foil: string;
  /** A prompt of the same number of tokens that asks for the foil. */
  readonly corrupt: string;
  readonly method: MethodId;
}

export const NO_QUESTION: Question = { answer: "", foil: "", corrupt: "", method: "fast" };

export interface Method {
  readonly id: MethodId;
  readonly title: Message;
  readonly about: Message;
  readonly needsCorrupt: boolean;
}

export const METHODS: readonly Method[] = [
  {
    id: "fast",
    title: "Fast",
    about: "estimates of all from one backward pass, the strongest 30 measured",
    needsCorrupt: false,
  },
  {
    id: "ablation",
    title: "Exact ablation",
    about: "every component replaced in turn",
    needsCorrupt: false,
  },
  {
    id: "attribution_patching",
    title: "Attribution patching",
    about: "first-order estimates alone",
    needsCorrupt: false,
  },
  {
    id: "integrated_gradients",
    title: "Integrated gradients",
    about: "estimates averaged from corrupt to clean inputs",
    needsCorrupt: true,
  },
  {
    id: "direct",
    title: "Direct attribution",
    about: "only what each component writes for the answer itself",
    needsCorrupt: false,
  },
];

/** Which run is patched with the other's values. */
export type Direction = "denoising" | "noising";

/** What is patched, for every layer and position. */
export type PatchSite = "resid_pre" | "attn" | "mlp" | "head";
export const PATCH_SITES: readonly { readonly id: PatchSite; readonly title: Message }[] = [
  { id: "resid_pre", title: "residual stream" },
  { id: "attn", title: "attention" },
  { id: "mlp", title: "MLPs" },
  { id: "head", title: "every head" },
];

/** How the subject is drowned, and how many layers are put back at once. */
export interface Tracing {
  readonly sigma: number;
  readonly draws: number;
  readonly window: number;
}

export interface Patching {
  readonly direction: Direction;
  readonly sites: readonly PatchSite[];
}

/** What is typed as the token it most likely means: a word follows a space. */
export function asToken(typed: string): string {
  return /^[\p{L}\p{N}]/u.test(typed) ? ` ${typed}` : typed;
}

/** The question's part of a request; what is empty is left to the service. */
export function asked(question: Question): Readonly<Record<string, string>> {
  const { answer, foil } = question;
  return {
    ...(answer === "" ? {} : { answer: asToken(answer) }),
    ...(foil === "" ? {} : { foil: asToken(foil) }),
  };
}

/** What a circuit scan is asked beside. */
export function askedOfCircuit(question: Question): Readonly<Record<string, string>> {
  const { corrupt, method } = question;
  return {
    ...asked(question),
    method,
    ...(corrupt.trim() === "" ? {} : { corrupt_prompt: corrupt }),
  };
}
