/** How a sequence is looked at: the small state beside the immutable numbers. */
import type { MapName } from "../colour/lut";
import type { Scale, Window } from "../colour/window";
import { SEQUENCES, sequence, type SequenceId } from "./sequences";

export interface SeriesView {
  readonly map: MapName;
  readonly inverted: boolean;
  readonly scale: Scale;
  /** Null: the automatic window. */
  readonly window: Window | null;
}

export type Views = Readonly<Record<SequenceId, SeriesView>>;

export type PanelName = "inspect" | "table" | "log";
export const PANEL_NAMES: readonly PanelName[] = ["inspect", "table", "log"];

export function defaultView(id: SequenceId): SeriesView {
  const { map, scale } = sequence(id);
  return { map, scale, inverted: false, window: null };
}

export function defaultViews(): Views {
  return Object.fromEntries(SEQUENCES.map(({ id }) => [id, defaultView(id)])) as unknown as Views;
}
