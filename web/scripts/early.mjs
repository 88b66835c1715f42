/**
 * Has the page run the first requests' module as soon as it is there, while the rest of the viewer is still on its
 * way: other modules wait for the whole page and its style.
 */
const NAME = "early";

/** @returns {import("vite").Plugin} */
export function early() {
  return {
    name: NAME,
    apply: "build",
    transformIndexHtml: {
      order: "post",
      handler: (html, { bundle }) => {
        const part = Object.values(bundle ?? {}).find(({ name }) => name === NAME);
        const source = `src="/${part?.fileName ?? NAME}"`;
        const found = html.replace(source, `async fetchpriority="high" ${source}`);
        if (found === html) throw new Error(`The page does not load the module ${NAME}`);
        return found;
      },
    },
  };
}
