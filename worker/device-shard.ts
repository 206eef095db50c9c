/**
 * A shard on a device: one rank's slices of the model as device tensors, or in graphs of their layer's own. It knows
 * nothing of slots or steps.
 */
import type { DeviceKind } from '../model/device-name.js';
import type { LlamaConfig } from '../model/config.js';
import {
  slicesOf,
  type LayerSlices,
  type RankPlan,
  type RankSlices,
  type TensorSlice,
} from '../model/plan.js';
import {
  hasFixedWeights,
  isFixed,
  weightBytes,
  type WeightForm,
  type WeightForms,
} from '../model/weights.js';
import { deviceEnterGraph, deviceFfnGraph, deviceLeaveGraph } from './device-graph.js';
import type { DeviceShape, MatrixShape } from './device-graph-builder.js';
import { CAPTURED_LENGTHS } from './device-launch.js';
import type { Graph } from './graph-builder.js';
import type { HalfNarrower } from './half-widener.js';
import type { BlockedLinear, Linear } from './linear.js';
import { elementType, type ElementType } from './ort.js';
import type { DeviceTensor } from './device-tensor.js';
import type { DeviceSession } from './ort-binding.js';
import type { OrtDevice } from './ort-device.js';
import type { Provider } from './ort-provider.js';

const { float32, float16 } = elementType;

/** Where a shard's weights come from, in host memory. */
export interface MatrixSource {
  /** Bytes of the checkpoint that were read so far. */
  readonly bytesRead: number;
  vector(slice: TensorSlice): Promise<Float32Array>;
  /** One matrix of the rows of all parts, in each of the forms; of float16 in float32. */
  matrix(forms: readonly WeightForm[], ...parts: TensorSlice[]): Promise<Linear[]>;
  /** The arrays of a matrix may be written again. */
  giveBack(matrix: Linear): void;
  close(): void;
}

/**
 * A matrix on the device: its weights and, with 4 bits, scales and zeros, by the names of a graph's inputs; none where they
 * are in the graph.
 */
export interface DeviceMatrix extends Omit<MatrixShape, 'fixed'> {
  readonly tensors: ReadonlyMap<'weight' | 'scales' | 'zeros', DeviceTensor>;
}

/** What a layer computes with weights of its own, where they are in its graphs. */
export interface LayerSessions {
  readonly enter: DeviceSession;
  readonly leave: DeviceSession;
  readonly ffn: DeviceSession;
}

export interface DeviceLayer {
  readonly attentionNorm: DeviceTensor;
  readonly qkv: DeviceMatrix;
  readonly o: DeviceMatrix;
  readonly ffnNorm: DeviceTensor;
  readonly gate: DeviceMatrix;
  readonly up: DeviceMatrix;
  readonly down: DeviceMatrix;
  readonly sessions: LayerSessions | null;
}

export class DeviceShard {
  readonly shape: DeviceShape;
  /** (vocab + 1, hidden): the last row is zeros. */
  readonly embedding: DeviceTensor;
  readonly layers: readonly DeviceLayer[];
  readonly norm: DeviceTensor;
  readonly head: DeviceMatrix;
  /** Bytes of weights as held in memory. */
  readonly weightBytes: number;
  /** Bytes of slices that were read to build it. */
  readonly bytesRead: number;
  readonly #device: OrtDevice;

  private constructor(device: OrtDevice, parts: Omit<DeviceShard, 'release' | 'config' | 'plan'>) {
    this.#device = device;
    this.shape = parts.shape;
    this.embedding = parts.embedding;
    this.layers = parts.layers;
    this.norm = parts.norm;
    this.head = parts.head;
    this.weightBytes = parts.weightBytes;
    this.bytesRead = parts.bytesRead;
  }

  get config(): LlamaConfig {
    return this.shape.config;
  }

  get plan(): RankPlan {
    return this.shape.plan;
  }

