/**
 * A Request is what a client asked, after validation: nothing unvalidated has this type, and only this
 * is put into the queue. It is plain JSON, since it travels through Redis.
 */
import type { GenerationDefaults } from '../model/generation-config.js';
import type { GrammarSpec } from './grammar.js';

export interface Sampling {
  /** 0 is greedy; otherwise logits are divided by it. 0 to 2. */
  readonly temperature: number;
  /** Nucleus: tokens are kept while the probability before them is ≤ topP. (0, 1]; 1 keeps all. */
  readonly topP: number;
  /** Keep the topK most likely tokens; 0 keeps all. */
  readonly topK: number;
  /** Keep tokens that are at least this many times as likely as the most likely one. (0, 1]; left out keeps all. */
  readonly minP?: number;
  /** How logits are changed before anything else; left out where they are not. */
  readonly adjustment?: LogitAdjustment;
  /** An integer of 64 bits at most; the same seed draws the same coins. Drawn at submit when the client gave none. */
  readonly seed: number;
}

/** Logits are changed in this order: the repetition penalty, the other two, the bias; then comes the temperature. */
export interface LogitAdjustment {
  /** Logits of tokens in prompt or answer are divided by it where positive, else multiplied. (0, 10]; 1 for none. */
  readonly repetitionPenalty: number;
  /** Taken from the logits of tokens in the answer, once. -2 to 2. */
  readonly presencePenalty: number;
  /** Taken from the logits of tokens in the answer, as often as they are there. -2 to 2. */
  readonly frequencyPenalty: number;
  /** Added to the logits of single tokens: [id, -100 to 100], each id once. */
  readonly biases: readonly (readonly [tokenId: number, bias: number])[];
}

/** Logits divided by less than this are beyond what floats hold, and the likeliest token is drawn in any case. */
const LEAST_TEMPERATURE = 1e-4;

/** A temperature as it was asked for, in a range that can be computed with. */
export const temperatureOf = (asked: number): number => (asked < LEAST_TEMPERATURE ? 0 : asked);

export interface Request {
  /** Wire version of this object, for engines of another release on the same queue. */
  readonly version: 1;
  /** Name of the model card. */
  readonly model: string;
  /** 1 to maxSeqLen - 1 ids, BOS included. */
  readonly promptTokenIds: readonly number[];
  readonly sampling: Sampling;
  /** Most tokens to generate; the context's end may come first. 0 only looks at the prompt. */
  readonly maxTokens: number;
  /** Texts that end the answer and are not part of it; at most 16, none empty. */
  readonly stop: readonly string[];
  /** Do not stop at EOS. */
  readonly ignoreEos: boolean;
  /** Drop the space that SentencePiece puts before a first word: chats and empty prompts. */
  readonly isTextStart: boolean;
  /** The shape that every answer must have; any if left out. */
  readonly grammar?: GrammarSpec;
  /** Further prompts of the same job, at most MAX_SEQUENCES with all their answers. */
  readonly otherPrompts?: readonly Prompt[];
  /** Answers to each prompt that are shown; 1 if left out. */
  readonly n?: number;
  /** Answers to each prompt that are generated: the `n` with the best mean logprob are shown. `n` if left out. */
  readonly bestOf?: number;
  /** Report the logprob of every token, and of this many of the likeliest; none if left out. 0 to MAX_LOGPROBS. */
  readonly logprobs?: number;
  /** The answer begins with the prompt. */
  readonly echo?: boolean;
}

export type Prompt = Pick<Request, 'promptTokenIds' | 'isTextStart'>;

/** Sequences that one job may have. */
export const MAX_SEQUENCES = 128;
/** Likeliest tokens whose logprobs can be asked for. */
export const MAX_LOGPROBS = 20;

/** Natural logarithms of probabilities as the model gave them: before penalties, biases and temperature. */
export interface TokenLogprobs {
  /** Of the token itself. */
  readonly logprob: number;
  /** The likeliest tokens of its place, as many as the request asks for, by falling logprob. */
  readonly top: readonly (readonly [tokenId: number, logprob: number])[];
}

/** Order and limits of a job beside its request. */
export interface JobTerms {
  /** 1 (most urgent) to 1000. Default 100. */
  readonly priority: number;
  /** Unix time in milliseconds after which the job is `expired`; null for none. */
  readonly deadlineMs: number | null;
  /** Whose job it is: engines share themselves among tenants. `default` if left out. */
  readonly tenant?: string;
  /** Share of the tenant, relative to those of others; 1 if left out. */
  readonly weight?: number;
  /** How long the job is kept once it has ended, in seconds; a day if left out. */
  readonly retentionS?: number;
  /** Unix time in milliseconds at which it must start, where its deadline was promised. */
  readonly latestStartMs?: number;
  /** Who is told of the job's end; left out where nobody is. */
  readonly webhook?: { readonly url: string };
  /** What the job's idempotency key stands for; left out where its request had none. */
  readonly fingerprint?: string;
}

/** Why a sequence ended by itself: EOS or a stop text, or a limit of tokens or context. */
export type FinishReason = 'stop' | 'length';

export interface Usage {
  /** Each prompt counts once, however many answers it gets. */
  readonly promptTokens: number;
  /** Of the prompt tokens, those that were not computed again; none if left out. */
  readonly cachedTokens?: number;
  readonly completionTokens: number;
}

/** How a job ended: exactly one of these, written once. */
export type Ending =
  | {
      readonly status: 'completed';
      /** Of the first sequence, where there are several. */
      readonly finishReason: FinishReason;
      /** Of all sequences together. */
      readonly usage: Usage;
    }
  | { readonly status: 'failed'; readonly code: string; readonly message: string }
  | { readonly status: 'cancelled' }
  | { readonly status: 'expired' };

/** Of what a card means; gateways refuse later ones by name. */
export const CARD_VERSION = 1;

/** What gateways and tools must know of a model, published to Redis by its coordinators. */
export interface ModelCard {
  readonly version: 1;
  /** Name that requests use: the folder's or the file's name unless --served-model-name says otherwise. */
  readonly name: string;
  /** SHA-256 (hex) of the checkpoint's headers. */
  readonly digest: string;
  /** Unix time in seconds when first published. */
  readonly createdS: number;
  readonly vocabSize: number;
  /** Positions of a slot: prompt and answer together. */
  readonly maxSeqLen: number;
  readonly maxBatchSize: number;
  readonly bosTokenId: number;
  readonly eosTokenIds: readonly number[];
  /** The checkpoint's tokenizer files, base64, by file name; see model/tokenizer. */
  readonly tokenizerFiles: Readonly<Record<string, string>>;
  /** What generation_config.json wishes, where a request leaves it out. */
  readonly defaults: GenerationDefaults;
  /** True when the engine runs in --exact mode. */
  readonly isExact: boolean;
}
