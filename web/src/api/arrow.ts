/**
 * Arrow's IPC file format, as far as the service writes it: columns without nulls of integers, floats,
 * booleans, texts, and lists of numbers. Anything else is refused by name. A general reader is four times
 * the size of the rest of the wire; what it reads beside would only be guessed at here.
 *
 * https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
 */

export class UnreadableTable extends Error {
  override readonly name = "UnreadableTable";
}

export type Numbers =
  | Int8Array
  | Uint8Array
  | Int16Array
  | Uint16Array
  | Int32Array
  | Uint32Array
  | Float32Array
  | Float64Array;

export type Column =
  | { readonly kind: "numbers"; readonly values: Numbers }
  | { readonly kind: "flags"; readonly values: readonly boolean[] }
  | { readonly kind: "texts"; readonly values: readonly string[] }
  /** Rows of as many numbers each, row-major. */
  | { readonly kind: "matrix"; readonly values: Numbers; readonly width: number }
  | { readonly kind: "lists"; readonly values: readonly Numbers[] };

export interface Table {
  readonly rows: number;
  readonly metadata: ReadonlyMap<string, string>;
  readonly columns: ReadonlyMap<string, Column>;
}

const MAGIC = "ARROW1";
/** A message's continuation mark and length stand before it. */
const PREFIX = 8;
const LITTLE_ENDIAN = 0;
const decoder = new TextDecoder();

/** The union member of a field's type, as Schema.fbs counts them. */
const TYPES = ["None", "Null", "Int", "FloatingPoint", "Binary", "Utf8", "Bool"] as const;
const LIST = 12;
const FIXED_SIZE_LIST = 16;

export function readTable(buffer: ArrayBuffer): Table {
  try {
    return parsed(buffer);
  } catch (error) {
    // What points outside of the file, points nowhere.
    if (!(error instanceof RangeError)) throw error;
    throw new UnreadableTable("The Arrow file is damaged: it points outside of itself", {
      cause: error,
    });
  }
}

function parsed(buffer: ArrayBuffer): Table {
  const view = new DataView(buffer);
  const end = buffer.byteLength - MAGIC.length;
  if (end < 2 * MAGIC.length + 4 || ascii(buffer, 0) !== MAGIC || ascii(buffer, end) !== MAGIC) {
    throw new UnreadableTable(`${buffer.byteLength} bytes are no Arrow file: it is cut or damaged`);
  }
  const footer = root(view, end - 4 - view.getInt32(end - 4, true));
  const schema = footer.table(1);
  if (schema.int16(0) !== LITTLE_ENDIAN) {
    throw new UnreadableTable("The Arrow file is big-endian");
  }
  const fields = schema.tables(1).map(fieldOf);
  const batches = footer.structs(3, 24).map((at) => batchAt(view, at));
  const parts = batches.map((batch) => fields.map((field) => columnOf(batch, field)));
  const columns = fields.map(
    ({ name }, index) =>
      [
        name,
        joined(
          name,
          parts.map((part) => part[index]),
        ),
      ] as const,
  );
  return {
    rows: batches.reduce((sum, { rows }) => sum + rows, 0),
    metadata: new Map(schema.tables(2).map((pair) => [pair.text(0), pair.text(1)])),
    columns: new Map(columns),
  };
}

function ascii(buffer: ArrayBuffer, at: number): string {
  return decoder.decode(new Uint8Array(buffer, at, MAGIC.length));
}

/** A table of a flatbuffer. Its vtable tells where each field stands, 0 for those left out. */
class Flat {
  constructor(
    readonly view: DataView,
    readonly at: number,
  ) {}

