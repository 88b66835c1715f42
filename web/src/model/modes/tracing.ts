/**
 * Where a fact passes: what putting a clean value back at one place and token does for the answer, in a
 * corrupted run (causal tracing, or patching between two prompts). Maps of layer x position.
 */
import { openTable, readTokens, type ArrowTable } from "../../api/frames";
import { field } from "../field";
import { acquisitionOf, bare, stored, type Loader } from "../series";
import { Volume } from "../volume";
import { reported } from "./activations";
import { quantity } from "./anomalies";

export interface Trace {
  readonly answer: string;
  readonly unit: string;
  readonly method: string;
  readonly clean: number;
  readonly corrupted: number;
  readonly probabilityClean: number;
  readonly probabilityCorrupted: number;
  /** Text whose embeddings were drowned in noise; null where a corrupt prompt was read instead. */
  readonly subject: string | null;
}

export const load: Loader = async (manifest, job, read) => {
  const traced = stored(manifest, "trace");
  const name = traced ? "trace" : "recovery";
  const [tokens, map, contrast] = await Promise.all([
    read("tokens").then(readTokens),
    read(name).then((bytes) => openTable(bytes, name)),
    read("contrast").then((bytes) => openTable(bytes, "contrast")),
  ]);
  const columns = reported(map.provenance.positions, tokens);
  const positions = columns.map(({ position }) => position);
  const volume = asNodes(traced ? quantity(map, "indirect_effect", positions) : recovered(map));
  const [runs] = contrast.rows((row) => ({
    answer: row.text("answer"),
    unit: contrast.provenance.unit,
    method: contrast.provenance.method,
    clean: row.number("clean"),
    corrupted: row.number("corrupted"),
    probabilityClean: row.number("probability_clean"),
    probabilityCorrupted: row.number("probability_corrupted"),
  }));
  const { subject } = manifest.request;
  return {
    ...bare("tracing", acquisitionOf(manifest, job)),
    fields: [
      field({
        id: "trace",
        title: traced ? "Causal trace" : "Recovery",
        unit: map.provenance.unit,
        method: map.provenance.method,
        volume,
        map: "blue-orange",
        signed: true,
        tail: 0.005,
      }),
    ],
    tokens: columns,
    trace:
      runs === undefined
        ? null
        : { ...runs, subject: typeof subject === "string" ? subject : null },
    complete: true,
  };
};

function recovered(map: ArrowTable): Volume {
  const { values, width } = map.matrix("value");
  return new Volume(map.texts("component"), width, values);
}

/**
 * The residual stream before a block is what the block before left: it is shown there, as the picture has
 * it; before the first stands the embedding.
 */
function asNodes(volume: Volume): Volume {
  const names = volume.components.map((component) => {
    const layer = /^blocks\.(\d+)\.resid_pre$/.exec(component)?.[1];
    if (layer === undefined) return component;
    return layer === "0" ? "embed" : `blocks.${Number(layer) - 1}.resid_post`;
  });
  return new Volume(names, volume.width, volume.data);
}
