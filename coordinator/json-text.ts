/**
 * JSON that others wrote. JSON.parse takes any depth, but what is deeper than a few thousand levels cannot be written again
 * (JSON.stringify runs out of stack): it is refused before anybody holds it.
 */
import { CaravanError } from '../proto/errors.js';

const MAX_LEVELS = 3_000;
const [QUOTE, BACKSLASH] = [0x22, 0x5c];

/** @throws SyntaxError as JSON.parse, CaravanError `invalid_request` for what is too deep. */
export function parseJson(text: string): unknown {
  const value: unknown = JSON.parse(text);
  if (levelsOf(text) > MAX_LEVELS) {
    throw new CaravanError('invalid_request', `the JSON is more than ${MAX_LEVELS} levels deep`);
  }
  return value;
}

/** The most brackets that are open at once, of well-formed JSON. */
function levelsOf(text: string): number {
  // Most texts have not even so many brackets.
  if (text.length < 2 * MAX_LEVELS) return 0;
  let level = 0;
  let most = 0;
  for (let i = 0; i < text.length; i += 1) {
    const code = text.charCodeAt(i);
    if (code === QUOTE) i = endOfText(text, i + 1);
    // [ and {, ] and } differ by their case bit.
    else if ((code | 0x20) === 0x7b) most = Math.max(most, (level += 1));
    else if ((code | 0x20) === 0x7d) level -= 1;
  }
  return most;
}

/** Where the closing quote stands. */
function endOfText(text: string, from: number): number {
  let i = from;
  while (text.charCodeAt(i) !== QUOTE) i += text.charCodeAt(i) === BACKSLASH ? 2 : 1;
  return i;
}
