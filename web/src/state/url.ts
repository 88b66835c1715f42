/**
 * What is on the screen as an address, and back. It stands in the fragment, which browsers never send:
 * a prompt does not end up in a server's log. Only what differs from the default is written.
 */
import { MAP_NAMES, type MapName } from "../colour/lut";
import type { Scale } from "../colour/window";
import { LAYOUT_NAMES, type LayoutName } from "../model/layout";
import { WHOLE, clampZoom, type Zoom } from "../model/layout/zoom";
import {
  NO_PRIOR,
  PRIOR_KINDS,
  PROTOCOL_IDS,
  type PriorKind,
  type PriorPlace,
  type ProtocolId,
} from "../model/protocols";
import { isSequence, type SequenceId } from "../model/sequences";
import { METHODS, NO_QUESTION, type MethodId, type Question } from "../model/question";
import { read, written, type Stimulus } from "../model/stimulus";
import {
  PANEL_NAMES,
  VIEW_IDS,
  defaultViews,
  type PanelName,
  type SeriesView,
  type ViewId,
  type Views,
} from "../model/views";
import { SAGITTAL_COLUMNS, USUAL_TRACTS, type SagittalColumn } from "./display.svelte";

const SCALES: readonly Scale[] = ["linear", "log", "size"];
const MOST_TRACTS = 5000;

export interface Place {
  readonly sequence: SequenceId;
  readonly model: string | null;
  /** The scans that are there, one of a kind. */
  readonly jobs: readonly string[];
  readonly prompt: string;
  readonly question: Question;
  /** What is to be done to the model in the next stimulation. */
  readonly stimuli: readonly Stimulus[];
  readonly tracts: number;
  readonly token: number;
  readonly focus: string | null;
  readonly layout: LayoutName;
  readonly swapped: boolean;
  /** The column that the sagittal plane cuts. */
  readonly sagittal: SagittalColumn;
  readonly protocol: ProtocolId;
  readonly folded: boolean;
  readonly zoom: Zoom;
  /** What is compared with. */
  readonly prior: PriorPlace;
  readonly panel: PanelName;
  readonly views: Views;
  /** The open session's id, and its revision where that is not the latest. */
  readonly session: string | null;
  readonly revision: string | null;
  /** The token of the link that the open session was reached by. */
  readonly shared: string | null;
  /** The session that is compared with. */
  readonly beside: string | null;
}

export const START: Place = {
  sequence: "T1",
  model: null,
  jobs: [],
  prompt: "",
  question: NO_QUESTION,
  stimuli: [],
  tracts: USUAL_TRACTS,
  token: 0,
  focus: null,
  layout: "brain",
  swapped: false,
  sagittal: "crosshair",
  protocol: "planes",
  folded: false,
  zoom: WHOLE,
  prior: NO_PRIOR,
  panel: "inspect",
  views: defaultViews(),
  session: null,
  revision: null,
  shared: null,
  beside: null,
};