  /**
   * Reads this rank's slices and puts them on the device, a matrix at a time: the host holds no more than one, or those of
   * a graph that they are part of.
   *
   * @param source, halves are closed at the end.
   * @throws CaravanError `invalid_checkpoint`, `out_of_memory`, or `cancelled` when the source's signal aborts.
   */
  static async load(
    device: OrtDevice,
    shape: DeviceShape,
    forms: WeightForms,
    source: MatrixSource,
    halves: HalfNarrower,
  ): Promise<DeviceShard> {
    const { config, plan } = shape;
    const loading = new Loading(device, shape, source, halves);
    try {
      const slices = slicesOf(config, plan);
      const { embedding, tiedHead } = await loading.vocabulary(slices);
      const layers: DeviceLayer[] = [];
      for (const layer of slices.layers) {
        layers.push(await loading.layer(layer, forms.variants[0]!));
      }
      const norm = await loading.vector(slices.norm);
      const head =
        tiedHead ?? (await loading.matrix({ form: forms.head, isInputsFirst: false }, slices.head));
      const bytes = weightBytes(config, plan, forms);
      return new DeviceShard(device, {
        ...{ shape, embedding, layers, norm, head },
        ...{ weightBytes: bytes, bytesRead: source.bytesRead },
      });
    } catch (error) {
      device.release(...loading.tensors);
      for (const session of loading.sessions) session.release();
      throw error;
    } finally {
      source.close();
      halves.release();
      device.endUploads();
    }
  }

  release(): void {
    for (const { attentionNorm, ffnNorm, qkv, o, gate, up, down, sessions } of this.layers) {
      this.#device.release(attentionNorm, ffnNorm);
      if (sessions !== null) {
        for (const own of [sessions.enter, sessions.leave, sessions.ffn]) own.release();
      }
      for (const { tensors } of [qkv, o, gate, up, down]) this.#device.release(...tensors.values());
    }
    this.#device.release(this.norm, ...this.head.tensors.values(), this.embedding);
  }
}

/** 16 bits for activations where weights have them; CUDA's attention has no more anyway. */
export function deviceShape(
  kind: DeviceKind,
  provider: Provider,
  config: LlamaConfig,
  plan: RankPlan,
  forms: WeightForms,
): DeviceShape {
  const activations = forms.head.kind === 'fp16' ? float16 : float32;
  return {
    config,
    plan,
    activations,
    attention: kind === 'cuda' ? float16 : activations,
    isInputsFirst: kind === 'cuda',
    lengthStep: kind === 'cuda' ? CAPTURED_LENGTHS : 1,
    hasFusedProducts: provider.hasFusedProducts,
    hasSums: kind === 'cuda',
    hasFixedWeights: hasFixedWeights(forms),
  };
}

/** A matrix, with the weights that the graph which it is part of is to have in it. */
type LoadedMatrix = MatrixShape & DeviceMatrix;

/** What has been put on the device so far. */
class Loading {
  readonly tensors: DeviceTensor[] = [];
  readonly sessions: DeviceSession[] = [];
  readonly #device: OrtDevice;
  readonly #shape: DeviceShape;
  readonly #activations: ElementType;
  readonly #source: MatrixSource;
  readonly #halves: HalfNarrower;
  /** What the next graph has in it. */
  readonly #lent: Linear[] = [];

  constructor(device: OrtDevice, shape: DeviceShape, source: MatrixSource, halves: HalfNarrower) {
    this.#device = device;
    this.#shape = shape;
    this.#activations = shape.activations;
    this.#source = source;
    this.#halves = halves;
  }

  /** The embedding's table, and the head if it has the same weights: they are read once, and lie in one place. */
  async vocabulary({
    embedding: slice,
    head,
  }: RankSlices): Promise<{ embedding: DeviceTensor; tiedHead: DeviceMatrix | null }> {
    const { count } = slice.rows;
    const width = slice.columns.count;
    const [read] = await this.#source.matrix([{ kind: 'fp32' }], slice);
    const values = read!.values as Float32Array;
    const type = this.#activations;
    const embedding = this.#keep(this.#device.uploadPadded(values, [count + 1, width], type));
    this.#source.giveBack(read!);
    if (head !== slice) return { embedding, tiedHead: null };
    const weight = this.#keep(this.#device.view(embedding, [count, width]));
    const form: WeightForm = { kind: type === float16 ? 'fp16' : 'fp32' };
    const tensors = new Map([['weight', weight]] as const);
    const tiedHead = { form, outputs: count, inputs: width, isInputsFirst: false, tensors };
    return { embedding, tiedHead };
  }

