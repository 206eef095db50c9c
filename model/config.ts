/**
 * The shape of a Llama: what every layout's configuration file is turned into.
 */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { onOneLine, spelled } from './quoted.js';
import { parseRope, type RopeScaling } from './rope-scaling.js';

export interface LlamaConfig {
  /** Width of the residual stream. */
  readonly hiddenSize: number;
  /** Width of the feed-forward network. */
  readonly ffnSize: number;
  readonly layerCount: number;
  readonly headCount: number;
  readonly kvHeadCount: number;
  readonly headSize: number;
  readonly vocabSize: number;
  /** Context that the checkpoint was trained for, or stretched to. */
  readonly maxPositions: number;
  readonly normEps: number;
  readonly ropeTheta: number;
  /** Absent where positions are turned as they are. */
  readonly ropeScaling?: RopeScaling;
  /** True when the head shares the embedding's weights. */
  readonly isHeadTied: boolean;
}

const positive = z.number().int().positive();

/** Families of one and the same network, by config.json's model_type. */
const SUPPORTED_FAMILIES =
  '"llama" (Llama 2 and 3, Code Llama, TinyLlama, SmolLM2 and others of the same architecture) and "mistral"';

// Unknown keys are ignored; keys whose presence changes the network are checked below. Defaults are those of
// transformers' LlamaConfig.
const huggingFaceConfig = z.object({
  model_type: z.string(),
  hidden_size: positive,
  intermediate_size: positive,
  num_hidden_layers: positive,
  num_attention_heads: positive,
  num_key_value_heads: positive.nullish(),
  head_dim: positive.nullish(),
  vocab_size: positive,
  max_position_embeddings: positive.default(2048),
  // Vicuna's name for the context that its rope_scaling leads to.
  max_sequence_length: positive.nullish(),
  rms_norm_eps: z.number().positive().default(1e-6),
  rope_theta: z.number().positive().default(10000),
  rope_scaling: z.unknown().optional(),
  rope_parameters: z.unknown().optional(),
  sliding_window: positive.nullish(),
  hidden_act: z.string().default('silu'),
  tie_word_embeddings: z.boolean().default(false),
  attention_bias: z.boolean().default(false),
  mlp_bias: z.boolean().default(false),
  quantization_config: z.unknown().optional(),
});

/**
 * Reads the text of a Hugging Face config.json.
 *
 * @throws CaravanError `invalid_checkpoint` naming the field, or `unsupported_model`.
 */
export function parseHuggingFaceConfig(text: string, fileName: string): LlamaConfig {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new CaravanError('invalid_checkpoint', `${fileName}: is not valid JSON`, { cause });
  }
  const damaged = (field: string, message: string): never => {
    throw new CaravanError('invalid_checkpoint', `${fileName}: ${field}: ${message}`);
  };
  const unsupported = (field: string, value: unknown, supported: string): never => {
    throw new CaravanError(
      'unsupported_model',
      `${fileName}: ${field} is ${spelled(value)}; Caravan runs ${supported}`,
    );
  };
  // Before anything else: another family's file may lack what a Llama's has.
  const family = z.object({ model_type: z.string() }).safeParse(json).data?.model_type;
  if (family !== undefined && family !== 'llama' && family !== 'mistral') {
    unsupported('model_type', family, SUPPORTED_FAMILIES);
  }
  const parsed = huggingFaceConfig.safeParse(json);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    return damaged(onOneLine(issue?.path.join('.') ?? ''), onOneLine(issue?.message ?? ''));
  }
  const c = parsed.data;
  if (c.hidden_act !== 'silu') unsupported('hidden_act', c.hidden_act, '"silu"');
  if (c.attention_bias) unsupported('attention_bias', true, 'models without biases');
  if (c.mlp_bias) unsupported('mlp_bias', true, 'models without biases');
  if (c.quantization_config != null) {
    const { quant_method: method } = c.quantization_config as { quant_method?: unknown };
    unsupported(
      'quantization_config.quant_method',
      method ?? null,
      'F32, F16 and BF16 safetensors, and quantizes them itself',
    );
  }
  const field = c.rope_parameters == null ? 'rope_scaling' : 'rope_parameters';
  const rope = parseRope(c[field], field, c.max_position_embeddings, { damaged, unsupported });
  const config: LlamaConfig = {
    hiddenSize: c.hidden_size,
    ffnSize: c.intermediate_size,
    layerCount: c.num_hidden_layers,
    headCount: c.num_attention_heads,
    kvHeadCount: c.num_key_value_heads ?? c.num_attention_heads,
    headSize: c.head_dim ?? c.hidden_size / c.num_attention_heads,
    vocabSize: c.vocab_size,
    maxPositions: contextOf(c, rope.scaling),
    normEps: c.rms_norm_eps,
    ropeTheta: rope.theta ?? c.rope_theta,
    ...(rope.scaling === undefined ? {} : { ropeScaling: rope.scaling }),
    isHeadTied: c.tie_word_embeddings,
  };
  checkConfig(config, fileName);
  return config;
}

/**
 * Positions that the network can be given. Within a sliding window attention sees everything, as Llama's does: so a
 * model that has one is run up to its length, and no further.
 */
function contextOf(c: z.infer<typeof huggingFaceConfig>, scaling: RopeScaling | undefined): number {
  const stretched =
    scaling?.kind === 'dynamic' ? Math.floor(scaling.factor * scaling.originalPositions) : 0;
  const context = Math.max(c.max_position_embeddings, c.max_sequence_length ?? 0, stretched);
  return Math.min(context, c.sliding_window ?? context);
}

/**
 * Far above any model: beyond them a file is damaged, or means harm, and lists of so many layers or heads would take
 * all memory before the first missing tensor is found.
 */
const MOST = {
  ...{ layerCount: 4096, headCount: 65_536, hiddenSize: 1 << 24, ffnSize: 1 << 24 },
  vocabSize: 1 << 24,
} as const;

/** Limits of the sizes, and relations between them, that every layout must keep. */
export function checkConfig(config: LlamaConfig, fileName: string): void {
  const { headCount, kvHeadCount, headSize } = config;
  const fail = (message: string): never => {
    throw new CaravanError('invalid_checkpoint', `${fileName}: ${message}`);
  };
  for (const [name, most] of Object.entries(MOST)) {
    const size = config[name as keyof typeof MOST];
    if (size > most) fail(`${name} is ${size}; at most ${most} is run`);
  }
  if (!Number.isInteger(headSize)) {
    fail(`hidden_size ${config.hiddenSize} is not a multiple of num_attention_heads ${headCount}`);
  }
  if (headSize % 2 !== 0) fail(`the head size ${headSize} is odd; rotary embedding needs pairs`);
  if (headCount % kvHeadCount !== 0) {
    fail(
      `num_attention_heads ${headCount} is not a multiple of num_key_value_heads ${kvHeadCount}`,
    );
  }
}
