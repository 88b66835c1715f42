/** The layouts a person can choose from. */
import type { Topology } from "../topology";
import { INSET, type Layout, type LayoutName, type Viewport } from "./layout";
import { place, type Outline } from "./place";

export type { Layout, LayoutName, Viewport } from "./layout";
export { radiiByParameters } from "./layout";

/** Room for the corner texts beside the picture, where the viewport is wide enough to have both. */
const CORNER_WIDTH = 168;
const WIDE = 620;

const stack: Outline = {
  halfWidth: ({ width }, height) => {
    const side = width >= WIDE ? CORNER_WIDTH : INSET.side;
    return Math.max(10, Math.min(width / 2 - side, height * 0.42));
  },
  taper: () => 1,
};

/** An axial head: an ellipse. Its rows stay level, as the sagittal plane beside it has them. */
const brain: Outline = {
  halfWidth: ({ width }, height) => {
    const side = width >= WIDE ? CORNER_WIDTH * 0.55 : INSET.side;
    return Math.max(10, Math.min(width / 2 - side, height * 0.46));
  },
  taper: (depth) => Math.sqrt(1 - ((depth - 0.5) / 0.58) ** 2),
};

const outlines: Readonly<Record<LayoutName, Outline>> = { stack, brain };

export const LAYOUT_NAMES: readonly LayoutName[] = ["stack", "brain"];

export function layOut(name: LayoutName, topology: Topology, viewport: Viewport): Layout {
  return place(topology, viewport, outlines[name]);
}
