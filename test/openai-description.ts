/** OpenAI's own description of its API, to hold bodies to; it lies beside the project and is not part of it. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import { Ajv2020 } from 'ajv/dist/2020.js';
import { parse } from 'yaml';
import { sharedPath, skipWithout } from './shared.js';

const NAME = 'data/openapi/openai-openapi.yaml';

let ajv: Ajv2020 | null = null;

function openDescription(): Ajv2020 {
  const description = parse(fs.readFileSync(sharedPath(NAME), 'utf8')) as {
    components: { schemas: Record<string, unknown> };
  };
  const opened = new Ajv2020({ strict: false, validateFormats: false, allErrors: true });
  opened.addSchema({ $id: 'openai', components: { schemas: description.components.schemas } });
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
