/**
 * One quantity of a scan: its numbers, what they are, and how they are shown unless somebody asks
 * otherwise. A scan may have several; one is looked at.
 */
import type { MapName } from "../colour/lut";
import type { Scale } from "../colour/window";
import type { Message } from "../words/words.svelte";
import type { Volume } from "./volume";

export interface Field {
  /** Stands in addresses. */
  readonly id: string;
  /** What a person picks it by. */
  readonly title: Message;
  readonly unit: string;
  /** How it was measured: formula or hook, as the service says it. */
  readonly method: string;
  readonly volume: Volume;
  readonly map: MapName;
  /** The scales that make sense, the usual one first. */
  readonly scales: readonly Scale[];
  /** Share of the values the automatic window leaves out at either end. */
  readonly tail: number;
  /** Whether values have a direction: then the window lies about 0. */
  readonly signed: boolean;
  /** Whether the values of a layer's heads add up to their layer's. */
  readonly adds: boolean;
  /** 1 where a component is marked as standing out; null where the quantity marks nothing. */
  readonly marks: Volume | null;
  /** What a mark says, in a few words. */
  readonly marked: string;
}

/** What a field is unless said otherwise. */
export function field(
  own: Pick<Field, "id" | "title" | "unit" | "method" | "volume" | "map"> & Partial<Field>,
): Field {
  return {
    scales: ["linear"],
    tail: 0.02,
    signed: false,
    adds: false,
    marks: null,
    marked: "",
    ...own,
  };
}

/**
 * Whose number a component shows: its own, or where a scan took a layer's attention as a whole, that
 * layer's. Null where there is none.
 */
export function source(volume: Volume, component: string): string | null {
  if (volume.has(component)) return component;
  const layer = /^(.+\.attn)\.head_\d+$/.exec(component)?.[1];
  return layer !== undefined && volume.has(layer) ? layer : null;
}
