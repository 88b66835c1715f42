/** What each action does to the room, whichever key or button asks for it. */
import { DIVERGING_MAPS, SEQUENTIAL_MAPS } from "../colour/lut";
import { moved, widened } from "../colour/window";
import { zoomedAbout } from "../model/layout/zoom";
import { PROTOCOL_IDS, type ProtocolId } from "../model/protocols";
import { isSequence } from "../model/sequences";
import {
  columnOf,
  headsLeft,
  neighbour,
  nodeAt,
  type Direction,
  type Topology,
} from "../model/topology";
import { t } from "../words/words.svelte";
import { after, type Tool } from "./display.svelte";
import type { Action } from "./keys";
import type { Reading } from "./reading.svelte";
import type { Room } from "./room.svelte";

/** One key press widens the window by this factor, or moves its level by this share. */
const WIDEN = 1.2;
const SHIFT = 0.08;
/** And comes closer by this factor. */
const CLOSER = 1.5;

export function perform(room: Room, action: Action): void {
  switch (action) {
    case "up":
    case "down":
    case "left":
    case "right":
      move(room, action);
      break;
    case "hottest": {
      const hottest = room.reading.hottest();
      if (hottest >= 0) room.lock(hottest);
      break;
    }
    case "release":
      if (room.help) room.help = false;
      else if (room.region !== null) room.region = null;
      else room.crosshair.locked = null;
      break;
    case "previous-token":
      room.goToToken(room.reading.column - 1);
      break;
    case "next-token":
      room.goToToken(room.reading.column + 1);
      break;
    case "first-token":
      room.goToToken(0);
      break;
    case "last-token":
      room.goToToken(room.reading.tokens.length - 1);
      break;
    case "play":
      // While a scan comes in, what can be paused is the scan.
      if (room.reading.state.status === "acquiring") room.study.hold(!room.study.held);
      else if (room.canPlay()) room.cine.toggle();
      break;
    case "cine-axis":
      room.display.cineAxis = room.display.cineAxis === "tokens" ? "layers" : "tokens";
      break;
    case "fold":
      room.fold(!room.display.folded);
      break;
    case "closer":
      zoom(room, CLOSER);
      break;
    case "farther":
      zoom(room, 1 / CLOSER);
      break;
    case "region":
      nextRegion(room);
      break;
    case "swap":
      room.display.protocol = "planes";
      room.display.swapped = !room.display.swapped;
      break;
    case "mark":
      void room.markImage();
      break;
    case "previous-protocol":
    case "next-protocol": {
      const step = action === "next-protocol" ? 1 : -1;
      const at = PROTOCOL_IDS.indexOf(room.display.protocol) + step;
      const id = PROTOCOL_IDS[(at + PROTOCOL_IDS.length) % PROTOCOL_IDS.length];
      if (id !== undefined) void room.hang(id);
      break;
    }
    case "previous-sequence":
    case "next-sequence":
      room.display.showSequence(action === "next-sequence" ? 1 : -1);
      room.show(room.display.sequence);
      break;
    case "narrower":
      room.display.change({ window: widened(room.reading.window, 1 / WIDEN) });
      break;
    case "wider":
      room.display.change({ window: widened(room.reading.window, WIDEN) });
      break;
    case "lower":
      room.display.change({ window: moved(room.reading.window, -SHIFT) });
      break;
    case "higher":
      room.display.change({ window: moved(room.reading.window, SHIFT) });
      break;
    case "automatic":
      room.display.change({ window: null });
      break;
    case "scale": {
      // A window of one scale means nothing on the other, so it goes back to automatic.
      const scales = room.reading.field?.scales ?? [];
      if (scales.length > 1) {
        room.display.change({ scale: after(scales, room.reading.scale), window: null });
      }
      break;
    }
    case "map": {
      const maps = room.reading.field?.signed === true ? DIVERGING_MAPS : SEQUENTIAL_MAPS;
      room.display.change({ map: after(maps, room.reading.map) });
      break;
    }
    case "field": {
      const ids = room.reading.fields.map(({ id }) => id);
      if (ids.length > 1) room.showField(after(ids, room.reading.field?.id ?? ""));
      break;
    }
    case "previous-mark":
    case "next-mark": {
      const order = room.reading.ordered();
      const at = order.findIndex((node) => isOfSameSource(room.reading, node));
      const next = at < 0 ? 0 : at + (action === "next-mark" ? 1 : -1);
      const node = order[Math.max(0, Math.min(order.length - 1, next))];
      if (node !== undefined) room.lock(node);
      break;
    }
    case "stimulate":
      room.display.panel = "stimulate";
      room.stimulationCalls++;
      break;
    case "invert":
      room.display.change({ inverted: !room.display.view.inverted });
      break;
    case "layout":
      room.display.nextLayout();
      break;
    case "table":
      room.display.panel = room.display.panel === "table" ? "inspect" : "table";
      break;
    case "corners":
      room.display.corners = !room.display.corners;
      break;
    case "hide-prompt":
      room.display.promptShown = !room.display.promptShown;
      break;
    case "reset":
      room.reset();
      break;
    case "prompt":
      room.callPrompt();
      break;
    case "strongest-head": {
      const strongest = room.reading.strongestHead();
      if (strongest >= 0) room.lock(strongest);
      break;
    }
    case "export":
      room.desk.exporting = true;
      break;
    case "sessions":
      room.desk.listing = room.desk.saved === null;
      break;
    case "session":
    case "note":
      room.display.panel = "session";
      if (action === "note") room.noteCalls++;
      break;
    case "save":
      room.display.panel = "session";
      if (room.desk.saved === null) void room.withSessions().then((all) => all.save());
      break;
    case "tour":
      room.desk.touring = true;
      break;
    case "help":
      room.help = !room.help;
      break;
    default: {
      const [kind, id = ""] = action.split(":");
      if (kind === "tool") room.display.tool = id as Tool;
      else if (kind === "protocol") void room.hang(id as ProtocolId);
      else if (isSequence(id)) room.show(id);
    }
  }
}

