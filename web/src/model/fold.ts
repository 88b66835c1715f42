/** Heads folded into their layer's attention: a number for each layer that was only measured head by head. */
import type { Field } from "./field";
import { Volume } from "./volume";

/** How a folded layer's number comes about. */
export type Folding = "own" | "sum" | "strongest";

export function foldingOf(field: Field): Folding {
  if (field.adds) return "sum";
  return field.volume.has("blocks.0.attn") ? "own" : "strongest";
}

/**
 * The volume with a row for every layer's attention: the sum of its heads and of what belongs to none of them alone,
 * or where parts do not add up, the strongest.
 */
export function folded(volume: Volume, folding: Folding, layers: number, heads: number): Volume {
  if (folding === "own") return volume;
  const { width } = volume;
  const names = Array.from({ length: layers }, (_, layer) => `blocks.${layer}.attn`);
  const data = new Float64Array(volume.data.length + layers * width);
  data.set(volume.data);
  names.forEach((name, layer) => {
    const at = volume.data.length + layer * width;
    for (let column = 0; column < width; column++) {
      let all = volume.at(name, column);
      for (let head = 0; head < heads; head++) {
        const value = volume.at(`${name}.head_${head}`, column);
        if (Number.isNaN(value)) continue;
        if (Number.isNaN(all)) all = value;
        else if (folding === "sum") all += value;
        else if (Math.abs(value) > Math.abs(all)) all = value;
      }
      data[at + column] = all;
    }
  });
  return new Volume([...volume.components, ...names], width, data);
}
