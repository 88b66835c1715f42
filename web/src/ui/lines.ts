/** A prompt of several lines in a field of one, that a line's end would be lost in: its sign stands for it, as in tokens. */

/** As it stands in a field. */
export function onOne(prompt: string): string {
  return prompt.replaceAll("\n", "⏎");
}

/** As it is read out of one. */
export function ofOne(typed: string): string {
  return typed.replaceAll("⏎", "\n");
}

/** Puts what is pasted into a field with its lines; a browser would make spaces of their ends. */
export function pasteLines(event: ClipboardEvent): void {
  const text = event.clipboardData?.getData("text/plain") ?? "";
  if (!/[\r\n]/.test(text)) return;
  event.preventDefault();
  const input = event.currentTarget as HTMLInputElement;
  const { selectionEnd, selectionStart, value } = input;
  const [from, to] = [selectionStart ?? value.length, selectionEnd ?? value.length];
  input.setRangeText(onOne(text.replaceAll(/\r\n?/g, "\n")), from, to, "end");
  input.dispatchEvent(new Event("input", { bubbles: true }));
}
