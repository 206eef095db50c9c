/** OpenAI's own description of its API, to hold bodies to; it lies beside the project and is not part of it. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import { Ajv2020 } from 'ajv/dist/2020.js';
import { parse } from 'yaml';
import { sharedPath, skipWithout } from './shared.js';

const NAME = 'data/openapi/openai-openapi.yaml';

let ajv: Ajv2020 | null = null;

/** OpenAPI 3.0's `nullable` beside a reference, which 3.1 has no more, as a choice of null. */
function withNull(schema: unknown): unknown {
  if (Array.isArray(schema)) return schema.map(withNull);
  if (typeof schema !== 'object' || schema === null) return schema;
  const { nullable, ...rest } = schema as Record<string, unknown>;
  const own = Object.fromEntries(
    Object.entries(rest).map(([key, value]) => [key, withNull(value)]),
  );
  if (nullable !== true) return nullable === undefined ? own : { ...own, nullable };
  return { anyOf: [own, { type: 'null' }] };
}

function openDescription(): Ajv2020 {
  const description = parse(fs.readFileSync(sharedPath(NAME), 'utf8')) as {
    components: { schemas: Record<string, unknown> };
  };
  const opened = new Ajv2020({ strict: false, validateFormats: false, allErrors: true });
  const schemas = withNull(description.components.schemas);
  opened.addSchema({ $id: 'openai', components: { schemas } });
  return opened;
}

/** Asserts that a body is what the schema of this name says. Says nothing where the description is not here. */
export function checkOpenaiBody(schema: string, body: unknown): void {
  if (skipWithout(NAME) !== false) return;
  ajv ??= openDescription();
  const check = ajv.getSchema(`openai#/components/schemas/${schema}`);
  assert.ok(check, `no schema ${schema}`);
  assert.ok(check(body), `${schema}: ${ajv.errorsText(check.errors)}\n${JSON.stringify(body)}`);
}
