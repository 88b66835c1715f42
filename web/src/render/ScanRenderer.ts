/**
 * Draws the axial plane on stacked canvases: anatomy (when the layout changes), tracts (when they do),
 * halos and nodes (when values change). Whatever changes sets one flag; one animation frame follows; none when idle.
 * Knows nothing of Svelte, tokens or units.
 */
import type { Layout } from "../model/layout";
import { blend, type NodePaint } from "./paint";
import { HURTS, type Tract } from "./tracts";

export interface Surfaces {
  readonly anatomy: HTMLCanvasElement;
  readonly tracts: HTMLCanvasElement;
  readonly halos: HTMLCanvasElement;
  readonly nodes: HTMLCanvasElement;
}

export interface Theme {
  readonly background: string;
  readonly vignette: string;
  readonly tract: string;
  readonly midline: string;
  readonly socket: string;
  readonly missing: string;
}

/** Canvases are opaque pixels: more than two device pixels a CSS pixel only cost time. */
const MOST_PIXELS = 2;
/** Discs smaller than this are drawn as squares, which cost a fraction. */
const SMALLEST_DISC = 2.2;
/** Beyond this many nodes halos would only blur the picture. */
const MOST_HALOS = 1_200;
/** Halos are soft: half the pixels each way show the same at a quarter of the cost. */
const HALO_PIXELS = 0.5;
const HALO_SPRITE = 64;
const HALO_REACH = 2.6;

export class ScanRenderer {
  readonly #surfaces: Surfaces;
  readonly #anatomy: CanvasRenderingContext2D;
  readonly #tracts: CanvasRenderingContext2D;
  readonly #halos: CanvasRenderingContext2D;
  readonly #nodes: CanvasRenderingContext2D;
  readonly #theme: Theme;
  readonly #hatch: CanvasPattern | null;
  #layout: Layout | null = null;
  #ratio = 1;
  #from: NodePaint | null = null;
  #to: NodePaint | null = null;
  #shown: NodePaint | null = null;
  #fadeMilliseconds = 0;
  #fadeStart: number | null = null;
  #haloSprite: HTMLCanvasElement | null = null;
  #haloColour = "";
  #layoutChanged = false;
  #paths: readonly Tract[] = [];
  #tractsChanged = false;
  #markColour = "";
  #sockets = false;
  #request = 0;
  /** Animation frames drawn so far. */
  frames = 0;

  constructor(surfaces: Surfaces, theme: Theme) {
    this.#surfaces = surfaces;
    this.#theme = theme;
    this.#anatomy = context(surfaces.anatomy, false);
    this.#tracts = context(surfaces.tracts, true);
    this.#halos = context(surfaces.halos, true);
    this.#nodes = context(surfaces.nodes, true);
    this.#hatch = hatch(this.#nodes, theme.missing);
  }

