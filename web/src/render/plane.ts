/** A dense grid of values as an image: one pixel a value, enlarged without smoothing by CSS. */
import { lutIndex, type Lut } from "../colour/lut";
import { position, type Scale, type Window } from "../colour/window";

export interface Plane {
  readonly width: number;
  readonly height: number;
  /** Row-major, top row first; NaN where not measured. */
  readonly values: Float32Array | Float64Array;
}

/** RGBA bytes of a plane; what was not measured stays transparent. */
export function planePixels(
  plane: Plane,
  window: Window,
  scale: Scale,
  lut: Lut,
): Uint8ClampedArray<ArrayBuffer> {
  const pixels = new Uint8ClampedArray(plane.width * plane.height * 4);
  for (let i = 0; i < plane.values.length; i++) {
    const t = position(plane.values[i] ?? NaN, window, scale);
    if (Number.isNaN(t)) continue;
    const at = lutIndex(t) * 3;
    pixels[i * 4] = lut[at] ?? 0;
    pixels[i * 4 + 1] = lut[at + 1] ?? 0;
    pixels[i * 4 + 2] = lut[at + 2] ?? 0;
    pixels[i * 4 + 3] = 255;
  }
  return pixels;
}

/** Paints a plane on a canvas of its own size. */
export function paintPlane(
  canvas: HTMLCanvasElement,
  plane: Plane,
  window: Window,
  scale: Scale,
  lut: Lut,
): void {
  if (plane.width === 0 || plane.height === 0) return;
  if (canvas.width !== plane.width) canvas.width = plane.width;
  if (canvas.height !== plane.height) canvas.height = plane.height;
  const pixels = planePixels(plane, window, scale, lut);
  canvas.getContext("2d")?.putImageData(new ImageData(pixels, plane.width, plane.height), 0, 0);
}
