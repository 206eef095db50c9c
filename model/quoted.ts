/** A text of unknown origin for a message: in quotes, on one line, and not long. */
const MOST = 120;

export function quoted(text: string): string {
  const shown = text.length > MOST ? `${text.slice(0, MOST)}…` : text;
  return JSON.stringify(shown).replace(/[\u007f-\u009f\u2028\u2029]/g, '?');
}

/** As `quoted`, of any value of a JSON file. */
export function spelled(value: unknown): string {
  if (typeof value === 'string') return quoted(value);
  const text = JSON.stringify(value ?? null);
  const shown = text.length > MOST ? `${text.slice(0, MOST)}…` : text;
  return shown.replace(/[\u007f-\u009f\u2028\u2029]/g, '?');
}

/** A message of somebody else's, which may repeat what a file says: on one line, and not long. */
export const onOneLine = (message: string): string =>
  message.replace(/[\p{Cc}\u2028\u2029]+/gu, ' ').slice(0, 3 * MOST);
