/** How a sequence is looked at: the small state beside the immutable numbers. Null: as the field has it. */
import type { MapName } from "../colour/lut";
import type { Scale, Window } from "../colour/window";
import { SEQUENCES, type SequenceId } from "./sequences";

export interface SeriesView {
  /** Which quantity is shown; null: the first. */
  readonly field: string | null;
  readonly map: MapName | null;
  readonly inverted: boolean;
  readonly scale: Scale | null;
  /** Null: the automatic window. */
  readonly window: Window | null;
}

export type Views = Readonly<Record<SequenceId, SeriesView>>;

export type PanelName = "inspect" | "stimulate" | "table" | "log";
export const PANEL_NAMES: readonly PanelName[] = ["inspect", "stimulate", "table", "log"];

export const USUAL_VIEW: SeriesView = {
  field: null,
  map: null,
  inverted: false,
  scale: null,
  window: null,
};

export function defaultViews(): Views {
  return Object.fromEntries(SEQUENCES.map(({ id }) => [id, USUAL_VIEW])) as unknown as Views;
}
