import { tableFromIPC } from "apache-arrow";
import { expect, test } from "vitest";

import {
  UnreadableTable,
  readActivations,
  readAttention,
  readNeurons,
  readParameters,
  readPredictions,
  readTokens,
  readTopology,
} from "../../src/api/frames";
import { bytes, json } from "./fixtures";

type Rows = Record<string, readonly never[]>;
const oracle = json("pyarrow") as Record<string, Rows>;
const frames = json("frames") as { texts: string[]; values: Record<string, number[]> };

function rows(table: string, column: string): readonly unknown[] {
  const found = oracle[table]?.[column];
  if (found === undefined) throw new Error(`pyarrow.json has no ${table}.${column}`);
  return found;
}

test("activations are pyarrow's floats, bit for bit", () => {
  const table = readActivations(bytes("activations"));
  expect(table.components).toEqual(Object.keys(frames.values));
  expect(table.width).toBe(frames.texts.length);
  const expected = Object.values(frames.values).flat();
  expect([...table.values]).toEqual(expected);
  expect(table.provenance.unit).toBe("L2 norm");
  expect(table.provenance.positions).toEqual(frames.texts.map((_, position) => position));
});

test("activations are apache-arrow's floats, too", () => {
  const table = readActivations(bytes("activations"));
  const other = tableFromIPC(new Uint8Array(bytes("activations"))).getChild("value");
  for (const row of [0, 7, 211, table.components.length - 1]) {
    const own = table.values.subarray(row * table.width, (row + 1) * table.width);
    expect([...own]).toEqual([...(other?.get(row) as Iterable<number>)]);
  }
});

test("topology counts parameters as pyarrow reads them", () => {
  const table = readTopology(bytes("topology"));
  expect(table.components.slice(0, 20)).toEqual(rows("topology", "component"));
  expect([...table.parameters.slice(0, 20)]).toEqual(rows("topology", "parameters"));
  expect([...table.shared.slice(0, 20)]).toEqual(rows("topology", "shared_parameters"));
});

test("parameter tensors keep their shapes", () => {
  const tensors = readParameters(bytes("parameters")).slice(0, 20);
  expect(tensors.map(({ shape }) => shape)).toEqual(rows("parameters", "shape"));
  expect(tensors.map(({ role }) => role)).toEqual(rows("parameters", "role"));
  expect(tensors.map(({ parameters }) => parameters)).toEqual(rows("parameters", "parameters"));
});

test("tokens say which is a sink", () => {
  const tokens = readTokens(bytes("tokens"));
  expect(tokens.map(({ text }) => text)).toEqual(rows("tokens", "text"));
  expect(tokens.map(({ sink }) => sink)).toEqual(rows("tokens", "sink"));
  expect(tokens.map(({ id }) => id)).toEqual(rows("tokens", "token_id"));
});

test("neurons and predictions are pyarrow's rows", () => {
  const neurons = readNeurons(bytes("neurons")).slice(0, 20);
  expect(neurons.map(({ neuron }) => neuron)).toEqual(rows("neurons", "neuron"));
  expect(neurons.map(({ value }) => value)).toEqual(rows("neurons", "value"));
  const predictions = readPredictions(bytes("predictions")).slice(0, 20);
  expect(predictions.map(({ text }) => text)).toEqual(rows("predictions", "text"));
  expect(predictions.map(({ probability }) => probability)).toEqual(
    rows("predictions", "probability"),
  );
});

test("every query's attention sums to 1", () => {
  const { components, patterns, size } = readAttention(bytes("attention.14"));
  expect(components).toHaveLength(9);
  expect([...patterns]).toEqual((rows("attention.14", "value") as number[][]).flat());
  for (let row = 0; row < components.length * size; row++) {
    const sum = patterns.subarray(row * size, (row + 1) * size).reduce((a, b) => a + b, 0);
    expect(sum).toBeCloseTo(1, 5);
  }
});

test("a table of another kind is refused by name", () => {
  expect(() => readActivations(bytes("tokens"))).toThrow(UnreadableTable);
  expect(() => readActivations(bytes("tokens"))).toThrow(/Expected table activations.*got tokens/);
});
