/** How the picture is shown: sequence, layout, and each sequence's own window and colour map. */
import { LAYOUT_NAMES, type LayoutName } from "../model/layout";
import { WHOLE, type Zoom } from "../model/layout/zoom";
import type { ProtocolId } from "../model/protocols";
import { SEQUENCES, type SequenceId } from "../model/sequences";
import {
  USUAL_VIEW,
  defaultViews,
  type PanelName,
  type SeriesView,
  type ViewId,
  type Views,
} from "../model/views";

/** Which column of components the sagittal plane cuts. */
export const SAGITTAL_COLUMNS = ["crosshair", "attn", "mlp", "resid_post"] as const;
export type SagittalColumn = (typeof SAGITTAL_COLUMNS)[number];

/** What dragging over a picture does. */
export type Tool = "window" | "region" | "pan";
export const TOOLS: readonly Tool[] = ["window", "region", "pan"];

/** What a cine goes through. */
export type CineAxis = "tokens" | "layers";

/** Few enough to be followed by eye. */
export const USUAL_TRACTS = 60;

export class Display {
  sequence = $state<SequenceId>("T1");
  layout = $state<LayoutName>("brain");
  protocol = $state<ProtocolId>("planes");
  /** Whether heads are folded into their layer's attention. */
  folded = $state(false);
  /** Whether the planes across have the larger part of the screen, as a map is read. */
  swapped = $state(false);
  zoom = $state.raw<Zoom>(WHOLE);
  tool = $state<Tool>("window");
  cineAxis = $state<CineAxis>("tokens");
  panel = $state<PanelName>("inspect");
  sagittal = $state<SagittalColumn>("crosshair");
  views = $state.raw<Views>(defaultViews());
  corners = $state(true);
  promptShown = $state(true);
  /** How many of the strongest tracts are drawn. */
  tracts = $state(USUAL_TRACTS);
  /** Whether the inspector asks the service for the attention pattern of the locked head. */
  attention = $state(false);

  readonly view: SeriesView = $derived(this.views[this.sequence]);

  change(change: Partial<SeriesView>, id: ViewId = this.sequence): void {
    this.views = { ...this.views, [id]: { ...this.views[id], ...change } };
  }

  resetView(): void {
    this.views = {
      ...this.views,
      [this.sequence]: { ...USUAL_VIEW, field: this.view.field },
      difference: USUAL_VIEW,
    };
    this.zoom = WHOLE;
  }

  /** Another quantity has a range, a map and scales of its own. */
  showField(id: string | null): void {
    this.views = { ...this.views, [this.sequence]: { ...USUAL_VIEW, field: id } };
  }

  nextLayout(): void {
    this.layout = after(LAYOUT_NAMES, this.layout);
  }

  showSequence(step: 1 | -1): void {
    const ids = SEQUENCES.map(({ id }) => id);
    const at = ids.indexOf(this.sequence) + step;
    this.sequence = ids[Math.min(ids.length - 1, Math.max(0, at))] ?? this.sequence;
  }
}

export function after<T>(all: readonly T[], current: T): T {
  return all[(all.indexOf(current) + 1) % all.length] ?? current;
}
