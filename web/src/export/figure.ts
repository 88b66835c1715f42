/**
 * Figures for a paper: the picture in vectors, with what is needed to read it without the viewer: axes,
 * names, colour bar with unit, legend, and how it was taken. Pure: descriptions in, SVG out.
 */
import { lutIndex, type Lut } from "../colour/lut";
import { bounds, histogram, position, type Scale, type Window } from "../colour/window";
import type { Layout } from "../model/layout";
import type { Section } from "../model/section";
import type { Topology } from "../model/topology";
import type { NodePaint } from "../render/paint";
import { DIRECTIONS, HURTS, type Tract } from "../render/tracts";
import { short, token } from "../ui/format";
import { INKS, onGround, type Ground, type Ink } from "./ink";
import { document, element, escaped, round, text } from "./svg";
import { wrapped } from "./wrap";

/** How values became colours: the same for pixels and for the bar beside them. */
export interface Colours {
  readonly lut: Lut;
  readonly window: Window;
  readonly scale: Scale;
  readonly signed: boolean;
  readonly unit: string;
  /** Sorted coordinates of all values, for the histogram; may be empty. */
  readonly distribution: Float64Array;
}

export interface Caption {
  readonly title: string;
  /** Under the title, each on a line of its own, or on a few. */
  readonly lines: readonly string[];
  /** Under the picture, likewise: method, window, scan. */
  readonly notes: readonly string[];
}

export interface AxialFigure {
  readonly caption: Caption;
  readonly colours: Colours;
  readonly layout: Layout;
  readonly topology: Topology;
  readonly values: Float64Array;
  /** Radii, rings and what was not measured; its colours are made anew for the ground. */
  readonly paint: NodePaint;
  readonly tracts: readonly Tract[];
  /** Said of the tracts: how many of how many, with which share. */
  readonly tractNote: string;
  /** Direction of a tract, in words. */
  readonly directions: Readonly<Record<string, string>>;
  readonly helps: string;
  readonly hinders: string;
  /** Nodes named in the picture. */
  readonly named: readonly number[];
}

export interface SectionFigure {
  readonly caption: Caption;
  readonly panels: readonly {
    readonly title: string;
    readonly section: Section;
    readonly colours: Colours;
  }[];
  /** What stands below the columns. */
  readonly across: string;
  readonly depth: string;
  /** What is written at the columns of tokens where the prompt is hidden. */
  readonly numbers: readonly number[];
  readonly promptShown: boolean;
}

const EDGE = 18;
const HEAD = 22;
const LINE = 16;
const NOTE = 13;
/** Mean width of a character of a note. */
const NOTE_CHARACTER = 5.2;
/** The same of a line under the title; a prompt may be long, and has so many. */
const LINE_CHARACTER = 6.5;
const MOST_LINES = 3;
const LONGEST_NAME = 14;
const LEGEND = 148;
const BAR = 14;
const BAR_HEIGHT = 240;
const CHART = 34;
const STOPS = 32;

export function axialFigure(figure: AxialFigure, ground: Ground): string {
  const { caption, colours, layout, topology } = figure;
  const ink = INKS[ground];
  const lut = onGround(colours.lut, colours.signed, ground);
  const width = EDGE * 2 + layout.width + LEGEND;
  const { lines, said } = broken(caption, width);
  const top = EDGE + HEAD + lines.length * LINE + 6;
  const height = top + layout.height + said.length * NOTE + EDGE;
  const picture = [
    anatomy(layout, ink),
    figure.tracts.map((tract) => tractPath(tract, ground)).join(""),
    nodes(figure, lut, ink),
    names(figure, ink),
    axes(layout, topology, ink),
  ].join("");
  const legendX = EDGE + layout.width + 12;
  const barTop = top + 46;
  const inside = [
    element("rect", { width, height, fill: ink.ground }),
    headings(caption.title, lines, ink),
    element("g", { transform: `translate(${EDGE} ${round(top)})` }, picture),
    colourBar(colours, lut, legendX, barTop, ink),
    tractLegend(figure, legendX, barTop + BAR_HEIGHT + 34, ink),
    notes(said, height, ink),
  ].join("");
  return document(width, height, caption.title, inside);
}

