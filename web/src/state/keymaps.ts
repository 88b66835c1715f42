/** Other keys for hands that learned them elsewhere. A map says only what differs from the viewer's own. */
import type { Message } from "../words/words.svelte";
import { BINDINGS, type Action, type Binding } from "./keys";

export type KeyMapId = "own" | "ohif";

export interface KeyMap {
  readonly id: KeyMapId;
  readonly title: Message;
  readonly differs: ReadonlyMap<string, Action>;
}

export const KEY_MAPS: readonly KeyMap[] = [
  { id: "own", title: "The viewer's own keys", differs: new Map() },
  {
    id: "ohif",
    title: "Keys of OHIF, a reading room's",
    // An image of the stack is a token, a series is a sequence.
    differs: new Map<string, Action>([
      ["ArrowUp", "previous-token"],
      ["ArrowDown", "next-token"],
      ["Shift+ArrowUp", "up"],
      ["Shift+ArrowDown", "down"],
      ["c", "play"],
      ["Shift+c", "cine-axis"],
      [" ", "reset"],
      ["+", "closer"],
      ["-", "farther"],
      ["=", "automatic"],
      [";", "lower"],
      ["'", "higher"],
    ]),
  },
];

export function keyMap(id: string | null): KeyMap {
  const [own] = KEY_MAPS;
  const found = KEY_MAPS.find((map) => map.id === id) ?? own;
  if (found === undefined) throw new RangeError("There is no key map");
  return found;
}

/** The keys of a binding in a map; none where all of them mean something else there. */
export function keysOf({ action, keys }: Binding, { differs }: KeyMap): readonly string[] {
  const added = [...differs].filter(([, other]) => other === action).map(([key]) => key);
  return [...keys.filter((key) => !differs.has(key)), ...added];
}

/** What can be done by no key in a map. */
export function unreachable(map: KeyMap): readonly Action[] {
  return BINDINGS.filter((binding) => keysOf(binding, map).length === 0).map(
    ({ action }) => action,
  );
}
