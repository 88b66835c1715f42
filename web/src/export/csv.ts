/** One quantity of a scan as rows: a component at a token, with every digit the service sent. */
import type { Token } from "../api/frames";
import type { Field } from "../model/field";

const PLACE = /^blocks\.(\d+)\.(attn|mlp|resid_\w+)(?:\.head_(\d+))?/;
const HEADER = ["component", "kind", "layer", "head", "position", "token", "value", "unit"];

/** RFC 4180: comma, quote doubled, CRLF. A static image has no position and no token. */
export function csvOf(field: Field, tokens: readonly Token[]): string {
  const rows = [HEADER.join(",")];
  for (const component of field.volume.components) {
    const [, layer = "", kind = component, head = ""] = PLACE.exec(component) ?? [];
    for (let column = 0; column < field.volume.width; column++) {
      const token = tokens[column];
      rows.push(
        [
          component,
          head === "" ? kind : "head",
          layer,
          head,
          token === undefined ? "" : String(token.position),
          token === undefined ? "" : quoted(token.text),
          number(field.volume.at(component, column)),
          quoted(field.unit),
        ].join(","),
      );
    }
  }
  return `${rows.join("\r\n")}\r\n`;
}

/** What was not measured is empty, never 0. */
function number(value: number): string {
  return Number.isNaN(value) ? "" : String(value);
}

function quoted(words: string): string {
  return /[",\r\n]|^\s|\s$/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
}
