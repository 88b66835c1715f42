/** A picture in a few thousand pixels: for thumbnails, the scout, and key images. Pure but for the canvas. */
import { lutIndex, type Lut } from "../colour/lut";
import { position, type Scale, type Window } from "../colour/window";
import type { Layout } from "../model/layout";

export interface Miniature {
  readonly values: Float64Array;
  readonly window: Window;
  readonly scale: Scale;
  readonly lut: Lut;
}

const BACKGROUND = "#0a0c10";
const STREAM = "#24493c";
const MISSING = "#3a4450";
/** Marks are larger than to scale, or they could not be told apart from the background. */
const MARK = 1.5;

/** Fits a layout into a canvas, and says by how much it shrank and where it begins. */
export function fitted(
  { width, height }: Pick<Layout, "width" | "height">,
  into: { readonly width: number; readonly height: number },
): { readonly scale: number; readonly left: number; readonly top: number } {
  const scale = Math.min(into.width / width, into.height / height);
  return {
    scale,
    left: (into.width - width * scale) / 2,
    top: (into.height - height * scale) / 2,
  };
}

/** Paints nodes in the colours they have in the picture; without values, only where they stand. */
export function paintMiniature(
  canvas: HTMLCanvasElement,
  layout: Layout,
  shown: Miniature | null,
): void {
  const context = canvas.getContext("2d");
  if (context === null) return;
  const { width, height } = canvas;
  const { scale, left, top } = fitted(layout, { width, height });
  context.fillStyle = BACKGROUND;
  context.fillRect(0, 0, width, height);
  context.strokeStyle = STREAM;
  context.beginPath();
  for (let at = 0; at < layout.spine.length; at += 2) {
    const [x, y] = [layout.spine[at] ?? 0, layout.spine[at + 1] ?? 0];
    if (at === 0) context.moveTo(left + x * scale, top + y * scale);
    else context.lineTo(left + x * scale, top + y * scale);
  }
  context.stroke();
  const side = Math.max(1, 2 * MARK * layout.maxRadius * scale);
  for (let node = 0; node < layout.x.length; node++) {
    const t = shown === null ? NaN : position(shown.values[node] ?? NaN, shown.window, shown.scale);
    if (shown === null || Number.isNaN(t)) context.fillStyle = MISSING;
    else {
      const at = lutIndex(t) * 3;
      context.fillStyle = `rgb(${shown.lut[at] ?? 0} ${shown.lut[at + 1] ?? 0} ${shown.lut[at + 2] ?? 0})`;
    }
    const x = left + (layout.x[node] ?? 0) * scale;
    const y = top + (layout.y[node] ?? 0) * scale;
    context.fillRect(x - side / 2, y - side / 2, side, side);
  }
}

/** The picture as a `data:` URL, for what has to outlast the canvas. */
export function thumbnailOf(layout: Layout, shown: Miniature): string {
  const canvas = document.createElement("canvas");
  canvas.width = 160;
  canvas.height = 120;
  paintMiniature(canvas, layout, shown);
  return canvas.toDataURL("image/png");
}
