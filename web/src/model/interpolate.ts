/** Stands in for d3-interpolate behind d3-scale, whose scales here map numbers to numbers alone. */

type Between = (share: number) => number;

export function interpolateNumber(from: number, to: number): Between {
  return (share) => from * (1 - share) + to * share;
}

export function interpolateRound(from: number, to: number): Between {
  const between = interpolateNumber(from, to);
  return (share) => Math.round(between(share));
}

/** Through several values in turn, each pair over an equal share. */
export function piecewise(
  between: (from: number, to: number) => Between,
  values: readonly number[],
): Between {
  const pieces = values.slice(1).map((to, index) => between(values[index] ?? to, to));
  return (share) => {
    const place = Math.max(0, Math.min(pieces.length - 1, Math.floor(share * pieces.length)));
    return pieces[place]?.(share * pieces.length - place) ?? NaN;
  };
}

export { interpolateNumber as interpolate };
