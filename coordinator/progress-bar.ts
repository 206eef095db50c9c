/**
 * How far something large has come, on stderr: a bar that is drawn again and again on a terminal, a line now and then
 * elsewhere.
 */

const BAR_CELLS = 24;
const DRAW_EVERY_MS = 100;
const LINE_EVERY_MS = 10_000;
/** The rate is that of the last seconds, unless told otherwise. */
const RATE_WINDOW_MS = 5_000;

/** What is counted: bytes, unless told otherwise. */
export interface Measure {
  readonly spell: (amount: number) => string;
  readonly rateWindowMs: number;
}

export interface Screen {
  readonly isTTY?: boolean;
  readonly columns?: number;
  write(text: string): unknown;
}

export class ProgressBar {
  readonly #title: string;
  readonly #screen: Screen;
  readonly #measure: Measure;
  #total = 0;
  #done = 0;
  #note = '';
  #drawnMs = -Infinity;
  /** (moments) of the last seconds: when, and how much had come by then. */
  #moments: { readonly atMs: number; readonly came: number }[] = [];
  /** What came while we looked on, unlike what was there. */
  #came = 0;

  constructor(
    title: string,
    screen: Screen,
    measure: Measure = { spell: spellBytes, rateWindowMs: RATE_WINDOW_MS },
  ) {
    this.#title = title;
    this.#screen = screen;
    this.#measure = measure;
  }

  /** So many more are to come. */
  expect(count: number): void {
    this.#total += count;
  }

  /** @param isNew whether they came now; what an earlier process left says nothing of the rate. */
  advance(count: number, isNew: boolean): void {
    this.#done += count;
    if (isNew) this.#came += count;
    this.#draw(false);
  }

  /** What is being done, behind the figures. */
  note(text: string): void {
    this.#note = text;
    this.#draw(false);
  }

  /** Draws the last state and leaves it standing. */
  end(): void {
    this.#note = '';
    this.#draw(true);
    if (this.#screen.isTTY === true && Number.isFinite(this.#drawnMs)) this.#screen.write('\n');
  }

  #draw(isLast: boolean): void {
    // Nothing is known yet, or nothing is to come.
    if (this.#total === 0) return;
    const nowMs = performance.now();
    const isTerminal = this.#screen.isTTY === true;
    if (!isLast && nowMs - this.#drawnMs < (isTerminal ? DRAW_EVERY_MS : LINE_EVERY_MS)) return;
    this.#drawnMs = nowMs;
    const line = this.#line(nowMs);
    if (!isTerminal) {
      this.#screen.write(`${line}\n`);
      return;
    }
    const columns = this.#screen.columns ?? 80;
    this.#screen.write(`\r\u001b[K${line.slice(0, columns - 1)}`);
  }

  #line(nowMs: number): string {
    const { spell, rateWindowMs } = this.#measure;
    const share = this.#total === 0 ? 0 : this.#done / this.#total;
    const cells = Math.round(share * BAR_CELLS);
    const bar = `${'█'.repeat(cells)}${'░'.repeat(BAR_CELLS - cells)}`;
    // Lines are farther apart than the drawings of a bar.
    const windowMs = Math.max(rateWindowMs, this.#screen.isTTY === true ? 0 : 3 * LINE_EVERY_MS);
    this.#moments = this.#moments.filter(({ atMs }) => nowMs - atMs < windowMs);
    this.#moments.push({ atMs: nowMs, came: this.#came });
    const first = this.#moments[0]!;
    const seconds = (nowMs - first.atMs) / 1000;
    const rate = seconds === 0 ? 0 : (this.#came - first.came) / seconds;
    const left = rate === 0 ? '' : `, ${clock((this.#total - this.#done) / rate)} left`;
    const percent = String(Math.floor(100 * share)).padStart(3);
    return (
      `${this.#title} ${bar} ${percent} %  ${spell(this.#done)} of ` +
      `${spell(this.#total)}${seconds === 0 ? '' : `, ${spell(rate)}/s${left}`}` +
      (this.#note === '' ? '' : `  ${this.#note}`)
    );
  }
}

export function spellBytes(bytes: number): string {
  const units = ['B', 'KB', 'MB', 'GB', 'TB'];
  const unit = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, bytes)) / 3));
  return `${(bytes / 1000 ** unit).toFixed(unit === 0 ? 0 : 1)} ${units[unit]!}`;
}

/** Minutes and seconds, or hours, minutes and seconds. */
function clock(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const two = (value: number): string => String(value).padStart(2, '0');
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours > 0
    ? `${hours}:${two(minutes)}:${two(whole % 60)}`
    : `${minutes}:${two(whole % 60)}`;
}
