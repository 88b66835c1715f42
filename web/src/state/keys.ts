/** Every key the viewer hears, in one table; the help dialog prints it and the handler reads it. */
import { PROTOCOLS, type ProtocolId } from "../model/protocols";
import { SEQUENCES, type SequenceId } from "../model/sequences";
import type { Message } from "../words/words.svelte";
import type { Tool } from "./display.svelte";

export type Action =
  | "up"
  | "down"
  | "left"
  | "right"
  | "hottest"
  | "strongest-head"
  | "export"
  | "tour"
  | "previous-token"
  | "next-token"
  | "first-token"
  | "last-token"
  | "play"
  | "previous-sequence"
  | "next-sequence"
  | "narrower"
  | "wider"
  | "lower"
  | "higher"
  | "automatic"
  | "scale"
  | "map"
  | "field"
  | "previous-mark"
  | "next-mark"
  | "stimulate"
  | "invert"
  | "layout"
  | "table"
  | "corners"
  | "hide-prompt"
  | "reset"
  | "prompt"
  | "release"
  | "help"
  | "fold"
  | "closer"
  | "farther"
  | "region"
  | "mark"
  | "sessions"
  | "session"
  | "save"
  | "note"
  | "swap"
  | "cine-axis"
  | "previous-protocol"
  | "next-protocol"
  | `tool:${Tool}`
  | `protocol:${ProtocolId}`
  | `sequence:${SequenceId}`;

export interface Binding {
  /** `KeyboardEvent.key` values, letters in lower case; `Shift+` where it must be held. */
  readonly keys: readonly string[];
  readonly action: Action;
  readonly about: Message;
  readonly group: Message;
}

export const BINDINGS: readonly Binding[] = [
  { keys: ["ArrowUp"], action: "up", about: "Component one layer up", group: "Crosshair" },
  { keys: ["ArrowDown"], action: "down", about: "Component one layer down", group: "Crosshair" },
  { keys: ["ArrowLeft"], action: "left", about: "Component to the left", group: "Crosshair" },
  { keys: ["ArrowRight"], action: "right", about: "Component to the right", group: "Crosshair" },
  { keys: ["h"], action: "hottest", about: "Largest value in the layers", group: "Crosshair" },
  {
    keys: ["Shift+h"],
    action: "strongest-head",
    about: "Strongest attention head",
    group: "Crosshair",
  },
  { keys: ["n"], action: "next-mark", about: "Next strongest, downwards", group: "Crosshair" },
  { keys: ["b"], action: "previous-mark", about: "Back towards the strongest", group: "Crosshair" },
  { keys: ["Escape"], action: "release", about: "Let go of what is locked", group: "Crosshair" },
  { keys: [","], action: "previous-token", about: "Token before", group: "Tokens" },
  { keys: ["."], action: "next-token", about: "Token after", group: "Tokens" },
  { keys: ["Home"], action: "first-token", about: "First token", group: "Tokens" },
  { keys: ["End"], action: "last-token", about: "Last token", group: "Tokens" },
  { keys: [" "], action: "play", about: "Play or pause the tokens", group: "Tokens" },
  ...SEQUENCES.map(({ id, key, title }) => ({
    keys: [key],
    action: `sequence:${id}` as const,
    about: title,
    group: "Sequence" as const,
  })),
  { keys: ["PageUp"], action: "previous-sequence", about: "Sequence before", group: "Sequence" },
  { keys: ["PageDown"], action: "next-sequence", about: "Sequence after", group: "Sequence" },
  { keys: ["f"], action: "field", about: "Next quantity of the sequence", group: "Sequence" },
  { keys: ["["], action: "narrower", about: "Narrower window", group: "Window and level" },
  { keys: ["]"], action: "wider", about: "Wider window", group: "Window and level" },
  { keys: ["-"], action: "lower", about: "Lower level", group: "Window and level" },
  { keys: ["="], action: "higher", about: "Higher level", group: "Window and level" },
  { keys: ["a"], action: "automatic", about: "Automatic window", group: "Window and level" },
  { keys: ["s"], action: "scale", about: "Linear or log scale", group: "Window and level" },
  { keys: ["m"], action: "map", about: "Next colour map", group: "Window and level" },
  { keys: ["i"], action: "invert", about: "Invert the colour map", group: "Window and level" },
  { keys: ["w"], action: "tool:window", about: "Drag: window and level", group: "Tools" },
  { keys: ["d"], action: "tool:region", about: "Drag: measure a region", group: "Tools" },
  { keys: ["g"], action: "tool:pan", about: "Drag: move the picture", group: "Tools" },
  { keys: ["e"], action: "region", about: "Region: layer, column, all, none", group: "Tools" },
  { keys: ["z"], action: "closer", about: "Closer", group: "Tools" },
  { keys: ["Shift+z"], action: "farther", about: "Farther; then fold the heads", group: "Tools" },
  { keys: ["x"], action: "fold", about: "Fold or unfold the heads", group: "Tools" },
  { keys: ["k"], action: "mark", about: "Mark a key image", group: "Tools" },
  { keys: ["c"], action: "cine-axis", about: "Play tokens or layers", group: "Tokens" },
  ...PROTOCOLS.map(({ id, key, title }) => ({
    keys: [key],
    action: `protocol:${id}` as const,
    about: title,
    group: "Hanging" as const,
  })),
  { keys: ["v"], action: "swap", about: "Larger planes, or a larger picture", group: "Hanging" },
  { keys: ["<"], action: "previous-protocol", about: "Hanging before", group: "Hanging" },
  { keys: [">"], action: "next-protocol", about: "Hanging after", group: "Hanging" },
  { keys: ["Shift+s"], action: "sessions", about: "All sessions", group: "Session" },
  { keys: ["j"], action: "session", about: "The open session", group: "Session" },
  { keys: ["u"], action: "save", about: "Save the session", group: "Session" },
  { keys: ["y"], action: "note", about: "Write a note", group: "Session" },
  { keys: ["l"], action: "layout", about: "Next layout", group: "View" },
  { keys: ["p"], action: "stimulate", about: "Stimulate the component", group: "View" },
  { keys: ["t"], action: "table", about: "Table of the scan", group: "View" },
  { keys: ["o"], action: "corners", about: "Corner texts", group: "View" },
  { keys: ["Shift+o"], action: "hide-prompt", about: "Hide the prompt", group: "View" },
  { keys: ["r"], action: "reset", about: "Reset the view", group: "View" },
  { keys: ["/"], action: "prompt", about: "Go to the prompt", group: "View" },
  { keys: ["Shift+e"], action: "export", about: "Export", group: "View" },
  { keys: ["Shift+t"], action: "tour", about: "Guided tour", group: "View" },
  { keys: ["?"], action: "help", about: "This help", group: "View" },
];

