/** One finished or growing scan: its numbers and everything that is known of how they were taken. */
import {
  readParameters,
  readTopology,
  type Neuron,
  type ParameterTensor,
  type Prediction,
  type Token,
} from "../api/frames";
import type { JobView, Manifest } from "../api/schema";
import { field, type Field } from "./field";
import type { Anomalies } from "./modes/anomalies";
import type { Circuit } from "./modes/circuits";
import type { Lesion } from "./modes/stimulation";
import type { Trace } from "./modes/tracing";
import type { Weights } from "./modes/weights";
import { sequence, type SequenceId } from "./sequences";
import { Volume } from "./volume";

/**
 * What a series is of: one of the sequences, the model reading a prompt with parts of it changed, or what
 * putting parts of one run into another does.
 */
export type SeriesId = SequenceId | "stimulation" | "tracing";

/** How and when a scan was taken, as the corners of the viewport tell it. */
export interface Acquisition {
  readonly job: string;
  readonly model: string;
  readonly revision: string;
  readonly prompt: string | null;
  /** The request as it was sent. */
  readonly request: Readonly<Record<string, unknown>>;
  readonly dtype: string | null;
  readonly device: string | null;
  readonly acquiredAt: Date | null;
  readonly forwardSeconds: number | null;
  readonly computeSeconds: number | null;
  readonly memoryBytes: number | null;
}

export interface Series {
  readonly sequence: SeriesId;
  /** What it measured; the first is shown unless another is asked for. */
  readonly fields: readonly Field[];
  /** The tokens of the volumes' columns; none for a static image. */
  readonly tokens: readonly Token[];
  readonly acquisition: Acquisition;
  readonly neurons: readonly Neuron[];
  readonly predictions: readonly Prediction[];
  readonly parameters: readonly ParameterTensor[];
  /** Parameters each component reads that are counted elsewhere. */
  readonly shared: ReadonlyMap<string, number>;
  /** What one modality alone has. */
  readonly weights: Weights | null;
  readonly circuit: Circuit | null;
  readonly anomalies: Anomalies | null;
  readonly lesion: Lesion | null;
  readonly trace: Trace | null;
  /** False while frames still arrive; true once the stored table stands here. */
  readonly complete: boolean;
}

export type TableReader = (name: string) => Promise<ArrayBuffer>;
export type Loader = (manifest: Manifest, job: string, read: TableReader) => Promise<Series>;

/** T1, from its stored tables. */
export const loadStructural: Loader = async (manifest, job, read) => {
  const [topology, parameters] = await Promise.all([
    read("topology").then(readTopology),
    read("parameters").then(readParameters),
  ]);
  return {
    ...bare("T1", acquisitionOf(manifest, job)),
    fields: [
      field({
        id: "parameters",
        title: "Parameters",
        unit: topology.provenance.unit,
        method: topology.provenance.method,
        volume: new Volume(topology.components, 1, topology.parameters),
        map: sequence("T1").map,
        scales: ["log", "linear"],
        tail: 0,
        adds: true,
      }),
    ],
    parameters,
    shared: new Map(topology.components.map((name, row) => [name, topology.shared[row] ?? 0])),
    complete: true,
  };
};

export function bare(sequence: SeriesId, acquisition: Acquisition): Series {
  return {
    sequence,
    fields: [],
    tokens: [],
    acquisition,
    neurons: [],
    predictions: [],
    parameters: [],
    shared: new Map(),
    weights: null,
    circuit: null,
    anomalies: null,
    lesion: null,
    trace: null,
    complete: false,
  };
}

/** What is known of a scan that still runs. */
export function announced(job: JobView): Acquisition {
  const prompt = job.request["prompt"];
  return {
    job: job.id,
    model: job.model,
    revision: job.revision,
    prompt: typeof prompt === "string" ? prompt : null,
    request: job.request,
    dtype: null,
    device: null,
    acquiredAt: null,
    forwardSeconds: null,
    computeSeconds: null,
    memoryBytes: null,
  };
}

export function acquisitionOf(manifest: Manifest, job: string): Acquisition {
  const prompt = manifest.request["prompt"];
  return {
    job,
    model: manifest.model,
    revision: manifest.revision,
    prompt: typeof prompt === "string" ? prompt : null,
    request: manifest.request,
    dtype: manifest.numerics.dtype,
    device: manifest.numerics.device,
    acquiredAt: new Date(manifest.created_at),
    forwardSeconds: manifest.forward_seconds,
    computeSeconds: manifest.compute_seconds,
    memoryBytes: manifest.memory_bytes,
  };
}

export function stored(manifest: Manifest, name: string): boolean {
  return manifest.tables.some((table) => table.name === name);
}
