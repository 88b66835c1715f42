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

/** What is looked at in a way of its own: each sequence, and the difference of two scans. */
export type ViewId = SequenceId | "difference";
export const VIEW_IDS: readonly ViewId[] = [...SEQUENCES.map(({ id }) => id), "difference"];

export type Views = Readonly<Record<ViewId, SeriesView>>;

export type PanelName = "inspect" | "stimulate" | "session" | "table" | "log";
export const PANEL_NAMES: readonly PanelName[] = [
  "inspect",
  "stimulate",
  "session",
  "table",
  "log",
];

export const USUAL_VIEW: SeriesView = {
  field: null,
  map: null,
  inverted: false,
  scale: null,
  window: null,
};

export function defaultViews(): Views {
  return Object.fromEntries(VIEW_IDS.map((id) => [id, USUAL_VIEW])) as unknown as Views;
}