  /** `sockets` draws a ring round every node's place: the least active one is still seen to be there. */
  setLayout(layout: Layout, devicePixels: number, sockets: boolean): void {
    if (layout === this.#layout && sockets !== this.#sockets) {
      this.#sockets = sockets;
      this.#layoutChanged = true;
      this.#invalidate();
      return;
    }
    this.#layout = layout;
    this.#sockets = sockets;
    this.#ratio = Math.min(devicePixels, MOST_PIXELS);
    const { anatomy, tracts, halos, nodes } = this.#surfaces;
    resize(anatomy, layout, this.#ratio);
    resize(tracts, layout, this.#ratio);
    resize(halos, layout, HALO_PIXELS);
    resize(nodes, layout, this.#ratio);
    // Radii belong to a layout, so a fade between two would mix sizes of both.
    this.#fadeStart = null;
    this.#from = null;
    this.#layoutChanged = true;
    this.#tractsChanged = true;
    this.#invalidate();
  }

  /** The paths a scan found, weakest first; none takes them away. */
  setTracts(tracts: readonly Tract[]): void {
    if (tracts.length === 0 && this.#paths.length === 0) return;
    this.#paths = tracts;
    this.#tractsChanged = true;
    this.#invalidate();
  }

  /** Shows a paint, crossfading from what is shown now; 0 ms replaces it at once. */
  paint(to: NodePaint, haloColour: string, markColour: string, fadeMilliseconds: number): void {
    const shown = this.#shown;
    const fades = fadeMilliseconds > 0 && shown?.radius.length === to.radius.length;
    // A repaint during a fade (a drag, a token step) goes on to the new goal in the time that is left.
    const continues = fadeMilliseconds === 0 && this.#fadeStart !== null && this.#from !== null;
    if (!continues) {
      this.#from = fades ? copy(shown) : null;
      this.#fadeStart = null;
      this.#fadeMilliseconds = fades ? fadeMilliseconds : 0;
    }
    this.#to = to;
    this.#markColour = markColour;
    if (haloColour !== this.#haloColour) {
      this.#haloColour = haloColour;
      this.#haloSprite = null;
    }
    this.#invalidate();
  }

  destroy(): void {
    cancelAnimationFrame(this.#request);
    this.#request = 0;
  }

  #invalidate(): void {
    if (this.#request === 0) this.#request = requestAnimationFrame((now) => this.#frame(now));
  }

  #frame(now: number): void {
    this.#request = 0;
    const layout = this.#layout;
    if (layout === null) return;
    this.frames++;
    if (this.#layoutChanged) {
      this.#layoutChanged = false;
      this.#drawAnatomy(layout);
    }
    if (this.#tractsChanged) {
      this.#tractsChanged = false;
      this.#drawTracts(layout);
    }
    const to = this.#to;
    if (to?.radius.length !== layout.x.length) return;
    const share = this.#share(now);
    if (this.#from !== null && share < 1) {
      this.#shown = this.#shown === null || this.#shown === to ? copy(to) : this.#shown;
      blend(this.#from, to, share, this.#shown);
      this.#invalidate();
    } else {
      this.#from = null;
      this.#fadeStart = null;
      this.#shown = to;
    }
    this.#drawHalos(layout, this.#shown);
    this.#drawNodes(layout, this.#shown);
  }

  #share(now: number): number {
    if (this.#from === null || this.#fadeMilliseconds === 0) return 1;
    this.#fadeStart ??= now;
    const linear = Math.min(1, (now - this.#fadeStart) / this.#fadeMilliseconds);
    return linear * linear * (3 - 2 * linear);
  }

  #drawTracts(layout: Layout): void {
    const ctx = this.#tracts;
    ctx.setTransform(this.#ratio, 0, 0, this.#ratio, 0, 0);
    ctx.clearRect(0, 0, layout.width, layout.height);
    ctx.lineCap = "round";
    for (const { curve, colour, width, opacity, helps } of this.#paths) {
      ctx.strokeStyle = colour;
      ctx.globalAlpha = opacity;
      ctx.lineWidth = width;
      ctx.setLineDash(helps ? [] : HURTS);
      ctx.beginPath();
      ctx.moveTo(curve[0], curve[1]);
      ctx.quadraticCurveTo(curve[2], curve[3], curve[4], curve[5]);
      ctx.stroke();
    }
    ctx.globalAlpha = 1;
    ctx.setLineDash([]);
  }

  #drawAnatomy(layout: Layout): void {
    const ctx = this.#anatomy;
    const { tracts, spine, width, height } = layout;
    ctx.setTransform(this.#ratio, 0, 0, this.#ratio, 0, 0);
    ctx.fillStyle = this.#theme.background;
    ctx.fillRect(0, 0, width, height);
    const glow = ctx.createRadialGradient(
      width / 2,
      height / 2,
      Math.min(width, height) * 0.1,
      width / 2,
      height / 2,
      Math.hypot(width, height) * 0.5,
    );
    glow.addColorStop(0, this.#theme.vignette);
    glow.addColorStop(1, this.#theme.background);
    ctx.fillStyle = glow;
    ctx.fillRect(0, 0, width, height);

    ctx.strokeStyle = this.#theme.midline;
    ctx.lineWidth = 2;
    ctx.beginPath();
    ctx.moveTo(spine[0] ?? 0, spine[1] ?? 0);
    for (let at = 2; at < spine.length; at += 2) ctx.lineTo(spine[at] ?? 0, spine[at + 1] ?? 0);
    ctx.stroke();

    ctx.strokeStyle = this.#theme.tract;
    ctx.lineWidth = 0.75;
    ctx.beginPath();
    for (let at = 0; at < tracts.length; at += 6) {
      ctx.moveTo(tracts[at] ?? 0, tracts[at + 1] ?? 0);
      ctx.quadraticCurveTo(
        tracts[at + 2] ?? 0,
        tracts[at + 3] ?? 0,
        tracts[at + 4] ?? 0,
        tracts[at + 5] ?? 0,
      );
    }
    ctx.stroke();

    if (this.#sockets) this.#drawSockets(layout);
  }

  #drawSockets(layout: Layout): void {
    const ctx = this.#anatomy;
    ctx.strokeStyle = this.#theme.socket;
    ctx.fillStyle = this.#theme.background;
    ctx.lineWidth = 1;
    ctx.beginPath();
    const radius = layout.maxRadius + 0.5;
    for (let node = 0; node < layout.x.length; node++) {
      const x = layout.x[node] ?? 0;
      const y = layout.y[node] ?? 0;
      ctx.moveTo(x + radius, y);
      ctx.arc(x, y, radius, 0, 2 * Math.PI);
    }
    ctx.fill();
    if (radius >= SMALLEST_DISC) ctx.stroke();
  }

  /** Round what the scan marks. */
  #drawRings(ctx: CanvasRenderingContext2D, { x, y, maxRadius }: Layout, paint: NodePaint): void {
    const radius = maxRadius + 1.5;
    ctx.strokeStyle = this.#markColour;
    ctx.lineWidth = 1.5;
    ctx.beginPath();
    for (let node = 0; node < x.length; node++) {
      if (!isRinged(paint, node)) continue;
      ctx.moveTo((x[node] ?? 0) + radius, y[node] ?? 0);
      ctx.arc(x[node] ?? 0, y[node] ?? 0, radius, 0, 2 * Math.PI);
    }
    ctx.stroke();
  }

  #drawHalos(layout: Layout, paint: NodePaint): void {
    const ctx = this.#halos;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, ctx.canvas.width, ctx.canvas.height);
    if (layout.x.length > MOST_HALOS) return;
    ctx.setTransform(HALO_PIXELS, 0, 0, HALO_PIXELS, 0, 0);
    ctx.globalCompositeOperation = "lighter";
    this.#haloSprite ??= haloSprite(this.#haloColour);
    for (let node = 0; node < layout.x.length; node++) {
      const strength = paint.halo[node] ?? 0;
      if (strength <= 0) continue;
      const reach = layout.maxRadius * HALO_REACH;
      ctx.globalAlpha = 0.25 + 0.55 * strength;
      ctx.drawImage(
        this.#haloSprite,
        (layout.x[node] ?? 0) - reach,
        (layout.y[node] ?? 0) - reach,
        2 * reach,
        2 * reach,
      );
    }
    ctx.globalAlpha = 1;
    ctx.globalCompositeOperation = "source-over";
  }

  #drawNodes(layout: Layout, paint: NodePaint): void {
    const ctx = this.#nodes;
    const { x, y } = layout;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, ctx.canvas.width, ctx.canvas.height);
    ctx.setTransform(this.#ratio, 0, 0, this.#ratio, 0, 0);

    // One path a colour: as many fills as colours, not as nodes.
    const first = new Map<number, number>();
    const next = new Int32Array(x.length).fill(-1);
    const unmeasured: number[] = [];
    for (let node = 0; node < x.length; node++) {
      if (paint.missing[node] === 1) {
        unmeasured.push(node);
        continue;
      }
      const at = node * 3;
      const colour =
        (Math.round(paint.rgb[at] ?? 0) << 16) |
        (Math.round(paint.rgb[at + 1] ?? 0) << 8) |
        Math.round(paint.rgb[at + 2] ?? 0);
      next[node] = first.get(colour) ?? -1;
      first.set(colour, node);
    }
    for (const [colour, start] of first) {
      ctx.fillStyle = `rgb(${colour >> 16} ${(colour >> 8) & 255} ${colour & 255})`;
      ctx.beginPath();
      for (let node = start; node >= 0; node = next[node] ?? -1) {
        disc(ctx, x[node] ?? 0, y[node] ?? 0, paint.radius[node] ?? 0);
      }
      ctx.fill();
    }
    this.#drawRings(ctx, layout, paint);
    if (unmeasured.length === 0) return;
    ctx.fillStyle = this.#hatch ?? this.#theme.missing;
    ctx.beginPath();
    for (const node of unmeasured) {
      disc(ctx, x[node] ?? 0, y[node] ?? 0, layout.maxRadius);
    }
    ctx.fill();
  }
}

function isRinged(paint: NodePaint, node: number): boolean {
  return paint.ring[node] === 1 && paint.missing[node] === 0;
}

function resize(canvas: HTMLCanvasElement, layout: Layout, ratio: number): void {
  const width = Math.round(layout.width * ratio);
  const height = Math.round(layout.height * ratio);
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
}

function disc(ctx: CanvasRenderingContext2D, x: number, y: number, radius: number): void {
  if (radius < SMALLEST_DISC) {
    ctx.rect(x - radius, y - radius, 2 * radius, 2 * radius);
    return;
  }
  ctx.moveTo(x + radius, y);
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
}

function context(canvas: HTMLCanvasElement, alpha: boolean): CanvasRenderingContext2D {
  const found = canvas.getContext("2d", { alpha });
  if (found === null) throw new Error("This browser has no canvas 2D context");
  return found;
}

function copy(paint: NodePaint): NodePaint {
  return {
    rgb: paint.rgb.slice(),
    radius: paint.radius.slice(),
    halo: paint.halo.slice(),
    ring: paint.ring.slice(),
    missing: paint.missing.slice(),
  };
}

function haloSprite(colour: string): HTMLCanvasElement {
  const sprite = document.createElement("canvas");
  sprite.width = sprite.height = HALO_SPRITE;
  const ctx = context(sprite, true);
  const half = HALO_SPRITE / 2;
  const gradient = ctx.createRadialGradient(half, half, 0, half, half, half);
  gradient.addColorStop(0, colour);
  gradient.addColorStop(1, "transparent");
  ctx.fillStyle = gradient;
  ctx.fillRect(0, 0, HALO_SPRITE, HALO_SPRITE);
  return sprite;
}

/** Diagonal strokes: the mark of "not measured". */
function hatch(ctx: CanvasRenderingContext2D, colour: string): CanvasPattern | null {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 4;
  const brush = context(tile, true);
  brush.strokeStyle = colour;
  brush.beginPath();
  brush.moveTo(-1, 5);
  brush.lineTo(5, -1);
  brush.stroke();
  return ctx.createPattern(tile, "repeat");
}
