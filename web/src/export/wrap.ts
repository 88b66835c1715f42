/** Texts broken into lines, by the mean width of their characters. */

/** What is written in full width: as wide as two others. */
const FULL =
  /[\u1100-\u11ff\u2e80-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\u{1f000}-\u{3ffff}]/u;

function extent(text: string): number {
  return [...text].reduce((sum, character) => sum + (FULL.test(character) ? 2 : 1), 0);
}

/**
 * Lines of no more than `room` characters, broken between words, and within one that is longer by itself. Beyond
 * `most` lines the last says that there was more.
 */
export function wrapped(text: string, room: number, most = Infinity): readonly string[] {
  const broken: string[] = [];
  for (const word of text.split(/\s+/).flatMap((whole) => pieces(whole, room))) {
    const last = broken.at(-1);
    if (last === undefined || extent(last) + 1 + extent(word) > room) broken.push(word);
    else broken[broken.length - 1] = `${last} ${word}`;
  }
  if (broken.length <= most) return broken;
  return broken.slice(0, most).map((line, at) => (at === most - 1 ? `${line}…` : line));
}

function pieces(word: string, room: number): readonly string[] {
  const all = [""];
  for (const character of word) {
    const piece = (all.at(-1) ?? "") + character;
    if (extent(piece) > room) all.push(character);
    else all[all.length - 1] = piece;
  }
  return all;
}
