/**
 * A cine as a WebM film: each frame is painted as the viewer paints it, with its token, unit and colour
 * bar, and recorded as it is drawn.
 */
import { css, lutIndex, type Lut } from "../colour/lut";
import { bounds, type Scale, type Window } from "../colour/window";
import type { Layout } from "../model/layout";
import type { NodePaint } from "../render/paint";
import { ScanRenderer } from "../render/ScanRenderer";
import { short } from "../ui/format";
import { INKS } from "./ink";
import { wrapped } from "./wrap";

export interface Shot {
  readonly paint: NodePaint;
  readonly caption: string;
}

export interface Film {
  readonly layout: Layout;
  readonly shots: readonly Shot[];
  readonly framesPerSecond: number;
  readonly title: string;
  /** Under the title, on as many lines as it takes; empty where it is not shown. */
  readonly prompt: string;
  readonly unit: string;
  readonly lut: Lut;
  readonly window: Window;
  readonly scale: Scale;
}

const EDGE = 12;
const STRIP = 46;
/** Above the picture: the title, and each line under it. */
const HEAD = 34;
const LINE = 18;
/** Mean width of a character under the title, and the most lines of them. */
const CHARACTER = 7;
const MOST_LINES = 3;
const BITS_PER_SECOND = 6_000_000;
/** Players show the last frame of a film for no time at all unless it is held. */
const HOLD_MILLISECONDS = 600;
const TYPES = ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm"];

const theme = {
  background: INKS.screen.ground,
  vignette: "#10141b",
  tract: "rgb(120 150 170 / 0.13)",
  midline: "rgb(102 170 136 / 0.30)",
  socket: INKS.screen.socket,
  missing: INKS.screen.missing,
};

export function canFilm(): boolean {
  return typeof MediaRecorder !== "undefined" && typeOf() !== undefined;
}

function typeOf(): string | undefined {
  return TYPES.find((type) => MediaRecorder.isTypeSupported(type));
}

/** Takes as long as the film lasts; `shown` is told of each frame. */
export async function record(
  film: Film,
  shown: (frame: number) => void,
  signal: AbortSignal,
): Promise<Blob> {
  const { layout, shots } = film;
  const surfaces = {
    anatomy: document.createElement("canvas"),
    tracts: document.createElement("canvas"),
    halos: document.createElement("canvas"),
    nodes: document.createElement("canvas"),
  };
  const renderer = new ScanRenderer(surfaces, theme);
  renderer.setLayout(layout, 1, true);
  const stage = document.createElement("canvas");
  // Encoders want even sides.
  stage.width = 2 * Math.ceil(layout.width / 2);
  const lines = linesOf(film);
  const head = HEAD + lines.length * LINE;
  stage.height = 2 * Math.ceil((head + layout.height + STRIP) / 2);
  const brush = stage.getContext("2d");
  if (brush === null) throw new Error("This browser has no canvas 2D context");
  const show = (frame: number) =>
    compose(brush, surfaces, { film, head, lines, frame, caption: shots[frame]?.caption ?? "" });
  const type = typeOf();
  if (type === undefined) throw new Error("This browser records no WebM");
  const stream = stage.captureStream();
  const recorder = new MediaRecorder(stream, {
    mimeType: type,
    videoBitsPerSecond: BITS_PER_SECOND,
  });
  const parts: Blob[] = [];
  recorder.addEventListener("dataavailable", ({ data }) => parts.push(data));
  const ended = new Promise((resolve) =>
    recorder.addEventListener("stop", resolve, { once: true }),
  );
  const period = 1000 / film.framesPerSecond;
  try {
    recorder.start();
    let due = performance.now();
    for (const [frame, { paint }] of shots.entries()) {
      signal.throwIfAborted();
      renderer.paint(paint, css(film.lut, 0.85), INKS.screen.mark, 0);
      await nextFrame();
      show(frame);
      shown(frame);
      due += period;
      await until(due);
    }
    await until(performance.now() + HOLD_MILLISECONDS);
    show(shots.length - 1);
    await nextFrame();
  } finally {
    recorder.stop();
    renderer.destroy();
  }
  await ended;
  for (const track of stream.getTracks()) track.stop();
  return new Blob(parts, { type: "video/webm" });
}

function linesOf({ layout, prompt }: Film): readonly string[] {
  const room = Math.floor((layout.width - 2 * EDGE) / CHARACTER);
  return prompt === "" ? [] : wrapped(`“${prompt}”`, room, MOST_LINES);
}

interface Still {
  readonly film: Film;
  /** Room above the picture, for the title and these lines. */
  readonly head: number;
  readonly lines: readonly string[];
  readonly frame: number;
  readonly caption: string;
}

function compose(
  brush: CanvasRenderingContext2D,
  { anatomy, halos, nodes }: Readonly<Record<"anatomy" | "halos" | "nodes", HTMLCanvasElement>>,
  { film, head, lines, frame, caption }: Still,
): void {
  const { layout, lut, shots } = film;
  const { width, height } = brush.canvas;
  brush.fillStyle = theme.background;
  brush.fillRect(0, 0, width, height);
  brush.drawImage(anatomy, 0, head);
  brush.globalCompositeOperation = "lighter";
  brush.drawImage(halos, 0, head, layout.width, layout.height);
  brush.globalCompositeOperation = "source-over";
  brush.drawImage(nodes, 0, head);
  brush.textBaseline = "middle";
  brush.font = "13px sans-serif";
  brush.fillStyle = INKS.screen.quiet;
  // Characters that are wider than most are set closer: nothing goes over the edge.
  const most = width - 2 * EDGE;
  lines.forEach((line, at) => brush.fillText(line, EDGE, HEAD + (at + 0.5) * LINE, most));
  brush.font = "600 14px sans-serif";
  brush.fillStyle = INKS.screen.text;
  brush.fillText(film.title, EDGE, 18, most);
  const line = head + layout.height + STRIP / 2;
  brush.fillText(`${frame + 1}/${shots.length}  ${caption}`, EDGE, line, width - 256);
  const bar = { x: width - 232, width: 150, height: 10 };
  for (let x = 0; x < bar.width; x++) {
    const at = lutIndex(x / (bar.width - 1)) * 3;
    brush.fillStyle = `rgb(${lut[at] ?? 0} ${lut[at + 1] ?? 0} ${lut[at + 2] ?? 0})`;
    brush.fillRect(bar.x + x, line - bar.height, 1, bar.height);
  }
  brush.font = "12px sans-serif";
  brush.fillStyle = INKS.screen.quiet;
  const [low, high] = bounds(film.window, film.scale);
  brush.fillText(short(low), bar.x, line + 9);
  brush.textAlign = "right";
  brush.fillText(short(high), bar.x + bar.width, line + 9);
  brush.textAlign = "left";
  brush.fillText(film.unit, bar.x + bar.width + 8, line - 5);
}

function nextFrame(): Promise<void> {
  return new Promise((resolve) => requestAnimationFrame(() => resolve()));
}

function until(due: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, Math.max(0, due - performance.now())));
}
