/** A dense field whose window changes in every frame. */
import { lut } from "../src/colour/lut";
import { paintPlane } from "../src/render/plane";

export async function window2d(size: number, milliseconds: number): Promise<number> {
  const canvas = document.createElement("canvas");
  document.body.replaceChildren(canvas);
  const values = Float32Array.from({ length: size * size }, (_, at) => Math.sin(at * 0.013) + 1);
  const plane = { width: size, height: size, values };
  const colours = lut("inferno");
  let frames = 0;
  const began = performance.now();
  await new Promise<void>((resolve) => {
    const frame = (now: number) => {
      const width = 1 + Math.sin(now * 0.003) ** 2;
      paintPlane(canvas, plane, { level: 1, width }, "linear", colours);
      frames++;
      if (now - began > milliseconds) resolve();
      else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  });
  return (1000 * frames) / (performance.now() - began);
}

Object.assign(window, { window2d });
