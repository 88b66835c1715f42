/** fMRI: what components write at each token, from stored tables or as it comes in. */
import {
  readActivations,
  readNeurons,
  readPredictions,
  readTokens,
  type ActivationTable,
  type Token,
} from "../../api/frames";
import type { ActivationFrame, JobEvent, JobView, LayerFrame } from "../../api/schema";
import type { MapName } from "../../colour/lut";
import { field, type Field } from "../field";
import { sequence } from "../sequences";
import { acquisitionOf, announced, bare, stored, type Loader, type Series } from "../series";
import { Volume } from "../volume";
import type { Message } from "../../words/words.svelte";

export const load: Loader = async (manifest, job, read) => {
  const [activations, tokens, neurons, predictions] = await Promise.all([
    read("activations").then(readActivations),
    read("tokens").then(readTokens),
    stored(manifest, "neurons") ? read("neurons").then(readNeurons) : [],
    stored(manifest, "predictions") ? read("predictions").then(readPredictions) : [],
  ]);
  return {
    ...bare("fMRI", acquisitionOf(manifest, job)),
    fields: [activity(activations, "activity", "Activity")],
    tokens: reported(activations.provenance.positions, tokens),
    neurons,
    predictions,
    complete: true,
  };
};

/** A table of what components write, as a quantity to look at. */
export function activity(
  table: ActivationTable,
  id: string,
  title: Message,
  map: MapName = sequence("fMRI").map,
): Field {
  return field({
    id,
    title,
    unit: table.provenance.unit,
    method: table.provenance.method,
    volume: new Volume(table.components, table.width, table.values),
    map,
    scales: ["log", "linear"],
  });
}

/** The tokens at the positions a table reports, in its order; all where it names none. */
export function reported(
  positions: readonly number[] | null,
  tokens: readonly Token[],
): readonly Token[] {
  if (positions === null) return tokens;
  const byPosition = new Map(tokens.map((token) => [token.position, token]));
  return positions.map(
    (position) => byPosition.get(position) ?? { position, id: -1, text: "", sink: false },
  );
}

/** An fMRI scan as it comes in: frames fill a buffer, and each makes a new series that readers can tell apart. */
export class Growing {
  #series: Series;
  #volume: Volume;
  readonly #rows: ReadonlyMap<string, number>;
  /** Layer the sweep has reached; -1 before it and once whole tokens arrive. */
  layer = -1;
  /** Column of the frame that came last. */
  token = 0;

  constructor(job: JobView, components: readonly string[], tokens: readonly string[]) {
    this.#rows = new Map(components.map((component, row) => [component, row]));
    const width = tokens.length;
    const buffer = new Float32Array(components.length * width).fill(NaN);
    this.#volume = new Volume(components, width, buffer);
    this.#series = {
      ...bare("fMRI", announced(job)),
      // Position 0 is a sink by definition; the others are known when the table is there.
      tokens: tokens.map((text, position) => ({ position, id: -1, text, sink: position === 0 })),
    };
    this.#renew("");
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
    this.#renew(event.unit);
    return true;
  }

  #renew(unit: string): void {
    this.#volume = this.#volume.again();
    const shown = field({
      id: "activity",
      title: "Activity",
      unit,
      method: "",
      volume: this.#volume,
      map: sequence("fMRI").map,
      scales: ["log", "linear"],
    });
    this.#series = { ...this.#series, fields: [shown] };
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
    const { data, width } = this.#volume;
    if (row === undefined || column < 0 || column >= width) return;
    data[row * width + column] = value;
  }
}