function move(room: Room, direction: Direction): void {
  const { topology, locked } = room.reading;
  if (topology === null) return;
  const middle = nodeAt(topology, 0, headsLeft(topology.nHeads));
  room.lock(locked < 0 ? middle : neighbour(topology, locked, direction));
}

/** Closer or farther by a step, about the crosshair; as far out as it goes, heads are folded. */
function zoom(room: Room, factor: number): void {
  const { display, layout } = room;
  const { locked } = room.reading;
  if (factor < 1 && display.zoom.scale === 1) {
    room.fold(true);
    return;
  }
  if (factor > 1 && display.folded) {
    room.fold(false);
    return;
  }
  const x = layout === null || locked < 0 ? 0.5 : (layout.x[locked] ?? 0) / layout.width;
  const y = layout === null || locked < 0 ? 0.5 : (layout.y[locked] ?? 0) / layout.height;
  const { zoom: now } = display;
  const at = (place: number, middle: number) => (place - middle) * now.scale + 0.5;
  display.zoom = zoomedAbout(now, factor, at(x, now.x), at(y, now.y));
}

/** Regions by key: the crosshair's layer, then its column, then everything, then none. */
function nextRegion(room: Room): void {
  const { locked, topology } = room.reading;
  if (topology === null || locked < 0) return;
  const layer = topology.layers[locked] ?? -1;
  const column = columnOf(topology, locked);
  const those = (keep: (node: number) => boolean) =>
    topology.addresses.filter((_, node) => isInLayers(topology, node) && keep(node));
  const choices = [
    those((node) => topology.layers[node] === layer),
    those((node) => columnOf(topology, node) === column),
    those(() => true),
  ].filter((components) => components.length > 0);
  const now = room.region?.components.join() ?? "";
  const at = choices.findIndex((components) => components.join() === now);
  const next = choices[at + 1];
  if (next === undefined) {
    room.measure(null);
    room.announce(t("No region."));
  } else room.measure({ components: next, columns: null });
}

function isInLayers(topology: Topology, node: number): boolean {
  const layer = topology.layers[node] ?? -1;
  return layer >= 0 && layer < topology.nLayers;
}

/** Whether a node shows the locked node's number. */
function isOfSameSource({ locked, sources }: Reading, node: number): boolean {
  return locked >= 0 && sources[node] === sources[locked];
}
