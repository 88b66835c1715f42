/** T2: what the published weights are like. Histograms and single outliers are fetched when looked at. */
import { openTable, type Row } from "../../api/frames";
import { field, type Field } from "../field";
import { sequence } from "../sequences";
import { acquisitionOf, bare, type Loader, type TableReader } from "../series";
import { Volume } from "../volume";
import type { Message } from "../../words/words.svelte";

/** A component is marked where its share of outliers exceeds the median component's so many times. */
export const MARKED_TIMES = 5;

export interface Tensor {
  readonly name: string;
  readonly component: string;
  readonly role: string;
  readonly shape: readonly number[];
  readonly mean: number;
  readonly std: number;
  readonly rms: number;
  readonly maxAbs: number;
  readonly kurtosis: number;
  readonly outlierShare: number;
}

export interface HeadCircuit {
  readonly circuit: "QK" | "OV";
  /** The largest, largest first. */
  readonly singular: Float32Array;
  readonly stableRank: number;
  /** From -1 to 1; NaN for QK. */
  readonly copying: number;
}

export interface WeightNeuron {
  readonly component: string;
  readonly neuron: number;
  readonly product: number;
  readonly inNorm: number;
  readonly outNorm: number;
}

export interface Histogram {
  readonly minimum: number;
  readonly maximum: number;
  readonly counts: Float32Array;
}

export interface Outlier {
  readonly row: number;
  readonly column: number;
  readonly value: number;
  readonly z: number;
}

export interface Weights {
  readonly tensors: readonly Tensor[];
  readonly circuits: ReadonlyMap<string, readonly HeadCircuit[]>;
  readonly neurons: readonly WeightNeuron[];
  /** Standard deviations beyond which a weight counts as an outlier. */
  readonly sigma: number;
  readonly distribution: (tensor: string) => Promise<Distribution>;
}

export interface Distribution {
  readonly histogram: Histogram | null;
  readonly outliers: readonly Outlier[];
}

export const load: Loader = async (manifest, job, read) => {
  const [weights, tensors, circuits, neurons] = await Promise.all([
    read("weights").then((bytes) => openTable(bytes, "weights")),
    read("tensors").then((bytes) => openTable(bytes, "tensors")),
    read("circuits").then((bytes) => openTable(bytes, "circuits")),
    read("neuron_weights").then((bytes) => openTable(bytes, "neuron_weights")),
  ]);
  const components = weights.texts("component");
  const sigma = Number(weights.provenance.parameters["outlier_sigma"] ?? NaN);
  const shares = Float32Array.from(weights.numbers("outlier_share"));
  const marks = new Volume(components, 1, outlying(shares));
  const marked = `ring: more than ${MARKED_TIMES} times the median share of weights beyond ${sigma} σ`;
  const { method } = weights.provenance;
  const quantity = (
    id: string,
    title: Message,
    unit: string,
    column: string,
    log: boolean,
  ): Field =>
    field({
      id,
      title,
      unit,
      method: `${column} of ${method}`,
      volume: new Volume(components, 1, Float32Array.from(weights.numbers(column))),
      map: sequence("T2").map,
      scales: log ? ["log", "linear"] : ["linear", "log"],
      marks,
      marked,
    });
  const shapes = tensors.lists("shape");
  const circuitRows = circuits.matrix("value");
  const byHead = new Map<string, HeadCircuit[]>();
  const copying = new Map<string, number>();
  circuits.rows((row) => {
    const found: HeadCircuit = {
      circuit: row.text("circuit") === "QK" ? "QK" : "OV",
      singular: circuitRows.values.subarray(
        row.index * circuitRows.width,
        (row.index + 1) * circuitRows.width,
      ),
      stableRank: row.number("stable_rank"),
      copying: row.number("copying"),
    };
    const head = row.text("component");
    byHead.set(head, [...(byHead.get(head) ?? []), found]);
    if (found.circuit === "OV") copying.set(head, found.copying);
  });
  return {
    ...bare("T2", acquisitionOf(manifest, job)),
    fields: [
      quantity("rms", "RMS", "RMS weight", "rms", true),
      quantity("outliers", "Outlier share", `share beyond ${sigma} σ`, "outlier_share", true),
      quantity("largest", "Largest weight", "|weight|", "max_abs", true),
      field({
        id: "copying",
        title: "Copying (OV)",
        unit: "copying score",
        method:
          "sum Re(eigenvalue) / sum |eigenvalue| of W_V W_O, -1 to 1; of heads alone: an MLP has none",
        volume: new Volume([...copying.keys()], 1, Float32Array.from(copying.values())),
        map: "blue-orange",
        signed: true,
        tail: 0,
      }),
    ],
    weights: {
      sigma,
      tensors: tensors.rows((row) => tensorOf(row, shapes[row.index] ?? [])),
      circuits: byHead,
      neurons: neurons.rows((row) => ({
        component: row.text("component"),
        neuron: row.number("neuron"),
        product: row.number("product"),
        inNorm: row.number("in_norm"),
        outNorm: row.number("out_norm"),
      })),
      distribution: (tensor) => distribution(read, tensor),
    },
    complete: true,
  };
};

function tensorOf(row: Row, shape: Iterable<number>): Tensor {
  return {
    name: row.text("name"),
    component: row.text("component"),
    role: row.text("role"),
    shape: [...shape],
    mean: row.number("mean"),
    std: row.number("std"),
    rms: row.number("rms"),
    maxAbs: row.number("max_abs"),
    kurtosis: row.number("kurtosis"),
    outlierShare: row.number("outlier_share"),
  };
}

/** 1 where a share is far above the median one. */
export function outlying(shares: Float32Array): Float32Array {
  const sorted = shares.filter(Number.isFinite).sort();
  const median = sorted[Math.floor(sorted.length / 2)] ?? 0;
  return shares.map((share) => (share > MARKED_TIMES * median ? 1 : 0));
}

/** How one tensor's weights are spread; the browser keeps the tables, which never change. */
async function distribution(read: TableReader, tensor: string): Promise<Distribution> {
  const [histograms, outliers] = await Promise.all([
    read("histograms").then((bytes) => openTable(bytes, "histograms")),
    read("outliers").then((bytes) => openTable(bytes, "outliers")),
  ]);
  const { values, width } = histograms.matrix("counts");
  const row = histograms.texts("name").indexOf(tensor);
  return {
    histogram:
      row < 0
        ? null
        : {
            minimum: histograms.numbers("minimum")[row] ?? NaN,
            maximum: histograms.numbers("maximum")[row] ?? NaN,
            counts: values.subarray(row * width, (row + 1) * width),
          },
    outliers: outliers
      .rows((entry) => ({
        tensor: entry.text("name"),
        row: entry.number("row"),
        column: entry.number("column"),
        value: entry.number("value"),
        z: entry.number("z"),
      }))
      .filter((entry) => entry.tensor === tensor),
  };
}
