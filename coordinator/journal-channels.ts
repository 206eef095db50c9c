/** Messages of Redis that wake whoever waits for a journal: they may be lost, so that all who wait also look. */
import type { Redis } from 'ioredis';
import { connectRedis } from './store-connection.js';

export class JournalChannels {
  readonly #subscriber: Redis;
  /** By channel: who waits for a message on it. */
  readonly #listeners = new Map<string, Set<(message: string) => void>>();

  private constructor(subscriber: Redis) {
    this.#subscriber = subscriber;
    subscriber.on('message', (channel: string, message: string) => {
      for (const listener of this.#listeners.get(channel) ?? []) listener(message);
    });
    // What was published while we were away is lost: everybody looks for himself.
    subscriber.on('ready', () => {
      for (const listeners of this.#listeners.values())
        for (const listener of listeners) listener('');
    });
  }

  /** @throws CaravanError `redis_unavailable` within 3 seconds. */
  static async open(url: string, onError?: (error: Error) => void): Promise<JournalChannels> {
    return new JournalChannels(await connectRedis(url, 'patient', onError));
  }

  /** Hears of messages; an empty one means that some may have been missed. @returns how to stop. */
  listen(channel: string, listener: (message: string) => void): () => void {
    let listeners = this.#listeners.get(channel);
    if (listeners === undefined) {
      listeners = new Set();
      this.#listeners.set(channel, listeners);
    }
    listeners.add(listener);
    const others = listeners;
    if (others.size === 1) {
      // What is published before the subscription stands is found by the first look or the next poll.
      this.#subscriber.subscribe(channel).catch(() => undefined);
    }
    return () => {
      others.delete(listener);
      if (others.size > 0 || this.#listeners.get(channel) !== others) return;
      this.#listeners.delete(channel);
      // Not waited for: Redis may be away, or the connection closed and without subscriptions.
      this.#subscriber.unsubscribe(channel).catch(() => undefined);
    };
  }

  close(): void {
    this.#subscriber.disconnect();
  }
}