  #slot(field: number): number {
    const vtable = this.at - this.view.getInt32(this.at, true);
    const slot = 4 + 2 * field;
    const offset =
      slot < this.view.getUint16(vtable, true) ? this.view.getUint16(vtable + slot, true) : 0;
    return offset === 0 ? 0 : this.at + offset;
  }

  uint8(field: number): number {
    const at = this.#slot(field);
    return at === 0 ? 0 : this.view.getUint8(at);
  }

  int16(field: number): number {
    const at = this.#slot(field);
    return at === 0 ? 0 : this.view.getInt16(at, true);
  }

  int32(field: number): number {
    const at = this.#slot(field);
    return at === 0 ? 0 : this.view.getInt32(at, true);
  }

  int64(field: number): number {
    const at = this.#slot(field);
    return at === 0 ? 0 : Number(this.view.getBigInt64(at, true));
  }

  has(field: number): boolean {
    return this.#slot(field) !== 0;
  }

  table(field: number): Flat {
    const at = this.#slot(field);
    if (at === 0)
      throw new UnreadableTable(`The Arrow file lacks field ${field} of its description`);
    return new Flat(this.view, at + this.view.getUint32(at, true));
  }

  text(field: number): string {
    const at = this.#slot(field);
    if (at === 0) return "";
    const start = at + this.view.getUint32(at, true);
    const { buffer, byteOffset } = this.view;
    const length = this.view.getUint32(start, true);
    return decoder.decode(new Uint8Array(buffer, byteOffset + start + 4, length));
  }

  tables(field: number): readonly Flat[] {
    return this.structs(field, 4).map(
      (at) => new Flat(this.view, at + this.view.getUint32(at, true)),
    );
  }

  /** Where each element of a vector of structs stands. */
  structs(field: number, size: number): readonly number[] {
    const at = this.#slot(field);
    if (at === 0) return [];
    const start = at + this.view.getUint32(at, true);
    const count = this.view.getUint32(start, true);
    if (start + 4 + count * size > this.view.byteLength) {
      throw new UnreadableTable(`The Arrow file is damaged: ${count} parts are not in it`);
    }
    return Array.from({ length: count }, (_, index) => start + 4 + index * size);
  }
}

function root(view: DataView, at: number): Flat {
  return new Flat(view, at + view.getUint32(at, true));
}

interface Field {
  readonly name: string;
  readonly type: number;
  readonly of: Flat;
  readonly children: readonly Field[];
}

function fieldOf(field: Flat): Field {
  return {
    name: field.text(0),
    type: field.uint8(2),
    of: field.table(3),
    children: field.tables(5).map(fieldOf),
  };
}

/** One record batch, whose nodes and buffers are taken in the order of its columns. */
interface Batch {
  readonly rows: number;
  readonly node: () => number;
  readonly buffer: () => readonly [offset: number, bytes: number];
  readonly bytes: ArrayBuffer;
}

function batchAt(view: DataView, block: number): Batch {
  const at = Number(view.getBigInt64(block, true));
  const body = at + view.getInt32(block + 8, true);
  const batch = root(view, at + PREFIX).table(2);
  if (batch.has(3)) throw new UnreadableTable("The Arrow file is compressed inside");
  const nodes = batch.structs(1, 16);
  const buffers = batch.structs(2, 16);
  let [node, buffer] = [0, 0];
  const int64 = (place: number) => Number(view.getBigInt64(place, true));
  return {
    rows: batch.int64(0),
    node: () => {
      const place = nodes[node++] ?? 0;
      if (int64(place + 8) > 0) throw new UnreadableTable("The Arrow file has nulls");
      return int64(place);
    },
    buffer: () => {
      const place = buffers[buffer++] ?? 0;
      return [body + int64(place), int64(place + 8)];
    },
    bytes: view.buffer as ArrayBuffer,
  };
}

function columnOf(batch: Batch, field: Field): Column {
  const rows = batch.node();
  // Without nulls the validity buffer is there all the same, and may be empty.
  batch.buffer();
  if (field.type === FIXED_SIZE_LIST) {
    return { kind: "matrix", values: childOf(batch, field), width: field.of.int32(0) };
  }
  switch (TYPES[field.type]) {
    case "Int":
    case "FloatingPoint":
      return { kind: "numbers", values: numbersOf(batch, field, rows) };
    case "Bool": {
      const [offset] = batch.buffer();
      const bits = new Uint8Array(batch.bytes, offset, Math.ceil(rows / 8));
      const flag = (_: unknown, row: number) => (((bits[row >> 3] ?? 0) >> (row & 7)) & 1) === 1;
      return { kind: "flags", values: Array.from({ length: rows }, flag) };
    }
    case "Utf8": {
      const ends = offsetsOf(batch, rows);
      const [offset] = batch.buffer();
      const text = (_: unknown, row: number) => {
        const start = ends[row] ?? 0;
        return decoder.decode(
          new Uint8Array(batch.bytes, offset + start, (ends[row + 1] ?? 0) - start),
        );
      };
      return { kind: "texts", values: Array.from({ length: rows }, text) };
    }
  }
  if (field.type === LIST) {
    const ends = offsetsOf(batch, rows);
    const values = childOf(batch, field);
    return {
      kind: "lists",
      values: Array.from({ length: rows }, (_, row) => values.subarray(ends[row], ends[row + 1])),
    };
  }
  throw new UnreadableTable(
    `Column ${field.name} has Arrow type ${TYPES[field.type] ?? field.type}, which is not read here`,
  );
}