/** Maps of depth against tokens side by side, as causal traces are printed. */
export function sectionFigure(figure: SectionFigure, ground: Ground): string {
  const { caption, panels } = figure;
  const ink = INKS[ground];
  const names = panels.flatMap(({ section }) => section.names.map((name) => name.length));
  // Names stand aslant below the map: their height goes with the longest.
  const labels = 34 + Math.min(LONGEST_NAME, Math.max(...names)) * 5;
  const heightOfCells = 300;
  const left = 46;
  const gap = 96;
  const columns = Math.max(1, ...panels.map(({ section }) => section.width));
  const panelWidth = Math.min(420, Math.max(180, columns * 22));
  const width = EDGE * 2 + left + panels.length * panelWidth + (panels.length - 1) * gap + LEGEND;
  const { lines, said } = broken(caption, width);
  const top = EDGE + HEAD + lines.length * LINE + 30;
  const height = top + heightOfCells + labels + said.length * NOTE + EDGE;
  const drawn = panels.map(({ title, section, colours }, at) => {
    const x = EDGE + left + at * (panelWidth + gap);
    const lut = onGround(colours.lut, colours.signed, ground);
    const box = { x, y: top, width: panelWidth, height: heightOfCells };
    return [
      text(x, top - 10, title, { "font-size": 13, "font-weight": 600, fill: ink.text }),
      cells(section, colours, lut, box),
      element("rect", { ...box, fill: "none", stroke: ink.socket }),
      depthAxis(section, box, ink),
      tokenAxis(section, box, figure, ink),
      sectionBar(colours, lut, x + panelWidth + 10, top, at === panels.length - 1, ink),
    ].join("");
  });
  const inside = [
    element("rect", { width, height, fill: ink.ground }),
    headings(caption.title, lines, ink),
    element(
      "text",
      {
        transform: `translate(${EDGE + 10} ${round(top + heightOfCells / 2)}) rotate(-90)`,
        "text-anchor": "middle",
        "font-size": 12,
        fill: ink.text,
      },
      figure.depth,
    ),
    ...drawn,
    text(EDGE + left, top + heightOfCells + labels - 8, figure.across, {
      "font-size": 12,
      fill: ink.text,
    }),
    notes(said, height, ink),
  ].join("");
  return document(width, height, caption.title, inside);
}

/** A caption's texts in lines no longer than the figure is wide. */
function broken({ lines, notes }: Caption, width: number) {
  const room = (character: number) => Math.floor((width - 2 * EDGE) / character);
  return {
    lines: lines.flatMap((line) => wrapped(line, room(LINE_CHARACTER), MOST_LINES)),
    said: notes.flatMap((note) => wrapped(note, room(NOTE_CHARACTER))),
  };
}

function headings(words: string, lines: readonly string[], ink: Ink): string {
  const title = text(EDGE, EDGE + 15, words, {
    "font-size": 17,
    "font-weight": 700,
    fill: ink.text,
  });
  const below = lines.map((line, at) =>
    text(EDGE, EDGE + HEAD + 12 + at * LINE, line, { "font-size": 12.5, fill: ink.quiet }),
  );
  return title + below.join("");
}

function notes(lines: readonly string[], height: number, ink: Ink): string {
  return lines
    .map((line, at) =>
      text(EDGE, height - EDGE / 2 - (lines.length - 1 - at) * NOTE, line, {
        "font-size": 10,
        fill: ink.quiet,
      }),
    )
    .join("");
}

