/** The mark a pointer means: the nearest one, so that nobody has to hit it. */

/** How far away a mark may be, in CSS pixels. */
export const REACH = 30;

/** Index of the nearest point within `reach`, or -1. */
export function nearest(
  xs: Float32Array,
  ys: Float32Array,
  x: number,
  y: number,
  reach = REACH,
): number {
  let best = -1;
  let least = reach * reach;
  for (let i = 0; i < xs.length; i++) {
    const dx = (xs[i] ?? 0) - x;
    const dy = (ys[i] ?? 0) - y;
    const distance = dx * dx + dy * dy;
    if (distance <= least) {
      least = distance;
      best = i;
    }
  }
  return best;
}
