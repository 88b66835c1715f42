/** What is on the screen, as descriptions of figures, rows and films. Reads the room; writes nothing. */
import { automatic, coordinates } from "../colour/window";
import { MAP_TITLES, lut } from "../colour/lut";
import { layOut, radiiByParameters, type Viewport } from "../model/layout";
import { sectionOf, type Column } from "../model/section";
import { paintNodes } from "../render/paint";
import { DIRECTIONS, shareOf, tractsOf, type Direction } from "../render/tracts";
import type { Room } from "../state/room.svelte";
import { brief, moment, percent, short, token, value, windowLevel } from "../ui/format";
import { t } from "../words/words.svelte";
import type { AxialFigure, Caption, Colours, SectionFigure } from "./figure";
import type { Film } from "./film";

/** A column of a paper, tall enough for thirty layers to be told apart. */
const PAGE: Viewport = { width: 600, height: 640 };
const NAMED = 10;
/** Gaussian-like tails are cut in tables of text; a film has all tokens. */
const FILM: Viewport = { width: 960, height: 640 };

export function axialOf(room: Room, size: Viewport = PAGE): AxialFigure | null {
  const { display, reading } = room;
  const { field, series, topology } = reading;
  if (topology === null || series === null || field === null) return null;
  const layout = layOut(display.layout, topology, size);
  const paint = paintNodes({
    values: reading.values,
    window: reading.window,
    scale: reading.scale,
    lut: reading.lut,
    radius:
      reading.sequence.size === "parameters" && !field.signed
        ? radiiByParameters(reading.values, layout)
        : layout.maxRadius,
    marks: reading.marks,
    halos: "none",
    signed: field.signed,
  });
  const circuit = reading.sequence.id === "DTI" ? series.circuit : null;
  const shown = Math.min(display.tracts, circuit?.paths.length ?? 0);
  const strongest = reading.ordered().slice(0, NAMED);
  const named =
    reading.locked >= 0 && !strongest.includes(reading.locked)
      ? [reading.locked, ...strongest]
      : strongest;
  return {
    caption: captionOf(room),
    colours: coloursOf(room),
    layout,
    topology,
    values: reading.values,
    paint,
    tracts: circuit === null ? [] : tractsOf(circuit.paths, shown, topology, layout, -1),
    tractNote:
      circuit === null
        ? ""
        : t("{shown} of {all} paths, {share} of strength", {
            shown,
            all: value(circuit.pathsInAll),
            share: percent(shareOf(circuit.paths, shown, circuit.share)),
          }),
    directions: Object.fromEntries(
      (Object.keys(DIRECTIONS) as Direction[]).map((id) => [id, t(DIRECTIONS[id].title)]),
    ),
    helps: t("helps"),
    hinders: t("hinders"),
    named,
  };
}

/** Depth against tokens: one map of what the sagittal plane shows, or a trace's three side by side. */
export function sectionsOf(room: Room): SectionFigure | null {
  const { display, reading } = room;
  const { field, series, topology } = reading;
  if (topology === null || series === null) return null;
  // FLAIR without sublayers paints no component, and still has its lens.
  const quantity =
    field === null || reading.volume === null ? null : { ...field, volume: reading.volume };
  const head = topology.heads[reading.locked] ?? -1;
  const kind = topology.kinds[reading.locked];
  const own: Column =
    display.sagittal !== "crosshair"
      ? display.sagittal
      : head >= 0
        ? head
        : kind === "mlp" || kind === "attn"
          ? kind
          : "resid_post";
  const columns: readonly Column[] = field?.id === "trace" ? ["resid_post", "attn", "mlp"] : [own];
  const sections = columns.flatMap((column) => {
    const section = sectionOf(topology, series, quantity, column);
    return section === null || section.width === 0 ? [] : [{ column, section }];
  });
  if (sections.length === 0) return null;
  const lens = sections[0]?.section.word != null;
  const overTokens = sections[0]?.section.across === "tokens";
  const scale = lens ? "linear" : reading.scale;
  const sinks = reading.tokens.map(({ sink }) => sink);
  const seen = sections.flatMap(({ section }) => [
    ...section.values.filter((_, at) => !overTokens || sinks[at % section.width] !== true),
  ]);
  // One window for maps that are compared by eye.
  const sorted = coordinates(seen, scale);
  const window = lens ? automatic(sorted, 0) : reading.windowOf(sorted);
  const titles = { resid_post: t("residual stream"), attn: t("attention"), mlp: "MLP" };
  return {
    caption: captionOf(room),
    panels: sections.map(({ column, section }) => ({
      title: lens
        ? "Logit lens"
        : !overTokens
          ? ""
          : typeof column === "number"
            ? t("head {n}", { n: column })
            : titles[column],
      section,
      colours: {
        lut: lens ? lut("magma") : reading.lut,
        window: section.shared && field?.id !== "trace" ? reading.window : window,
        scale,
        signed: field?.signed === true && !lens,
        unit: lens ? `KL, ${section.unit}` : section.unit,
        distribution: new Float64Array(0),
      },
    })),
    across: overTokens ? t("token") : "",
    depth: t("layer"),
    numbers: room.reading.tokens.map(({ position }) => position),
    promptShown: display.promptShown,
  };
}

