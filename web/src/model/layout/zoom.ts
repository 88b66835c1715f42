/** Looking closer at a layout: the same places, enlarged about a point. */
import type { Layout, Mark } from "./layout";

export interface Zoom {
  /** 1: the whole layout. */
  readonly scale: number;
  /** What stands in the viewport's middle, as shares of the layout's width and height. */
  readonly x: number;
  readonly y: number;
}

export const WHOLE: Zoom = { scale: 1, x: 0.5, y: 0.5 };
export const CLOSEST = 12;

/** A zoom that shows nothing but the layout: never smaller than the viewport, never beyond its edges. */
export function clampZoom({ scale, x, y }: Zoom): Zoom {
  const s = Math.min(CLOSEST, Math.max(1, scale));
  const margin = 0.5 / s;
  const inside = (at: number) => Math.min(1 - margin, Math.max(margin, at));
  return s === 1 ? WHOLE : { scale: s, x: inside(x), y: inside(y) };
}

/** Enlarged by a factor so that the place under a point of the viewport (in shares of it) stays there. */
export function zoomedAbout(zoom: Zoom, factor: number, px: number, py: number): Zoom {
  const scale = Math.min(CLOSEST, Math.max(1, zoom.scale * factor));
  return clampZoom({
    scale,
    x: zoom.x + (px - 0.5) * (1 / zoom.scale - 1 / scale),
    y: zoom.y + (py - 0.5) * (1 / zoom.scale - 1 / scale),
  });
}

/** Moved just as far as a place (in shares of the layout) needs to be well in sight. */
export function following(zoom: Zoom, x: number, y: number): Zoom {
  if (zoom.scale === 1) return zoom;
  const reach = 0.4 / zoom.scale;
  const near = (at: number, to: number) => Math.min(to + reach, Math.max(to - reach, at));
  return clampZoom({ scale: zoom.scale, x: near(zoom.x, x), y: near(zoom.y, y) });
}

/** The part of the layout in sight, in shares of it. */
export function inSight(zoom: Zoom): {
  readonly left: number;
  readonly top: number;
  readonly size: number;
} {
  const size = 1 / zoom.scale;
  return { left: zoom.x - size / 2, top: zoom.y - size / 2, size };
}

export function enlarged(layout: Layout, zoom: Zoom): Layout {
  if (zoom.scale === 1) return layout;
  const { scale } = zoom;
  const { left, top } = inSight(zoom);
  const px = (x: number) => (x - left * layout.width) * scale;
  const py = (y: number) => (y - top * layout.height) * scale;
  const pairs = (points: Float32Array) =>
    points.map((at, index) => (index % 2 === 0 ? px(at) : py(at)));
  const marked = (mark: Mark): Mark => ({ label: mark.label, x: px(mark.x), y: py(mark.y) });
  return {
    ...layout,
    x: layout.x.map(px),
    y: layout.y.map(py),
    maxRadius: layout.maxRadius * Math.sqrt(scale),
    rows: layout.rows.map(py),
    pitch: layout.pitch * scale,
    tracts: pairs(layout.tracts),
    spine: pairs(layout.spine),
    midline: {
      x: px(layout.midline.x),
      top: py(layout.midline.top),
      bottom: py(layout.midline.bottom),
    },
    ends: [marked(layout.ends[0]), marked(layout.ends[1])],
    columns: layout.columns.map(marked),
    margins: layout.margins.map(marked),
    scale: layout.scale * scale,
  };
}
