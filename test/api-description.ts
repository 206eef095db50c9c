/** A gateway's own description of its API, to hold real calls to: bodies, answers and the events of streams. */
import assert from 'node:assert/strict';
import { Ajv2020, type ValidateFunction } from 'ajv/dist/2020.js';
import { createParser } from 'eventsource-parser';

type Json = Record<string, unknown>;

interface Reference {
  readonly $ref: string;
}

interface Operation {
  readonly requestBody?: { readonly content: Readonly<Record<string, unknown>> };
  readonly responses: Readonly<
    Record<string, { readonly content: Readonly<Record<string, unknown>> }>
  >;
}

export interface Description {
  readonly openapi: string;
  readonly paths: Readonly<Record<string, Readonly<Record<string, Operation>>>>;
  readonly components: { readonly schemas: Readonly<Record<string, Json>> };
}

/** Nothing may be in an answer that the description does not know. */
function closed(schema: unknown): unknown {
  if (Array.isArray(schema)) return schema.map(closed);
  if (typeof schema !== 'object' || schema === null) return schema;
  const own = Object.fromEntries(
    Object.entries(schema as Json).map(([key, value]) => [key, closed(value)]),
  );
  const isOpen =
    'additionalProperties' in own || own['type'] !== 'object' || !('properties' in own);
  return isOpen ? own : { ...own, additionalProperties: false };
}

export class ApiDescription {
  readonly document: Description;
  readonly #ajv = new Ajv2020({ strict: false, validateFormats: false });
  /** Operations that were called and answered well, as `post /v1/files`. */
  readonly seen = new Set<string>();

  constructor(document: Description) {
    this.document = document;
    const entries = Object.entries(document.components.schemas).map(([name, schema]) => [
      name,
      // Requests may have fields that nobody knows.
      name.endsWith('Request') || name === 'Response' ? schema : closed(schema),
    ]);
    const schemas = Object.fromEntries(entries) as Json;
    this.#ajv.addSchema({ $id: 'api', components: { schemas } });
  }

  static async fetch(url: string): Promise<ApiDescription> {
    return new ApiDescription((await (await fetch(`${url}/openapi.json`)).json()) as Description);
  }

  /** The platform's fetch, which checks what goes and what comes. */
  readonly checkedFetch: typeof fetch = async (input, init = {}) => {
    const { pathname } = new URL(input instanceof Request ? input.url : input);
    const method = (init.method ?? 'GET').toLowerCase();
    const [path, operation] = this.#find(method, pathname);
    const response = await fetch(input, init);
    if (!response.ok) {
      this.#check(
        operation.responses['default']!.content,
        'application/json',
        await response.clone().json(),
      );
      return response;
    }
    this.seen.add(`${method} ${path}`);
    if (typeof init.body === 'string') {
      this.#check(operation.requestBody!.content, 'application/json', JSON.parse(init.body));
    }
    const { content } = operation.responses['200']!;
    const mediaType = response.headers.get('content-type')!.split(';')[0]!;
    if (mediaType === 'application/json') {
      this.#check(content, mediaType, await response.clone().json());
      return response;
    }
    assert.ok(mediaType in content, `${method} ${path}: ${mediaType}`);
    if (mediaType !== 'text/event-stream') return response;
    return new Response(response.body!.pipeThrough(this.#checkedEvents(content)), response);
  };

  #checkedEvents(
    content: Readonly<Record<string, unknown>>,
  ): TransformStream<Uint8Array, Uint8Array> {
    const decoder = new TextDecoder();
    const parser = createParser({
      onEvent: ({ data }) => {
        if (data === '[DONE]') return;
        const body = JSON.parse(data) as Json;
        const isError = 'error' in body && !('type' in body);
        if (isError) this.check('Error', body);
        else this.#check(content, 'text/event-stream', body);
      },
    });
    return new TransformStream({
      transform: (bytes, out) => {
        parser.feed(decoder.decode(bytes, { stream: true }));
        out.enqueue(bytes);
      },
    });
  }

  /** Asserts that a body is what the component of this name says. */
  check(name: string, body: unknown): void {
    const check: ValidateFunction = this.#ajv.getSchema(`api#/components/schemas/${name}`)!;
    assert.ok(
      check(body),
      `${name}: ${this.#ajv.errorsText(check.errors)}\n${JSON.stringify(body)}`,
    );
  }

  #check(content: Readonly<Record<string, unknown>>, mediaType: string, body: unknown): void {
    const { schema } = content[mediaType] as { schema: Reference & { anyOf?: Reference[] } };
    const names = (schema.anyOf ?? [schema]).map(({ $ref }) =>
      $ref.replace('#/components/schemas/', ''),
    );
    const { object } = body as { object?: unknown };
    // Of several shapes the one that the body says it has.
    this.check(names.find((name) => this.#objectOf(name) === object) ?? names[0]!, body);
  }

  #objectOf(name: string): unknown {
    const { properties } = this.document.components.schemas[name] as {
      properties?: { object?: { const?: unknown } };
    };
    return properties?.object?.const;
  }

  /** The operation of a path as it was asked for. */
  #find(method: string, pathname: string): [path: string, operation: Operation] {
    const paths = Object.keys(this.document.paths).sort(
      (a, b) => a.split('{').length - b.split('{').length,
    );
    const path = paths.find((each) => {
      const pattern = each
        .replace(/[.]/g, '\\.')
        .replace(/\{\w+\}/g, each.includes('models') ? '.+' : '[^/]+');
      return new RegExp(`^${pattern}$`).test(pathname) && method in this.document.paths[each]!;
    });
    assert.ok(path, `${method} ${pathname} is not described`);
    return [path, this.document.paths[path]![method]!];
  }
}
