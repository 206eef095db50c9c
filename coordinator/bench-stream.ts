/** One streamed completion over HTTP, timed as a client sees it. */
import { CaravanError } from '../proto/errors.js';

export interface BenchPrompt {
  readonly tokenIds: readonly number[];
  readonly maxTokens: number;
}

/** What a client saw. Times are of performance.now(). */
export interface TimedAnswer {
  readonly startMs: number;
  /** When each event with text came, and how many tokens there were after it. */
  readonly events: readonly { readonly atMs: number; readonly tokens: number }[];
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly outputTokens: number;
}

export interface BenchTarget {
  readonly url: string;
  readonly apiKey: string | undefined;
  /** Left out where the gateway serves one model only. */
  readonly model: string | undefined;
  readonly temperature: number;
}

interface Chunk {
  readonly choices?: readonly { readonly text?: string }[];
  readonly usage?: {
    readonly prompt_tokens: number;
    readonly completion_tokens: number;
    readonly prompt_tokens_details?: { readonly cached_tokens?: number };
  } | null;
  readonly error?: { readonly message: string };
}

/**
 * Asks for a completion that goes on to its limit, and reads its stream.
 *
 * @throws CaravanError `gateway_unavailable`, or `internal` with the server's own words; the signal's reason.
 */
export async function streamOnce(
  target: BenchTarget,
  { tokenIds, maxTokens }: BenchPrompt,
  signal: AbortSignal,
): Promise<TimedAnswer> {
  const { url, apiKey, model, temperature } = target;
  const startMs = performance.now();
  const events: { atMs: number; tokens: number }[] = [];
  let usage: Chunk['usage'];
  try {
    const response = await fetch(`${url.replace(/\/$/, '')}/v1/completions`, {
      method: 'POST',
      headers: {
        'content-type': 'application/json',
        ...(apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` }),
      },
      body: JSON.stringify({
        ...(model === undefined ? {} : { model }),
        prompt: tokenIds,
        max_tokens: maxTokens,
        temperature,
        ignore_eos: true,
        stream: true,
        stream_options: { include_usage: true },
      }),
      signal,
    });
    if (!response.ok || response.body === null) {
      throw new CaravanError('internal', refusalOf(response.status, await response.text()));
    }
    for await (const { id, data } of eventsOf(response.body)) {
      if (data === '[DONE]') break;
      const chunk = JSON.parse(data) as Chunk;
      if (chunk.error !== undefined) throw new CaravanError('internal', chunk.error.message);
      usage = chunk.usage ?? usage;
      if ((chunk.choices?.[0]?.text ?? '') === '') continue;
      // Our events' ids count the tokens; of other servers each event counts as one.
      const counted = /^(\d+)-/.exec(id)?.[1];
      const tokens = counted === undefined ? (events.at(-1)?.tokens ?? 0) + 1 : Number(counted);
      events.push({ atMs: performance.now(), tokens });
    }
  } catch (cause) {
    if (signal.aborted) throw signal.reason;
    if (cause instanceof CaravanError) throw cause;
    const { message, cause: inner } = cause as Error;
    const reason = inner instanceof Error && inner.message !== '' ? inner.message : message;
    throw new CaravanError('gateway_unavailable', `${url}: ${reason}`, { cause });
  }
  return {
    startMs,
    events,
    promptTokens: usage?.prompt_tokens ?? tokenIds.length,
    cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? 0,
    outputTokens: usage?.completion_tokens ?? events.at(-1)?.tokens ?? 0,
  };
}

function refusalOf(status: number, body: string): string {
  try {
    const { error } = JSON.parse(body) as { error: { message: string } };
    return `the server answered ${status}: ${error.message}`;
  } catch {
    return `the server answered ${status}`;
  }
}

/** The events of a stream: WHATWG's server-sent events, as far as OpenAI's servers use them. */
async function* eventsOf(
  body: ReadableStream<Uint8Array>,
): AsyncGenerator<{ id: string; data: string }> {
  const decoder = new TextDecoder();
  let pending = '';
  for await (const bytes of body) {
    pending += decoder.decode(bytes, { stream: true });
    const blocks = pending.split('\n\n');
    pending = blocks.pop()!;
    for (const block of blocks) {
      const lines = block.split('\n');
      const field = (name: string): string | undefined =>
        lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      const data = field('data');
      if (data !== undefined) yield { id: field('id') ?? '', data };
    }
  }
}
