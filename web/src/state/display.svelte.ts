/** How the picture is shown: sequence, layout, and each sequence's own window and colour map. */
import { MAP_NAMES } from "../colour/lut";
import { LAYOUT_NAMES, type LayoutName } from "../model/layout";
import { SEQUENCES, type SequenceId } from "../model/sequences";
import {
  defaultView,
  defaultViews,
  type PanelName,
  type SeriesView,
  type Views,
} from "../model/views";

/** Which column of components the sagittal plane cuts. */
export type SagittalColumn = "crosshair" | "attn" | "mlp" | "resid_post";

export class Display {
  sequence = $state<SequenceId>("T1");
  layout = $state<LayoutName>("brain");
  panel = $state<PanelName>("inspect");
  sagittal = $state<SagittalColumn>("crosshair");
  views = $state.raw<Views>(defaultViews());
  corners = $state(true);
  promptShown = $state(true);
  /** Whether the inspector asks the service for the attention pattern of the locked head. */
  attention = $state(false);

  readonly view: SeriesView = $derived(this.views[this.sequence]);

  change(change: Partial<SeriesView>): void {
    this.views = { ...this.views, [this.sequence]: { ...this.view, ...change } };
  }

  resetView(): void {
    this.views = { ...this.views, [this.sequence]: defaultView(this.sequence) };
  }

  /** A window of one scale means nothing on the other, so it goes back to automatic. */
  toggleScale(): void {
    this.change({ scale: this.view.scale === "log" ? "linear" : "log", window: null });
  }

  nextMap(): void {
    this.change({ map: after(MAP_NAMES, this.view.map) });
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

function after<T>(all: readonly T[], current: T): T {
  return all[(all.indexOf(current) + 1) % all.length] ?? current;
}
