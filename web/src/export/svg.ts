/** Vector pictures as text: elements, escaped. Knows nothing of scans. */

export type Attributes = Readonly<Record<string, string | number>>;

/** `<name a="b">inside</name>`; numbers to a tenth of a thousandth of a figure's width. */
export function element(name: string, attributes: Attributes, inside = ""): string {
  const written = Object.entries(attributes)
    .map(([key, value]) => ` ${key}="${typeof value === "number" ? round(value) : escaped(value)}"`)
    .join("");
  return inside === "" ? `<${name}${written}/>` : `<${name}${written}>${inside}</${name}>`;
}

export function text(x: number, y: number, words: string, attributes: Attributes = {}): string {
  return words === "" ? "" : element("text", { x, y, ...attributes }, escaped(words));
}

/** What XML 1.0 has no way to say: control characters, halves of a character, two that are none. */
const UNSAYABLE = /[^\t\n\r\x20-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu;

export function escaped(words: string): string {
  return words
    .replaceAll(UNSAYABLE, "")
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;");
}

export function round(x: number): string {
  return String(Math.round(x * 100) / 100);
}

/** A file that opens in a browser, and in what papers are made with. */
export function document(width: number, height: number, title: string, inside: string): string {
  const root = element(
    "svg",
    {
      xmlns: "http://www.w3.org/2000/svg",
      width,
      height,
      viewBox: `0 0 ${round(width)} ${round(height)}`,
      "font-family": "Helvetica, Arial, 'Liberation Sans', sans-serif",
      role: "img",
    },
    `<title>${escaped(title)}</title>${inside}`,
  );
  return `<?xml version="1.0" encoding="UTF-8"?>\n${root}\n`;
}