export function encode(place: Place): string {
  const fields = new URLSearchParams();
  const write = (name: string, value: string | null, usual: string | null) => {
    if (value !== null && value !== usual) fields.set(name, value);
  };
  write("seq", place.sequence, START.sequence);
  write("model", place.model, null);
  for (const job of place.jobs) fields.append("job", job);
  write("prompt", place.prompt, "");
  write("answer", place.question.answer, "");
  write("foil", place.question.foil, "");
  write("corrupt", place.question.corrupt, "");
  write("method", place.question.method, NO_QUESTION.method);
  for (const stimulus of place.stimuli) fields.append("do", written(stimulus));
  write("tracts", String(place.tracts), String(START.tracts));
  write("token", String(place.token), "0");
  write("focus", place.focus, null);
  write("layout", place.layout, START.layout);
  write("hang", place.protocol, START.protocol);
  write("swap", String(place.swapped), "false");
  write("cut", place.sagittal, START.sagittal);
  write("fold", String(place.folded), "false");
  const { scale, x, y } = place.zoom;
  write("zoom", [scale, x, y].join(), [WHOLE.scale, WHOLE.x, WHOLE.y].join());
  write("prior", place.prior.kind, NO_PRIOR.kind);
  write("prior.prompt", place.prior.prompt, "");
  write("prior.model", place.prior.model, null);
  for (const job of place.prior.jobs) fields.append("prior.job", job);
  write("panel", place.panel, START.panel);
  write("session", place.session, null);
  write("revision", place.revision, null);
  write("shared", place.shared, null);
  write("prior.session", place.beside, null);
  for (const id of VIEW_IDS) {
    const view = place.views[id];
    write(`${id}.field`, view.field, null);
    write(`${id}.map`, view.map, null);
    write(`${id}.scale`, view.scale, null);
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
  const tracts = Number(fields.get("tracts"));
  return {
    sequence: isSequence(sequence) ? sequence : START.sequence,
    model: fields.get("model"),
    jobs: fields.getAll("job"),
    prompt: fields.get("prompt") ?? "",
    question: {
      answer: fields.get("answer") ?? "",
      foil: fields.get("foil") ?? "",
      corrupt: fields.get("corrupt") ?? "",
      method: oneOf<MethodId>(
        METHODS.map(({ id }) => id),
        fields.get("method"),
        NO_QUESTION.method,
      ),
    },
    stimuli: fields.getAll("do").flatMap((text) => read(text) ?? []),
    tracts: Number.isInteger(tracts) && tracts > 0 ? Math.min(tracts, MOST_TRACTS) : START.tracts,
    token: Number.isInteger(token) && token >= 0 ? token : 0,
    focus: fields.get("focus"),
    layout: oneOf<LayoutName>(LAYOUT_NAMES, fields.get("layout"), START.layout),
    protocol: oneOf<ProtocolId>(PROTOCOL_IDS, fields.get("hang"), START.protocol),
    swapped: fields.get("swap") === "true",
    sagittal: oneOf<SagittalColumn>(SAGITTAL_COLUMNS, fields.get("cut"), START.sagittal),
    folded: fields.get("fold") === "true",
    zoom: decodeZoom(fields.get("zoom") ?? ""),
    prior: {
      kind: oneOf<PriorKind>(PRIOR_KINDS, fields.get("prior"), NO_PRIOR.kind),
      prompt: fields.get("prior.prompt") ?? "",
      model: fields.get("prior.model"),
      jobs: fields.getAll("prior.job"),
    },
    panel: oneOf<PanelName>(PANEL_NAMES, fields.get("panel"), START.panel),
    session: fields.get("session"),
    revision: fields.get("revision"),
    shared: fields.get("shared"),
    beside: fields.get("prior.session"),
    views: Object.fromEntries(
      VIEW_IDS.map((id) => [id, decodeView(fields, id)]),
    ) as unknown as Views,
  };
}

function decodeZoom(text: string): Zoom {
  const [scale = NaN, x = NaN, y = NaN] = text.split(",").map(number);
  return [scale, x, y].every(Number.isFinite) ? clampZoom({ scale, x, y }) : WHOLE;
}

function decodeView(fields: URLSearchParams, id: ViewId): SeriesView {
  const [width = NaN, level = NaN] = (fields.get(`${id}.wl`) ?? "").split(",").map(number);
  const isWindow = Number.isFinite(width) && width > 0 && Number.isFinite(level);
  return {
    field: fields.get(`${id}.field`),
    map: oneOf<MapName | null>(MAP_NAMES, fields.get(`${id}.map`), null),
    scale: oneOf<Scale | null>(SCALES, fields.get(`${id}.scale`), null),
    inverted: fields.get(`${id}.inverted`) === "true",
    window: isWindow ? { width, level } : null,
  };
}

/** `Number("")` is 0; an absent number is none. */
function number(text: string): number {
  return text.trim() === "" ? NaN : Number(text);
}

function oneOf<T>(allowed: readonly T[], value: string | null, usual: T): T {
  return allowed.find((candidate) => candidate === value) ?? usual;
}