function anatomy({ tracts, spine }: Layout, ink: Ink): string {
  const fibres: string[] = [];
  for (let at = 0; at < tracts.length; at += 6) {
    const [x0, y0, cx, cy, x1, y1] = Array.from(tracts.subarray(at, at + 6), round);
    fibres.push(`M${x0} ${y0}Q${cx} ${cy} ${x1} ${y1}`);
  }
  const stem: string[] = [];
  for (let at = 0; at < spine.length; at += 2) {
    stem.push(`${at === 0 ? "M" : "L"}${round(spine[at] ?? 0)} ${round(spine[at + 1] ?? 0)}`);
  }
  return (
    element("path", {
      d: fibres.join(""),
      fill: "none",
      stroke: ink.line,
      "stroke-width": 0.5,
      opacity: 0.6,
    }) +
    element("path", { d: stem.join(""), fill: "none", stroke: ink.socket, "stroke-width": 1.5 })
  );
}

/** Bright tracts of the screen are deepened on paper, where they would be too pale. */
const PAPER_TRACTS = { head: "#c62f1e", mlp: "#a87400", answer: "#1262b5" } as const;

function tractColour(direction: Tract["direction"], ground: Ground): string {
  return ground === "paper" ? PAPER_TRACTS[direction] : DIRECTIONS[direction].colour;
}

function tractPath(tract: Tract, ground: Ground): string {
  const [x0, y0, cx, cy, x1, y1] = tract.curve.map(round);
  return element("path", {
    d: `M${x0} ${y0}Q${cx} ${cy} ${x1} ${y1}`,
    fill: "none",
    stroke: tractColour(tract.direction, ground),
    "stroke-width": tract.width,
    "stroke-opacity": tract.opacity,
    "stroke-linecap": "round",
    ...(tract.helps ? {} : { "stroke-dasharray": HURTS.join(" ") }),
  });
}

function nodes({ colours, layout, paint, values }: AxialFigure, lut: Lut, ink: Ink): string {
  const { window, scale } = colours;
  return Array.from(values, (value, node) => {
    const [cx, cy] = [layout.x[node] ?? 0, layout.y[node] ?? 0];
    const t = position(value, window, scale);
    if (Number.isNaN(t)) {
      const r = layout.maxRadius * 0.7;
      return element("path", {
        d: `M${round(cx - r)} ${round(cy + r)}L${round(cx + r)} ${round(cy - r)}`,
        stroke: ink.missing,
        "stroke-width": 1,
      });
    }
    const r = paint.radius[node] ?? layout.maxRadius;
    const disc = element("circle", {
      cx,
      cy,
      r,
      fill: hex(lut, t),
      stroke: ink.socket,
      "stroke-width": 0.6,
    });
    const ring =
      paint.ring[node] === 1
        ? element("circle", {
            cx,
            cy,
            r: r + 2,
            fill: "none",
            stroke: ink.mark,
            "stroke-width": 1.4,
          })
        : "";
    return disc + ring;
  }).join("");
}

/** Names beside the nodes that matter, on a plate of the ground so that tracts do not run through them. */
function names({ layout, named, topology }: AxialFigure, ink: Ink): string {
  const taken: Box[] = layout.margins.map(({ label, x, y }) => {
    const width = label.length * 6.3 + 4;
    return { x: x - layout.maxRadius - 7 - width, y: y - 6, width, height: 12 };
  });
  return named
    .map((node) => {
      const label = topology.labels[node] ?? "";
      const [x, y] = [layout.x[node] ?? 0, layout.y[node] ?? 0];
      const size = { y: y - 7, width: label.length * 6.3 + 6, height: 14 };
      const right = { ...size, x: x + layout.maxRadius + 3 };
      const left = { ...size, x: x - layout.maxRadius - 3 - size.width };
      const sides = x >= layout.midline.x ? [right, left] : [left, right];
      const plate = sides.find((side) => !taken.some((other) => overlaps(side, other)));
      if (plate === undefined) return "";
      taken.push(plate);
      return (
        element("rect", { ...plate, fill: ink.ground, opacity: 0.82 }) +
        text(plate.x + 3, y + 4, label, { "font-size": 11, "font-weight": 600, fill: ink.text })
      );
    })
    .join("");
}

function overlaps(a: Box, b: Box): boolean {
  return a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
}

