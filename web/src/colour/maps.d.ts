declare module "virtual:colour-maps" {
  /** Base64 of 64 colours, red, green and blue a colour; see scripts/colour-maps.mjs. */
  const maps: Readonly<Record<"inferno" | "magma" | "viridis" | "cividis", string>>;
  export default maps;
}
