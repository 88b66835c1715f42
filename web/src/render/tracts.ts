/** The paths of a circuit as curves to draw: where, how thick, in which colour. Pure. */
import type { Layout } from "../model/layout";
import type { Path } from "../model/modes/circuits";
import { nodeOf, type Topology } from "../model/topology";
import type { Message } from "../words/words.svelte";

/** `x0 y0 cx cy x1 y1` of a quadratic curve. */
export type Curve = readonly [number, number, number, number, number, number];

/** What reads a path: heads carry it across tokens, MLPs work on it in place, the unembedding answers. */
export type Direction = "head" | "mlp" | "answer";

export interface Tract {
  readonly curve: Curve;
  readonly direction: Direction;
  readonly colour: string;
  readonly width: number;
  readonly opacity: number;
  /** Solid where the answer suffers without it, dashed where it gains. */
  readonly helps: boolean;
  readonly path: Path;
}

export const DIRECTIONS: Readonly<
  Record<Direction, { readonly colour: string; readonly title: Message }>
> = {
  head: { colour: "#ff6f61", title: "into heads" },
  mlp: { colour: "#f2c14e", title: "into MLPs" },
  answer: { colour: "#58a9ff", title: "to answer" },
};

/** Dashes of a path without which the answer would gain. */
export const HURTS = [5, 4];

const THINNEST = 0.8;
const THICKEST = 4.2;
/** How far a curve bows out, as a share of its length. */
const BOW = 0.16;
const UNLIT = 0.22;

/**
 * Tracts of the strongest `count` paths, the strongest last so that it lies on top; where a node is lit, all that do
 * not touch it are dimmed. -1 for none.
 */
export function tractsOf(
  paths: readonly Path[],
  count: number,
  topology: Topology,
  layout: Layout,
  lit: number,
): readonly Tract[] {
  const shown = paths.slice(0, count);
  const most = Math.abs(shown[0]?.strength ?? 1) || 1;
  return shown
    .flatMap((path): readonly Tract[] => {
      const from = node(topology, path.source);
      const to = node(topology, path.target);
      if (from < 0 || to < 0) return [];
      const share = Math.sqrt(Math.abs(path.strength) / most);
      const direction = directionOf(path.target);
      const dimmed = lit >= 0 && from !== lit && to !== lit;
      return [
        {
          curve: bowed(layout, from, to),
          direction,
          colour: DIRECTIONS[direction].colour,
          width: THINNEST + (THICKEST - THINNEST) * share,
          opacity: (0.3 + 0.6 * share) * (dimmed ? UNLIT : 1),
          helps: path.strength < 0,
          path,
        },
      ];
    })
    .reverse();
}

export function directionOf(target: string): Direction {
  if (target === "unembed") return "answer";
  return target.endsWith(".mlp") ? "mlp" : "head";
}

/** A layer's attention as a whole has no node of its own: its paths are drawn at its first head. */
function node(topology: Topology, address: string): number {
  const own = topology.indexOf.get(address);
  return own ?? nodeOf(topology, address);
}

/** Bows away from the middle, so that tracts of one side do not cross the stem; on it, by turns. */
function bowed({ x, y, midline, level, width, height }: Layout, from: number, to: number): Curve {
  const [x0 = 0, y0 = 0, x1 = 0, y1 = 0] = [x[from], y[from], x[to], y[to]];
  const [mx, my] = [(x0 + x1) / 2, (y0 + y1) / 2];
  const length = Math.hypot(x1 - x0, y1 - y0) || 1;
  // In rows tracts bow sideways; elsewhere across their own direction.
  const [nx, ny] = level ? [1, 0] : [(y0 - y1) / length, (x1 - x0) / length];
  const [cx, cy] = level ? [midline.x, my] : [width / 2, height / 2];
  const lean = (mx - cx) * nx + (my - cy) * ny;
  const side = Math.abs(lean) < 1 ? (from % 2 === 0 ? 1 : -1) : Math.sign(lean);
  const by = side * BOW * length;
  return [x0, y0, mx + by * nx, my + by * ny, x1, y1];
}

/** The share of all strength that the strongest `count` carry; what was not told is counted as well. */
export function shareOf(paths: readonly Path[], count: number, shareOfAll: number): number {
  const sum = (many: readonly Path[]) =>
    many.reduce((total, { strength }) => total + Math.abs(strength), 0);
  const told = sum(paths);
  return told === 0 ? 0 : (sum(paths.slice(0, count)) / told) * shareOfAll;
}
