/** The models that a gateway can serve: those with a card, with their tokenizers opened once. */
import { createHash } from 'node:crypto';
import { openChatTemplate } from '../model/chat-template.js';
import { openTokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import { GrammarCache } from './grammar.js';
import type { ServedModel } from './openai.js';
import { CARD_VERSION, type ModelCard } from './request.js';
import type { Store } from './store.js';

/** Cards hold whole tokenizers: requests that follow each other closely share one reading of them. */
const CARDS_FRESH_MS = 1000;

export class Models {
  readonly #store: Store;
  /** By digest of the files: cards come and go, a checkpoint's tokenizer stays. */
  readonly #opened = new Map<string, Omit<ServedModel, 'card'>>();
  /** A card's digest is of its configuration and weights, and does not know its template. */
  readonly #digests = new WeakMap<ModelCard, string>();
  #read: { readonly cards: Promise<ModelCard[]>; readonly atMs: number } | null = null;

  constructor(store: Store) {
    this.#store = store;
  }

  cards(): Promise<ModelCard[]> {
    return this.#store.cards();
  }

  /**
   * The model of this name; without a name, the only one there is.
   *
   * @throws CaravanError `model_not_found` naming the models that there are, or `invalid_request`.
   */
  async find(name: string | null): Promise<ServedModel> {
    let cards = await this.#freshCards();
    // A model that has just come must not be denied.
    if (cards.length === 0 || (name !== null && cards.every((card) => card.name !== name))) {
      cards = await this.#store.cards();
    }
    const names = cards.map((card) => card.name).join(', ') || 'none yet';
    if (name === null && cards.length > 1) {
      throw new CaravanError('invalid_request', `model: must name one of ${names}`, {
        param: 'model',
      });
    }
    const card = name === null ? cards[0] : cards.find((candidate) => candidate.name === name);
    if (card === undefined) {
      const asked = name === null ? 'no model is there' : `the model ${name} does not exist`;
      throw new CaravanError('model_not_found', `${asked}; models: ${names}`, { param: 'model' });
    }
    const version: number = card.version;
    if (version > CARD_VERSION) {
      throw new CaravanError(
        'protocol_mismatch',
        `the card of ${card.name} is of version ${version}, this gateway reads ${CARD_VERSION}: update the gateway`,
      );
    }
    return { card, ...this.#open(card) };
  }

  #freshCards(): Promise<ModelCard[]> {
    const nowMs = performance.now();
    if (this.#read === null || nowMs - this.#read.atMs > CARDS_FRESH_MS) {
      const read = { cards: this.#store.cards(), atMs: nowMs };
      this.#read = read;
      read.cards.catch(() => {
        if (this.#read === read) this.#read = null;
      });
    }
    return this.#read.cards;
  }

  #open(card: ModelCard): Omit<ServedModel, 'card'> {
    let digest = this.#digests.get(card);
    if (digest === undefined) {
      digest = createHash('sha256').update(JSON.stringify(card.tokenizerFiles)).digest('hex');
      this.#digests.set(card, digest);
    }
    let opened = this.#opened.get(digest);
    if (opened === undefined) {
      const files = new Map(
        Object.entries(card.tokenizerFiles).map(([name, base64]) => [
          name,
          Buffer.from(base64, 'base64'),
        ]),
      );
      const tokenizer = openTokenizer(files);
      opened = {
        tokenizer,
        chat: openChatTemplate(files, tokenizer),
        grammars: new GrammarCache(tokenizer),
      };
      this.#opened.set(digest, opened);
    }
    return opened;
  }
}
