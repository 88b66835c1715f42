/** FLAIR: uncertainty, where a prediction appears, and its support, against what is ordinary. */
import { openTable, readPredictions, readTokens, type ArrowTable } from "../../api/frames";
import { field, type Field } from "../field";
import { sequence } from "../sequences";
import { acquisitionOf, bare, stored, type Loader } from "../series";
import { Volume } from "../volume";
import { reported } from "./activations";

/** One token's three channels. NaN where nothing was measured, as at position 0. */
export interface Finding {
  readonly position: number;
  /** What the model itself says next. */
  readonly next: string;
  readonly entropy: number;
  readonly probability: number;
  readonly margin: number;
  readonly uncertain: boolean;
  /** Layer from which the lens's likeliest token stays the model's; -1 where not measured. */
  readonly layer: number;
  readonly depth: number;
  readonly gain: number;
  readonly support: number;
  readonly unsupported: boolean;
}

/** A token asked about, at the target. */
export interface Asked {
  readonly role: string;
  readonly position: number;
  readonly text: string;
  readonly logProbability: number;
  readonly support: number;
  readonly unsupported: boolean;
}

export interface LensWord {
  readonly text: string;
  readonly logProbability: number;
}

export interface Anomalies {
  readonly findings: readonly Finding[];
  readonly asked: readonly Asked[];
  /** D_KL(model ‖ lens) in nats: rows are `places`, columns the series' tokens. */
  readonly lens: Volume;
  readonly lensAnomalous: Volume;
  readonly lensMethod: string;
  /** `embed`, then each block's end. */
  readonly places: readonly string[];
  readonly word: (place: string, position: number) => LensWord | null;
  readonly calibrated: boolean;
  readonly rate: number;
  readonly methods: {
    readonly uncertainty: string;
    readonly support: string;
    readonly depth: string;
  };
}

export const load: Loader = async (manifest, job, read) => {
  const table = (name: string) => read(name).then((bytes) => openTable(bytes, name));
  const [tokens, predictions, lens, words, uncertainty, support, depth, nodes] = await Promise.all([
    read("tokens").then(readTokens),
    read("predictions").then(readPredictions),
    table("lens"),
    table("lens_tokens"),
    table("uncertainty"),
    table("support"),
    table("depth"),
    stored(manifest, "nodes") ? table("nodes") : null,
  ]);
  const columns = reported(lens.provenance.positions, tokens);
  const positions = columns.map(({ position }) => position);
  const calibrated = lens.provenance.parameters["calibration"] !== "none";
  const kl = quantity(lens, "kl", positions);
  const said = new Map<string, LensWord>();
  words.rows((row) => {
    said.set(`${row.text("component")}@${row.number("position")}`, {
      text: row.text("text"),
      logProbability: row.number("log_probability"),
    });
  });
  const own = new Map<number, { gain: number; support: number; unsupported: boolean }>();
  const asked: Asked[] = [];
  support.rows((row) => {
    const position = row.number("position");
    const [supported, unsupported] = [row.number("support"), row.flag("anomalous")];
    if (row.text("role") === "own") {
      own.set(position, { gain: row.number("gain"), support: supported, unsupported });
    } else {
      asked.push({
        role: row.text("role"),
        position,
        text: row.text("text"),
        logProbability: row.number("log_probability"),
        support: supported,
        unsupported,
      });
    }
  });
  const settled = new Map(
    depth.rows((row) => [row.number("position"), [row.number("layer"), row.number("depth")]]),
  );
  return {
    ...bare("FLAIR", acquisitionOf(manifest, job)),
    fields: fieldsOf(nodes, positions, calibrated),
    tokens: columns,
    predictions,
    anomalies: {
      findings: uncertainty.rows((row) => {
        const position = row.number("position");
        const [layer = -1, share = NaN] = settled.get(position) ?? [];
        return {
          position,
          next: row.text("text"),
          entropy: row.number("entropy"),
          probability: row.number("max_probability"),
          margin: row.number("margin"),
          uncertain: row.flag("anomalous"),
          layer,
          depth: share,
          gain: own.get(position)?.gain ?? NaN,
          support: own.get(position)?.support ?? NaN,
          unsupported: own.get(position)?.unsupported ?? false,
        };
      }),
      asked,
      lens: kl,
      lensAnomalous: quantity(lens, "anomalous", positions),
      lensMethod: lens.provenance.method,
      places: kl.components,
      word: (place, position) => said.get(`${place}@${position}`) ?? null,
      calibrated,
      rate: Number(lens.provenance.parameters["false_alarm_rate"] ?? NaN),
      methods: {
        uncertainty: uncertainty.provenance.method,
        support: support.provenance.method,
        depth: depth.provenance.method,
      },
    },
    complete: true,
  };
};

/** What the nodes can be painted with. Without a calibration nothing can be called unusual. */
function fieldsOf(
  nodes: ArrowTable | null,
  positions: readonly number[],
  calibrated: boolean,
): Field[] {
  if (nodes === null) return [];
  const marks = quantity(nodes, "anomalous", positions);
  const { method, unit } = nodes.provenance;
  const marked = "ring: beyond the bound that the false-alarm rate allows";
  const change = field({
    id: "change",
    title: "KL change",
    unit,
    method,
    volume: quantity(nodes, "kl_change", positions),
    map: "blue-orange",
    signed: true,
    marks: calibrated ? marks : null,
    marked,
  });
  if (!calibrated) return [change];
  const z = field({
    id: "z",
    title: "Unusual",
    unit: "ordinary σ",
    method: `z of the KL change on reference text; ${method}`,
    volume: quantity(nodes, "z", positions),
    map: sequence("FLAIR").map,
    scales: ["size", "linear"],
    tail: 0.005,
    marks,
    marked,
  });
  return [z, change];
}

/** One quantity of a table with a row a place and quantity, at these positions; NaN where it has none. */
export function quantity(table: ArrowTable, name: string, positions: readonly number[]): Volume {
  const { values, width } = table.matrix("value");
  const own = table.provenance.positions ?? positions;
  const columns = positions.map((position) => own.indexOf(position));
  const quantities = table.texts("quantity");
  const components = table.texts("component");
  const rows = [...components.keys()].filter((row) => quantities[row] === name);
  const data = new Float32Array(rows.length * positions.length).fill(NaN);
  rows.forEach((row, place) => {
    columns.forEach((column, at) => {
      if (column >= 0) data[place * positions.length + at] = values[row * width + column] ?? NaN;
    });
  });
  return new Volume(
    rows.map((row) => components[row] ?? ""),
    positions.length,
    data,
  );
}
