/** Plots of lines, as an SVG that reads on light and dark pages. */

export interface Line {
  readonly name: string;
  readonly points: readonly (readonly [x: number, y: number])[];
}

export interface Plot {
  readonly title: string;
  readonly x: string;
  readonly y: string;
  readonly lines: readonly Line[];
}

const WIDTH = 380;
const HEIGHT = 260;
const LEFT = 50;
const RIGHT = 16;
const TOP = 34;
const BOTTOM = 44;
const COLOURS = ['#1f77b4', '#d1641a', '#2a9d4a', '#9a4fb5'];

/** Plots beside each other, from zero on both axes. */
export function linesSvg(plots: readonly Plot[]): string {
  const parts = plots.map(
    (plot, i) => `<g transform="translate(${i * WIDTH} 0)">${drawn(plot)}</g>`,
  );
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${plots.length * WIDTH} ${HEIGHT}" ` +
    `font-family="sans-serif" font-size="11" fill="#777">\n${parts.join('\n')}\n</svg>\n`
  );
}

function drawn({ title, x, y, lines }: Plot): string {
  const points = lines.flatMap((line) => line.points);
  const xMost = roundUp(Math.max(...points.map(([at]) => at)));
  const yMost = roundUp(Math.max(...points.map(([, figure]) => figure)));
  const toX = (at: number): number => LEFT + (at / xMost) * (WIDTH - LEFT - RIGHT);
  const toY = (figure: number): number =>
    HEIGHT - BOTTOM - (figure / yMost) * (HEIGHT - TOP - BOTTOM);
  const text = (left: number, top: number, words: string, anchor: string): string =>
    `<text x="${left.toFixed(1)}" y="${top.toFixed(1)}" text-anchor="${anchor}">${words}</text>`;
  const quarters = [0, 0.25, 0.5, 0.75, 1];
  const grid = quarters.flatMap((part) => [
    `<path d="M${LEFT} ${toY(part * yMost).toFixed(1)}H${WIDTH - RIGHT}" stroke="#8884"/>`,
    text(LEFT - 6, toY(part * yMost) + 4, String(part * yMost), 'end'),
    text(toX(part * xMost), HEIGHT - BOTTOM + 16, String(part * xMost), 'middle'),
  ]);
  const curves = lines.flatMap(({ name, points: own }, i) => {
    const colour = COLOURS[i % COLOURS.length]!;
    const path = own.map(([at, figure]) => `${toX(at).toFixed(1)} ${toY(figure).toFixed(1)}`);
    return [
      `<path d="M${path.join('L')}" fill="none" stroke="${colour}" stroke-width="2"/>`,
      `<text x="${LEFT + 10}" y="${TOP + 12 + 15 * i}" fill="${colour}">${name}</text>`,
    ];
  });
  return [
    `<text x="${WIDTH / 2}" y="18" text-anchor="middle" font-size="13">${title}</text>`,
    ...grid,
    ...curves,
    text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, 'middle'),
    `<text transform="translate(12 ${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">${y}</text>`,
  ].join('\n');
}

/** The next number of one digit and zeros that four divides well. */
function roundUp(value: number): number {
  const unit = 10 ** Math.floor(Math.log10(value));
  const step = [1, 2, 4, 6, 8, 10].find((factor) => factor * unit >= value) ?? 10;
  return step * unit;
}