function axes(layout: Layout, topology: Topology, ink: Ink): string {
  const every = [1, 2, 5, 10, 20].find((step) => step * layout.pitch >= 15) ?? 20;
  const ends = layout.ends.map(({ label, x, y }) =>
    text(x, y, label, {
      "font-size": 12,
      "font-weight": 700,
      "text-anchor": "middle",
      fill: ink.text,
    }),
  );
  const heads = layout.columns.map(({ label, x, y }) =>
    text(x, y - layout.maxRadius - 6, label, {
      "font-size": 10.5,
      "text-anchor": "middle",
      fill: ink.quiet,
    }),
  );
  const layers = layout.margins.flatMap(({ label, x, y }, layer) =>
    layer % every === 0 || layer === topology.nLayers - 1
      ? [
          text(x - layout.maxRadius - 7, y + 4, label, {
            "font-size": 10.5,
            "text-anchor": "end",
            fill: ink.quiet,
          }),
        ]
      : [],
  );
  return [...ends, ...heads, ...layers].join("");
}

export function colourBar(
  colours: Colours,
  lut: Lut,
  x: number,
  y: number,
  ink: Ink,
  height = BAR_HEIGHT,
): string {
  const { window, scale, distribution } = colours;
  const [low, high] = [window.level - window.width / 2, window.level + window.width / 2];
  const bins = 40;
  const counts = histogram(distribution, low, high, bins);
  const most = counts.reduce((a, b) => Math.max(a, b), 1);
  const step = height / bins;
  const shape = Array.from(counts, (count, bin) => {
    const length = CHART * Math.sqrt(count / most);
    return `M${round(x + CHART)} ${round(y + height - bin * step)}h${round(-length)}v${round(-step)}h${round(length)}z`;
  }).join("");
  const bands = Array.from({ length: STOPS }, (_, stop) =>
    element("rect", {
      x: x + CHART + 3,
      y: y + height - ((stop + 1) * height) / STOPS,
      width: BAR,
      height: height / STOPS + 0.4,
      fill: hex(lut, stop / (STOPS - 1)),
    }),
  );
  const [least, greatest] = bounds(window, scale);
  const middle = scale === "log" ? Math.sqrt(least * greatest) : (least + greatest) / 2;
  // What lies beyond the window has the colour of its end, and the end says so.
  const beyond = [
    (distribution.at(-1) ?? high) > high ? "≥ " : "",
    "",
    (distribution[0] ?? low) < low ? "≤ " : "",
  ];
  const ticks = [greatest, middle, least].map((value, at) => {
    const level = y + (at * height) / 2;
    return (
      element("path", {
        d: `M${round(x + CHART + 3 + BAR)} ${round(level)}h4`,
        stroke: ink.text,
      }) +
      text(x + CHART + BAR + 10, level + 4, `${beyond[at] ?? ""}${short(value)}`, {
        "font-size": 11,
        fill: ink.text,
      })
    );
  });
  return [
    text(x, y - 12, `${colours.unit}${scale === "linear" ? "" : ` (${scale})`}`, {
      "font-size": 11.5,
      "font-weight": 600,
      fill: ink.text,
    }),
    element("path", { d: shape, fill: ink.line }),
    ...bands,
    element("rect", {
      x: x + CHART + 3,
      y,
      width: BAR,
      height,
      fill: "none",
      stroke: ink.socket,
    }),
    ...ticks,
  ].join("");
}

/** Maps side by side have a bar each: beside the last with its histogram's room, else narrow. */
function sectionBar(
  colours: Colours,
  lut: Lut,
  x: number,
  y: number,
  last: boolean,
  ink: Ink,
): string {
  const bare = { ...colours, distribution: new Float64Array(0), unit: last ? colours.unit : "" };
  return colourBar(bare, lut, x - CHART, y, ink, 300);
}

