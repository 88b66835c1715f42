/** Hands a file to the person, under a name that says what is in it. */

export function download(name: string, content: Blob | string, type = "text/plain"): void {
  const blob = typeof content === "string" ? new Blob([content], { type }) : content;
  const address = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  // The browser has taken hold of it once the click is done with.
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** `fMRI`, `L3H7 at token 4` -> `neural-mri-fMRI-L3H7-at-token-4.svg`. */
export function fileName(parts: readonly string[], extension: string): string {
  const words = ["neural-mri", ...parts]
    .join("-")
    .replaceAll(/[^\p{L}\p{N}.]+/gu, "-")
    .replaceAll(/^-|-$/g, "");
  return `${words.slice(0, 120)}.${extension}`;
}
