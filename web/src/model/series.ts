/** One finished or growing scan: its numbers and everything that is known of how they were taken. */
import {
  readActivations,
  readNeurons,
  readParameters,
  readPredictions,
  readTokens,
  readTopology,
  type Neuron,
  type ParameterTensor,
  type Prediction,
  type Token,
} from "../api/frames";
import type { ActivationFrame, JobEvent, JobView, LayerFrame, Manifest } from "../api/schema";
import type { SequenceId } from "./sequences";
import { Volume } from "./volume";

/** How and when a scan was taken, as the corners of the viewport tell it. */
export interface Acquisition {
  readonly job: string;
  readonly model: string;
  readonly revision: string;
  readonly prompt: string | null;
  readonly dtype: string | null;
  readonly device: string | null;
  readonly acquiredAt: Date | null;
  readonly forwardSeconds: number | null;
  readonly computeSeconds: number | null;
  readonly memoryBytes: number | null;
}

export interface Series {
  readonly sequence: SequenceId;
  readonly volume: Volume;
  readonly unit: string;
  readonly method: string;
  /** The tokens of the volume's columns; none for a static sequence. */
  readonly tokens: readonly Token[];
  readonly acquisition: Acquisition;
  readonly neurons: readonly Neuron[];
  readonly predictions: readonly Prediction[];
  readonly parameters: readonly ParameterTensor[];
  /** Parameters each component reads that are counted elsewhere. */
  readonly shared: ReadonlyMap<string, number>;
  /** False while frames still arrive; true once the stored table stands here. */
  readonly complete: boolean;
}

export type TableReader = (name: string) => Promise<ArrayBuffer>;

/** T1, from its stored tables. */
export async function loadStructural(manifest: Manifest, job: string, read: TableReader) {
  const [topology, parameters] = await Promise.all([
    read("topology").then(readTopology),
    read("parameters").then(readParameters),
  ]);
  const series: Series = {
    ...bare("T1", acquisitionOf(manifest, job)),
    volume: new Volume(topology.components, 1, topology.parameters),
    unit: topology.provenance.unit,
    method: topology.provenance.method,
    parameters,
    shared: new Map(topology.components.map((name, row) => [name, topology.shared[row] ?? 0])),
    complete: true,
  };
  return series;
}

/** fMRI, from its stored tables. */
export async function loadFunctional(manifest: Manifest, job: string, read: TableReader) {
  const [activations, tokens, neurons, predictions] = await Promise.all([
    read("activations").then(readActivations),
    read("tokens").then(readTokens),
    stored(manifest, "neurons") ? read("neurons").then(readNeurons) : [],
    stored(manifest, "predictions") ? read("predictions").then(readPredictions) : [],
  ]);
  const { provenance } = activations;
  const positions = provenance.positions ?? tokens.map((token) => token.position);
  const byPosition = new Map(tokens.map((token) => [token.position, token]));
  const series: Series = {
    ...bare("fMRI", acquisitionOf(manifest, job)),
    volume: new Volume(activations.components, activations.width, activations.values),
    unit: provenance.unit,
    method: provenance.method,
    tokens: positions.map(
      (position) => byPosition.get(position) ?? { position, id: -1, text: "", sink: false },
    ),
    neurons,
    predictions,
    complete: true,
  };
  return series;
}

/** A scan as it comes in: frames fill a buffer, and each makes a new series that readers can tell apart. */
export class Growing {
  #series: Series;
  readonly #rows: ReadonlyMap<string, number>;
  /** Layer the sweep has reached; -1 before it and once whole tokens arrive. */
  layer = -1;
  /** Column of the frame that came last. */
  token = 0;

  constructor(job: JobView, components: readonly string[], tokens: readonly string[]) {
    this.#rows = new Map(components.map((component, row) => [component, row]));
    const width = tokens.length;
    const buffer = new Float32Array(components.length * width).fill(NaN);
    const prompt = job.request["prompt"];
    this.#series = {
      ...bare("fMRI", {
        job: job.id,
        model: job.model,
        revision: job.revision,
        prompt: typeof prompt === "string" ? prompt : null,
        dtype: null,
        device: null,
        acquiredAt: null,
        forwardSeconds: null,
        computeSeconds: null,
        memoryBytes: null,
      }),
      volume: new Volume(components, width, buffer),
      unit: "",
      method: "",
      // Position 0 is a sink by definition; the others are known when the table is there.
      tokens: tokens.map((text, position) => ({ position, id: -1, text, sink: position === 0 })),
    };
  }

  get series(): Series {
    return this.#series;
  }

  /** Takes in what an event brings. Whether it brought any numbers. */
  take(event: JobEvent): boolean {
    if (event.type === "layer_frame") this.#layerArrived(event);
    else if (event.type === "activation_frame") this.#tokenArrived(event);
    else return false;
    this.token = event.token_idx;
    this.#series = { ...this.#series, unit: event.unit, volume: this.#series.volume.again() };
    return true;
  }

  /** One layer at one token. */
  #layerArrived(frame: LayerFrame): void {
    this.layer = frame.layer;
    const block = `blocks.${frame.layer}`;
    frame.heads.forEach((value, head) => {
      this.#put(`${block}.attn.head_${head}`, frame.token_idx, value);
    });
    if (frame.mlp !== null) this.#put(`${block}.mlp`, frame.token_idx, frame.mlp);
    if (frame.attn !== null) this.#put(`${block}.attn`, frame.token_idx, frame.attn);
    if (frame.resid_post !== null) {
      this.#put(`${block}.resid_post`, frame.token_idx, frame.resid_post);
    }
  }

  /** All components at one token. */
  #tokenArrived(frame: ActivationFrame): void {
    this.layer = -1;
    for (const layer of frame.layers) {
      if (layer.type === "attention") {
        layer.activations.forEach((value, head) => {
          this.#put(`${layer.layer_id}.head_${head}`, frame.token_idx, value);
        });
      } else {
        this.#put(layer.layer_id, frame.token_idx, layer.activations[0] ?? NaN);
      }
    }
  }

  #put(component: string, column: number, value: number): void {
    const row = this.#rows.get(component);
    const { volume } = this.#series;
    if (row === undefined || column < 0 || column >= volume.width) return;
    volume.data[row * volume.width + column] = value;
  }
}

function bare(sequence: SequenceId, acquisition: Acquisition): Series {
  return {
    sequence,
    volume: new Volume([], 0, new Float32Array(0)),
    unit: "",
    method: "",
    tokens: [],
    acquisition,
    neurons: [],
    predictions: [],
    parameters: [],
    shared: new Map(),
    complete: false,
  };
}

function acquisitionOf(manifest: Manifest, job: string): Acquisition {
  const prompt = manifest.request["prompt"];
  return {
    job,
    model: manifest.model,
    revision: manifest.revision,
    prompt: typeof prompt === "string" ? prompt : null,
    dtype: manifest.numerics.dtype,
    device: manifest.numerics.device,
    acquiredAt: new Date(manifest.created_at),
    forwardSeconds: manifest.forward_seconds,
    computeSeconds: manifest.compute_seconds,
    memoryBytes: manifest.memory_bytes,
  };
}

function stored(manifest: Manifest, name: string): boolean {
  return manifest.tables.some((table) => table.name === name);
}
