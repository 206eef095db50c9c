/** `caravan generate`: starts ranks, generates once, stops. */
import { randomInt } from 'node:crypto';
import type { Command } from 'commander';
import { CaravanError } from '../../proto/errors.js';
import { RankEngine } from '../engine.js';
import { DEFAULT_MAX_STEP_ROWS, weightCacheSettingNames, weightCacheTerms } from '../group-spec.js';
import { draftTokensOf } from '../speculation.js';
import { withLocalGroup } from '../local-group.js';
import { openModelChat } from '../model-tokenizer.js';
import { promptOf } from '../prompt.js';
import type { FinishReason, Request } from '../request.js';
import { declareSettings } from './options.js';

/** What one generation gave; the document that `--json` prints. */
interface Generation {
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly promptTokens: number;
  readonly completionTokens: number;
  readonly finishReason: FinishReason;
  readonly ttftMs: number;
  /** Of the tokens after the first; null when there is only one. */
  readonly decodeTokensPerSecond: number | null;
  /** How partials went between ranks; empty for a lone one. */
  readonly transport: string;
  /** What could be quicker, and why it is not. */
  readonly notes: readonly string[];
}

export function register(program: Command): void {
  const command = program
    .command('generate')
    .description('Starts ranks on this machine, generates once and stops.');
  const settings = declareSettings(
    command,
    [
      'model',
      'tp',
      'device',
      'weights',
      'exact',
      'kv',
      'transport',
      ...weightCacheSettingNames,
      'speculation',
      'maxSeqLen',
      'prompt',
      'chat',
      'maxTokens',
      'temperature',
      'topP',
      'topK',
      'seed',
      'stop',
      'ignoreEos',
      'json',
    ],
    { defaults: { temperature: 0.6, topP: 0.9, topK: 0 } },
  );
  command.action(async () => {
    const s = settings();
    const { tokenizer, chat } = openModelChat(s.model);
    const prompt = promptOf(tokenizer, chat, { prompt: s.prompt, chatFile: s.chat });
    const interrupted = new AbortController();
    const interrupt = (): void => {
      interrupted.abort();
    };
    process.once('SIGINT', interrupt);
    process.once('SIGTERM', interrupt);
    const generation = await withLocalGroup(
      {
        ...s,
        keptWeights: weightCacheTerms(s),
        maxBatchSize: 1,
        maxStepRows: DEFAULT_MAX_STEP_ROWS,
      },
      async ({ ranks, spec }) => {
        const request: Request = {
          version: 1,
          model: s.model,
          ...prompt,
          sampling: {
            temperature: s.temperature ?? 0.6,
            topP: s.topP ?? 0.9,
            topK: s.topK ?? 0,
            seed: s.seed ?? randomInt(2 ** 47),
          },
          maxTokens: s.maxTokens ?? spec.maxSeqLen,
          stop: s.stop ?? [],
          ignoreEos: s.ignoreEos,
        };
        const engine = new RankEngine(ranks, tokenizer, {
          ...spec,
          isExact: s.exact,
          draftTokens: draftTokensOf(s.speculation),
        });
        const show = s.json ? () => undefined : (text: string) => process.stdout.write(text);
        const generated = await generateOnce(engine, request, show, interrupted.signal);
        return { ...generated, transport: ranks.transport, notes: ranks.notes };
      },
    );
    process.removeListener('SIGINT', interrupt);
    process.removeListener('SIGTERM', interrupt);
    if (s.json) {
      process.stdout.write(`${JSON.stringify(generation)}\n`);
      return;
    }
    process.stdout.write('\n');
    const rate = generation.decodeTokensPerSecond?.toFixed(1) ?? '-';
    process.stderr.write(
      `${generation.promptTokens} prompt tokens, ${generation.completionTokens} generated, ` +
        `first after ${generation.ttftMs.toFixed(0)} ms, then ${rate} tokens/s\n`,
    );
  });
}

async function generateOnce(
  engine: RankEngine,
  request: Request,
  show: (text: string) => void,
  signal: AbortSignal,
): Promise<Omit<Generation, 'transport' | 'notes'>> {
  const done = new AbortController();
  const tokenIds: number[] = [];
  let text = '';
  const startMs = performance.now();
  let firstMs = startMs;
  let lastMs = startMs;
  const release = (released: string): void => {
    text += released;
    if (released !== '') show(released);
  };
  const finished = new Promise<FinishReason>((resolve, reject) => {
    signal.addEventListener('abort', () => {
      reject(new CaravanError('cancelled', 'interrupted'));
    });
    engine.add(
      { id: 'generate', request, index: 0, resumeTokenIds: [] },
      {
        token: (tokenId, released) => {
          lastMs = performance.now();
          if (tokenIds.length === 0) firstMs = lastMs;
          tokenIds.push(tokenId);
          release(released);
        },
        end: (reason, held) => {
          release(held);
          resolve(reason);
        },
        fail: reject,
      },
    );
  });
  const running = engine.run(done.signal);
  // The engine's own failure reaches the sink first; what run throws is the same.
  running.catch(() => undefined);
  try {
    const finishReason = await finished;
    const count = tokenIds.length;
    return {
      text,
      tokenIds,
      promptTokens: request.promptTokenIds.length,
      completionTokens: count,
      finishReason,
      ttftMs: firstMs - startMs,
      decodeTokensPerSecond: count > 1 ? ((count - 1) * 1000) / (lastMs - firstMs) : null,
    };
  } finally {
    done.abort();
    await running.catch(() => undefined);
  }
}
