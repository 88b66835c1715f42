/**
 * Bytes as text that stands in a script element of a page: seven characters for six bytes, where base64 has
 * eight. Of the 128 characters of ASCII those are left out that HTML would read as something else: NUL, the
 * carriage return, which becomes a line feed, and `<`.
 */

const RADIX = 125;

/** @param {Uint8Array} bytes */
export function densely(bytes) {
  const parts = [String(bytes.length), " "];
  for (let at = 0; at < bytes.length; at += 6) {
    let number = 0;
    for (let byte = 0; byte < 6; byte++) number = number * 256 + (bytes[at + byte] ?? 0);
    let part = "";
    for (let digit = 0; digit < 7; digit++) {
      const code = number % RADIX;
      part += String.fromCharCode(code < 12 ? code + 1 : code < 58 ? code + 2 : code + 3);
      number = Math.floor(number / RADIX);
    }
    parts.push(part);
  }
  return parts.join("");
}

/**
 * The way back. Its source is written into the page as it stands, so it needs nothing from around it.
 * @param {string} text
 */
export function dense(text) {
  const start = text.indexOf(" ") + 1;
  const bytes = new Uint8Array(Number(text.slice(0, start)));
  for (let from = start, at = 0; at < bytes.length; from += 7, at += 6) {
    let number = 0;
    for (let digit = 6; digit >= 0; digit--) {
      const code = text.charCodeAt(from + digit);
      number = number * 125 + code - (code < 13 ? 1 : code < 60 ? 2 : 3);
    }
    for (let byte = 5; byte >= 0; byte--) {
      if (at + byte < bytes.length) bytes[at + byte] = number % 256;
      number = Math.floor(number / 256);
    }
  }
  return bytes;
}
