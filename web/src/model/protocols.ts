/** Hanging protocols: which pictures hang side by side, and what they have in common. */
import type { Message } from "../words/words.svelte";

export type ProtocolId = "planes" | "one" | "five" | "prior" | "models";

export interface Protocol {
  readonly id: ProtocolId;
  readonly title: Message;
  readonly about: Message;
  /** The key that hangs it. */
  readonly key: string;
  /** Whether what is looked at hangs beside something that it is compared with. */
  readonly compares: boolean;
}

export const PROTOCOLS: readonly Protocol[] = [
  {
    id: "planes",
    title: "3 planes",
    about: "axial, sagittal and coronal, cut where the crosshair is",
    key: "6",
    compares: false,
  },
  {
    id: "one",
    title: "1 up",
    about: "the axial plane alone, as large as it gets",
    key: "7",
    compares: false,
  },
  {
    id: "five",
    title: "5 up",
    about: "all five sequences of the same place",
    key: "8",
    compares: false,
  },
  {
    id: "prior",
    title: "Compare",
    about: "prior, current and difference: what was, what is, what changed",
    key: "9",
    compares: true,
  },
  {
    id: "models",
    title: "2 models",
    about: "the same prompt read by two models, the crosshair at the same depth",
    key: "0",
    compares: true,
  },
];

export const PROTOCOL_IDS: readonly ProtocolId[] = PROTOCOLS.map(({ id }) => id);

export function protocol(id: ProtocolId): Protocol {
  const found = PROTOCOLS.find((candidate) => candidate.id === id);
  if (found === undefined) throw new RangeError(`There is no protocol ${id}`);
  return found;
}

/** Where the scan comes from that another is compared with. */
export type PriorKind = "prompt" | "model" | "scan" | "stimulation";
export const PRIOR_KINDS: readonly PriorKind[] = ["prompt", "model", "scan", "stimulation"];

/** What somebody wants to see compared: everything that brings the other picture back. */
export interface PriorPlace {
  readonly kind: PriorKind;
  readonly prompt: string;
  readonly model: string | null;
  /** The scans that are there, one of a kind. */
  readonly jobs: readonly string[];
}

export const NO_PRIOR: PriorPlace = { kind: "prompt", prompt: "", model: null, jobs: [] };