  async layer(
    slices: LayerSlices,
    forms: Readonly<Record<'qkv' | 'o' | 'gateUp' | 'down', WeightForm>>,
  ): Promise<DeviceLayer> {
    const shape = this.#shape;
    const { isInputsFirst } = shape;
    const matrix = (form: WeightForm, ...parts: TensorSlice[]) =>
      this.matrix({ form, isInputsFirst }, ...parts);
    const attentionNorm = await this.vector(slices.attentionNorm);
    const qkv = await matrix(forms.qkv, slices.q, slices.k, slices.v);
    const enter = this.#open(() => deviceEnterGraph(shape, qkv));
    const o = await matrix(forms.o, slices.o);
    const leave = this.#open(() => deviceLeaveGraph(shape, o));
    const ffnNorm = await this.vector(slices.ffnNorm);
    const gate = await matrix(forms.gateUp, slices.gate);
    const up = await matrix(forms.gateUp, slices.up);
    const down = await matrix(forms.down, slices.down);
    const ffn = this.#open(() => deviceFfnGraph(shape, { gate, up, down }));
    return {
      ...{ attentionNorm, ffnNorm },
      ...{ qkv: placed(qkv), o: placed(o), gate: placed(gate), up: placed(up), down: placed(down) },
      sessions: enter && leave && ffn && { enter, leave, ffn },
    };
  }

  /** The session of a graph of this layer alone, which from then on has the weights that were lent; null where all share. */
  #open(graph: () => Graph): DeviceSession | null {
    if (!this.#shape.hasFixedWeights) return null;
    const session = this.#device.session(graph());
    this.sessions.push(session);
    for (const linear of this.#lent.splice(0)) this.#source.giveBack(linear);
    return session;
  }

  async vector(slice: TensorSlice): Promise<DeviceTensor> {
    const values = await this.#source.vector(slice);
    return this.#keep(this.#device.upload(values, [values.length], this.#activations));
  }

  async matrix(
    how: Pick<MatrixShape, 'form' | 'isInputsFirst'>,
    ...parts: TensorSlice[]
  ): Promise<LoadedMatrix> {
    const [linear] = await this.#source.matrix([how.form], ...parts);
    if (isFixed(how.form)) return this.#lend(how, linear as BlockedLinear);
    const matrix = this.put(how, linear!);
    this.#source.giveBack(linear!);
    return matrix;
  }

  #lend(how: Pick<MatrixShape, 'form' | 'isInputsFirst'>, linear: BlockedLinear): LoadedMatrix {
    this.#lent.push(linear);
    const { outputs, inputs, values } = linear;
    const fixed = { values, scales: this.#halves.narrow(linear.scales) };
    return { ...how, outputs, inputs, fixed, tensors: new Map() };
  }

  put(
    { form, isInputsFirst }: Pick<MatrixShape, 'form' | 'isInputsFirst'>,
    linear: Linear,
  ): DeviceMatrix {
    const { outputs, inputs } = linear;
    const tensors = new Map<'weight' | 'scales' | 'zeros', DeviceTensor>();
    const upload = this.#device.upload.bind(this.#device);
    if (linear.kind === 'int4') {
      const blocks = inputs / linear.block;
      const shape = [outputs, blocks, linear.block / 2];
      tensors.set('weight', this.#keep(upload(linear.values, shape)));
      const { scales, zeros } = linear;
      tensors.set('scales', this.#keep(upload(scales, [outputs * blocks], this.#activations)));
      // Without them it is fixed.
      tensors.set('zeros', this.#keep(upload(zeros!, [zeros!.length])));
    } else {
      const values = linear.values as Float32Array;
      const weight = isInputsFirst
        ? this.#device.uploadTransposed(values, [outputs, inputs], this.#activations)
        : upload(values, [outputs, inputs], this.#activations);
      tensors.set('weight', this.#keep(weight));
    }
    return { form, outputs, inputs, isInputsFirst, tensors };
  }

  #keep(tensor: DeviceTensor): DeviceTensor {
    this.tensors.push(tensor);
    return tensor;
  }
}

/** Without the weights that a graph has now. */
const placed = ({ form, outputs, inputs, isInputsFirst, tensors }: LoadedMatrix): DeviceMatrix => ({
  ...{ form, outputs, inputs, isInputsFirst, tensors },
});
