/**
 * How KEDA and the HorizontalPodAutoscaler choose the number of Pods, from their documentation: KEDA takes the target from
 * 0 to 1 and back, the autoscaler does the rest with an average value a Pod.
 */
export interface KedaSettings {
  /** Between looks of the autoscaler; KEDA hears of activity at once (an external-push trigger). */
  readonly syncS: number;
  /** The autoscaler shrinks to the largest number that it wanted in this time. */
  readonly stabilizationS: number;
  /** KEDA goes to zero when nothing was active for this long. */
  readonly cooldownS: number;
  readonly maxPods: number;
}

/** A ratio nearer to 1 than this changes nothing. */
const TOLERANCE = 0.1;

export class Keda {
  readonly #settings: KedaSettings;
  #wanted: { atS: number; pods: number }[] = [];
  #activeS = -Infinity;

  constructor(settings: KedaSettings) {
    this.#settings = settings;
  }

  /** KEDA hears, or asks, whether there is work. @returns the number of Pods there should be. */
  activity(nowS: number, pods: number, isActive: boolean): number {
    if (isActive) this.#activeS = nowS;
    if (isActive && pods === 0) return 1;
    if (!isActive && pods > 0 && nowS - this.#activeS >= this.#settings.cooldownS) {
      this.#wanted = [];
      return 0;
    }
    return pods;
  }

  /** The autoscaler looks. @param metric of all Pods together. @param target for one Pod. */
  sync(nowS: number, pods: number, metric: number, target: number): number {
    if (pods === 0) return 0;
    const { stabilizationS, maxPods } = this.#settings;
    const ratio = metric / (target * pods);
    const raw = Math.abs(ratio - 1) <= TOLERANCE ? pods : Math.ceil(metric / target);
    const wanted = Math.min(Math.max(raw, 1), maxPods);
    this.#wanted = this.#wanted.filter(({ atS }) => nowS - atS < stabilizationS);
    this.#wanted.push({ atS: nowS, pods: wanted });
    if (wanted > pods) return Math.min(wanted, Math.max(2 * pods, pods + 4));
    return Math.min(pods, Math.max(...this.#wanted.map((each) => each.pods)));
  }
}
