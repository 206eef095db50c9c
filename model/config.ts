/**
 * The shape of a Llama: what every layout's configuration file is turned into.
 */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';

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
  /** Context that the checkpoint was trained for. */
  readonly maxPositions: number;
  readonly normEps: number;
  readonly ropeTheta: number;
  /** True when the head shares the embedding's weights. */
  readonly isHeadTied: boolean;
}

const positive = z.number().int().positive();

// Unknown keys are ignored; keys whose presence changes the network are checked below.
const huggingFaceConfig = z.object({
  model_type: z.string(),
  hidden_size: positive,
  intermediate_size: positive,
  num_hidden_layers: positive,
  num_attention_heads: positive,
  num_key_value_heads: positive.optional(),
  head_dim: positive.nullish(),
  vocab_size: positive,
  max_position_embeddings: positive.default(4096),
  rms_norm_eps: z.number().positive().default(1e-5),
  rope_theta: z.number().positive().default(10000),
  rope_scaling: z.unknown().optional(),
  hidden_act: z.string().default('silu'),
  tie_word_embeddings: z.boolean().default(false),
  attention_bias: z.boolean().default(false),
  mlp_bias: z.boolean().default(false),
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
  const parsed = huggingFaceConfig.safeParse(json);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    const field = issue?.path.join('.') ?? '';
    throw new CaravanError('invalid_checkpoint', `${fileName}: ${field}: ${issue?.message ?? ''}`);
  }
  const c = parsed.data;
  const unsupported = (field: string, value: unknown, supported: string): never => {
    throw new CaravanError(
      'unsupported_model',
      `${fileName}: ${field} is ${JSON.stringify(value)}; Caravan runs ${supported}`,
    );
  };
  if (c.model_type !== 'llama') unsupported('model_type', c.model_type, '"llama"');
  if (c.hidden_act !== 'silu') unsupported('hidden_act', c.hidden_act, '"silu"');
  if (c.rope_scaling != null) unsupported('rope_scaling', c.rope_scaling, 'models without it');
  if (c.attention_bias) unsupported('attention_bias', true, 'models without biases');
  if (c.mlp_bias) unsupported('mlp_bias', true, 'models without biases');
  const config: LlamaConfig = {
    hiddenSize: c.hidden_size,
    ffnSize: c.intermediate_size,
    layerCount: c.num_hidden_layers,
    headCount: c.num_attention_heads,
    kvHeadCount: c.num_key_value_heads ?? c.num_attention_heads,
    headSize: c.head_dim ?? c.hidden_size / c.num_attention_heads,
    vocabSize: c.vocab_size,
    maxPositions: c.max_position_embeddings,
    normEps: c.rms_norm_eps,
    ropeTheta: c.rope_theta,
    isHeadTied: c.tie_word_embeddings,
  };
  checkConfig(config, fileName);
  return config;
}

/** Relations between the sizes that every layout must keep. */
export function checkConfig(config: LlamaConfig, fileName: string): void {
  const { headCount, kvHeadCount, headSize } = config;
  const fail = (message: string): never => {
    throw new CaravanError('invalid_checkpoint', `${fileName}: ${message}`);
  };
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
