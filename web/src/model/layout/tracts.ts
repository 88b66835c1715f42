/** The wiring every model has, as curves: heads read and write the residual stream that the MLPs stand on. */
import { columnOf, headsLeft, nodeAt, type Topology } from "../topology";

type Bend = (x0: number, y0: number, x1: number, y1: number) => readonly [x: number, y: number];

/**
 * Heads write to the residual stream above their layer's MLP; the MLP's output is read by the next heads.
 * `bend` says where the curve between two points is pulled to.
 */
export function joined(
  topology: Topology,
  x: Float32Array,
  y: Float32Array,
  bend: Bend,
): Float32Array {
  const curves: number[] = [];
  const join = (from: number, to: number) => {
    const [x0 = 0, y0 = 0, x1 = 0, y1 = 0] = [x[from], y[from], x[to], y[to]];
    curves.push(x0, y0, ...bend(x0, y0, x1, y1), x1, y1);
  };
  const middle = headsLeft(topology.nHeads);
  for (let node = 1; node < topology.size - 1; node++) {
    const layer = topology.layers[node] ?? 0;
    if (columnOf(topology, node) === middle) continue;
    join(layer === 0 ? 0 : nodeAt(topology, layer - 1, middle), node);
    join(node, nodeAt(topology, layer, middle));
  }
  return Float32Array.from(curves);
}
