/** JSON Schema's formats, as patterns; what they let through is a subset of what RFC 3339, 5321, 4291 … allow. */
import type { Expression } from './grammar-expression.js';
import { parseRegex } from './grammar-regex.js';

const year = '[0-9]{4}';
const leapYear = '(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)';
const date =
  `(?:${year}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|` +
  `02-(?:0[1-9]|1[0-9]|2[0-8]))|${leapYear}-02-29)`;
const time =
  '(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])';
const label = '[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?';
const hostname = `${label}(?:\\.${label}){0,6}`;
const octet = '(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])';
const ipv4 = `${octet}(?:\\.${octet}){3}`;
const group = '[0-9A-Fa-f]{1,4}';
const ipv6 = [
  `(?:${group}:){7}${group}`,
  ...Array.from({ length: 7 }, (_, before) => {
    const left = before === 0 ? '' : `${group}(?::${group}){${before - 1}}`;
    const most = 7 - before - 1;
    const right = most === 0 ? '' : `(?:${group}(?::${group}){0,${most - 1}})?`;
    return `${left}::${right}`;
  }),
].join('|');
const count = (unit: string): string => `(?:[0-9]{1,4}${unit})`;
const clock = `T(?:${count('H')}(?:${count('M')}${count('S')}?)?|${count('M')}${count('S')}?|${count('S')})`;
const calendar = `(?:${count('Y')}(?:${count('M')}${count('D')}?)?|${count('M')}${count('D')}?|${count('D')})`;
const atom = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,24}";

const patterns: Readonly<Record<string, string>> = {
  date,
  time,
  'date-time': `${date}T${time}`,
  duration: `P(?:${calendar}(?:${clock})?|${clock}|${count('W')})`,
  email: `${atom}(?:\\.${atom}){0,2}@${label}(?:\\.${label}){1,4}`,
  hostname,
  ipv4,
  ipv6,
  uuid: '[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}',
  uri: `[A-Za-z][A-Za-z0-9+.-]{1,15}://${hostname}(?::[1-9][0-9]{0,3})?(?:/[A-Za-z0-9._~-]{0,40}){0,8}`,
};

export const FORMATS: readonly string[] = Object.keys(patterns);

/** The texts of a format; null for one that is not known. */
export function formatExpression(format: string): Expression | null {
  const pattern = Object.hasOwn(patterns, format) ? patterns[format] : undefined;
  return pattern === undefined ? null : parseRegex(pattern, 'whole');
}
