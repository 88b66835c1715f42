/** The stages of the guided tour: what each shows, and what it says of it. */
import { EIFFEL } from "../model/examples";
import type { SequenceId } from "../model/sequences";
import type { Room } from "../state/room.svelte";
import { value } from "../ui/format";
import { t, type Message } from "../words/words.svelte";

export interface Stage {
  readonly title: Message;
  /** Brings up what the stage is about. */
  readonly enter: (room: Room) => void;
  /** Whether it is there to be talked of. */
  readonly isThere: (room: Room) => boolean;
  /** Done once it is there. */
  readonly point: (room: Room) => void;
  readonly says: (room: Room) => string;
  readonly hint: Message;
}

const nothing = () => undefined;

/** Shows a sequence of the example, scanned unless that has been done. */
function take(room: Room, id: SequenceId): void {
  room.show(id);
  const state = room.study.series[id];
  const known = state.status === "acquiring" || (state.status === "ready" && isExample(room, id));
  if (known || room.desk.saved !== null) return;
  const { prompt, ...question } = EIFFEL;
  room.prompt = prompt;
  room.question = { ...room.question, ...question };
  room.scan();
}

function isExample(room: Room, id: SequenceId): boolean {
  const state = room.study.series[id];
  return state.status === "ready" && state.series.acquisition.prompt === EIFFEL.prompt;
}

export const STAGES: readonly Stage[] = [
  {
    title: "One disc, one part",
    enter: (room) => room.show("T1"),
    isThere: (room) => room.reading.series !== null,
    point: nothing,
    says: () =>
      t(
        "Every disc is an attention head or an MLP of the model, layer below layer, from the embedding E to the unembedding U. Lighter and larger: more parameters.",
      ),
    hint: "Hover a disc to read it.",
  },
  {
    title: "The model reads",
    enter: (room) => take(room, "fMRI"),
    isThere: (room) => isExample(room, "fMRI"),
    point: nothing,
    says: () =>
      t("It reads “{prompt}”. Hotter and larger: the part writes more at this token.", {
        prompt: EIFFEL.prompt,
      }),
    hint: "Step through the tokens with , and . or play them with Space.",
  },
  {
    title: "What carries the answer",
    enter: (room) => take(room, "DTI"),
    isThere: (room) => isExample(room, "DTI"),
    point: nothing,
    says: () =>
      t(
        "Each part was replaced by what it does for “{corrupt}”. Green: without it, {answer} loses against {foil}. Tracts join what one part writes to what another reads.",
        EIFFEL,
      ),
    hint: "Drag over the picture for contrast.",
  },
  {
    title: "The head that moves it most",
    enter: (room) => take(room, "DTI"),
    isThere: (room) => isExample(room, "DTI"),
    point: (room) => room.perform("strongest-head"),
    says: (room) => {
      const { reading } = room;
      const node = reading.locked;
      return t(
        "Of all heads, {head} moves “ {answer}” most: replacing it changes the answer by {effect} {unit}.",
        {
          head: reading.topology?.labels[node] ?? "",
          answer: EIFFEL.answer,
          effect: value(reading.values[node] ?? NaN),
          unit: reading.unit,
        },
      );
    },
    hint: "Press P to silence it, and see what the model says then.",
  },
];
