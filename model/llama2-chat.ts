/**
 * Llama 2's chat format, token for token as Meta's reference implementation builds it.
 */
import { CaravanError } from '../proto/errors.js';
import type { ChatMessage } from './chat-template.js';
import type { Tokenizer } from './tokenizer.js';

const INST = ['[INST]', '[/INST]'] as const;
const SYS = ['<<SYS>>\n', '\n<</SYS>>\n\n'] as const;
const SPECIAL_TAGS = ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'];

/**
 * Ids of a dialog: an optional system message, then user and assistant in turn, user last. Every past turn
 * stands between BOS and EOS; the last has BOS alone.
 *
 * @throws CaravanError `invalid_request` with the reference's own sentences.
 */
export function renderLlama2Chat(messages: readonly ChatMessage[], tokenizer: Tokenizer): number[] {
  checkDialog(messages);
  const turns = foldSystem(messages);
  const eos = tokenizer.eosTokenIds[0]!;
  const ids: number[] = [];
  for (let i = 0; i + 1 < turns.length; i += 2) {
    const answer = textOf(turns[i + 1]!).trim();
    ids.push(
      tokenizer.bosTokenId,
      ...tokenizer.encode(`${instruction(turns[i]!)} ${answer} `),
      eos,
    );
  }
  ids.push(tokenizer.bosTokenId, ...tokenizer.encode(instruction(turns.at(-1)!)));
  return ids;
}

const textOf = ({ content }: ChatMessage): string => content ?? '';

const instruction = (message: ChatMessage): string =>
  `${INST[0]} ${textOf(message).trim()} ${INST[1]}`;

/** The system text becomes part of the first user message. */
function foldSystem(messages: readonly ChatMessage[]): readonly ChatMessage[] {
  const [system, first, ...rest] = messages;
  if (system?.role !== 'system' || first === undefined) return messages;
  const content = `${SYS[0]}${textOf(system)}${SYS[1]}${textOf(first)}`;
  return [{ role: first.role, content }, ...rest];
}

function checkDialog(messages: readonly ChatMessage[]): void {
  const refuse = (message: string): never => {
    throw new CaravanError('invalid_request', message, { param: 'messages' });
  };
  const turns = messages[0]?.role === 'system' ? messages.slice(1) : messages;
  const isAlternating = turns.every(({ role }, i) => role === (i % 2 === 0 ? 'user' : 'assistant'));
  if (!isAlternating) {
    refuse(
      "model only supports 'system', 'user' and 'assistant' roles, " +
        "starting with 'system', then 'user' and alternating (u/a/u/a/u...)",
    );
  }
  const last = messages.at(-1);
  if (last?.role !== 'user') {
    refuse(`Last message must be from user, got ${last?.role ?? 'no message'}`);
  }
  const isTagged = messages.some((message) =>
    SPECIAL_TAGS.some((tag) => textOf(message).includes(tag)),
  );
  if (isTagged) refuse('Error: special tags are not allowed as part of the prompt.');
}
