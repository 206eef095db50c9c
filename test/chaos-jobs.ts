/** Jobs for a test that kills processes at random: of mixed lengths and kinds, all of them from one seed. */
import { Random } from './random.js';

export const jobKinds = ['plain', 'greedy', 'several', 'shaped', 'stopped'] as const;
export type JobKind = (typeof jobKinds)[number];

export interface ChaosJob {
  readonly number: number;
  readonly kind: JobKind;
  readonly route: '/v1/completions' | '/v1/chat/completions';
  readonly body: Readonly<Record<string, unknown>>;
  readonly isStream: boolean;
  readonly sequences: number;
}

const openings = [
  'Once upon a time',
  'The llama walked',
  'A fox and a crow',
  'In the desert, far away,',
  '砂漠を行く',
];

const schema = {
  type: 'object',
  properties: {
    name: { type: 'string', maxLength: 24 },
    count: { type: 'integer', minimum: 0, maximum: 9999 },
    colours: {
      type: 'array',
      items: { enum: ['red', 'green', 'blue'] },
      minItems: 2,
      maxItems: 6,
    },
    isTall: { type: 'boolean' },
  },
  required: ['name', 'count', 'colours', 'isTall'],
  additionalProperties: false,
};

/** @param mostTokens of the longest answers. */
export function chaosJobs(count: number, seed: number, mostTokens: number): ChaosJob[] {
  const random = new Random(seed);
  const pick = <T>(items: readonly T[]): T => items[random.below(items.length)]!;
  return Array.from({ length: count }, (_, number): ChaosJob => {
    const kind = jobKinds[number % jobKinds.length]!;
    const isStream = random.below(5) > 0;
    const tokens = 20 + random.below(mostTokens - 20);
    const body = {
      seed: random.below(1 << 30),
      temperature: kind === 'greedy' ? 0 : 0.3 + random.below(10) / 10,
      top_p: pick([1, 1, 0.9]),
      max_tokens: tokens,
    };
    const text = `${pick(openings)} ${number}`;
    const job = { number, kind, isStream, sequences: kind === 'several' ? 2 : 1 };
    if (kind === 'shaped') {
      const response_format = { type: 'json_schema', json_schema: { name: 'thing', schema } };
      const messages = [{ role: 'user', content: text }];
      return {
        ...{ ...job, route: '/v1/chat/completions' },
        body: { ...body, messages, max_tokens: 250, response_format },
      };
    }
    const own =
      kind === 'several'
        ? { n: 2, ignore_eos: true, frequency_penalty: 0.4 }
        : // Long enough to be half matched often, and rare enough that answers have some length.
          kind === 'stopped'
          ? { stop: ['e the', 'ing to', 'She wa'] }
          : { ignore_eos: true };
    return { ...job, route: '/v1/completions', body: { ...body, ...own, prompt: text } };
  });
}