function childOf(batch: Batch, { children: [child], name }: Field): Numbers {
  const column = child === undefined ? null : columnOf(batch, child);
  if (column?.kind === "numbers") return column.values;
  throw new UnreadableTable(`Column ${name} has lists of what are no numbers`);
}

function offsetsOf(batch: Batch, rows: number): Int32Array {
  const [offset, bytes] = batch.buffer();
  // No rows may mean no offsets either.
  return bytes === 0 ? new Int32Array(1) : new Int32Array(batch.bytes, offset, rows + 1);
}

const INTEGERS = {
  8: [Uint8Array, Int8Array],
  16: [Uint16Array, Int16Array],
  32: [Uint32Array, Int32Array],
} as const;

/** The values in place: the array shares the file's bytes. */
function numbersOf(batch: Batch, { name, of, type }: Field, rows: number): Numbers {
  const [offset] = batch.buffer();
  if (TYPES[type] === "FloatingPoint") {
    const precision = of.int16(0);
    if (precision === 1) return new Float32Array(batch.bytes, offset, rows);
    if (precision === 2) return new Float64Array(batch.bytes, offset, rows);
    throw new UnreadableTable(`Column ${name} has floats of 16 bits`);
  }
  const [bits, signed] = [of.int32(0), of.uint8(1)];
  if (bits === 64) return wide(name, new BigInt64Array(batch.bytes, offset, rows));
  const kinds = INTEGERS[bits as keyof typeof INTEGERS] as (typeof INTEGERS)[8] | undefined;
  if (kinds === undefined) throw new UnreadableTable(`Column ${name} has integers of ${bits} bits`);
  const Kind = kinds[signed === 0 ? 0 : 1];
  return new Kind(batch.bytes, offset, rows);
}

/** Numbers hold whole values of 53 bits exactly; a larger one is refused, not rounded. */
function wide(name: string, values: BigInt64Array): Float64Array {
  return Float64Array.from(values, (value) => {
    const number = Number(value);
    if (!Number.isSafeInteger(number)) {
      throw new UnreadableTable(`Column ${name} has ${value}, which no number holds exactly`);
    }
    return number;
  });
}

/** The batches of a column as one. */
function joined(name: string, parts: readonly (Column | undefined)[]): Column {
  const [first, ...rest] = parts.filter((part) => part !== undefined);
  if (first === undefined) return { kind: "numbers", values: new Float64Array(0) };
  return rest.reduce<Column>((whole, part) => {
    if (whole.kind === "numbers" && part.kind === "numbers") {
      return { ...whole, values: appended(whole.values, part.values) };
    }
    if (whole.kind === "matrix" && part.kind === "matrix") {
      return { ...whole, values: appended(whole.values, part.values) };
    }
    if (whole.kind === "flags" && part.kind === "flags") {
      return { ...whole, values: [...whole.values, ...part.values] };
    }
    if (whole.kind === "texts" && part.kind === "texts") {
      return { ...whole, values: [...whole.values, ...part.values] };
    }
    if (whole.kind === "lists" && part.kind === "lists") {
      return { ...whole, values: [...whole.values, ...part.values] };
    }
    throw new UnreadableTable(`Column ${name} changes its type between batches`);
  }, first);
}

function appended(first: Numbers, second: Numbers): Numbers {
  const Kind = first.constructor as new (length: number) => Numbers;
  const all = new Kind(first.length + second.length);
  all.set(first);
  all.set(second, first.length);
  return all;
}