export function filmOf(room: Room): Film | null {
  const figure = axialOf(room, FILM);
  const { cine, display, reading } = room;
  const { field, volume } = reading;
  if (figure === null || field === null || volume === null || reading.tokens.length < 2)
    return null;
  const { layout } = figure;
  return {
    layout,
    framesPerSecond: cine.fps,
    title: figure.caption.title,
    prompt: display.promptShown ? (promptOf(room) ?? "") : "",
    unit: reading.unit,
    lut: reading.lut,
    window: reading.window,
    scale: reading.scale,
    shots: reading.tokens.map((one, column) => ({
      caption: display.promptShown ? token(one.text) : "▪▪▪",
      paint: paintNodes({
        values: Float64Array.from(reading.sources, (address) =>
          address === null ? NaN : volume.at(address, column),
        ),
        window: reading.window,
        scale: reading.scale,
        lut: reading.lut,
        radius: layout.maxRadius,
        marks: Float64Array.from(reading.sources, (address) =>
          address === null ? NaN : (field.marks?.at(address, column) ?? NaN),
        ),
        halos: reading.sequence.halos,
        signed: field.signed,
      }),
    })),
  };
}

function promptOf({ reading }: Room): string | null {
  return reading.series?.acquisition.prompt ?? null;
}

function coloursOf({ reading }: Room): Colours {
  return {
    lut: reading.lut,
    window: reading.window,
    scale: reading.scale,
    signed: reading.field?.signed === true,
    unit: reading.unit,
    distribution: reading.distribution,
  };
}

function captionOf(room: Room): Caption {
  const { display, reading } = room;
  const { field, sequence, series } = reading;
  const acquisition = series?.acquisition ?? null;
  const metric = series?.circuit?.metric ?? null;
  const trace = series?.trace ?? null;
  const prompt = promptOf(room);
  const at =
    reading.token === null
      ? ""
      : `${t("token {n} of 0–{last}", { n: reading.token.position, last: reading.tokens.at(-1)?.position ?? 0 })}${
          display.promptShown ? `: ${token(reading.token.text)}` : ""
        }`;
  const asked = !display.promptShown
    ? ""
    : metric !== null
      ? contrast(metric)
      : trace !== null
        ? contrast({ answer: trace.answer, foil: "" })
        : "";
  const probabilities =
    metric !== null
      ? `p ${percent(metric.probabilityClean)}`
      : trace !== null
        ? `${t("clean")} ${percent(trace.probabilityClean)}, ${t("corrupt")} ${percent(trace.probabilityCorrupted)}`
        : "";
  const lines = [
    acquisition === null ? "" : `${acquisition.model} @ ${brief(acquisition.revision)}`,
    prompt !== null && display.promptShown ? `“${prompt}”` : "",
    [asked, probabilities, metric === null ? at : ""].filter((part) => part !== "").join(" · "),
  ];
  const notes = [
    field?.method ?? "",
    [
      MAP_TITLES[reading.map],
      windowLevel(reading.window, reading.scale),
      reading.unit,
      acquisition === null ? "" : `scan ${acquisition.job}`,
      acquisition?.acquiredAt == null ? "" : moment(acquisition.acquiredAt),
    ]
      .filter((part) => part !== "")
      .join("  ·  "),
    metric === null ? "" : `${metric.method}: ${short(metric.clean)} ${metric.unit}`,
  ];
  return {
    title: `${sequence.id} · ${field === null ? t(sequence.title) : t(field.title)}`,
    lines: lines.filter((line) => line !== ""),
    notes: notes.filter((note) => note !== ""),
  };
}

function contrast({ answer, foil }: { readonly answer: string; readonly foil: string }): string {
  return foil === ""
    ? `${t("answer")} ${token(answer)}`
    : `${t("answer")} ${token(answer)}, ${t("not")} ${token(foil)}`;
}
