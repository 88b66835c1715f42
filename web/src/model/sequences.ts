/**
 * The sequences a model can be scanned with. A new one is a new entry here and a loader of its tables:
 * tabs, series, windows, keys and addresses follow from it.
 */
import { STRUCTURAL } from "../api/requests";
import type { MapName } from "../colour/lut";
import type { Message } from "../words/words.svelte";

export type SequenceId = "T1" | "T2" | "fMRI" | "DTI" | "FLAIR";

export interface Sequence {
  readonly id: SequenceId;
  readonly title: Message;
  /** What it stands for, as the specification names it. */
  readonly fullName: string;
  readonly about: Message;
  /** How to read the picture, where it is not a matter of course. */
  readonly reading: Message;
  /** The key that shows it. */
  readonly key: string;
  readonly endpoint: string;
  readonly needsPrompt: boolean;
  /** Its map in words: what the colour bar is before anything is measured. */
  readonly map: MapName;
  /** Whether a node's size tells its parameter count or swells with its value. */
  readonly size: "parameters" | "value";
  /** Halos: none, on the largest values, or on what the scan itself marks. */
  readonly halos: "none" | "largest" | "marked";
}

export const SEQUENCES: readonly Sequence[] = [
  {
    id: "T1",
    title: "Topology",
    fullName: "Topology Layer 1",
    about: "Static structure: every head and MLP, and how many parameters it has.",
    reading: "Lighter and larger: more parameters.",
    key: "1",
    endpoint: STRUCTURAL,
    needsPrompt: false,
    map: "grey",
    size: "parameters",
    halos: "none",
  },
  {
    id: "T2",
    title: "Tensor",
    fullName: "Tensor Layer 2",
    about: "How large the weights of each component are, as published; no prompt is read.",
    reading:
      "Lighter blue: larger weights. A ring marks weights far outside the rest of their tensor.",
    key: "2",
    endpoint: "/api/scan/weights",
    needsPrompt: false,
    map: "steel",
    size: "value",
    halos: "none",
  },
  {
    id: "fMRI",
    title: "Functional",
    fullName: "functional Model Resonance Imaging",
    about: "What each component writes to the residual stream at each token of a prompt.",
    reading: "Hotter and larger: writes more at this token.",
    key: "3",
    endpoint: "/api/scan/activation",
    needsPrompt: true,
    map: "inferno",
    size: "value",
    halos: "largest",
  },
  {
    id: "DTI",
    title: "Tracts",
    fullName: "Data Tractography Imaging",
    about:
      "Which components carry the answer, and along which paths: what replacing each one does to it.",
    reading:
      "Green: the answer suffers without it. Violet: the answer gains. Tracts join what one writes to what another reads.",
    key: "4",
    endpoint: "/api/scan/circuits",
    needsPrompt: true,
    map: "green-violet",
    size: "value",
    halos: "none",
  },
  {
    id: "FLAIR",
    title: "Anomaly",
    fullName: "Feature-Level Anomaly Identification & Reporting",
    about:
      "Uncertainty, where the prediction appears, and whether more than habit supports it, against what is ordinary for this model.",
    reading:
      "Grey is ordinary. Red, ringed and pulsing: farther from ordinary than the false-alarm rate allows.",
    key: "5",
    endpoint: "/api/scan/anomaly",
    needsPrompt: true,
    map: "lesion",
    size: "value",
    halos: "marked",
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
