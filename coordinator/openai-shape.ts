/**
 * What a body says of the answer's shape: OpenAI's `response_format`, and vLLM's `guided_json`, `guided_regex`,
 * `guided_choice` and `guided_grammar`. At most one of them.
 */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import type { CallsSpec, GrammarCache, GrammarSpec } from './grammar.js';
import { parseJson } from './json-text.js';
import { refuse } from './openai-refusal.js';

const MAX_CHOICES = 10_000;
const MAX_CHOICE_CHARACTERS = 10_000;

const schema = z.union([z.record(z.string(), z.unknown()), z.boolean()], {
  error: 'must be a JSON Schema',
});

const responseFormat = z.discriminatedUnion(
  'type',
  [
    z.object({ type: z.literal('text') }),
    z.object({ type: z.literal('json_object') }),
    z.object({
      type: z.literal('json_schema'),
      json_schema: z.object({
        name: z.string().regex(/^[\w-]{1,64}$/, 'must have 1 to 64 letters, digits, _ and -'),
        description: z.string().nullish(),
        schema: schema.nullish(),
        strict: z.boolean().nullish(),
      }),
    }),
  ],
  { error: 'must be an object whose type is text, json_object or json_schema' },
);

export const shapeFields = {
  response_format: responseFormat.nullish(),
  guided_json: z.union([schema, z.string()], { error: 'must be a JSON Schema' }).nullish(),
  guided_regex: z.string().min(1).nullish(),
  guided_choice: z
    .array(z.string().min(1).max(MAX_CHOICE_CHARACTERS))
    .min(1)
    .max(MAX_CHOICES)
    .nullish(),
  guided_grammar: z.string().min(1).nullish(),
};

export type ShapeBody = z.infer<z.ZodObject<typeof shapeFields>>;

/** What a body asks for, with the field that says so. */
function specOf(asked: ShapeBody): (readonly [field: string, spec: GrammarSpec])[] {
  const specs: [string, GrammarSpec][] = [];
  const format = asked.response_format;
  if (format?.type === 'json_object') {
    specs.push(['response_format', { kind: 'schema', schema: { type: 'object' } }]);
  } else if (format?.type === 'json_schema') {
    // Without a schema it is an object of any shape.
    const given = format.json_schema.schema ?? { type: 'object' };
    specs.push(['response_format', { kind: 'schema', schema: given }]);
  }
  if (asked.guided_json != null) {
    let given: unknown = asked.guided_json;
    if (typeof given === 'string') {
      try {
        given = parseJson(given);
      } catch (thrown) {
        const isTooDeep = thrown instanceof CaravanError;
        refuse('guided_json', isTooDeep ? thrown.message : 'is not valid JSON');
      }
    }
    specs.push(['guided_json', { kind: 'schema', schema: given }]);
  }
  if (asked.guided_regex != null) {
    specs.push(['guided_regex', { kind: 'regex', pattern: asked.guided_regex }]);
  }
  if (asked.guided_choice != null) {
    specs.push(['guided_choice', { kind: 'choice', choices: asked.guided_choice }]);
  }
  if (asked.guided_grammar != null) {
    specs.push(['guided_grammar', { kind: 'gbnf', source: asked.guided_grammar }]);
  }
  return specs;
}

/**
 * The shape of an answer, compiled once to see that it can be followed.
 *
 * @param calls the tools that it may call.
 * @param others fields that would end an answer elsewhere than where its shape does.
 * @throws CaravanError `invalid_request` with the field as `param`, naming what is not supported or the limit.
 */
export function grammarOf(
  asked: ShapeBody,
  grammars: GrammarCache,
  others: { readonly stop: readonly string[]; readonly ignoreEos: boolean },
  calls?: CallsSpec,
): GrammarSpec | undefined {
  const specs = specOf(asked);
  if (calls !== undefined) specs.unshift(['tools', calls]);
  const [first, second] = specs;
  if (first === undefined) return undefined;
  const [field, spec] = first;
  if (second !== undefined) refuse(second[0], `cannot stand beside ${field}`);
  // A text that is cut short has not the shape that was asked for.
  if (others.stop.length > 0)
    refuse('stop', `cannot stand beside ${field}, which says where to end`);
  if (others.ignoreEos)
    refuse('ignore_eos', `cannot stand beside ${field}, which says where to end`);
  checkGrammar(field, spec, grammars);
  return spec;
}

/** @throws CaravanError `invalid_request` with the field as `param`. */
export function checkGrammar(field: string, spec: GrammarSpec, grammars: GrammarCache): void {
  try {
    grammars.get(spec).begin(true).mask();
  } catch (thrown) {
    if (thrown instanceof CaravanError) refuse(field, thrown.message);
    throw thrown;
  }
}
