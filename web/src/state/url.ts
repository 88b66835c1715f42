/**
 * What is on the screen as an address, and back. It stands in the fragment, which browsers never send:
 * a prompt does not end up in a server's log. Only what differs from the default is written.
 */
import { MAP_NAMES, type MapName } from "../colour/lut";
import { LAYOUT_NAMES, type LayoutName } from "../model/layout";
import { SEQUENCES, isSequence, type SequenceId } from "../model/sequences";
import {
  PANEL_NAMES,
  defaultView,
  defaultViews,
  type PanelName,
  type SeriesView,
  type Views,
} from "../model/views";

export interface Place {
  readonly sequence: SequenceId;
  readonly model: string | null;
  readonly job: string | null;
  readonly prompt: string;
  readonly token: number;
  readonly focus: string | null;
  readonly layout: LayoutName;
  readonly panel: PanelName;
  readonly views: Views;
}

export const START: Place = {
  sequence: "T1",
  model: null,
  job: null,
  prompt: "",
  token: 0,
  focus: null,
  layout: "brain",
  panel: "inspect",
  views: defaultViews(),
};

export function encode(place: Place): string {
  const fields = new URLSearchParams();
  const write = (name: string, value: string | null, usual: string | null) => {
    if (value !== null && value !== usual) fields.set(name, value);
  };
  write("seq", place.sequence, START.sequence);
  write("model", place.model, null);
  write("job", place.job, null);
  write("prompt", place.prompt, "");
  write("token", String(place.token), "0");
  write("focus", place.focus, null);
  write("layout", place.layout, START.layout);
  write("panel", place.panel, START.panel);
  for (const { id } of SEQUENCES) {
    const view = place.views[id];
    const usual = defaultView(id);
    write(`${id}.map`, view.map, usual.map);
    write(`${id}.scale`, view.scale, usual.scale);
    write(`${id}.inverted`, String(view.inverted), "false");
    if (view.window !== null) fields.set(`${id}.wl`, `${view.window.width},${view.window.level}`);
  }
  return fields.toString();
}

/** Reads an address. What it does not say, or says wrongly, is the default. */
export function decode(fragment: string): Place {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const sequence = fields.get("seq") ?? "";
  const token = Number(fields.get("token"));
  return {
    sequence: isSequence(sequence) ? sequence : START.sequence,
    model: fields.get("model"),
    job: fields.get("job"),
    prompt: fields.get("prompt") ?? "",
    token: Number.isInteger(token) && token >= 0 ? token : 0,
    focus: fields.get("focus"),
    layout: oneOf<LayoutName>(LAYOUT_NAMES, fields.get("layout"), START.layout),
    panel: oneOf<PanelName>(PANEL_NAMES, fields.get("panel"), START.panel),
    views: Object.fromEntries(
      SEQUENCES.map(({ id }) => [id, decodeView(fields, id)]),
    ) as unknown as Views,
  };
}

function decodeView(fields: URLSearchParams, id: SequenceId): SeriesView {
  const usual = defaultView(id);
  const scale = fields.get(`${id}.scale`);
  const [width = NaN, level = NaN] = (fields.get(`${id}.wl`) ?? "").split(",").map(number);
  const isWindow = Number.isFinite(width) && width > 0 && Number.isFinite(level);
  return {
    map: oneOf<MapName>(MAP_NAMES, fields.get(`${id}.map`), usual.map),
    scale: scale === "log" || scale === "linear" ? scale : usual.scale,
    inverted: fields.get(`${id}.inverted`) === "true",
    window: isWindow ? { width, level } : null,
  };
}

/** `Number("")` is 0; an absent number is none. */
function number(text: string): number {
  return text.trim() === "" ? NaN : Number(text);
}

function oneOf<T extends string>(allowed: readonly T[], value: string | null, usual: T): T {
  return allowed.find((candidate) => candidate === value) ?? usual;
}
