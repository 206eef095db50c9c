/** Kubernetes' own schemas, and those of its extensions, with unknown fields refused. */
import fs from 'node:fs';
import path from 'node:path';
import { Ajv, type ValidateFunction } from 'ajv';
import type { Manifest } from './chart.js';
import { sharedPath } from './shared.js';

type Schema = Record<string, unknown>;

const coreFolder = sharedPath('kubernetes/schemas-core');
const extensionFolder = sharedPath('kubernetes/schemas');

const read = (file: string): Schema => JSON.parse(fs.readFileSync(file, 'utf8')) as Schema;

/** Go's patterns may begin to ignore case anywhere; ours do so from the start. */
const goPattern = Object.assign(
  (pattern: string, flags: string): RegExp =>
    new RegExp(pattern.replace('(?i)', ''), pattern.includes('(?i)') ? `${flags}i` : flags),
  { code: 'goPattern' },
);

/** Formats and annotations of OpenAPI are no rules of JSON Schema. */
const ajvOptions = {
  strict: false,
  validateFormats: false,
  allErrors: true,
  logger: false,
  code: { regExp: goPattern },
} as const;

/** Refuses what a schema of an extension does not list, as the API server does with strict validation. */
function refuseUnknown(schema: unknown): unknown {
  if (Array.isArray(schema)) return schema.map(refuseUnknown);
  if (typeof schema !== 'object' || schema === null) return schema;
  const closed: Schema = {};
  for (const [key, value] of Object.entries(schema)) closed[key] = refuseUnknown(value);
  const isObject = typeof closed['properties'] === 'object' && closed['type'] === 'object';
  if (
    isObject &&
    closed['additionalProperties'] === undefined &&
    closed['x-kubernetes-preserve-unknown-fields'] !== true
  ) {
    closed['additionalProperties'] = false;
  }
  return closed;
}

export class KubernetesSchemas {
  readonly #ajv = new Ajv(ajvOptions);
  readonly #validators = new Map<string, ValidateFunction>();

  constructor() {
    this.#ajv.addSchema(read(path.join(coreFolder, '_definitions.json')), '_definitions.json');
  }

  /** What is wrong with an object: a line each, none if it is valid. */
  problems(object: Manifest): string[] {
    const { apiVersion, kind, metadata } = object;
    const validate = this.#validator(apiVersion, kind);
    if (validate(object)) return [];
    return (validate.errors ?? []).map(
      ({ instancePath, message, params }) =>
        `${kind}/${metadata.name}${instancePath}: ${message ?? ''} ${JSON.stringify(params)}`,
    );
  }

  #validator(apiVersion: string, kind: string): ValidateFunction {
    const key = `${apiVersion}/${kind}`;
    const known = this.#validators.get(key);
    if (known !== undefined) return known;
    const validate = this.#ajv.compile(this.#schema(apiVersion, kind));
    this.#validators.set(key, validate);
    return validate;
  }

  #schema(apiVersion: string, kind: string): Schema {
    const [group, version] = apiVersion.includes('/') ? apiVersion.split('/') : ['', apiVersion];
    const name = kind.toLowerCase();
    // apps/v1 → deployment-apps-v1.json, rbac.authorization.k8s.io/v1 → role-rbac-v1.json, v1 → service-v1.json
    const short = group === '' ? '' : `${group!.split('.')[0]!}-`;
    const core = path.join(coreFolder, `${name}-${short}${version!}.json`);
    if (fs.existsSync(core)) return { ...read(core), $id: `${name}-${short}${version!}.json` };
    const extension = path.join(extensionFolder, `${name}_${group!}_${version!}.json`);
    if (!fs.existsSync(extension)) throw new Error(`there is no schema of ${kind} ${apiVersion}`);
    const schema = refuseUnknown(read(extension)) as Schema & { properties: Schema };
    schema.properties = {
      ...schema.properties,
      apiVersion: { const: apiVersion },
      kind: { const: kind },
      metadata: {
        $ref: '_definitions.json#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta',
      },
    };
    return { ...schema, $id: `${name}_${group!}_${version!}.json` };
  }
}
