/**
 * The sequences a model can be scanned with. A new one is a new entry here: tabs, series, windows, keys
 * and addresses follow from it.
 */
import type { MapName } from "../colour/lut";
import type { Scale } from "../colour/window";

export type SequenceId = "T1" | "fMRI";

export interface Sequence {
  readonly id: SequenceId;
  readonly title: string;
  /** What it stands for, as the specification names it. */
  readonly fullName: string;
  readonly about: string;
  /** The key that shows it: places 1 to 5 are T1, T2, fMRI, DTI, FLAIR. */
  readonly key: string;
  readonly endpoint: string;
  readonly needsPrompt: boolean;
  readonly map: MapName;
  readonly scale: Scale;
  /** Share of the values the automatic window leaves out at either end. */
  readonly tail: number;
  /** Whether a node's size tells its parameter count or swells with its value. */
  readonly size: "parameters" | "value";
  readonly glows: boolean;
}

export const SEQUENCES: readonly Sequence[] = [
  {
    id: "T1",
    title: "Topology",
    fullName: "Topology Layer 1",
    about: "Static structure: every head and MLP, and how many parameters it has.",
    key: "1",
    endpoint: "/api/scan/structural",
    needsPrompt: false,
    map: "grey",
    scale: "log",
    tail: 0,
    size: "parameters",
    glows: false,
  },
  {
    id: "fMRI",
    title: "Functional",
    fullName: "functional Model Resonance Imaging",
    about: "What each component writes to the residual stream at each token of a prompt.",
    key: "3",
    endpoint: "/api/scan/activation",
    needsPrompt: true,
    map: "inferno",
    scale: "log",
    tail: 0.02,
    size: "value",
    glows: true,
  },
];

export function sequence(id: SequenceId): Sequence {
  const found = SEQUENCES.find((candidate) => candidate.id === id);
  if (found === undefined) throw new RangeError(`There is no sequence ${id}`);
  return found;
}

export function isSequence(id: string): id is SequenceId {
  return SEQUENCES.some((candidate) => candidate.id === id);
}
