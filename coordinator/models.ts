/** The models that a gateway can serve: those with a card, with their tokenizers opened once. */
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import type { ServedModel } from './openai.js';
import type { ModelCard } from './request.js';
import type { Store } from './store.js';

/** Cards hold whole tokenizers: requests that follow each other closely share one reading of them. */
const CARDS_FRESH_MS = 1000;

export class Models {
  readonly #store: Store;
  /** By digest: cards come and go, a checkpoint's tokenizer stays. */
  readonly #tokenizers = new Map<string, Tokenizer>();
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
   * @throws CaravanError `not_found` naming the models that there are, or `invalid_request`.
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
      throw new CaravanError('not_found', `${asked}; models: ${names}`, { param: 'model' });
    }
    return { card, tokenizer: this.#tokenizerOf(card) };
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

  #tokenizerOf(card: ModelCard): Tokenizer {
    let tokenizer = this.#tokenizers.get(card.digest);
    if (tokenizer === undefined) {
      const files = Object.entries(card.tokenizerFiles);
      tokenizer = openTokenizer(
        new Map(files.map(([name, base64]) => [name, Buffer.from(base64, 'base64')])),
      );
      this.#tokenizers.set(card.digest, tokenizer);
    }
    return tokenizer;
  }
}
