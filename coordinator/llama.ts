/**
 * Meta's two calls as a TypeScript API: `import { Llama } from 'caravan'`. The semantics are those of the reference
 * implementation's `Llama` class (docs/parity.md puts them side by side); the engine is the one that serves jobs, with its
 * ranks as child processes of this one. No Redis is needed.
 */
import { z } from 'zod';
import type { ChatTemplate } from '../model/chat-template.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { RankEngine } from './engine.js';
import { DEFAULT_MAX_STEP_ROWS } from './group-spec.js';
import { LlamaCalls, type Generated } from './llama-calls.js';
import { startLocalGroup, type StartedGroup } from './local-group.js';
import { openModelChat } from './model-tokenizer.js';
import { encodePrompt } from './prompt.js';
import { temperatureOf, type Request } from './request.js';

export { CaravanError } from '../proto/errors.js';

export interface BuildOptions {
  /** Folder of a checkpoint, a .gguf file, or hf:ORG/NAME that was pulled. Default: the embedded caravan-tiny. */
  readonly ckptDir?: string;
  /** Positions of prompt and answer together. Default: what the model was trained for. */
  readonly maxSeqLen?: number;
  /** Most prompts of one call, and slots of the engine. 1 to 1024, default 4. */
  readonly maxBatchSize?: number;
  /** Ranks to cut the model into, whatever number of files it has. 1 to 256, default 1. */
  readonly modelParallelSize?: number;
  /** Where draws begin: the same calls after the same seed draw the same tokens. Default 1. */
  readonly seed?: number;
  /** How weights are held. Default `auto`: the fastest that fits into memory. */
  readonly weights?: 'auto' | 'fp32' | 'int8' | 'int4' | 'int4+int8';
  /** Same prompt, same tokens, bit for bit, whatever else runs. Default false. */
  readonly exact?: boolean;
}

export interface ChatOptions {
  /** 0 takes the likeliest token; otherwise logits are divided by it. Default 0.6. */
  readonly temperature?: number;
  /** Tokens are kept while the probability of those before them is at most this. 0 to 1, default 0.9. */
  readonly topP?: number;
  /** Most tokens to generate. Default: what maxSeqLen leaves. */
  readonly maxGenLen?: number;
  /** Tell each token, and its logprob of the raw logits. Default false. */
  readonly logprobs?: boolean;
  /** Draws of this call alone; left out, calls draw on from the seed of `build`. */
  readonly seed?: number;
  /** Withdraws the call: it is rejected with the code `cancelled`, and its slots are free within two steps. */
  readonly signal?: AbortSignal;
}

export interface TextOptions extends ChatOptions {
  /** Begin with the prompt, and with its logprobs. Default false. */
  readonly echo?: boolean;
}

export interface Message {
  readonly role: 'system' | 'user' | 'assistant';
  readonly content: string;
}

/** An optional system message, then user and assistant in turn, user last. */
export type Dialog = readonly Message[];

interface Tokens {
  /** The text of each token. Only with `logprobs`. */
  readonly tokens?: readonly string[];
  /** Of each token, natural logarithms; 0 for a prompt's first token. Only with `logprobs`. */
  readonly logprobs?: readonly number[];
}

export interface CompletionPrediction extends Tokens {
  readonly generation: string;
}

export interface ChatPrediction extends Tokens {
  readonly generation: { readonly role: 'assistant'; readonly content: string };
}

const seedRule = z.number().int().nonnegative();

const buildRules = z.object({
  ckptDir: z.string().min(1).optional(),
  maxSeqLen: z.number().int().min(2).max(1_048_576).optional(),
  maxBatchSize: z.number().int().min(1).max(1024).default(4),
  modelParallelSize: z.number().int().min(1).max(256).default(1),
  seed: seedRule.default(1),
  weights: z.enum(['auto', 'fp32', 'int8', 'int4', 'int4+int8']).default('auto'),
  exact: z.boolean().default(false),
});

