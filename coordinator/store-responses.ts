/**
 * Responses that can be asked for again, and continued.
 *
 *   caravan:{RESPONSE}:response   what was asked, as JSON; what was answered stands in the job's journal
 */
import type { Redis } from 'ioredis';
import type { StoreConnection } from './store-connection.js';

export interface ResponseMessage {
  readonly role: string;
  /** Null where an assistant only called tools. */
  readonly content: string | null;
  readonly tool_calls?: readonly ResponseCall[];
  /** The call that a tool's message is the output of. */
  readonly tool_call_id?: string;
}

/** A call of a tool, as chats have it. */
export interface ResponseCall {
  readonly id: string;
  readonly type: 'function';
  readonly function: { readonly name: string; readonly arguments: string };
}

export interface ResponseRecord {
  readonly version: 1;
  readonly id: string;
  readonly jobId: string;
  readonly createdS: number;
  /** The conversation that was asked, without instructions: they are not handed on. */
  readonly messages: readonly ResponseMessage[];
  /** The fields of the response that only repeat the request. */
  readonly echoed: Readonly<Record<string, unknown>>;
}

const keyOf = (id: string): string => `caravan:{${id}}:response`;

export class ResponseRecords {
  readonly #connection: StoreConnection;
  readonly #redis: Redis;

  constructor(connection: StoreConnection) {
    this.#connection = connection;
    this.#redis = connection.redis;
  }

  /** @param retentionS how long: as the journals of jobs that have ended. */
  async keep(record: ResponseRecord, retentionS: number): Promise<void> {
    const text = JSON.stringify(record);
    await this.#connection.call(() => this.#redis.set(keyOf(record.id), text, 'EX', retentionS));
  }

  async find(id: string): Promise<ResponseRecord | null> {
    const text = await this.#connection.call(() => this.#redis.get(keyOf(id)));
    return text === null ? null : (JSON.parse(text) as ResponseRecord);
  }

  /** @returns whether it was there. */
  async forget(id: string): Promise<boolean> {
    return (await this.#connection.call(() => this.#redis.del(keyOf(id)))) === 1;
  }
}