function tractLegend(figure: AxialFigure, x: number, y: number, ink: Ink): string {
  if (figure.tracts.length === 0) return "";
  const ground: Ground = ink === INKS.paper ? "paper" : "screen";
  const sample = (at: number, colour: string, dash: string, words: string) =>
    element("path", {
      d: `M${round(x)} ${round(at)}h26`,
      stroke: colour,
      "stroke-width": 3,
      ...(dash === "" ? {} : { "stroke-dasharray": dash }),
    }) + text(x + 33, at + 4, words, { "font-size": 11, fill: ink.text });
  const kinds = (["head", "mlp", "answer"] as const).map((direction, at) =>
    sample(y + at * 17, tractColour(direction, ground), "", figure.directions[direction] ?? ""),
  );
  return [
    ...kinds,
    sample(y + 59, ink.text, "", figure.helps),
    sample(y + 76, ink.text, HURTS.join(" "), figure.hinders),
    ...figure.tractNote
      .split(", ")
      .map((part, at) => text(x, y + 100 + at * 14, part, { "font-size": 10.5, fill: ink.quiet })),
  ].join("");
}

interface Box {
  readonly x: number;
  readonly y: number;
  readonly width: number;
  readonly height: number;
}

/** One rectangle for as many neighbours in a row as have one colour. */
function cells(section: Section, { window, scale }: Colours, lut: Lut, box: Box): string {
  const [w, h] = [box.width / section.width, box.height / section.height];
  const all: string[] = [];
  for (let row = 0; row < section.height; row++) {
    for (let at = 0; at < section.width;) {
      const colour = cellColour(section, row, at, window, scale, lut);
      let end = at + 1;
      while (end < section.width && cellColour(section, row, end, window, scale, lut) === colour) {
        end++;
      }
      if (colour !== null) {
        all.push(
          element("rect", {
            x: box.x + at * w,
            y: box.y + row * h,
            width: (end - at) * w + 0.2,
            height: h + 0.2,
            fill: colour,
          }),
        );
      }
      at = end;
    }
  }
  return all.join("");
}

function cellColour(
  section: Section,
  row: number,
  at: number,
  window: Window,
  scale: Scale,
  lut: Lut,
): string | null {
  const t = position(section.values[row * section.width + at] ?? NaN, window, scale);
  return Number.isNaN(t) ? null : hex(lut, t);
}

function depthAxis(section: Section, box: Box, ink: Ink): string {
  const h = box.height / section.height;
  const every = [1, 2, 5, 10, 20].find((step) => step * h >= 15) ?? 20;
  return Array.from({ length: section.height }, (_, row) => row + section.top)
    .filter(
      (layer) => layer < 0 || layer % every === 0 || layer === section.height - 1 + section.top,
    )
    .map((layer) =>
      text(
        box.x - 5,
        box.y + (layer - section.top + 0.5) * h + 4,
        layer < 0 ? "E" : String(layer),
        {
          "font-size": 10.5,
          "text-anchor": "end",
          fill: ink.text,
        },
      ),
    )
    .join("");
}

function tokenAxis(section: Section, box: Box, figure: SectionFigure, ink: Ink): string {
  const { numbers, promptShown } = figure;
  const w = box.width / section.width;
  const every = Math.max(1, Math.ceil(13 / w));
  return section.names
    .map((name, at) => {
      if (at % every !== 0) return "";
      const words =
        section.across === "tokens" ? (promptShown ? token(name) : `${numbers[at] ?? at}`) : name;
      const x = box.x + (at + 0.5) * w + 3;
      return element(
        "text",
        {
          transform: `translate(${round(x)} ${round(box.y + box.height + 8)}) rotate(-55)`,
          "text-anchor": "end",
          "font-size": 10.5,
          fill: ink.text,
        },
        escaped(words.slice(0, LONGEST_NAME)),
      );
    })
    .join("");
}

/** `css()` in the one form that every program that reads SVG understands. */
function hex(lut: Lut, t: number): string {
  const at = lutIndex(t) * 3;
  const channels = [lut[at], lut[at + 1], lut[at + 2]];
  return `#${channels.map((channel) => (channel ?? 0).toString(16).padStart(2, "0")).join("")}`;
}
