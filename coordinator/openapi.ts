/** The gateway's description of itself, OpenAPI 3.1: of the routes that it serves, with the schemas that check the bodies. */
import { z } from 'zod';
import { errorTable } from '../proto/errors.js';
import {
  answerSchemas,
  requestSchemas,
  routeDescriptions,
  type RouteDescription,
} from './openapi-routes.js';

type Json = Readonly<Record<string, unknown>>;

const schemaOf = (schema: z.ZodType, io: 'input' | 'output'): Json => {
  const json: Record<string, unknown> = z.toJSONSchema(schema, {
    io,
    unrepresentable: 'any',
    override: ({ jsonSchema }) => {
      // Answers may get more fields; bodies may have any.
      if (jsonSchema.additionalProperties === false) delete jsonSchema.additionalProperties;
    },
  });
  delete json['$schema'];
  return json;
};

const reference = (name: string): Json => ({ $ref: `#/components/schemas/${name}` });

const form: Json = {
  type: 'object',
  required: ['purpose', 'file'],
  properties: {
    purpose: { const: 'batch' },
    file: { type: 'string', contentMediaType: 'application/octet-stream' },
    'expires_after[anchor]': { const: 'created_at' },
    'expires_after[seconds]': { type: 'string', pattern: '^[0-9]+$' },
  },
};

function parametersOf(path: string, { query, takesLastEventId }: RouteDescription): Json[] {
  const inPath = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => ({
    ...{ name, in: 'path', required: true, schema: { type: 'string' } },
  }));
  const inQuery = Object.entries(query?.shape ?? {}).map(([name, schema]) => ({
    ...{ name, in: 'query', required: false, schema: schemaOf(schema as z.ZodType, 'input') },
  }));
  const lastEventId = {
    ...{ name: 'last-event-id', in: 'header', required: false, schema: { type: 'string' } },
  };
  return [...inPath, ...inQuery, ...(takesLastEventId === true ? [lastEventId] : [])];
}

function operationOf(path: string, route: RouteDescription): Json {
  const { summary, body, answer, events } = route;
  const content =
    typeof answer === 'string'
      ? { 'application/json': { schema: reference(answer) } }
      : { [answer.mediaType]: {} };
  const [event, ...others] = (events ?? []).map(reference);
  const schema = others.length === 0 ? event : { anyOf: [event, ...others] };
  const stream = event === undefined ? {} : { 'text/event-stream': { schema } };
  return {
    summary,
    parameters: parametersOf(path, route),
    ...(body === undefined
      ? {}
      : {
          requestBody: {
            required: true,
            content:
              body === 'form'
                ? { 'multipart/form-data': { schema: form } }
                : { 'application/json': { schema: reference(body) } },
          },
        }),
    responses: {
      200: {
        description:
          events === undefined ? 'The answer.' : 'The answer; of a stream, the data of each event.',
        content: { ...content, ...stream },
      },
      default: {
        description: 'What went wrong.',
        content: { 'application/json': { schema: reference('Error') } },
      },
    },
  };
}

/** Pages for people and what belongs to them: no part of the API. */
const isPage = (route: string): boolean => /^\w+ \/(ui|admin|queues|assets)(\/|$)/.test(route);

/** A path of Fastify's as OpenAPI writes it. */
const openapiPath = (url: string): string => url.replace(/:(\w+)/g, '{$1}').replace(/\*$/, '{id}');

/**
 * @param served method and path of every route, as Fastify has them.
 * @returns the document; a route that nobody described is empty there.
 */
export function describeApi(served: readonly string[], version: string): Json {
  const paths: Record<string, Record<string, Json>> = {};
  for (const route of served.filter((each) => !isPage(each))) {
    const [method, url] = route.split(' ') as [string, string];
    const path = openapiPath(url);
    const description = routeDescriptions[route];
    const operation = description === undefined ? {} : operationOf(path, description);
    paths[path] = { ...paths[path], [method.toLowerCase()]: operation };
  }
  const named = (schemas: Readonly<Record<string, z.ZodType>>, io: 'input' | 'output') =>
    Object.entries(schemas).map(([name, schema]) => [name, schemaOf(schema, io)] as const);
  const schemas = Object.fromEntries([
    ...named(requestSchemas, 'input'),
    ...named(answerSchemas, 'output'),
  ]) as Record<string, { properties?: { error?: { properties?: { code?: Json } } } }>;
  const code = schemas['Error']?.properties?.error?.properties;
  if (code !== undefined) code.code = { type: 'string', enum: Object.keys(errorTable) };
  return {
    openapi: '3.1.0',
    info: {
      title: 'Caravan',
      version,
      description: 'Llama 2 on many devices: chats, completions, responses, files and batches.',
    },
    paths,
    components: { schemas, securitySchemes: { key: { type: 'http', scheme: 'bearer' } } },
    security: [{}, { key: [] }],
  };
}
