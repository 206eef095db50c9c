/** Refusals of single fields of a body, as OpenAI's clients expect them: the message begins with the field. */
import type { z } from 'zod';
import { CaravanError } from '../proto/errors.js';

/** @throws CaravanError `invalid_request` with the field as `param`. */
export const refuse = (param: string, message: string): never => {
  throw new CaravanError('invalid_request', `${param}: ${message}`, { param });
};

/** @throws CaravanError `invalid_request` for anything but a JSON object. */
export function asObject(body: unknown): Readonly<Record<string, unknown>> {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw new CaravanError('invalid_request', 'the body must be a JSON object');
  }
  return body as Record<string, unknown>;
}

/**
 * A body by its schema.
 *
 * @param field to name where no single one is at fault.
 * @throws CaravanError `invalid_request` with the first field at fault as `param`.
 */
export function parseBody<T extends z.ZodType>(schema: T, body: unknown, field = ''): z.infer<T> {
  const parsed = schema.safeParse(asObject(body));
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0];
  const path = issue?.path.join('.') ?? '';
  const value = (issue?.path ?? []).reduce<unknown>(
    (outer, key) => (outer as Record<PropertyKey, unknown> | undefined)?.[key],
    body,
  );
  const got = typeof value === 'number' || typeof value === 'boolean' ? `, got ${value}` : '';
  return refuse(path === '' ? field : path, `${issue?.message ?? 'is wrong'}${got}`);
}
