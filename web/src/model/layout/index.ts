/** The layouts a person can choose from. */
import type { Topology } from "../topology";
import { INSET, type Layout, type LayoutName, type Viewport } from "./layout";
import { network } from "./network";
import { place, type Outline } from "./place";
import { radial } from "./radial";

export type { Layout, LayoutName, Viewport } from "./layout";
export { radiiByParameters } from "./layout";

/** Room for the corner texts beside the picture, where the viewport is wide enough to have both. */
const CORNER_WIDTH = 168;
const WIDE = 620;
/** Room for the colour bar beside the picture's widest row. */
const SCALE_WIDTH = 116;

const stack: Outline = {
  halfWidth: ({ width }, height) => {
    const side = width >= WIDE ? CORNER_WIDTH : INSET.side;
    return Math.max(10, Math.min(width / 2 - side, height * 0.42));
  },
  taper: () => 1,
};

/** An axial head: an ellipse whose rows stay level. */
const brain: Outline = {
  halfWidth: ({ width }, height) => {
    const side = width >= WIDE ? SCALE_WIDTH : INSET.side;
    return Math.max(10, Math.min(width / 2 - side, height * 0.46));
  },
  taper: (depth) => Math.sqrt(1 - ((depth - 0.5) / 0.58) ** 2),
};

type Placement = (topology: Topology, viewport: Viewport) => Layout;

const placements: Readonly<Record<LayoutName, Placement>> = {
  stack: (topology, viewport) => place(topology, viewport, stack),
  brain: (topology, viewport) => place(topology, viewport, brain),
  network,
  radial,
};

export const LAYOUT_NAMES: readonly LayoutName[] = ["stack", "brain", "network", "radial"];

export function layOut(name: LayoutName, topology: Topology, viewport: Viewport): Layout {
  return placements[name](topology, viewport);
}
