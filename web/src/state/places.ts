/** What the room shows as a place, that an address can name, and back. */
import { NO_PRIOR } from "../model/protocols";
import type { Room } from "./room.svelte";
import { encode, type Place } from "./url";

export function placeOf(room: Room): Place {
  const { comparison, crosshair, display, sessions, study } = room;
  return {
    sequence: display.sequence,
    model: study.chosen,
    jobs: study.jobs(),
    prompt: room.prompt,
    question: room.question,
    stimuli: room.stimuli,
    tracts: display.tracts,
    token: crosshair.token,
    focus: crosshair.locked,
    layout: display.layout,
    swapped: display.swapped,
    sagittal: display.sagittal,
    protocol: display.protocol,
    folded: display.folded,
    zoom: display.zoom,
    prior: comparison?.place() ?? NO_PRIOR,
    panel: display.panel,
    views: display.views,
    ...(sessions?.where ?? NOWHERE),
  };
}

/**
 * What is seen as an address without the session that it is of: a link's token is nobody else's matter. The model is
 * named even where it is the default: what is seen later, or elsewhere, must not be another's.
 */
export function viewOf(room: Room): string {
  return encode({ ...placeOf(room), ...NOWHERE, model: room.study.model?.name ?? null });
}

const NOWHERE = { session: null, revision: null, shared: null, beside: null };

/** Everything but the scans, and the session that they are of. */
export function goTo(room: Room, place: Place): void {
  const { crosshair, display } = room;
  display.sequence = place.sequence;
  display.layout = place.layout;
  display.swapped = place.swapped;
  display.sagittal = place.sagittal;
  display.protocol = place.protocol;
  display.folded = place.folded;
  display.zoom = place.zoom;
  display.panel = place.panel;
  display.views = place.views;
  display.tracts = place.tracts;
  crosshair.token = place.token;
  crosshair.locked = place.focus;
  crosshair.chosen = place.focus !== null;
  room.prompt = place.prompt;
  room.question = place.question;
  room.stimuli = place.stimuli;
}