const callRules = z.object({
  temperature: z.number().min(0).max(100).default(0.6),
  topP: z.number().min(0).max(1).default(0.9),
  maxGenLen: z.number().int().min(0).optional(),
  logprobs: z.boolean().default(false),
  echo: z.boolean().default(false),
  seed: seedRule.optional(),
  signal: z.instanceof(AbortSignal).optional(),
});

const promptRules = z.array(z.string());
const dialogRules = z.array(
  z.array(z.object({ role: z.string(), content: z.string() })).min(1, 'must hold a message'),
);

/** A loaded model. `close` it: its rank processes keep the program alive until then. */
export class Llama {
  readonly #group: StartedGroup;
  readonly #tokenizer: Tokenizer;
  readonly #chat: ChatTemplate;
  readonly #calls: LlamaCalls;
  readonly #stopping = new AbortController();
  readonly #seed: number;
  readonly #running: Promise<void>;
  #callCount = 0;

  private constructor(
    group: StartedGroup,
    { tokenizer, chat }: { readonly tokenizer: Tokenizer; readonly chat: ChatTemplate },
    { seed, exact }: { readonly seed: number; readonly exact: boolean },
  ) {
    this.#group = group;
    this.#tokenizer = tokenizer;
    this.#chat = chat;
    this.#seed = seed;
    const engine = new RankEngine(group.ranks, tokenizer, {
      ...group.spec,
      isExact: exact,
      onSlotFree: () => {
        this.#calls.startMore();
      },
    });
    this.#calls = new LlamaCalls(engine);
    this.#running = engine.run(this.#stopping.signal).then(
      () => {
        this.#calls.end(new CaravanError('cancelled', 'the model was closed'));
      },
      (thrown: unknown) => {
        this.#calls.end(toCaravanError(thrown));
      },
    );
  }

  /**
   * Starts the ranks and loads the model.
   *
   * @throws CaravanError `invalid_request` for an option, `invalid_checkpoint`, `unsupported_model`, `illegal_tp`,
   *   `out_of_memory`, `rank_unavailable`.
   */
  static async build(options: BuildOptions = {}): Promise<Llama> {
    const { ckptDir, modelParallelSize, maxSeqLen, ...rest } = checked(buildRules, options, '');
    const model = openModelChat(ckptDir);
    const group = await startLocalGroup({
      ...rest,
      ...{ model: ckptDir, tp: modelParallelSize, device: 'cpu', maxSeqLen },
      maxStepRows: DEFAULT_MAX_STEP_ROWS,
    });
    return new Llama(group, model, rest);
  }

  /** Positions of prompt and answer together. */
  get maxSeqLen(): number {
    return this.#group.spec.maxSeqLen;
  }

  /** Most prompts of one call. */
  get maxBatchSize(): number {
    return this.#group.spec.maxBatchSize;
  }

  /**
   * Continues each prompt, all of them in one batch.
   *
   * @throws CaravanError `invalid_request`, `context_length_exceeded` before anything is computed; `cancelled` by the
   *   signal or `close`; `rank_failed`.
   */
  async textCompletion(
    prompts: readonly string[],
    options: TextOptions = {},
  ): Promise<CompletionPrediction[]> {
    const texts = checked(promptRules, prompts, 'prompts');
    const encoded = texts.map((text) => encodePrompt(text, this.#tokenizer).ids);
    const predictions = await this.#predict('prompts', encoded, options);
    return predictions.map(({ text, ...tokens }) => ({ generation: text, ...tokens }));
  }

  /**
   * Answers each dialog, all of them in one batch.
   *
   * @throws CaravanError as `textCompletion`, and `invalid_request` with the reference's sentences for roles out of order and
   *   for special tags.
   */
  async chatCompletion(
    dialogs: readonly Dialog[],
    options: ChatOptions = {},
  ): Promise<ChatPrediction[]> {
    const encoded = checked(dialogRules, dialogs, 'dialogs').map((dialog, i) => {
      try {
        return this.#chat.render(dialog);
      } catch (thrown) {
        const { code, message } = toCaravanError(thrown);
        throw new CaravanError(code, message, { param: `dialogs.${i}`, cause: thrown });
      }
    });
    const predictions = await this.#predict('dialogs', encoded, { ...options, echo: false });
    return predictions.map(({ text, ...tokens }) => ({
      generation: { role: 'assistant', content: text },
      ...tokens,
    }));
  }

  /** Ends the ranks; calls that run are rejected with the code `cancelled`. Idempotent. */
  async close(): Promise<void> {
    this.#stopping.abort();
    await this.#running;
    await this.#group.close();
  }

  async #predict(
    field: 'prompts' | 'dialogs',
    prompts: readonly (readonly number[])[],
    options: TextOptions,
  ): Promise<(Tokens & { readonly text: string })[]> {
    const rules = checked(callRules, options, '');
    const { maxSeqLen, maxBatchSize } = this;
    const refuse = (
      code: 'invalid_request' | 'context_length_exceeded',
      message: string,
    ): never => {
      throw new CaravanError(code, `${field}: ${message}`, { param: field });
    };
    if (prompts.length < 1 || prompts.length > maxBatchSize) {
      refuse('invalid_request', `${prompts.length} of them; maxBatchSize is ${maxBatchSize}`);
    }
    const longest = Math.max(...prompts.map((ids) => ids.length));
    if (longest >= maxSeqLen) {
      const room = `maxSeqLen ${maxSeqLen} must hold at least one more`;
      refuse('context_length_exceeded', `has ${longest} tokens, and ${room}`);
    }
    const { temperature, topP, maxGenLen = maxSeqLen - 1, logprobs, echo, seed, signal } = rules;
    const sampling = {
      temperature: temperatureOf(temperature),
      topP,
      topK: 0,
      seed: seed ?? this.#nextSeed(),
    };
    const requests = prompts.map((promptTokenIds): Request => ({
      ...{ version: 1, model: '', promptTokenIds, sampling, maxTokens: maxGenLen, stop: [] },
      ...{ ignoreEos: false, isTextStart: true, echo },
      ...(logprobs ? { logprobs: 0 } : {}),
    }));
    const answers = await this.#calls.generate(requests, signal);
    return answers.map((answer, i) => this.#show(answer, requests[i]!));
  }

  /** Text and tokens of an answer up to its first EOS, after the prompt where it is shown. */
  #show(answer: Generated, { promptTokenIds, echo, logprobs }: Request) {
    const tokenizer = this.#tokenizer;
    const eosAt = answer.tokenIds.findIndex((id) => tokenizer.eosTokenIds.includes(id));
    const end = eosAt === -1 ? answer.tokenIds.length : eosAt;
    const before = echo === true ? promptTokenIds : [];
    const ids = [...before, ...answer.tokenIds.slice(0, end)];
    const text = tokenizer.decode(ids);
    if (logprobs === undefined) return { text };
    const ofPrompt = echo === true ? [0, ...answer.promptLogprobs] : [];
    return {
      text,
      tokens: ids.map((id) => tokenizer.decode([id])),
      logprobs: [...ofPrompt, ...answer.logprobs.slice(0, end)],
    };
  }

  /** The reference seeds its generator once, and every call draws on. */
  #nextSeed(): number {
    const mixed = BigInt(this.#seed) * 0x9e3779b97f4a7c15n + BigInt(this.#callCount);
    this.#callCount += 1;
    return Number(BigInt.asUintN(53, mixed));
  }
}

/** @throws CaravanError `invalid_request` that names the field. */
function checked<T extends z.ZodType>(rules: T, value: unknown, field: string): z.infer<T> {
  const parsed = rules.safeParse(value);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0];
  const path = [...(field === '' ? [] : [field]), ...(issue?.path ?? [])].join('.');
  const param = path === '' ? 'options' : path;
  throw new CaravanError('invalid_request', `${param}: ${issue?.message ?? 'is wrong'}`, { param });
}
