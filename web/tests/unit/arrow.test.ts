import { readFileSync, readdirSync } from "node:fs";

import {
  Bool,
  Field,
  Float32,
  Float64,
  Int64,
  List,
  Schema,
  Struct,
  Table,
  Utf8,
  type Vector,
  makeData,
  tableFromArrays,
  tableFromIPC,
  tableToIPC,
  vectorFromArray,
} from "apache-arrow";
import { expect, test } from "vitest";

import { UnreadableTable, readTable } from "../../src/api/arrow";

const DATA = new URL("../fixtures/data/", import.meta.url);
const FILES = readdirSync(DATA, { recursive: true, encoding: "utf8" }).filter((name) =>
  name.endsWith(".arrow"),
);

function bufferOf(bytes: Uint8Array): ArrayBuffer {
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength) as ArrayBuffer;
}

function plain(value: unknown): unknown {
  if (typeof value === "object" && value !== null && Symbol.iterator in value) {
    return [...(value as Iterable<unknown>)].map(plain);
  }
  return typeof value === "bigint" ? Number(value) : value;
}

/** A column's rows, as the other reader gives them. */
function rows(bytes: Uint8Array, name: string): unknown[] {
  return [...(tableFromIPC(bytes).getChild(name) ?? [])].map(plain);
}

function ours(bytes: Uint8Array, name: string): unknown[] {
  const column = readTable(bufferOf(bytes)).columns.get(name);
  if (column === undefined) throw new Error(`no column ${name}`);
  if (column.kind !== "matrix") return [...column.values].map(plain);
  const count = column.values.length / column.width;
  return Array.from({ length: count }, (_, row) => [
    ...column.values.subarray(row * column.width, (row + 1) * column.width),
  ]);
}

test.each(FILES)("%s is read as apache-arrow reads it, column for column", (name) => {
  const bytes = new Uint8Array(readFileSync(new URL(name, DATA)));
  const oracle = tableFromIPC(bytes);
  const table = readTable(bufferOf(bytes));
  expect(table.rows).toBe(oracle.numRows);
  expect([...table.metadata]).toEqual([...oracle.schema.metadata]);
  expect([...table.columns.keys()]).toEqual(oracle.schema.names);
  for (const column of table.columns.keys()) {
    expect(ours(bytes, column), column).toEqual(rows(bytes, column));
  }
});

test("batches that follow each other are one table", () => {
  const part = (from: number) => ({
    number: Float64Array.from([from, from + 0.5]),
    small: Int8Array.from([from, -from]),
  });
  const table = tableFromArrays(part(1)).concat(tableFromArrays(part(7)));
  const bytes = tableToIPC(table, "file");
  expect(table.batches).toHaveLength(2);
  expect(ours(bytes, "number")).toEqual([1, 1.5, 7, 7.5]);
  expect(ours(bytes, "small")).toEqual([1, -1, 7, -7]);
});

function file(column: string, vector: Vector): ArrayBuffer {
  return bufferOf(tableToIPC(new Table({ [column]: vector }), "file"));
}

test("booleans and texts, empty ones among them", () => {
  const flags = Array.from({ length: 19 }, (_, at) => at % 3 === 0);
  const texts = ["", " Paris", "\n", "한국어", "🗼"];
  expect(ours(new Uint8Array(file("b", vectorFromArray(flags, new Bool()))), "b")).toEqual(flags);
  expect(ours(new Uint8Array(file("t", vectorFromArray(texts, new Utf8()))), "t")).toEqual(texts);
});

test("a whole number is read exactly, or refused", () => {
  const exact = vectorFromArray([2n ** 53n - 1n], new Int64());
  const large = vectorFromArray([2n ** 53n], new Int64());
  expect(ours(new Uint8Array(file("n", exact)), "n")).toEqual([2 ** 53 - 1]);
  expect(() => readTable(file("n", large))).toThrow(/9007199254740992/);
});

test("what is not read here is refused by name, never guessed", () => {
  const nulls = vectorFromArray([1, null], new Float32());
  expect(() => readTable(file("x", nulls))).toThrow(/nulls/);
  const nested = new List(new Field("item", new Utf8()));
  expect(() => readTable(file("x", vectorFromArray([["a"]], nested)))).toThrow(/Column x/);
  const child = new Field("a", new Float32(), false);
  const data = makeData({
    type: new Struct([child]),
    children: [makeData({ type: new Float32(), data: Float32Array.of(1) })],
  });
  const struct = new Table(new Schema([child]), data as never);
  expect(readTable(bufferOf(tableToIPC(struct, "file"))).rows).toBe(1);
  expect(() => readTable(bufferOf(tableToIPC(struct, "stream")))).toThrow(UnreadableTable);
});

test("a file that was cut short anywhere is refused, and never read as less", () => {
  const whole = readFileSync(new URL("tokens.arrow", DATA));
  for (let length = 0; length < whole.length; length += 37) {
    expect(() => readTable(bufferOf(whole.subarray(0, length))), String(length)).toThrow(
      UnreadableTable,
    );
  }
});

test("a file whose description was changed at random is refused, or read; it never hangs", () => {
  const whole = new Uint8Array(readFileSync(new URL("tokens.arrow", DATA)));
  for (let at = whole.length - 400; at < whole.length - 6; at += 3) {
    const changed = whole.slice();
    changed[at] = (changed[at] ?? 0) ^ 0x55;
    try {
      readTable(bufferOf(changed));
    } catch (error) {
      expect(error).toBeInstanceOf(UnreadableTable);
    }
  }
});

test("numbers lie where the file has them: nothing is copied", () => {
  const bytes = file("x", vectorFromArray([1, 2, 3], new Float32()));
  const column = readTable(bytes).columns.get("x");
  expect(column?.kind).toBe("numbers");
  expect((column?.values as Float32Array).buffer).toBe(bytes);
});

test("numbers of 64 bits keep all of them", () => {
  const values = [Math.PI, Number.MIN_VALUE, -0];
  expect(ours(new Uint8Array(file("x", vectorFromArray(values, new Float64()))), "x")).toEqual(
    values,
  );
});
