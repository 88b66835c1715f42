/** Every node another colour and size in every frame, as fast as the browser asks for frames. */
import type { Architecture } from "../src/api/schema";
import { css, lut } from "../src/colour/lut";
import { layOut } from "../src/model/layout";
import { topologyOf } from "../src/model/topology";
import { ScanRenderer } from "../src/render/ScanRenderer";
import { paintNodes } from "../src/render/paint";

const VIEWPORT = { width: 960, height: 640 };
const WARM_UP_MILLISECONDS = 1000;

export interface Measured {
  readonly nodes: number;
  readonly framesPerSecond: number;
  /** Of our own code a frame, the canvas calls included, the browser's rasterising not. */
  readonly scriptMilliseconds: number;
}

export async function recolour(
  nLayers: number,
  nHeads: number,
  milliseconds: number,
): Promise<Measured> {
  const topology = topologyOf({
    n_layers: nLayers,
    n_heads: nHeads,
    n_kv_heads: nHeads,
    parallel_blocks: false,
  } as Architecture);
  const stage = document.createElement("div");
  stage.style.position = "relative";
  const [anatomy, tracts, halos, nodes] = [canvas(), canvas(), canvas(), canvas()];
  stage.append(anatomy, tracts, halos, nodes);
  document.body.replaceChildren(stage);
  const renderer = new ScanRenderer(
    { anatomy, tracts, halos, nodes },
    {
      background: "#0a0c10",
      vignette: "#10141b",
      tract: "rgb(120 150 170 / 0.13)",
      midline: "rgb(102 170 136 / 0.30)",
      socket: "#39434f",
      missing: "#4d5967",
    },
  );
  const layout = layOut("brain", topology, VIEWPORT);
  renderer.setLayout(layout, 1, true);

  const colours = lut("inferno");
  const values = new Float64Array(topology.size);
  let script = 0;
  let counted = 0;
  const began = performance.now();
  await new Promise<void>((resolve) => {
    const frame = (now: number) => {
      const start = performance.now();
      for (let node = 0; node < values.length; node++) {
        values[node] = 0.5 + 0.5 * Math.sin(node * 0.37 + now * 0.004);
      }
      const paint = paintNodes({
        values,
        window: { level: 0.5, width: 1 },
        scale: "linear",
        lut: colours,
        radius: layout.maxRadius,
        marks: new Float64Array(0),
        halos: "largest",
        signed: false,
      });
      renderer.paint(paint, css(colours, 0.85), "#ff8fab", 0);
      if (now - began > WARM_UP_MILLISECONDS) {
        counted++;
        script += performance.now() - start;
      }
      if (now - began < WARM_UP_MILLISECONDS + milliseconds) requestAnimationFrame(frame);
      else resolve();
    };
    requestAnimationFrame(frame);
  });
  renderer.destroy();
  return {
    nodes: topology.size,
    framesPerSecond: (counted / milliseconds) * 1000,
    scriptMilliseconds: script / counted,
  };
}

function canvas(): HTMLCanvasElement {
  const made = document.createElement("canvas");
  Object.assign(made.style, { position: "absolute", inset: "0", width: "960px", height: "640px" });
  return made;
}

Object.assign(window, { recolour });
