/**
 * How a model is asked in a chat: by the Jinja template that its checkpoint carries, or in Llama 2's own format, token
 * for token as Meta's reference builds it, where the checkpoint has no template and Llama 2's kind of tokenizer, or a
 * template that says just the same.
 *
 * The template is chat_template.jinja, else chat_template.json, else tokenizer_config.json's chat_template; of several by
 * name it is `tool_use` when there are tools, else `default`.
 */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { JinjaTemplate, TemplateRefusal } from './jinja-template.js';
import { renderLlama2Chat } from './llama2-chat.js';
import { markFor, TextMarker } from './marked-text.js';
import { onOneLine } from './quoted.js';
import { readJson, readTokenizerConfig, type Tokenizer } from './tokenizer.js';

/** As OpenAI's, after validation. A template may read any member. */
export interface ChatMessage {
  readonly role: string;
  /** Null where an assistant only called tools. */
  readonly content: string | null;
  readonly name?: string;
  readonly tool_calls?: readonly unknown[];
  readonly tool_call_id?: string;
}

export interface ChatOptions {
  /** Descriptions of tools, as OpenAI's `tools`. */
  readonly tools?: readonly unknown[];
  /** Whether the prompt ends where the assistant begins to speak. Default true. */
  readonly addGenerationPrompt?: boolean;
}

export interface ChatTemplate {
  /** Whether descriptions of tools reach the model. */
  readonly knowsTools: boolean;
  /** Whether calls of tools stand between <tool_call> tags; else they are a JSON array. */
  readonly tagsCalls?: boolean;
  /**
   * Ids of a dialog. What messages and tools spell is text, never a control token.
   *
   * @throws CaravanError `invalid_request` for a dialog that the template refuses, in the template's words, or when
   *   the model has no template; `unsupported_model` when Caravan cannot run it.
   */
  render(messages: readonly ChatMessage[], options?: ChatOptions): number[];
}

/** Templates write roles beside control tokens: only known ones may come there. */
const ROLES = ['system', 'developer', 'user', 'assistant', 'tool', 'function'];

/**
 * Never fails: what is wrong with a template is said when it is asked for, since completions do without.
 *
 * @param files as `openTokenizer` takes them.
 */
export function openChatTemplate(
  files: ReadonlyMap<string, Uint8Array>,
  tokenizer: Tokenizer,
): ChatTemplate {
  try {
    const sources = readSources(files);
    if (sources === null) {
      if (!isLlama2(files, tokenizer)) return noTemplate;
      return { knowsTools: false, render: llama2Chat(tokenizer) };
    }
    const template = new JinjaChat(sources, specialTokens(files, tokenizer), tokenizer);
    return template.isLlama2() ? { knowsTools: false, render: llama2Chat(tokenizer) } : template;
  } catch (thrown) {
    const reason = thrown instanceof Error ? thrown.message : String(thrown);
    const error =
      thrown instanceof CaravanError
        ? thrown
        : new CaravanError(
            'unsupported_model',
            `chat_template: cannot be read: ${onOneLine(reason)}`,
          );
    return {
      knowsTools: false,
      render: () => {
        throw error;
      },
    };
  }
}

const refuse = (message: string, param = 'messages'): never => {
  throw new CaravanError('invalid_request', message, { param });
};

const noTemplate: ChatTemplate = {
  knowsTools: false,
  render: () =>
    refuse('messages: the model has no chat template; it continues texts, at /v1/completions'),
};

const llama2Chat =
  (tokenizer: Tokenizer): ChatTemplate['render'] =>
  (messages, { tools = [] } = {}) => {
    if (tools.length > 0) refuse("tools: Llama 2's chat format has no place for tools", 'tools');
    return renderLlama2Chat(messages, tokenizer);
  };

/** By name; the only one is `default`. */
type Sources = ReadonlyMap<string, string>;

const templateList = z.union([
  z.string().transform((template) => [{ name: 'default', template }]),
  z.array(z.object({ name: z.string(), template: z.string() })).min(1),
]);

function readSources(files: ReadonlyMap<string, Uint8Array>): Sources | null {
  const jinja = files.get('chat_template.jinja');
  if (jinja !== undefined) return new Map([['default', Buffer.from(jinja).toString('utf8')]]);
  const beside = files.get('chat_template.json');
  const [fileName, json] =
    beside === undefined
      ? ['tokenizer_config.json', readTokenizerConfig(files)]
      : ['chat_template.json', readJson(beside, 'chat_template.json')];
  const found = (json as { chat_template?: unknown } | null)?.chat_template;
  if (found === undefined || found === null) return null;
  const parsed = templateList.safeParse(found);
  if (!parsed.success) {
    throw new CaravanError(
      'invalid_checkpoint',
      `${fileName}: chat_template: must be a text, or a list of {"name", "template"}`,
    );
  }
  return new Map(parsed.data.map(({ name, template }) => [name, template]));
}

/** A tokenizer of Llama 2's kind, in a checkpoint that is not another family's. */
function isLlama2(files: ReadonlyMap<string, Uint8Array>, tokenizer: Tokenizer): boolean {
  const bytes = files.get('config.json');
  const config = bytes === undefined ? {} : (readJson(bytes, 'config.json') as object | null);
  const { model_type: family = 'llama' } = (config ?? {}) as { model_type?: unknown };
  if (family !== 'llama') return false;
  if (tokenizer.pieceOf(tokenizer.bosTokenId) !== '<s>') return false;
  // Byte-level tokenizers have no pieces for single bytes.
  return tokenizer.pieceOf(3) === '<0x00>' && tokenizer.pieceOf(258) === '<0xFF>';
}

