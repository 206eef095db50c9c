/** The tokenizer of a checkpoint on disk, and its way of chatting. */
import fs from 'node:fs';
import { openChatTemplate, type ChatTemplate } from '../model/chat-template.js';
import { openCheckpoint, resolveModelPath } from '../model/checkpoint.js';
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { readFolderTokenizer } from '../model/tokenizer-files.js';

/**
 * Needs only the tokenizer's files of a folder, not its weights.
 *
 * @param model as `--model` takes it. @throws CaravanError `invalid_checkpoint`.
 */
export function openModelTokenizer(model: string | undefined): Tokenizer {
  return openModelChat(model).tokenizer;
}

/** As `openModelTokenizer`, and what messages are rendered with. */
export function openModelChat(model: string | undefined): {
  readonly tokenizer: Tokenizer;
  readonly chat: ChatTemplate;
} {
  const path = resolveModelPath(model);
  const isFolder = fs.statSync(path).isDirectory();
  const files = isFolder ? readFolderTokenizer(path) : openCheckpoint(path).readTokenizerFiles();
  const tokenizer = openTokenizer(files);
  return { tokenizer, chat: openChatTemplate(files, tokenizer) };
}
