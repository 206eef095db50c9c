/** What an engine can do with a job that it has taken from the queue. */
import type { HeldJob } from './order.js';
import type { JobSize } from './queue-order.js';

/** A job that this engine works on. */
export interface TakenJob {
  readonly id: string;
  /** What the order knew of it when it was taken. */
  readonly held: HeldJob;
  /**
   * BullMQ may forget it: the journal has its ending. Can be repeated.
   *
   * @param unusedTokens of those that the job was reckoned with; its tenant is not charged for them.
   */
  finish(isFailed: boolean, unusedTokens?: number): Promise<void>;
  /** Back to the queue, for any engine. @param left what it still needs; as much as before if left out. */
  giveBack(left?: JobSize, isPreempted?: boolean): Promise<void>;
  /** Back to the queue, not to be taken before so many milliseconds have passed. */
  giveBackLater(delayMs: number): Promise<void>;
  /** Redis had lost the job: should this engine die, it is not forgotten. Can be repeated. */
  keep(): Promise<void>;
  /** Another engine has it, or soon will: its lock is not renewed any more. */
  drop(): void;
}