/** The variables that templates know special tokens by. */
function specialTokens(
  files: ReadonlyMap<string, Uint8Array>,
  tokenizer: Tokenizer,
): Readonly<Record<string, string>> {
  const config = readTokenizerConfig(files);
  const tokens: Record<string, string> = {
    bos_token: tokenizer.pieceOf(tokenizer.bosTokenId),
    eos_token: tokenizer.pieceOf(tokenizer.eosTokenIds[0]!),
  };
  for (const key of ['bos_token', 'eos_token', 'unk_token', 'pad_token']) {
    const token = config[key];
    const { content } = (token ?? {}) as { content?: unknown };
    if (typeof token === 'string') tokens[key] = token;
    else if (typeof content === 'string') tokens[key] = content;
  }
  return tokens;
}

class JinjaChat implements ChatTemplate {
  readonly knowsTools: boolean;
  readonly tagsCalls: boolean;
  readonly #plain: JinjaTemplate;
  readonly #withTools: JinjaTemplate;
  readonly #specialTokens: Readonly<Record<string, string>>;
  readonly #tokenizer: Tokenizer;
  readonly #marker: TextMarker;

  /** @throws Error that says what cannot be parsed. */
  constructor(sources: Sources, special: Readonly<Record<string, string>>, tokenizer: Tokenizer) {
    const named = (name: string): JinjaTemplate | null => {
      const source = sources.get(name);
      return source === undefined ? null : new JinjaTemplate(source);
    };
    const plain = named('default');
    const withTools = named('tool_use') ?? plain;
    if (withTools === null) {
      throw new CaravanError(
        'unsupported_model',
        `chat_template: has ${onOneLine([...sources.keys()].join(', '))}, and none of the name default`,
      );
    }
    this.#plain = plain ?? withTools;
    this.#withTools = withTools;
    this.knowsTools = /\btools\b/.test(withTools.source);
    // Where the tag is a control token, text cannot spell it.
    const hasTags = withTools.source.includes('<tool_call>');
    this.tagsCalls = hasTags && !tokenizer.controlTokens.has('<tool_call>');
    this.#specialTokens = special;
    this.#tokenizer = tokenizer;
    const literals = [...this.#plain.literals(), ...withTools.literals()];
    this.#marker = new TextMarker(tokenizer.controlTokens, literals);
  }

  render(
    messages: readonly ChatMessage[],
    { tools = [], addGenerationPrompt = true }: ChatOptions = {},
  ): number[] {
    messages.forEach(({ role }, i) => {
      if (!ROLES.includes(role)) {
        refuse(
          `messages.${i}.role: must be one of ${ROLES.join(', ')}, got ${JSON.stringify(role)}`,
        );
      }
    });
    if (tools.length > 0 && !this.knowsTools) {
      refuse("tools: the model's chat template has no place for tools", 'tools');
    }
    const template = tools.length > 0 ? this.#withTools : this.#plain;
    const given = wellFormed({ messages, tools }) as ChatVariables;
    const write = (variables: ChatVariables): string =>
      this.#write(template, variables, addGenerationPrompt);
    const text = write(given);
    const givenJson = JSON.stringify(given);
    const mark = markFor([template.source, text, givenJson]);
    const marked = this.#markTexts(given, mark);
    if (JSON.stringify(marked) === givenJson) {
      return this.#tokenizer.encodeParts(this.#marker.split(text, mark));
    }
    const markedText = write(marked);
    if (markedText.replaceAll(mark, '') !== text) {
      refuse(
        "messages: spell what could be a control token, and the model's chat template computes with it",
      );
    }
    return this.#tokenizer.encodeParts(this.#marker.split(markedText, mark));
  }

  /** Whether the template writes what Meta's reference writes, for a dialog that shows all there is to it. */
  isLlama2(): boolean {
    if (this.#tokenizer.pieceOf(3) !== '<0x00>') return false;
    const messages = [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: ' One? ' },
      { role: 'assistant', content: ' Two. ' },
      { role: 'user', content: 'Three?' },
    ];
    const [bos, eos] = [this.#specialTokens['bos_token'], this.#specialTokens['eos_token']];
    const expected =
      `${bos}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n One? [/INST] Two. ${eos}` +
      `${bos}[INST] Three? [/INST]`;
    try {
      return this.#write(this.#plain, { messages, tools: [] }, true) === expected;
    } catch {
      // Then it is another one, and says why when it is asked.
      return false;
    }
  }

  #markTexts({ messages, tools }: ChatVariables, mark: string): ChatVariables {
    return {
      messages: messages.map((message) => ({
        ...(this.#marker.markAll(message, mark) as ChatMessage),
        role: message.role,
      })),
      tools: this.#marker.markAll(tools, mark) as readonly unknown[],
    };
  }

  #write(
    template: JinjaTemplate,
    { messages, tools }: ChatVariables,
    addGenerationPrompt: boolean,
  ): string {
    try {
      return template.render({
        ...this.#specialTokens,
        messages,
        // What transformers gives where there are none.
        tools: tools.length > 0 ? tools : null,
        documents: null,
        add_generation_prompt: addGenerationPrompt,
      });
    } catch (thrown) {
      const message = thrown instanceof Error ? thrown.message : String(thrown);
      const line = onOneLine(message).replace(/\s+/g, ' ').trim();
      if (thrown instanceof TemplateRefusal) return refuse(line);
      return refuse(`messages: the model's chat template fails on them: ${line}`);
    }
  }
}

interface ChatVariables {
  readonly messages: readonly ChatMessage[];
  readonly tools: readonly unknown[];
}

/** Lone surrogates, which no tokenizer knows, become U+FFFD. */
function wellFormed(value: unknown): unknown {
  if (typeof value === 'string') return value.toWellFormed();
  if (Array.isArray(value)) return value.map(wellFormed);
  if (typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, member]) => [key.toWellFormed(), wellFormed(member)]),
  );
}