const byKey = new Map(
  BINDINGS.flatMap((binding) => binding.keys.map((key) => [key, binding.action] as const)),
);

/** What a key that is held does on and on: it moves. Everything else is done once. */
export const REPEATED =
  /^(up|down|left|right|narrower|wider|lower|higher|closer|farther)$|-(token|sequence|mark)$/;

export interface Pressed {
  readonly key: string;
  /** The key's place on the keyboard: `KeyA` where a Latin A would be. */
  readonly code?: string;
  readonly shiftKey: boolean;
  readonly ctrlKey: boolean;
  readonly altKey: boolean;
  readonly metaKey: boolean;
}

/** What a key press means, or null. Chords with Ctrl, Alt or Meta belong to the browser. */
export function actionOf(
  press: Pressed,
  differs: ReadonlyMap<string, Action> = new Map(),
): Action | null {
  if (press.ctrlKey || press.altKey || press.metaKey) return null;
  const meaning = (key: string) => differs.get(key) ?? byKey.get(key) ?? null;
  // Another script's letters stand where Latin ones do on the same keyboard.
  const foreign = /^[^ -~]$/u.test(press.key) ? /^Key(.)$/.exec(press.code ?? "")?.[1] : undefined;
  const letter = foreign ?? press.key;
  const shift = press.shiftKey ? "Shift+" : "";
  if (/^[a-z]$/i.test(letter)) return meaning(shift + letter.toLowerCase());
  // Shift makes another sign of a sign; with an arrow it means something only where it is asked for.
  return (press.shiftKey ? differs.get(shift + press.key) : null) ?? meaning(press.key);
}

/** A key as a person reads it. */
export function keyCap(key: string): string {
  const names: Readonly<Record<string, string>> = {
    " ": "Space",
    ArrowUp: "↑",
    ArrowDown: "↓",
    ArrowLeft: "←",
    ArrowRight: "→",
    Escape: "Esc",
    PageUp: "PgUp",
    PageDown: "PgDn",
  };
  if (key.startsWith("Shift+")) return `Shift ${keyCap(key.slice(6))}`;
  return names[key] ?? (key.length === 1 ? key.toUpperCase() : key);
}
