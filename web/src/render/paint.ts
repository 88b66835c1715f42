/** From values to what each node is painted with. Pure; the renderer only puts it on the canvas. */
import { lutIndex, type Lut } from "../colour/lut";
import { position, type Scale, type Window } from "../colour/window";

export interface NodePaint {
  /** `[node * 3 + channel]`, 0 to 255. */
  readonly rgb: Float32Array;
  /** CSS pixels. */
  readonly radius: Float32Array;
  /** Strength of the halo, 0 to 1; 0 for most. */
  readonly halo: Float32Array;
  /** 1 where the scan marks the node: ringed, so that colour is not all that says so. */
  readonly ring: Uint8Array;
  /** 1 where there is no value: drawn hatched, never as a low value. */
  readonly missing: Uint8Array;
}

export interface PaintInput {
  readonly values: Float64Array;
  readonly window: Window;
  readonly scale: Scale;
  readonly lut: Lut;
  /** Radius of each node, or one for all that swells with the value. */
  readonly radius: Float32Array | number;
  /** 1 where the scan marks a node. */
  readonly marks: Float64Array;
  /** Which nodes have a halo: none, the largest values, or what the scan marks. */
  readonly halos: "none" | "largest" | "marked";
  /** Size by distance from 0, where values have a direction. */
  readonly signed: boolean;
}

/** A node's radius at the window's lower end, as a share of the largest. */
const LEAST_SHARE = 0.58;
/** Only values in the window's upper part have a halo. */
const HALO_FROM = 0.7;

export function paintNodes(input: PaintInput): NodePaint {
  const size = input.values.length;
  const rgb = new Float32Array(size * 3);
  const radius = new Float32Array(size);
  const halo = new Float32Array(size);
  const missing = new Uint8Array(size);
  const ring = new Uint8Array(size);
  for (let node = 0; node < size; node++) {
    const t = position(input.values[node] ?? NaN, input.window, input.scale);
    const own = typeof input.radius === "number" ? input.radius : (input.radius[node] ?? 0);
    if (Number.isNaN(t)) {
      missing[node] = 1;
      radius[node] = own * LEAST_SHARE;
      continue;
    }
    const at = lutIndex(t) * 3;
    for (let channel = 0; channel < 3; channel++) {
      rgb[node * 3 + channel] = input.lut[at + channel] ?? 0;
    }
    const extent = input.signed ? Math.abs(2 * t - 1) : t;
    radius[node] =
      typeof input.radius === "number" ? own * (LEAST_SHARE + (1 - LEAST_SHARE) * extent) : own;
    const marked = input.marks[node] === 1;
    if (marked) ring[node] = 1;
    if (input.halos === "largest" && extent > HALO_FROM) {
      halo[node] = (extent - HALO_FROM) / (1 - HALO_FROM);
    }
    if (input.halos === "marked" && marked) halo[node] = 1;
  }
  return { rgb, radius, halo, ring, missing };
}

/** `share` of the way from one paint to another, written into `out`. */
export function blend(from: NodePaint, to: NodePaint, share: number, out: NodePaint): void {
  mix(from.rgb, to.rgb, share, out.rgb);
  mix(from.radius, to.radius, share, out.radius);
  mix(from.halo, to.halo, share, out.halo);
  out.missing.set(share < 0.5 ? from.missing : to.missing);
  out.ring.set(share < 0.5 ? from.ring : to.ring);
}

function mix(from: Float32Array, to: Float32Array, share: number, out: Float32Array): void {
  for (let i = 0; i < out.length; i++) {
    const a = from[i] ?? 0;
    out[i] = a + ((to[i] ?? 0) - a) * share;
  }
}
