/** What is looked at in a sentence, for who hears it. */
import { spoken, value } from "../ui/format";
import { t } from "../words/words.svelte";
import type { Reading } from "./reading.svelte";

/** Name, value, unit, rank and token of the locked component, to be read out. */
export function described(reading: Reading): string {
  const { topology, locked, values, ranks, measured, series, token, tokens, unit } = reading;
  if (topology === null) return t("No model yet.");
  if (series === null) return t("Not scanned yet.");
  const place =
    token === null
      ? ""
      : `, ${t("token {n} of 0–{last}", { n: token.position, last: tokens.at(-1)?.position ?? 0 })}, ${spoken(token.text)}`;
  if (locked < 0) return `${t("No component chosen")}${place}.`;
  const x = values[locked] ?? NaN;
  const told = Number.isNaN(x)
    ? t("not measured")
    : `${value(x)} ${unit}, ${t("rank {rank} of {count}", { rank: ranks[locked] ?? 0, count: measured })}`;
  const whole =
    reading.sources[locked] === topology.addresses[locked] || Number.isNaN(x)
      ? ""
      : ` (${t("the layer's attention as a whole")})`;
  const marked = reading.marks[locked] === 1 ? `, ${t("marked")}` : "";
  return `${topology.labels[locked] ?? ""}${whole}, ${told}${marked}${place}.`;
}
