/** Stands in for d3-format behind d3-scale, whose ticks are never written out here. */

function unused(): never {
  throw new Error("No tick of a scale is formatted by d3");
}

export const format = unused;
export const formatPrefix = unused;
export const formatSpecifier = unused;
export const precisionFixed = unused;
export const precisionPrefix = unused;
export const precisionRound = unused;
